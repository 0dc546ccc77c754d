"""Building and reading shards: uncompressed Arrow IPC files, named by a manifest.

Uncompressed because images are compressed already: compression would save a percent and cost
random access its speed. Record batches are the unit of shuffling and of random access.
"""

import hashlib
import io
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import ipc

from sr4ir_dist import storage
from sr4ir_dist.data.arrow_files import map_batches
from sr4ir_dist.data.groups import aspect_group
from sr4ir_dist.data.schema import MANIFEST_NAME, DatasetError, Manifest, Shard
from sr4ir_dist.untrusted import MOST_BYTES

SHARD_SUFFIX = ".arrow"
# A shard may grow to so many times its size before another one is begun: what a few samples told of
# the images' size is not quite true of all.
_STRETCH = 1.5


def build_shards(
    rows: Iterable[dict[str, Any]],
    schema: pa.Schema,
    *,
    stem: str,
    shard_bytes: int,
    batch_bytes: int,
    batch_rows: int,
) -> Iterator[tuple[Shard, memoryview]]:
    """Build shards in memory, one after the other.

    Rows keep their order; in a dataset for detection they keep it within their aspect-ratio group,
    because a record batch holds rows of one group. Equal rows give equal bytes.

    Args:
        rows: of ``schema.checked_row``.
        schema: of ``schema.arrow_schema``.
        stem: what the shards' names begin with; a number and a part of the digest follow, so that
            two shards, also of several builds, never share a name.
        shard_bytes: the payload of images and masks that rows for one shard are expected to have;
            another one is begun where they exceed it greatly.
        batch_bytes: a record batch is closed when its payload reaches this.
        batch_rows: or when it has so many rows.

    Yields:
        Each shard's manifest entry and its bytes; nothing without rows.
    """
    grouped = "boxes" in schema.names
    pending: dict[int, _Pending] = {}  # a group's rows that are not written yet
    number = 0
    file = _ShardFile(schema, grouped)
    for row in rows:
        group = aspect_group(row["height"], row["width"]) if grouped else 0
        batch = pending.setdefault(group, _Pending())
        batch.rows.append(row)
        batch.bytes += payload_bytes(row)
        if batch.bytes >= batch_bytes or len(batch.rows) >= batch_rows:
            file.write(pending.pop(group), group)
            if file.payload >= _STRETCH * shard_bytes:
                yield file.finish(f"{stem}-{number}")
                number += 1
                file = _ShardFile(schema, grouped)
    for group in sorted(pending):
        file.write(pending[group], group)
    if file.payload:
        yield file.finish(f"{stem}-{number}")


def payload_bytes(row: dict[str, Any]) -> int:
    """The size of a row's image and mask."""
    return len(row["image"]) + len(row.get("mask", b""))


class ShardReader:
    """Random access to the rows of a local shard, which is memory-mapped.

    Reading is safe from several threads.

    Args:
        path: the shard's file.
        columns: the columns to return; all by default.

    Raises:
        DatasetError: as `map_batches`, or it lacks a column.
    """

    def __init__(self, path: Path, columns: Sequence[str] | None = None):
        batches, names = map_batches(path)
        self.columns = tuple(names if columns is None else columns)
        missing = sorted(set(self.columns) - set(names))
        if missing:
            raise DatasetError(f"{path}: no column {missing}; there are {names}")
        self.batch_rows = tuple(batch.num_rows for batch in batches)
        self._starts = [0, *accumulate(self.batch_rows)]
        self._batches = [[batch.column(name) for name in self.columns] for batch in batches]

    def __len__(self) -> int:
        return self._starts[-1]

    def row(self, index: int, *, mapped: bool = False) -> dict[str, Any]:
        """The row at a place in the shard, as Python values; images and masks as bytes.

        Args:
            index: the row's place.
            mapped: images and masks as views of the mapped file, which keep it mapped.

        Raises:
            IndexError: there is no such row.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of a shard of {len(self)} rows")
        batch = bisect_right(self._starts, index) - 1
        place = index - self._starts[batch]
        return {
            name: memoryview(column[place].as_buffer())
            if mapped and column.type == pa.binary()
            else column[place].as_py()
            for name, column in zip(self.columns, self._batches[batch], strict=True)
        }

    def rows(self, indices: Iterable[int]) -> list[dict[str, Any]]:
        """The rows at several places, in the order asked for."""
        return [self.row(int(index)) for index in indices]


def load_manifest(dataset_uri: str, split: str) -> Manifest:
    """The manifest of a split.

    Raises:
        DatasetError: there is none, it has another format version, or it is malformed.
        StorageError: the storage did not answer.
    """
    uri = storage.join(dataset_uri, split, MANIFEST_NAME)
    try:
        data = storage.read_bytes(uri, MOST_BYTES)
    except storage.ContentError as error:
        raise DatasetError(str(error)) from error
    except storage.MissingError:
        found = [name for name in storage.list_names(dataset_uri) if has_split(dataset_uri, name)]
        raise DatasetError(
            f"{uri}: no manifest, so no split {split!r} of a dataset here; "
            f"splits found: {', '.join(found) or 'none'}. Make one with jobs/prepare_data.py"
        ) from None
    manifest = Manifest.from_bytes(data, uri)
    if manifest.split != split:
        raise DatasetError(f"{uri}: holds split {manifest.split!r:.200}, expected {split!r}")
    return manifest


def has_split(dataset_uri: str, split: str) -> bool:
    """Whether a dataset has a committed split.

    Raises:
        StorageError: the storage did not answer.
    """
    return storage.exists(storage.join(dataset_uri, split, MANIFEST_NAME))


def verify_shard(path: Path, shard: Shard, row_start: int, *, digest: bool = True) -> None:
    """Compare a local copy of a shard with its manifest entry.

    Args:
        path: the file.
        shard: what the manifest says.
        row_start: the number in the split of the shard's first row, for the message.
        digest: compare the SHA-256 too, not only the size.

    Raises:
        DatasetError: size or digest differ; names the shard, its rows in the split, and both.
    """
    rows = f"shard {shard.path} (rows {row_start} to {row_start + shard.rows - 1} of the split)"
    try:
        found = path.stat().st_size
        if found != shard.bytes:
            raise DatasetError(
                f"{rows} is truncated or altered: expected {shard.bytes} bytes, "
                f"found {found} in {path}"
            )
        if digest and (actual := _sha256(path)) != shard.sha256:
            raise DatasetError(
                f"{rows} is altered: expected sha256 {shard.sha256}, found {actual} in {path}"
            )
    except OSError as error:
        raise DatasetError(f"{rows} cannot be read: {error}") from error


@dataclass
class _Pending:
    """Rows that wait for their record batch, and the size of their images and masks."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    bytes: int = 0


class _ShardFile:
    """A shard being built in memory."""

    def __init__(self, schema: pa.Schema, grouped: bool):
        # Grows by an eighth at a time, in place; Arrow's own buffers double.
        self._sink = io.BytesIO()
        self._writer = ipc.new_file(self._sink, schema)
        self._schema, self._grouped = schema, grouped
        self._batch_rows: list[int] = []
        self._batch_groups: list[int] = []
        self.payload = 0

    def write(self, pending: _Pending, group: int) -> None:
        columns = [
            pa.array([row[column.name] for row in pending.rows], column.type)
            for column in self._schema
        ]
        self._writer.write_batch(pa.record_batch(columns, schema=self._schema))
        self._batch_rows.append(len(pending.rows))
        self._batch_groups += [group] if self._grouped else []
        self.payload += pending.bytes

    def finish(self, stem: str) -> tuple[Shard, memoryview]:
        self._writer.close()
        content = self._sink.getbuffer()
        digest = hashlib.sha256(content).hexdigest()
        shard = Shard(
            path=f"{stem}-{digest[:12]}{SHARD_SUFFIX}",
            rows=sum(self._batch_rows),
            bytes=len(content),
            sha256=digest,
            batch_rows=tuple(self._batch_rows),
            batch_groups=tuple(self._batch_groups),
        )
        return shard, content


def _sha256(path: Path) -> str:
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
