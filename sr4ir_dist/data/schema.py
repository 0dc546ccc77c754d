"""What a dataset is: its columns, and the manifest that says which shards make a split.

A dataset URI holds one folder a split (``train``, ``val``) with ``manifest.json`` and the shards.
The manifest is written last and is the commit: readers trust it and never a listing.
"""

import hashlib
import json
import re
from collections.abc import KeysView
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sr4ir_dist.data.groups import GROUPS
from sr4ir_dist.untrusted import parse_json

FORMAT_VERSION = 2
MANIFEST_NAME = "manifest.json"
ON_BAD_ROW = ("fail", "skip")
TASKS = ("images", "classification", "segmentation", "detection")

# The columns of each task. "images" is in every dataset: the file's bytes as they came, and the
# decoded size in pixels. Labels index class_names; masks are one-channel PNG bytes: 0 background,
# label + 1, 255 void; boxes are x0, y0, x1, y1 in pixels; crowd marks a box around many objects.
_COLUMNS: dict[str, tuple[tuple[str, pa.DataType], ...]] = {
    "images": (
        ("id", pa.string()),
        ("image", pa.binary()),
        ("height", pa.int32()),
        ("width", pa.int32()),
    ),
    "classification": (("label", pa.int64()),),
    "segmentation": (("mask", pa.binary()),),
    "detection": (
        ("boxes", pa.list_(pa.list_(pa.float32(), 4))),
        ("box_labels", pa.list_(pa.int64())),
        ("crowd", pa.list_(pa.bool_())),
    ),
}
COLUMN_TYPES = dict(column for columns in _COLUMNS.values() for column in columns)
"""The Arrow type of each column that a shard may have."""
# The order of rows is drawn from what the manifest claims, before a shard is seen.
_MOST, _MOST_BATCH_ROWS = 1 << 40, 1 << 20
_DIGEST = re.compile(r"^[0-9a-f]{64}$")
# What stands between a manifest file's content and the content's digest, its last entry.
_SEAL = b',\n "sha256": "'

VOID = 255
"""The class number of mask pixels that belong to no class and count nowhere."""
MIN_BOX_SIDE = 0.1
"""Pixels. A thinner box may lose its last extent to rounding when it is mirrored or resized."""


class DatasetError(ValueError):
    """A dataset, a shard or a source image is not as it must be; the message names it."""


@dataclass(frozen=True)
class Shard:
    """One Arrow IPC file of a split.

    Attributes:
        path: its place relative to the manifest.
        rows: how many rows it has.
        bytes: its size.
        sha256: the digest of its bytes, in hexadecimal.
        batch_rows: rows of each record batch, in order; their sum is ``rows``.
        batch_groups: the aspect-ratio group of each record batch (``groups.aspect_group``), which
            all of its rows share; empty where the dataset is not for detection.
    """

    path: str
    rows: int
    bytes: int
    sha256: str
    batch_rows: tuple[int, ...]
    batch_groups: tuple[int, ...] = ()


@dataclass(frozen=True)
class Manifest:
    """Everything about one split of a dataset but its rows.

    Attributes:
        name: the dataset's name, for people.
        split: ``train``, ``val``, ...
        tasks: what the rows can be used for, of ``TASKS``; ``images`` is always there.
        class_names: the classes that labels index; empty without any.
        shards: the split's shards in row order.
        source: where it came from and how it was converted, mostly for people; not part of the
            digest.
        format_version: the version of this format.
    """

    name: str
    split: str
    tasks: tuple[str, ...]
    class_names: tuple[str, ...]
    shards: tuple[Shard, ...]
    source: dict[str, Any] = field(default_factory=dict, hash=False)
    format_version: int = FORMAT_VERSION

    @cached_property
    def rows(self) -> int:
        """Rows of the split."""
        return sum(shard.rows for shard in self.shards)

    @property
    def on_bad_row(self) -> str:
        """What happens where an image cannot be read: "fail" ends the run, "skip" goes on."""
        return self.source.get("on_bad_row", ON_BAD_ROW[0])

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the split's content: equal rows, classes and batches give equal digests."""
        content = {key: value for key, value in self.to_json().items() if key != "source"}
        for shard in content["shards"]:
            del shard["path"]
        return hashlib.sha256(
            json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
        ).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """The manifest as a JSON object."""
        # Not dataclasses.asdict, whose deep copies take seconds with 100,000 shards.
        value = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {**value, "shards": [dict(vars(shard)) for shard in self.shards]}

    def to_bytes(self) -> bytes:
        """The manifest's file: indented JSON whose last entry is the digest of all before it."""
        content = json.dumps(self.to_json(), indent=1).encode().removesuffix(b"\n}")
        return content + _SEAL + hashlib.sha256(content).hexdigest().encode() + b'"\n}\n'

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> "Manifest":
        """The manifest in a file, checked.

        Args:
            data: of ``to_bytes``, or from before manifests held their digest.
            where: the file's URI, for messages.

        Raises:
            DatasetError: a byte is not as it was written, or as in ``from_json``.
        """
        content, sealed, seal = data.rpartition(_SEAL)
        if sealed:
            if seal != hashlib.sha256(content).hexdigest().encode() + b'"\n}\n':
                raise DatasetError(f"{where}: truncated or altered: not the sha256 that it ends on")
            data = content + b"\n}"
        try:
            value = parse_json(data)
        except ValueError as error:
            raise DatasetError(f"{where}: malformed manifest: not valid JSON: {error}") from error
        return cls.from_json(value, where)

    @classmethod
    def from_json(cls, value: Any, where: str) -> "Manifest":
        """The manifest in a JSON object, checked.

        Args:
            value: what ``json.loads`` gave.
            where: the manifest's URI, for messages.

        Raises:
            DatasetError: another format version, or a field that is missing, unknown or wrong.
        """
        if not isinstance(value, dict):
            raise DatasetError(f"{where}: malformed manifest: expected a JSON object")
        version = value.get("format_version")
        if version != FORMAT_VERSION:
            raise DatasetError(
                f"{where}: format_version is {version!r:.50}, this version of the package reads "
                f"{FORMAT_VERSION}; convert the dataset again with jobs/prepare_data.py"
            )
        try:
            return _manifest(value)
        except DatasetError as error:
            raise DatasetError(f"{where}: malformed manifest: {error}") from None


def arrow_schema(name: str, tasks: tuple[str, ...]) -> pa.Schema:
    """The Arrow schema of a dataset's shards.

    Args:
        name: the dataset's name, kept in the metadata with the format version.
        tasks: what the rows are for, of ``TASKS``.

    Raises:
        DatasetError: an unknown task, or ``images`` is not among them.
    """
    _check_tasks(tasks)
    columns = [column for task in TASKS if task in tasks for column in _COLUMNS[task]]
    return pa.schema(columns, {"format_version": str(FORMAT_VERSION), "name": name})


def checked_row(row: dict[str, Any], schema: pa.Schema, classes: int) -> dict[str, Any]:
    """A row as it can be written, checked.

    Args:
        row: one value for each column.
        schema: of ``arrow_schema``.
        classes: how many classes labels may name.

    Returns:
        The row with boxes and their labels as lists.

    Raises:
        DatasetError: a column is missing, unknown, or has a value out of its range.
    """
    where = f"row {row.get('id')!r}"
    if row.keys() != set(schema.names):
        raise DatasetError(f"{where}: has columns {sorted(row)}, expected {sorted(schema.names)}")
    row = dict(row)
    for name in ("image", "mask"):
        if name in row and (not isinstance(row[name], bytes) or not row[name]):
            raise DatasetError(f"{where}: {name} is {type(row[name]).__name__}, expected bytes")
    for name in ("height", "width"):
        if int(row[name]) <= 0:
            raise DatasetError(f"{where}: {name} is {row[name]}, expected a positive integer")
    if "label" in row and not 0 <= int(row["label"]) < classes:
        raise DatasetError(f"{where}: label is {row['label']}, expected 0 to {classes - 1}")
    if "boxes" in row:
        boxes = np.asarray(row["boxes"], np.float32).reshape(-1, 4)
        labels = [int(label) for label in row["box_labels"]]
        crowd = [bool(flag) for flag in row["crowd"]]
        if len(boxes) != len(labels) or not all(0 <= label < classes for label in labels):
            raise DatasetError(
                f"{where}: {len(boxes)} boxes with box_labels {labels}, "
                f"expected one label from 0 to {classes - 1} a box"
            )
        if len(crowd) != len(boxes):
            raise DatasetError(f"{where}: {len(boxes)} boxes with crowd {crowd}: expected one each")
        bad = boxes[~_inside(boxes, int(row["height"]), int(row["width"]))]
        if len(bad):
            raise DatasetError(
                f"{where}: box {bad[0].tolist()} is thinner than {MIN_BOX_SIDE} or outside the "
                f"image of {row['height']}x{row['width']}"
            )
        row["boxes"], row["box_labels"], row["crowd"] = boxes.tolist(), labels, crowd
    return row


def clip_boxes(
    boxes: NDArray[np.float64], height: int, width: int
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Boxes cut to their image.

    Args:
        boxes: n,4 x0, y0, x1, y1 in pixels, finite.
        height: of the image.
        width: of the image.

    Returns:
        The boxes, float32, and for each whether it still has an extent and may be written.
    """
    clipped = np.clip(boxes, 0, (width, height, width, height)).astype(np.float32)
    return clipped, _inside(clipped, height, width)


def _inside(boxes: NDArray[np.float32], height: int, width: int) -> NDArray[np.bool_]:
    x0, y0, x1, y1 = boxes.T
    thick = np.minimum(x1 - x0, y1 - y0) >= MIN_BOX_SIDE
    return thick & (x0 >= 0) & (y0 >= 0) & (x1 <= width) & (y1 <= height)


def _check_tasks(tasks: tuple[str, ...]) -> None:
    unknown = sorted(set(tasks) - set(TASKS))
    if unknown or "images" not in tasks:
        raise DatasetError(
            f"tasks is {list(tasks)}: expected 'images' and any of {', '.join(TASKS[1:])}"
        )


def _manifest(value: dict[str, Any]) -> Manifest:
    _check_keys(value, Manifest.__dataclass_fields__.keys(), "manifest")
    for key in ("name", "split"):
        _check(isinstance(value[key], str) and value[key], key, value[key], "a name")
    for key in ("tasks", "class_names"):
        _check(_is_list(value[key], str), key, value[key], "a list of names")
    _check(isinstance(value["shards"], list), "shards", value["shards"], "a list")
    _check(isinstance(value["source"], dict), "source", value["source"], "an object")
    policy = value["source"].get("on_bad_row", ON_BAD_ROW[0])
    _check(policy in ON_BAD_ROW, "source.on_bad_row", policy, f"one of {', '.join(ON_BAD_ROW)}")
    _check_tasks(tuple(value["tasks"]))
    grouped = "detection" in value["tasks"]
    shards = tuple(_shard(item, i, grouped) for i, item in enumerate(value["shards"]))
    paths = {shard.path for shard in shards}
    _check(len(paths) == len(shards), "shards", "the same path twice", "different paths")
    return Manifest(
        name=value["name"],
        split=value["split"],
        tasks=tuple(value["tasks"]),
        class_names=tuple(value["class_names"]),
        shards=shards,
        source=value["source"],
    )


def _shard(value: Any, index: int, grouped: bool) -> Shard:
    if not isinstance(value, dict):
        raise DatasetError(f"shards[{index}] is {value!r:.200}: expected an object")
    _check_keys(value, Shard.__dataclass_fields__.keys(), f"shards[{index}]")
    path, rows, size, digest = value["path"], value["rows"], value["bytes"], value["sha256"]
    batches, groups = value["batch_rows"], value["batch_groups"]
    counts = _are_ints(batches, 1, _MOST_BATCH_ROWS) and len(batches) > 0 and sum(batches) == rows
    expected = len(batches) if grouped and counts else 0
    # One table and few calls, because a manifest may have 100,000 shards.
    for key, good, allowed in (
        ("path", _is_inside(path), "a path below the manifest's folder"),
        ("rows", _are_ints([rows], 1, _MOST), "a positive integer"),
        ("bytes", _are_ints([size], 1, _MOST), "a positive integer"),
        ("sha256", isinstance(digest, str) and _DIGEST.match(digest), "64 hexadecimal digits"),
        (
            "batch_rows",
            counts,
            f"integers from 1 to {_MOST_BATCH_ROWS} that sum to rows={rows!r:.50}",
        ),
        (
            "batch_groups",
            _are_ints(groups, 0, GROUPS - 1) and len(groups) == expected,
            f"{expected} integers from 0 to {GROUPS - 1}",
        ),
    ):
        if not good:
            raise DatasetError(f"shards[{index}].{key} is {value[key]!r:.200}: expected {allowed}")
    return Shard(path, rows, size, digest, tuple(batches), tuple(groups))


def _is_inside(path: Any) -> bool:
    """Whether it is a path below a folder: a manifest may come from anyone's bucket."""
    return (
        isinstance(path, str)
        and "\\" not in path
        and ":" not in path
        and {"", ".", ".."}.isdisjoint(path.split("/"))
    )


def _are_ints(values: Any, least: int, most: int) -> bool:
    """Whether it is a list of integers in a range, of which there may be none."""
    if not isinstance(values, list) or not set(map(type, values)) <= {int}:
        return False
    return not values or (min(values) >= least and max(values) <= most)


def _check_keys(value: dict[str, Any], allowed: KeysView[str], name: str) -> None:
    if value.keys() != allowed:
        missing, unknown = sorted(allowed - value.keys()), sorted(value.keys() - allowed)
        raise DatasetError(f"{name}: missing keys {missing}, unknown keys {unknown!r:.200}")


def _check(good: Any, name: str, value: Any, expected: str) -> None:
    if not good:
        raise DatasetError(f"{name} is {value!r:.200}: expected {expected}")


def _is_list(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)
