"""A checkpoint's directory: files, then a manifest with their digests, last.

A checkpoint exists when its `manifest.json` does; what a crash leaves half-written has none and is
never listed. Networks and optimizer states are safetensors, the rest is JSON: loading runs no code.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from sr4ir_dist import storage

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
"""The file that makes a directory a checkpoint; it is written last."""
_FOLDER = "checkpoints"
_FILE = re.compile(r"[a-z0-9_]+(\.[a-z0-9_]+)*")
_STEP = re.compile(r"step-\d{9}")


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

    def read(self, name: str) -> bytes:
        """A file's bytes.

        Raises:
            CheckpointError: the checkpoint has no such file, or the file is not what was published.
        """
        if name not in self.files:
            raise CheckpointError(f"checkpoint {self.uri} has no {name}; it has {list(self.files)}")
        try:
            data = storage.read_bytes(storage.join(self.uri, name))
        except storage.MissingError as error:
            # Storage that did not answer is another matter: it says nothing of the checkpoint.
            raise CheckpointError(f"checkpoint {self.uri} has lost {name}") from error
        size, digest = self.files[name]
        if len(data) != size or hashlib.sha256(data).hexdigest() != digest:
            raise CheckpointError(
                f"{name} of checkpoint {self.uri} is not what was published: "
                f"{len(data)} bytes, expected {size} with SHA-256 {digest}"
            )
        return data

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of a safetensors file, on CPU."""
        try:
            return safetensors.torch.load(self.read(name))
        except safetensors.SafetensorError as error:
            raise CheckpointError(f"{name} of checkpoint {self.uri}: {error}") from error

    def json(self, name: str) -> Any:
        """The value of a JSON file."""
        return json.loads(self.read(name))


def publish(run_uri: str, step: int, files: Mapping[str, bytes]) -> str:
    """Write a run's checkpoint after a step; it becomes visible whole or not at all.

    Checkpoints of later steps, which a run that fell back behind them could not use, are deleted.

    Returns:
        The checkpoint's URI.
    """
    uri = storage.join(run_uri, _FOLDER, f"step-{step:09d}")
    manifest = storage.join(uri, MANIFEST)
    if storage.exists(manifest):
        # A run that fell back behind this step writes it anew.
        storage.delete(manifest)
    write(uri, files.items())
    for later in newest_first(run_uri):
        # Names sort as steps do. What a run left when it fell back must not pass for its newest.
        if later > uri:
            delete(later)
    return uri


def write(uri: str, files: Iterable[tuple[str, bytes]]) -> None:
    """Write a checkpoint's files below a URI where there is none; the manifest goes last."""
    entries = {}
    for name, data in files:
        storage.write_bytes(storage.join(uri, name), data)
        entries[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest = {"format_version": FORMAT_VERSION, "files": entries}
    storage.write_json(storage.join(uri, MANIFEST), manifest)


def load(uri: str) -> Checkpoint:
    """Open a published checkpoint.

    Raises:
        CheckpointError: there is none at the URI, its manifest is malformed, or its format version
            is not this package's.
        StorageError: the storage does not answer.
    """
    try:
        value = json.loads(storage.read_bytes(storage.join(uri, MANIFEST)))
    except storage.MissingError as error:
        raise CheckpointError(f"no checkpoint at {uri}") from error
    except ValueError as error:
        if isinstance(error, storage.StorageError):
            raise
        raise CheckpointError(f"checkpoint {uri} has a malformed manifest: {error}") from error
    version = value.get("format_version") if isinstance(value, dict) else None
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"checkpoint {uri} has format_version {version!r}; this package reads {FORMAT_VERSION}"
        )
    try:
        files = {
            str(name): (int(entry["bytes"]), str(entry["sha256"]))
            for name, entry in value["files"].items()
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"the manifest of checkpoint {uri} is malformed: {error!r}"
        ) from error
    for name in files:
        if not _FILE.fullmatch(name):
            raise CheckpointError(f"checkpoint {uri} lists a file named {name!r}")
    return Checkpoint(uri, files)


def newest_first(run_uri: str) -> list[str]:
    """URIs of a run's published checkpoints, the newest first."""
    folder = storage.join(run_uri, _FOLDER)
    uris = [storage.join(folder, n) for n in storage.list_names(folder) if _STEP.fullmatch(n)]
    return [uri for uri in reversed(uris) if storage.exists(storage.join(uri, MANIFEST))]


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


def prune(run_uri: str, keep: int) -> None:
    """Delete all but the newest checkpoints of a run; each disappears whole."""
    for uri in newest_first(run_uri)[keep:]:
        delete(uri)


def delete(uri: str) -> None:
    """Delete a checkpoint; it disappears whole, whatever is left of it when this is killed."""
    storage.delete(storage.join(uri, MANIFEST))
    storage.delete(uri)
