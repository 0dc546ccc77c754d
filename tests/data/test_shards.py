import dataclasses
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from sr4ir_dist import storage
from sr4ir_dist.data.groups import aspect_group
from sr4ir_dist.data.schema import DatasetError, Manifest, Shard, arrow_schema, checked_row
from sr4ir_dist.data.shards import ShardReader, build_shards, load_manifest, verify_shard

CLASSES = ("a", "b", "c")
ALL_TASKS = ("images", "classification", "segmentation", "detection")


def make_row(i: int, image_bytes: int = 100) -> dict[str, Any]:
    rng = np.random.default_rng(i)
    corners = rng.uniform(0, 20, (i % 3, 2))
    boxes = np.hstack([corners, corners + rng.uniform(1, 20, (i % 3, 2))]).astype(np.float32)
    return {
        "id": f"sample-{i}",
        "image": rng.bytes(image_bytes),
        "height": 40 + i % 7,
        "width": 50,
        "label": i % 3,
        "mask": rng.bytes(7),
        "boxes": boxes,
        "box_labels": [i % 3] * len(boxes),
        "crowd": [k == 1 for k in range(len(boxes))],
    }


Write = Callable[..., Manifest]


@pytest.fixture
def write(write_given: Write) -> Write:
    """Writes so many rows of `make_row`."""

    def write(uri: str, rows: int, *, image_bytes: int = 100, **settings: Any) -> Manifest:
        made = [make_row(i, image_bytes) for i in range(rows)]
        settings = {"name": "made up", "tasks": ALL_TASKS, "class_names": CLASSES, **settings}
        return write_given(uri, made, **settings)

    return write


@pytest.fixture(params=["path", "s3"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return (
        str(tmp_path / "set") if request.param == "path" else request.getfixturevalue("s3")() + "/x"
    )


def test_rows_come_back_in_order_from_several_shards(uri: str, tmp_path: Path, write: Write):
    manifest = write(uri, 100, image_bytes=1000, shard_bytes=30_000)
    assert manifest.rows == 100
    assert len(manifest.shards) == 4
    found = []
    for shard in manifest.shards:
        local = tmp_path / "copies" / shard.path
        storage.download(storage.join(uri, "train", shard.path), local)
        verify_shard(local, shard, row_start=len(found))
        reader = ShardReader(local)
        assert reader.batch_rows == shard.batch_rows
        assert len(reader) == shard.rows
        found += reader.rows(range(shard.rows))
    for i, row in enumerate(found):
        expected = make_row(i, 1000)
        expected["boxes"] = expected["boxes"].tolist()
        assert row == expected


def test_a_record_batch_holds_one_group(uri: str, tmp_path: Path, write_given: Write):
    # Three shapes that come in turns: widths of 20, 50 and 100 at heights about 50.
    rows = [make_row(i) | {"height": 48 + i % 5, "width": (20, 50, 100)[i % 3]} for i in range(90)]
    rows = [row | {"boxes": [], "box_labels": [], "crowd": []} for row in rows]
    manifest = write_given(
        uri, rows, tasks=ALL_TASKS, class_names=CLASSES,
        shard_bytes=3000, batch_bytes=500, min_batches=10,
    )  # fmt: skip
    assert len(manifest.shards) > 2
    found: dict[int, list[str]] = {}
    for shard in manifest.shards:
        local = tmp_path / "copies" / shard.path
        storage.download(storage.join(uri, "train", shard.path), local)
        reader, start = ShardReader(local), 0
        assert len(shard.batch_groups) == len(shard.batch_rows)
        for group, count in zip(shard.batch_groups, shard.batch_rows, strict=True):
            assert count <= 5
            part = reader.rows(range(start, start + count))
            assert {aspect_group(row["height"], row["width"]) for row in part} == {group}
            found.setdefault(group, []).extend(row["id"] for row in part)
            start += count
    for group, ids in found.items():
        expected = [r["id"] for r in rows if aspect_group(r["height"], r["width"]) == group]
        assert ids == expected
    assert sum(map(len, found.values())) == 90
    assert len(found) == 5


def test_only_datasets_for_detection_have_groups(tmp_path: Path, write_given: Write):
    columns = ("id", "image", "height", "width", "mask")
    rows = [{name: make_row(i)[name] for name in columns} for i in range(5)]
    tasks = ("images", "segmentation")
    manifest = write_given(str(tmp_path), rows, tasks=tasks, class_names=CLASSES)
    assert [shard.batch_groups for shard in manifest.shards] == [()]


def test_random_access_and_columns(tmp_path: Path, write: Write):
    manifest = write(str(tmp_path), 70)
    reader = ShardReader(tmp_path / "train" / manifest.shards[0].path, columns=("label", "id"))
    assert reader.rows([69, 0, 33, 33]) == [
        {"label": i % 3, "id": f"sample-{i}"} for i in (69, 0, 33, 33)
    ]
    for index in (70, -1):
        with pytest.raises(IndexError, match=f"row {index} of a shard of 70"):
            reader.row(index)
    with pytest.raises(DatasetError, match="no column"):
        ShardReader(tmp_path / "train" / manifest.shards[0].path, columns=("depth",))


def test_the_schema_says_version_and_name(tmp_path: Path, write: Write):
    manifest = write(str(tmp_path), 3)
    with pa.memory_map(str(tmp_path / "train" / manifest.shards[0].path)) as source:
        with pa.ipc.open_file(source) as reader:
            assert reader.schema.metadata == {b"format_version": b"2", b"name": b"made up"}
            assert reader.schema.names == [*make_row(0)]
    with pytest.raises(DatasetError, match="expected 'images' and any of"):
        arrow_schema("x", ("classification",))


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 200, 1000])
def test_small_splits_have_many_record_batches(tmp_path: Path, rows: int, write: Write):
    manifest = write(str(tmp_path), rows)
    sizes = [size for shard in manifest.shards for size in shard.batch_rows]
    assert sum(sizes) == rows
    assert len(sizes) >= min(rows, 64)


def test_record_batches_keep_their_size(tmp_path: Path, write: Write):
    manifest = write(str(tmp_path), 300, image_bytes=1000, batch_bytes=2500, min_batches=2)
    assert [shard.batch_rows for shard in manifest.shards] == [(3,) * 100]
    manifest = write(str(tmp_path / "few"), 300, min_batches=2)
    assert [shard.batch_rows for shard in manifest.shards] == [(150, 150)]


@pytest.mark.parametrize("shard_bytes", [1000, 5000, 40_000])
def test_shards_keep_their_size(tmp_path: Path, shard_bytes: int, write_given: Write):
    # Half of the rows are ten times as large, all in one place: the mean is true of no part.
    rows = [make_row(i, 100 if i < 100 else 1000) for i in range(200)]
    limits = {"shard_bytes": shard_bytes, "batch_bytes": 500}
    manifest = write_given(str(tmp_path), rows, tasks=ALL_TASKS, class_names=CLASSES, **limits)
    starts = np.cumsum([0, *(shard.rows for shard in manifest.shards)])
    sizes = [
        sum(len(row["image"]) + len(row["mask"]) for row in rows[start:end])
        for start, end in pairwise(starts)
    ]
    assert max(sizes) < 1.5 * shard_bytes + 1007
    assert len(sizes) <= 2 * sum(sizes) / shard_bytes + 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": 3}, "label is 3, expected 0 to 2"),
        ({"label": -1}, "label is -1"),
        ({"height": 0}, "height is 0"),
        ({"image": b""}, "image is bytes, expected bytes"),
        ({"mask": "text"}, "mask is str, expected bytes"),
        ({"depth": 1}, "expected"),
        ({"boxes": np.zeros((2, 4)), "box_labels": [1]}, "2 boxes with box_labels"),
        ({"boxes": np.zeros((1, 4)), "box_labels": [3]}, "one label from 0 to 2"),
        ({"boxes": [[0, 0, 9, 9]], "box_labels": [0], "crowd": []}, "1 boxes with crowd"),
        ({"boxes": [[0, 0, 51, 9]], "box_labels": [0], "crowd": [False]}, "outside the image"),
        ({"boxes": [[-1, 0, 9, 9]], "box_labels": [0], "crowd": [False]}, "of 40x50"),
        ({"boxes": [[9, 0, 5, 9]], "box_labels": [0], "crowd": [False]}, r"box \[9.0, 0.0, 5.0"),
        ({"boxes": [[3, 3, 3, 9]], "box_labels": [0], "crowd": [False]}, "thinner than 0.1"),
        ({"boxes": [[3, np.nan, 3, 9]], "box_labels": [0], "crowd": [False]}, "nan"),
    ],
)
def test_bad_rows(change: dict[str, Any], message: str):
    schema = arrow_schema("x", ALL_TASKS)
    assert checked_row(make_row(0), schema, len(CLASSES)) == make_row(0) | {"boxes": []}
    with pytest.raises(DatasetError, match=f"row 'sample-0': .*{message}"):
        checked_row({**make_row(0), **change}, schema, len(CLASSES))


def test_altered_and_truncated_shards_are_named(tmp_path: Path, write: Write):
    manifest = write(str(tmp_path), 30)
    shard = manifest.shards[0]
    path = tmp_path / "train" / shard.path
    content = bytearray(path.read_bytes())
    verify_shard(path, shard, 100)
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    verify_shard(path, shard, 100, digest=False)
    where = rf"shard {shard.path} \(rows 100 to 129 of the split\)"
    with pytest.raises(DatasetError, match=f"{where} is altered: expected sha256 {shard.sha256}"):
        verify_shard(path, shard, 100)
    path.write_bytes(content[:-8])
    with pytest.raises(
        DatasetError, match=f"{where} is truncated .* {shard.bytes} bytes, found {shard.bytes - 8}"
    ):
        verify_shard(path, shard, 100, digest=False)
    with pytest.raises(DatasetError, match="not a readable shard"):
        ShardReader(path)
    path.unlink()
    with pytest.raises(DatasetError, match=f"{where} cannot be read"):
        verify_shard(path, shard, 100)


def test_manifest_digest_is_that_of_the_content(tmp_path: Path, write: Write):
    first = write(str(tmp_path / "a"), 10, on_bad_row="fail")
    second = write(str(tmp_path / "b"), 10, on_bad_row="skip")
    assert first.source != second.source
    write(str(tmp_path / "b"), 10, overwrite=True)
    assert first.digest == second.digest == load_manifest(str(tmp_path / "b"), "train").digest
    assert first.digest != write(str(tmp_path / "c"), 11).digest
    assert first.digest != dataclasses.replace(first, class_names=("a", "b", "d")).digest


def test_a_digest_is_this_for_ever():
    # Golden: runs are named after it, so a run goes on with another version of the package.
    shards = tuple(Shard(f"{i}.arrow", 7, 900 + i, f"{i:064x}", (3, 4), (0, 5)) for i in range(2))
    manifest = Manifest("x", "train", ("images", "detection"), ("a", "b"), shards, {"root": "y"})
    assert manifest.digest == "ebd56f925aab5f5137ceedcc13ce183d7f952b845029d21fc5f0e1708749d541"


def test_no_manifest_names_the_splits_that_are_there(uri: str, write: Write):
    with pytest.raises(DatasetError, match=r"no split 'val' .*; splits found: none"):
        load_manifest(uri, "val")
    write(uri, 3)
    with pytest.raises(DatasetError, match=r"no split 'val' .*; splits found: train\."):
        load_manifest(uri, "val")


def test_malformed_json(tmp_path: Path, write: Write):
    write(str(tmp_path), 3)
    path = tmp_path / "train" / "manifest.json"
    for content in (b"{", b"\xff\xfe\x00", b"[1, 2]", b""):
        path.write_bytes(content)
        with pytest.raises(DatasetError, match=r"manifest\.json: malformed manifest"):
            load_manifest(str(tmp_path), "train")


def unsealed(file: Path) -> dict[str, Any]:
    """A manifest file's content without its digest, as someone who writes his own would."""
    content = json.loads(file.read_text())
    del content["sha256"]
    return content


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("format_version",), 1, "format_version is 1, this version of the package reads 2"),
        (("format_version",), None, "format_version is None"),
        (("extra",), 1, r"unknown keys \['extra'\]"),
        (("shards", 0, "extra"), 1, r"shards\[0\]: .*unknown keys \['extra'\]"),
        (("shards", 0, "path"), "../x.arrow", r"shards\[0\]\.path is '\.\./x\.arrow'"),
        (("shards", 0, "path"), "/etc/x", r"shards\[0\]\.path"),
        (("shards", 0, "path"), "s3://other/x", r"shards\[0\]\.path"),
        (("shards", 0, "path"), "a\\..\\x", r"shards\[0\]\.path"),
        (("shards", 0, "path"), "", r"shards\[0\]\.path"),
        (("shards", 0, "rows"), 4, r"batch_rows .* sum to rows=4"),
        (("shards", 0, "rows"), True, r"shards\[0\]\.rows is True"),
        (("shards", 0, "bytes"), -1, r"shards\[0\]\.bytes is -1"),
        (("shards", 0, "batch_rows"), [3.0], r"batch_rows is \[3\.0\]"),
        (
            ("shards", 0, "batch_groups"),
            [],
            r"batch_groups is \[\]: expected 3 integers",
        ),
        (("shards", 0, "batch_groups"), [2, 2, 8], r"batch_groups is \[2, 2, 8\]"),
        (("shards", 0, "batch_groups"), [2, 2, True], r"batch_groups is \[2, 2, True\]"),
        (("shards", 0, "sha256"), "00", r"sha256 is '00'"),
        (("shards", 0), 7, r"shards\[0\] is 7"),
        (("shards",), {}, "shards is {}"),
        (("tasks",), ["classification"], "expected 'images'"),
        (("tasks",), ["images", "depth"], "expected 'images'"),
        (("class_names",), "abc", "class_names is 'abc'"),
        (("name",), "", "name is ''"),
        (("split",), "val", "holds split 'val', expected 'train'"),
        (("source",), None, "source is None"),
    ],
)
def test_manifest_errors(
    tmp_path: Path, path: tuple[str | int, ...], value: Any, message: str, write: Write
):
    write(str(tmp_path), 3)
    file = tmp_path / "train" / "manifest.json"
    place = content = unsealed(file)
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    file.write_text(json.dumps(content))
    with pytest.raises(DatasetError, match=message) as caught:
        load_manifest(str(tmp_path), "train")
    assert str(file) in str(caught.value)


def test_a_manifest_without_a_key(tmp_path: Path, write: Write):
    write(str(tmp_path), 3)
    file = tmp_path / "train" / "manifest.json"
    content = unsealed(file)
    del content["class_names"]
    file.write_text(json.dumps(content))
    with pytest.raises(DatasetError, match=r"missing keys \['class_names'\]"):
        load_manifest(str(tmp_path), "train")


def test_the_same_shard_twice_is_refused(tmp_path: Path, write: Write):
    manifest = write(str(tmp_path), 3)
    value = json.loads(json.dumps(manifest.to_json()))
    assert Manifest.from_json(value, "here") == manifest
    value["shards"] *= 2
    with pytest.raises(DatasetError, match="here: malformed manifest: .*twice"):
        Manifest.from_json(value, "here")


def test_equal_rows_make_shards_of_several_names():
    row = make_row(0) | {"boxes": []}
    limits = {"shard_bytes": 1, "batch_bytes": 1, "batch_rows": 1}
    schema = arrow_schema("x", ALL_TASKS)
    shards = [shard for shard, _ in build_shards([row] * 3, schema, stem="part", **limits)]
    assert len({shard.path for shard in shards}) == 3
    assert len({shard.sha256 for shard in shards}) == 1
