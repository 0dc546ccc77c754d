"""Arrow IPC files that may come from anyone: mapped, and checked before a row is read."""

import struct
from pathlib import Path

import pyarrow as pa
from pyarrow import ipc

from sr4ir_dist.data.schema import COLUMN_TYPES, FORMAT_VERSION, DatasetError

_MAGIC = b"ARROW1"
# Places of fields in the tables of Arrow's flatbuffers (File.fbs, Message.fbs).
_FOOTER_BATCHES, _MESSAGE_HEADER, _BATCH_COMPRESSION = 3, 2, 3
_BLOCK_BYTES = 24  # of a record batch in the footer


def map_batches(path: Path) -> tuple[list[pa.RecordBatch], list[str]]:
    """The record batches of a shard, mapped into memory.

    Args:
        path: a local file.

    Returns:
        The batches, and their columns' names; whatever the rows say, reading them stays within the
        file.

    Raises:
        DatasetError: it is no Arrow IPC file of this format version and a dataset's columns, it is
            compressed, or a value lies outside of it or is missing.
    """
    try:
        with pa.memory_map(str(path)) as source:
            # Decompression takes the memory that the file claims to need.
            if _is_compressed(memoryview(source.read_buffer())):
                raise DatasetError(f"{path}: not a readable shard: it is compressed")
            with ipc.open_file(source) as reader:
                names = _checked_names(path, reader.schema)
                batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        for batch in batches:
            batch.validate(full=True)
    except (OSError, pa.ArrowException, struct.error) as error:
        raise DatasetError(f"{path}: not a readable shard: {error}") from error
    for batch in batches:
        for name, column in zip(names, batch.columns, strict=True):
            if _has_nulls(column):
                raise DatasetError(f"{path}: not a readable shard: column {name} lacks values")
    return batches, names


def _checked_names(path: Path, schema: pa.Schema) -> list[str]:
    version = (schema.metadata or {}).get(b"format_version", b"none").decode(errors="replace")
    if version != str(FORMAT_VERSION):
        raise DatasetError(f"{path}: format_version is {version:.50}, expected {FORMAT_VERSION}")
    names = schema.names
    wrong = [field for field in schema if field.type != COLUMN_TYPES.get(field.name)]
    if wrong or len(set(names)) < len(names):
        raise DatasetError(f"{path}: not a readable shard: its columns are {names!r:.300}")
    return names


def _has_nulls(column: pa.Array) -> bool:
    if column.null_count:
        return True
    nested = pa.types.is_list(column.type) or pa.types.is_fixed_size_list(column.type)
    return nested and _has_nulls(column.flatten())


def _is_compressed(file: memoryview) -> bool:
    """Whether a record batch of an Arrow file is compressed, which only its metadata tell."""
    tail = len(_MAGIC) + 4
    if len(file) < 2 * tail or bytes(file[-len(_MAGIC) :]) != _MAGIC:
        raise struct.error("no Arrow file")
    footer = len(file) - tail - _int32(file, len(file) - tail)
    vector = _field(file, _follow(file, footer), _FOOTER_BATCHES)
    if vector is None:
        return False
    vector = _follow(file, vector)
    for number in range(_int32(file, vector)):
        (start,) = struct.unpack_from("<q", file, vector + 4 + _BLOCK_BYTES * number)
        # A marker of four bytes, the length, the message; what old writers wrote has no marker.
        if _int32(file, start) != -1:
            raise struct.error("a record batch in the framing of Arrow before 0.15")
        header = _field(file, _follow(file, start + 8), _MESSAGE_HEADER)
        if header is None:
            raise struct.error("a record batch without a header")
        if _field(file, _follow(file, header), _BATCH_COMPRESSION) is not None:
            return True
    return False


def _int32(data: memoryview, at: int) -> int:
    return struct.unpack_from("<i", data, at)[0]


def _follow(data: memoryview, at: int) -> int:
    return at + struct.unpack_from("<I", data, at)[0]


def _field(data: memoryview, table: int, number: int) -> int | None:
    """Where a field of a flatbuffer's table lies; None where it has its default."""
    places = table - _int32(data, table)
    (size,) = struct.unpack_from("<H", data, places)
    if 4 + 2 * number >= size:
        return None
    (offset,) = struct.unpack_from("<H", data, places + 4 + 2 * number)
    return table + offset if offset else None
