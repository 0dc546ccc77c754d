"""Writing and reading shards: uncompressed Arrow IPC files with a manifest written last.

Uncompressed because images are compressed already: compression would save a percent and cost
random access its speed. Record batches are the unit of shuffling and of random access.
"""

import hashlib
import tempfile
import uuid
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
from pyarrow import ipc

from sr4ir_dist import storage
from sr4ir_dist.data.groups import aspect_group
from sr4ir_dist.data.schema import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    DatasetError,
    Manifest,
    Shard,
    arrow_schema,
    checked_row,
)


class ShardWriter:
    """Writes one split of a dataset; a context manager.

    Rows keep their order; in a dataset for detection they keep it within their aspect-ratio group,
    because a record batch holds rows of one group. A shard is built in a temporary file and then
    uploaded. A clean exit writes the manifest, last, and so commits; on an error nothing is
    committed, the shards that were uploaded are deleted, and a split that was to be overwritten
    stays as it was.

    Args:
        uri: the dataset's URI; the split gets a folder in it.
        name: the dataset's name, for people.
        split: the split's name.
        tasks: what the rows are for, of ``schema.TASKS``; they determine the columns.
        class_names: the classes that labels index.
        source: where the rows come from, for people; may be changed until the exit.
        expected_rows: how many rows will come, if known: evens out the record batches.
        shard_bytes: a shard is closed when its payload reaches this.
        batch_bytes: a record batch is closed when its payload reaches this.
        min_batches: a split of at least so many rows gets at least so many record batches, so that
            small datasets have more of them than ranks.
        overwrite: replace a split that is there.

    Raises:
        DatasetError: the split is there and ``overwrite`` is not set; unknown tasks; and from
            ``append``: a row that does not fit the columns.
        StorageError: the URI cannot be written.
    """

    def __init__(
        self,
        uri: str,
        *,
        name: str,
        split: str,
        tasks: Sequence[str],
        class_names: Sequence[str] = (),
        source: dict[str, Any] | None = None,
        expected_rows: int | None = None,
        shard_bytes: int = 96 << 20,
        batch_bytes: int = 6 << 20,
        min_batches: int = 64,
        overwrite: bool = False,
    ):
        self.uri = storage.join(uri, split)
        self.name, self.split = name, split
        self.tasks, self.class_names = tuple(tasks), tuple(class_names)
        self.source = dict(source or {})
        self._schema = arrow_schema(name, self.tasks)
        self._expected_rows = expected_rows
        self._shard_bytes, self._batch_bytes = shard_bytes, batch_bytes
        self._min_batches = min_batches
        self._manifest_uri = storage.join(self.uri, MANIFEST_NAME)
        replaces = storage.exists(self._manifest_uri)
        if replaces and not overwrite:
            raise DatasetError(f"{self.uri}: there is a dataset already; overwrite it explicitly")
        # Other names than the old shards': the old manifest holds until the new one replaces it.
        self._suffix = f"-{uuid.uuid4().hex[:8]}" if replaces else ""
        self._grouped = "detection" in self.tasks
        self._pending: dict[int, _Pending] = {}  # a group's rows that are not written yet
        self._total_rows = 0
        self._file: _ShardFile | None = None
        self._shards: list[Shard] = []

    def __enter__(self) -> "ShardWriter":
        return self

    def append(self, row: dict[str, Any]) -> None:
        """Add a row.

        Args:
            row: one value for each column of the tasks: ``id``, ``image`` (bytes), ``height``,
                ``width``, and ``label``, ``mask`` (bytes), ``boxes`` (K,4), ``box_labels`` (K)
                and ``crowd`` (K).

        Raises:
            DatasetError: a column is missing, unknown or of another type, a label is no class, or
                a box is empty or not inside the image.
        """
        row = checked_row(row, self._schema, len(self.class_names))
        group = aspect_group(row["height"], row["width"]) if self._grouped else 0
        pending = self._pending.setdefault(group, _Pending())
        pending.rows.append(row)
        pending.bytes += len(row["image"]) + len(row.get("mask", b""))
        self._total_rows += 1
        # Without an expected number batches grow with what was written: many in any case.
        rows_limit = (self._expected_rows or self._total_rows) // self._min_batches
        if pending.bytes >= self._batch_bytes or len(pending.rows) >= max(1, rows_limit):
            self._flush_batch(group)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        committed = False
        try:
            if kind is None:
                self._commit()
                committed = True
        finally:
            if self._file is not None:
                self._file.discard()
                self._file = None
            if not committed:
                for shard in self._shards:
                    with suppress(storage.StorageError):
                        storage.delete(storage.join(self.uri, shard.path))

    def _flush_batch(self, group: int) -> None:
        pending = self._pending.pop(group)
        columns = [
            pa.array([row[column.name] for row in pending.rows], column.type)
            for column in self._schema
        ]
        if self._file is None:
            self._file = _ShardFile(self._schema, self._grouped)
        self._file.write(pa.record_batch(columns, schema=self._schema), pending.bytes, group)
        if self._file.payload >= self._shard_bytes:
            self._flush_shard()

    def _flush_shard(self) -> None:
        if self._file is None:
            return
        shard = self._file.finish(f"part-{len(self._shards):05d}{self._suffix}.arrow")
        self._shards.append(shard)
        storage.upload(self._file.path, storage.join(self.uri, shard.path))
        self._file.discard()
        self._file = None

    def _commit(self) -> None:
        for group in sorted(self._pending):
            self._flush_batch(group)
        self._flush_shard()
        if not self._shards:
            raise DatasetError(f"{self.uri}: no rows were written")
        manifest = Manifest(
            name=self.name,
            split=self.split,
            tasks=self.tasks,
            class_names=self.class_names,
            shards=tuple(self._shards),
            source=self.source,
        )
        storage.write_bytes(self._manifest_uri, manifest.to_bytes())
        used = {shard.path for shard in self._shards}
        for name in storage.list_names(self.uri):
            # Left behind by a longer dataset that was overwritten or never committed.
            if name.startswith("part-") and name.endswith(".arrow") and name not in used:
                storage.delete(storage.join(self.uri, name))


class ShardReader:
    """Random access to the rows of a local shard, which is memory-mapped.

    Reading is safe from several threads.

    Args:
        path: the shard's file.
        columns: the columns to return; all by default.

    Raises:
        DatasetError: the file is no Arrow IPC file of this format version, or lacks a column.
    """

    def __init__(self, path: Path, columns: Sequence[str] | None = None):
        try:
            with pa.memory_map(str(path)) as source, ipc.open_file(source) as reader:
                names, metadata = reader.schema.names, reader.schema.metadata or {}
                batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        except (OSError, pa.ArrowException) as error:
            raise DatasetError(f"{path}: not a readable shard: {error}") from error
        version = metadata.get(b"format_version", b"none").decode(errors="replace")
        if version != str(FORMAT_VERSION):
            raise DatasetError(f"{path}: format_version is {version}, expected {FORMAT_VERSION}")
        self.columns = tuple(names if columns is None else columns)
        missing = sorted(set(self.columns) - set(names))
        if missing:
            raise DatasetError(f"{path}: no column {missing}; there are {names}")
        self.batch_rows = tuple(batch.num_rows for batch in batches)
        self._starts = [0, *accumulate(self.batch_rows)]
        self._batches = [[batch.column(name) for name in self.columns] for batch in batches]

    def __len__(self) -> int:
        return self._starts[-1]

    def row(self, index: int) -> dict[str, Any]:
        """The row at a place in the shard, as Python values; images and masks as bytes.

        Raises:
            IndexError: there is no such row.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of a shard of {len(self)} rows")
        batch = bisect_right(self._starts, index) - 1
        place = index - self._starts[batch]
        return {
            name: column[place].as_py()
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
        data = storage.read_bytes(uri)
    except storage.MissingError:
        found = [name for name in storage.list_names(dataset_uri) if has_split(dataset_uri, name)]
        raise DatasetError(
            f"{uri}: no manifest, so no split {split!r} of a dataset here; "
            f"splits found: {', '.join(found) or 'none'}. Make one with jobs/prepare_data.py"
        ) from None
    manifest = Manifest.from_bytes(data, uri)
    if manifest.split != split:
        raise DatasetError(f"{uri}: holds split {manifest.split!r}, expected {split!r}")
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
    """A shard being built in a temporary file."""

    def __init__(self, schema: pa.Schema, grouped: bool):
        self._folder = tempfile.TemporaryDirectory(prefix="sr4ir-shard-")
        self.path = Path(self._folder.name) / "shard.arrow"
        self._writer = ipc.new_file(str(self.path), schema)
        self._batch_rows: list[int] = []
        self._batch_groups: list[int] = []
        self._grouped = grouped
        self.payload = 0

    def write(self, batch: pa.RecordBatch, payload: int, group: int) -> None:
        self._writer.write_batch(batch)
        self._batch_rows.append(batch.num_rows)
        self._batch_groups += [group] if self._grouped else []
        self.payload += payload

    def finish(self, name: str) -> Shard:
        self._writer.close()
        return Shard(
            path=name,
            rows=sum(self._batch_rows),
            bytes=self.path.stat().st_size,
            sha256=_sha256(self.path),
            batch_rows=tuple(self._batch_rows),
            batch_groups=tuple(self._batch_groups),
        )

    def discard(self) -> None:
        self._writer.close()
        self._folder.cleanup()


def _sha256(path: Path) -> str:
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
