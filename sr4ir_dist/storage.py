"""URIs to bytes: one small set of functions over local files and S3 buckets.

A URI is ``s3://bucket/key``, ``file:///path`` or a plain path. S3 is reached with the settings of
the AWS environment (``AWS_ENDPOINT_URL_S3`` or ``AWS_ENDPOINT_URL``, ``AWS_REGION`` or
``AWS_DEFAULT_REGION``, ``AWS_PROFILE``, the usual credential chain), so any S3-compatible store
works. Whatever is written appears whole or not at all.

What fails because of the server or the network (503, 500, a connection that is cut, silent for
`SR4IR_S3_TIMEOUT_S` seconds or ends early) is tried again, see `faults.PATIENCE`.
"""

import hashlib
import json
import mmap
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
from pyarrow import fs as pafs

from sr4ir_dist import s3, untrusted
from sr4ir_dist.faults import ContentError as ContentError
from sr4ir_dist.faults import MissingError as MissingError
from sr4ir_dist.faults import PassingError, StorageError, named, retried

_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.\-]*)://")
# Each read is one ranged request. Downloads go straight into their file, so that these may be large
# enough for a shard of the usual size.
_CHUNK, _DOWNLOAD = 64 << 20, 128 << 20
Mark = tuple[int | None, int | None]
"""What a file can be told from another by without reading it, as far as the storage tells: its size
in bytes, and when it was last changed, in nanoseconds since 1970."""
_TEMPORARY = re.compile(r"^\..*\.[0-9a-f]{32}\.tmp$")


def is_local(uri: str | os.PathLike[str]) -> bool:
    """Whether a URI is a plain path or ``file://``.

    Raises:
        StorageError: the scheme is neither ``file`` nor ``s3``.
    """
    return _split(uri)[0] == "file"


def local_path(uri: str | os.PathLike[str]) -> Path:
    """The absolute path of a local URI.

    Raises:
        StorageError: the URI is not local.
    """
    scheme, path = _split(uri)
    if scheme != "file":
        raise StorageError(f"{uri}: not a local path")
    return Path(path)


def absolute(uri: str | os.PathLike[str]) -> str:
    """The URI with a plain path made absolute; other URIs as they are.

    Jobs call this once on their arguments, because workers run in other directories.
    """
    text = os.fspath(uri)
    return text if _SCHEME.match(text) else _split(text)[1]


def join(uri: str | os.PathLike[str], *parts: str) -> str:
    """The URI with path components appended."""
    text = os.fspath(uri)
    for part in parts:
        text = f"{text.rstrip('/')}/{part.strip('/')}"
    return text


def filesystem(uri: str | os.PathLike[str]) -> tuple[pafs.FileSystem, str]:
    """The pyarrow filesystem of a URI and the path within it.

    There is one S3 filesystem a process and set of AWS settings.

    Args:
        uri: where to.

    Returns:
        The filesystem and the path that it knows the URI by (``bucket/key`` on S3).

    Raises:
        StorageError: the scheme is unknown, the bucket is missing, or the AWS settings are broken.
    """
    scheme, path = _split(uri)
    return (pafs.LocalFileSystem() if scheme == "file" else s3.filesystem()), path


@retried
def exists(uri: str | os.PathLike[str]) -> bool:
    """Whether there is a file or a folder at the URI.

    Raises:
        StorageError: the storage did not answer.
    """
    system, path = filesystem(uri)
    return system.get_file_info(path).type != pafs.FileType.NotFound


@retried
def read_bytes(uri: str | os.PathLike[str], most: int | None = None) -> bytes:
    """The whole content of a file.

    Args:
        uri: where it is.
        most: the largest size in bytes that is read; None for any.

    Raises:
        MissingError: there is no such file.
        ContentError: it is larger.
        StorageError: it cannot be read.
    """
    with _opened(uri) as source:
        size = source.size()
        if most is not None and size > most:
            raise ContentError(f"{uri}: {size} bytes, more than the {most} that are read")
        return source.readall()


@retried
def sha256(uri: str | os.PathLike[str]) -> tuple[int, str]:
    """A file's size in bytes and its SHA-256; only a part of it is in memory at a time.

    Raises:
        MissingError: there is no such file.
        StorageError: it cannot be read.
    """
    digest = hashlib.sha256()
    with _opened(uri) as source:
        while chunk := source.read(_CHUNK):
            digest.update(chunk)
        return source.tell(), digest.hexdigest()


def write_bytes(uri: str | os.PathLike[str], data: bytes | memoryview) -> None:
    """Write a file, whole or not at all, with the folders above it.

    Locally this is a temporary file, fsync and rename; on S3 one upload.

    Raises:
        StorageError: it cannot be written.
    """
    if is_local(uri):
        with named(uri), _published(local_path(uri)) as temporary:
            temporary.write_bytes(data)
    else:
        _put(uri, pa.py_buffer(data))


def read_json(uri: str | os.PathLike[str]) -> Any:
    """The value in a JSON file.

    Raises:
        MissingError: there is no such file.
        ContentError: it is no JSON, or more than `untrusted.parse_json` takes.
        StorageError: it cannot be read.
    """
    data = read_bytes(uri, untrusted.MOST_BYTES)
    try:
        return untrusted.parse_json(data)
    except ValueError as error:
        raise ContentError(f"{uri}: not valid JSON: {error}") from error


def write_json(uri: str | os.PathLike[str], value: Any) -> None:
    """Write a value as indented JSON, whole or not at all.

    Raises:
        StorageError: it cannot be written.
    """
    write_bytes(uri, (json.dumps(value, indent=1) + "\n").encode())


def upload(path: Path, uri: str | os.PathLike[str]) -> None:
    """Copy a local file to a URI; it appears there whole or not at all.

    Raises:
        StorageError: the file is missing or the URI cannot be written.
    """
    if is_local(uri):
        with named(uri), _published(local_path(uri)) as temporary:
            shutil.copyfile(path, temporary)
        return
    with named(path), pa.memory_map(os.fspath(path)) as source:
        content = source.read_buffer()
    _put(uri, content)


@retried
def download(uri: str | os.PathLike[str], path: Path) -> None:
    """Copy a file to a local path, where it appears when all of it arrived.

    For copies that can be had again, whose digest is checked before they are used: they are not
    forced to the disk.

    Raises:
        MissingError: there is no such file.
        StorageError: it cannot be read, ended early, or the path cannot be written.
    """
    with _opened(uri) as source, _published(path, durable=False) as temporary:
        size = source.size()
        with temporary.open("w+b") as sink:
            if size:
                # Room first: a full disk would end a process that writes to mapped pages.
                os.posix_fallocate(sink.fileno(), 0, size)
                with mmap.mmap(sink.fileno(), size) as pages, memoryview(pages) as content:
                    arrived = 0
                    while arrived < size:
                        part = source.readinto(content[arrived : arrived + _DOWNLOAD])
                        if not part:
                            raise OSError(f"{arrived} of {size} bytes arrived")
                        arrived += part


@retried
def list_names(uri: str | os.PathLike[str]) -> list[str]:
    """The sorted names of the files and folders directly below a URI.

    Returns:
        The names; an empty list when there is nothing there. Files that are still being written
        are not listed.

    Raises:
        StorageError: the storage did not answer, or the URI is a file.
    """
    system, path = filesystem(uri)
    found = system.get_file_info(pafs.FileSelector(path, allow_not_found=True))
    return sorted(info.base_name for info in found if not _TEMPORARY.match(info.base_name))


def list_files(uri: str | os.PathLike[str]) -> list[str]:
    """The sorted paths, relative to the URI, of all files below it at any depth.

    Raises:
        StorageError: the storage did not answer, or the URI is a file.
    """
    return list(list_marks(uri))


@retried
def list_marks(uri: str | os.PathLike[str]) -> dict[str, Mark]:
    """The marks of all files below a URI at any depth, by their sorted paths relative to it.

    Raises:
        StorageError: the storage did not answer, or the URI is a file.
    """
    system, path = filesystem(uri)
    found = system.get_file_info(pafs.FileSelector(path, allow_not_found=True, recursive=True))
    start = len(path.rstrip("/")) + 1
    return {
        info.path[start:]: (info.size, info.mtime_ns)
        for info in sorted(found, key=lambda info: info.path)
        if info.type == pafs.FileType.File and not _TEMPORARY.match(info.base_name)
    }


@retried
def mark(uri: str | os.PathLike[str]) -> Mark:
    """The mark of one file; of one that is not there, nothing is known.

    Raises:
        StorageError: the storage did not answer.
    """
    system, path = filesystem(uri)
    info = system.get_file_info(path)
    return info.size, info.mtime_ns


@retried
def delete(uri: str | os.PathLike[str]) -> None:
    """Delete a file, or a folder with all that is in it; nothing there is no error.

    Raises:
        StorageError: it cannot be deleted.
    """
    system, path = filesystem(uri)
    if path.strip("/").count("/") == 0:
        raise StorageError(f"{uri}: refusing to delete a whole bucket or top-level folder")
    kind = system.get_file_info(path).type
    if kind == pafs.FileType.Directory:
        system.delete_dir(path)
    elif kind != pafs.FileType.NotFound:
        system.delete_file(path)


def delete_unfinished(uri: str | os.PathLike[str]) -> None:
    """Delete what writers that were killed left directly below a folder; no writer may be at work.

    On S3 there is nothing of the kind to be seen.

    Raises:
        StorageError: it cannot be deleted.
    """
    if is_local(uri) and exists(uri):
        with named(uri):
            for path in local_path(uri).iterdir():
                if _TEMPORARY.match(path.name):
                    path.unlink()


def check_writable(uri: str | os.PathLike[str]) -> None:
    """Write, read back and delete a small probe below the URI.

    Raises:
        StorageError: one of the three failed; the message says why.
    """
    probe = join(uri, f".probe-{uuid.uuid4().hex}")
    try:
        write_bytes(probe, b"probe")
        if read_bytes(probe) != b"probe":
            raise StorageError(f"{probe}: what was written reads back differently")
        delete(probe)
    except StorageError as error:
        raise StorageError(f"{uri}: cannot be written: {error}") from error


def worker_environment() -> dict[str, str]:
    """The S3 settings of this process that workers on other nodes need.

    Returns:
        Endpoint, region, profile, checksum mode, metadata switch and timeout, as far as they are
        set; never keys or tokens, which nodes get from their own role or profile.
    """
    return {name: os.environ[name] for name in s3.WORKER_VARIABLES if name in os.environ}


def _split(uri: str | os.PathLike[str]) -> tuple[str, str]:
    """A URI's scheme (``file`` or ``s3``) and its path within the filesystem."""
    text = os.fspath(uri)
    match = _SCHEME.match(text)
    if match is None:
        if not text:
            raise StorageError("an empty path: expected s3://bucket/key, file:///path or a path")
        return "file", os.path.abspath(os.path.expanduser(text))
    scheme, rest = match.group(1).lower(), text[match.end() :]
    if scheme == "file":
        if not rest.startswith("/"):
            raise StorageError(f"{text}: a file URI has three slashes, as in file:///path")
        return "file", os.path.abspath(unquote(rest))
    if scheme != "s3":
        raise StorageError(f"{text}: unknown scheme {scheme!r}; allowed: s3://, file://, a path")
    bucket = rest.split("/", 1)[0]
    if not bucket or "?" in rest:
        raise StorageError(
            f"{text}: expected s3://bucket/key without a query; "
            "set AWS_ENDPOINT_URL and AWS_REGION for the endpoint"
        )
    return "s3", rest.rstrip("/")


@contextmanager
def _opened(uri: str | os.PathLike[str]) -> Iterator[pa.NativeFile]:
    """A file to read, of the size that it has."""
    system, path = filesystem(uri)
    with system.open_input_file(path) as source:
        # A reply that is cut before it tells the size passes for that of an empty file.
        if source.size() == 0 and system.get_file_info(path).size:
            raise PassingError(f"{uri}: its size did not arrive")
        yield source


@retried
def _put(uri: str | os.PathLike[str], content: pa.Buffer) -> None:
    system, path = filesystem(uri)
    with system.open_output_stream(path) as stream:
        # One single write: closing a stream publishes what it got, so there must be no place
        # between two writes where an interruption could publish half.
        stream.write(content)


@contextmanager
def _published(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """A temporary sibling of a path that takes its place on a clean exit.

    Unless it is to be durable, a power cut soon after may leave a hollow file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        if durable:
            with temporary.open("rb") as written:
                os.fsync(written.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
