"""A checkpoint's directory: files, then a manifest with their digests, last.

A checkpoint exists when its `manifest.json` does; what a crash leaves half-written has none and is
never listed. Networks and optimizer states are safetensors, the rest is JSON: loading runs no code.
Nothing that a manifest or a file claims is trusted: sizes are compared before anything is read, and
digests before anything is used.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sr4ir_dist import storage, untrusted
from sr4ir_dist.networks.tensor_files import MOST_HEADER_BYTES, parse_safetensors, unlike

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
"""The file that makes a directory a checkpoint; it is written last."""
FOLDER = "checkpoints"
"""Where a run keeps its checkpoints."""
_FILE = re.compile(r"[a-z0-9_]+(\.[a-z0-9_]+)*")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_STEP = re.compile(r"step-\d{9}")  # names of a run's checkpoints, which sort as its steps do


class CheckpointError(ValueError):
    """A checkpoint that is absent, damaged or of another format; the message names its URI."""


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint; every read is checked against the manifest's digests.

    Attributes:
        uri: its directory.
        files: size in bytes and SHA-256 of each file, by name.
    """

    uri: str
    files: Mapping[str, tuple[int, str]]

    def read(self, name: str, most: int | None = None) -> bytes:
        """A file's bytes.

        Args:
            name: the file.
            most: the largest size in bytes that it may have; None for any.

        Raises:
            CheckpointError: the checkpoint has no such file, or the file is not what was published,
                or larger.
            StorageError: the storage does not answer.
        """
        size, digest = self._entry(name)
        if most is not None and size > most:
            raise CheckpointError(
                f"{name} of checkpoint {self.uri} has {size} bytes, expected at most {most}"
            )
        try:
            data = storage.read_bytes(storage.join(self.uri, name), most=size)
        except storage.MissingError as error:
            # Storage that did not answer is another matter: it says nothing of the checkpoint.
            raise CheckpointError(f"checkpoint {self.uri} has lost {name}") from error
        except storage.ContentError as error:
            raise self._altered(name, str(error)) from error
        if len(data) != size or hashlib.sha256(data).hexdigest() != digest:
            raise self._altered(name, f"{len(data)} bytes")
        return data

    def check(self, name: str) -> None:
        """Compare a file with its digest, without holding more than a part of it.

        Raises:
            CheckpointError: as `read`.
            StorageError: the storage does not answer.
        """
        expected = self._entry(name)
        try:
            found = storage.sha256(storage.join(self.uri, name))
        except storage.MissingError as error:
            raise CheckpointError(f"checkpoint {self.uri} has lost {name}") from error
        if found != expected:
            raise self._altered(name, f"{found[0]} bytes")

    def tensors(self, name: str, like: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The tensors of a safetensors file, on CPU.

        Args:
            name: the file.
            like: tensors of the names, shapes and dtypes that it must have; None for any.

        Raises:
            CheckpointError: as `read`, or it is no safetensors file, or holds other tensors.
            StorageError: the storage does not answer.
        """
        most = None
        if like is not None:
            most = 8 + MOST_HEADER_BYTES + sum(value.nbytes for value in like.values())
        data = self.read(name, most)
        try:
            found = parse_safetensors(data)
        except ValueError as error:
            raise CheckpointError(f"{name} of checkpoint {self.uri}: {error}") from error
        faults = "" if like is None else unlike(found, like)
        if faults:
            raise CheckpointError(f"{name} of checkpoint {self.uri} does not fit: {faults}")
        return found

    def json(self, name: str) -> Any:
        """The value of a JSON file.

        Raises:
            CheckpointError: as `read`, or it is no JSON, or too much of it.
            StorageError: the storage does not answer.
        """
        data = self.read(name, untrusted.MOST_BYTES)
        try:
            return untrusted.parse_json(data)
        except ValueError as error:
            raise CheckpointError(f"{name} of checkpoint {self.uri}: {error}") from error

    def _entry(self, name: str) -> tuple[int, str]:
        if name not in self.files:
            raise CheckpointError(f"checkpoint {self.uri} has no {name}; it has {list(self.files)}")
        return self.files[name]

    def _altered(self, name: str, found: str) -> CheckpointError:
        size, digest = self.files[name]
        return CheckpointError(
            f"{name} of checkpoint {self.uri} is not what was published: {found}, expected {size} "
            f"with SHA-256 {digest}"
        )


def publish(run_uri: str, step: int, files: Mapping[str, bytes]) -> str:
    """Write a run's checkpoint after a step; it becomes visible whole or not at all.

    Checkpoints of later steps, which a run that fell back behind them could not use, are deleted.

    Returns:
        The checkpoint's URI.
    """
    uri = storage.join(run_uri, FOLDER, f"step-{step:09d}")
    manifest = storage.join(uri, MANIFEST)
    if storage.exists(manifest):
        # A run that fell back behind this step writes it anew.
        storage.delete(manifest)
    for later in newest_first(run_uri):
        # Names sort as steps do. What a run left when it fell back must not pass for its newest.
        if later > uri:
            delete(later)
    try:
        write(uri, files.items())
    except storage.StorageError:
        # Where space is short, the next one needs it.
        with suppress(storage.StorageError):
            delete(uri)
        raise
    return uri


def write(uri: str, files: Iterable[tuple[str, bytes]]) -> None:
    """Write a checkpoint's files below a URI where there is none; the manifest goes last."""
    entries = {}
    for name, data in files:
        storage.write_bytes(storage.join(uri, name), data)
        entries[name] = (len(data), hashlib.sha256(data).hexdigest())
    storage.write_bytes(storage.join(uri, MANIFEST), _manifest(entries))


def load(uri: str) -> Checkpoint:
    """Open a published checkpoint.

    Raises:
        CheckpointError: there is none at the URI, its manifest is not as it was written, or its
            format version is not this package's.
        StorageError: the storage does not answer.
    """
    try:
        data = storage.read_bytes(storage.join(uri, MANIFEST), untrusted.MOST_BYTES)
    except storage.MissingError as error:
        raise CheckpointError(f"no checkpoint at {uri}") from error
    except storage.ContentError as error:
        raise CheckpointError(f"checkpoint {uri}: {error}") from error
    try:
        value = untrusted.parse_json(data)
    except ValueError as error:
        raise CheckpointError(f"{MANIFEST} of checkpoint {uri} is malformed: {error}") from error
    version = value.get("format_version") if isinstance(value, dict) else None
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"checkpoint {uri} has format_version {version!r:.50}; this package reads "
            f"{FORMAT_VERSION}"
        )
    try:
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in value["files"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{MANIFEST} of checkpoint {uri} is malformed: {error!r:.200}"
        ) from error
    for name, (size, digest) in files.items():
        if not _FILE.fullmatch(name):
            raise CheckpointError(f"checkpoint {uri} lists a file named {name!r:.200}")
        if type(size) is not int or size < 0 or not _is_digest(digest):
            raise CheckpointError(
                f"{MANIFEST} of checkpoint {uri} says of {name} that it has {size!r:.50} bytes "
                f"with SHA-256 {digest!r:.100}"
            )
    # Byte by byte, for there is one way to write it: this finds every change that JSON forgives.
    if data != _manifest(files):
        raise CheckpointError(f"{MANIFEST} of checkpoint {uri} is not what was published")
    return Checkpoint(uri, files)


def verify(uri: str) -> Checkpoint:
    """Compare every file of a checkpoint with its digest, a part of it in memory at a time.

    Raises:
        CheckpointError: as `load`; or a file is lost or is not what was published: names it.
        StorageError: the storage does not answer.
    """
    saved = load(uri)
    for error in faults(saved):
        raise error
    return saved


def faults(saved: Checkpoint) -> Iterator[CheckpointError]:
    """What is wrong with a checkpoint's files, compared one by one, a part of one in memory.

    Raises:
        StorageError: the storage does not answer.
    """
    for name in saved.files:
        try:
            saved.check(name)
        except CheckpointError as error:
            yield error


def newest_first(run_uri: str) -> list[str]:
    """URIs of a run's published checkpoints, the newest first."""
    return published_and_not(run_uri)[0]


def published_and_not(run_uri: str) -> tuple[list[str], list[str]]:
    """URIs of a run's checkpoints, and of what interrupted saves and deletions left of others.

    Both have the newest first.
    """
    folder = storage.join(run_uri, FOLDER)
    whole: list[str] = []
    broken: list[str] = []
    for name in reversed(storage.list_names(folder)):
        if _STEP.fullmatch(name):
            uri = storage.join(folder, name)
            (whole if storage.exists(storage.join(uri, MANIFEST)) else broken).append(uri)
    return whole, broken


def run_of(uri: str) -> str | None:
    """The run whose checkpoint a URI names; None where it names none."""
    run, _, name = uri.rstrip("/").rpartition(f"/{FOLDER}/")
    return run if run and _STEP.fullmatch(name) else None


def resolve(uri: str) -> str:
    """The checkpoint that a URI means: itself, or the newest one of a run.

    Raises:
        CheckpointError: the URI is neither a checkpoint nor a run with one.
    """
    if storage.exists(storage.join(uri, MANIFEST)):
        return uri
    published = newest_first(uri)
    if not published:
        raise CheckpointError(f"{uri} is neither a checkpoint nor a run that has published one")
    return published[0]


def delete(uri: str) -> None:
    """Delete a checkpoint; it disappears whole, whatever is left of it when this is killed."""
    storage.delete(storage.join(uri, MANIFEST))
    storage.delete(uri)


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and _DIGEST.fullmatch(value) is not None


def _manifest(files: Mapping[str, tuple[int, str]]) -> bytes:
    """A manifest's bytes; its last entry is the digest of the others."""
    entries = {name: {"bytes": size, "sha256": digest} for name, (size, digest) in files.items()}
    content: dict[str, Any] = {"format_version": FORMAT_VERSION, "files": entries}
    content["sha256"] = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return (json.dumps(content, indent=1) + "\n").encode()
