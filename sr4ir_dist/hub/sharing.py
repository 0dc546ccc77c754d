"""Versions on their way out of a hub: fetched to a folder, or shared by a URL that expires."""

from __future__ import annotations

import hashlib
import http.client
import re
import secrets
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import boto3
from botocore.exceptions import BotoCoreError
from pydantic import BaseModel, ValidationError

from sr4ir_dist import checkpoint, s3, storage
from sr4ir_dist.faults import PassingError, Uri, retried
from sr4ir_dist.hub.names import SCHEME, SHARES, HubError, Name
from sr4ir_dist.hub.versions import find, resolve, uri_of

LONGEST_S = 7 * 24 * 3600
"""How long S3 lets a presigned URL live."""
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 24 * 3600}
_DURATION = re.compile(r"(\d{1,9})([smhd])")
_INDEX = re.compile(r"(?P<expires>\d{10,12})-[0-9a-f]{32}\.json")
_TIMEOUT_S = 30
_SMALL, _PART = 1 << 20, 1 << 20
_LARGE = 4 << 30
"""Bytes of the largest index or manifest that is read."""


class _Index(BaseModel):
    """A shared version: a URL for each of its files, the manifest among them."""

    name: str
    files: dict[str, str]


def seconds(text: str) -> int:
    """The seconds in a duration such as `7d`, `12h`, `30m` or `45s`.

    Raises:
        HubError: it is malformed, or longer than S3 allows.
    """
    match = _DURATION.fullmatch(text)
    value = int(match[1]) * _UNITS[match[2]] if match else 0
    if not 0 < value <= LONGEST_S:
        raise HubError(f"{text!r}: expected a time from 1s to 7d, such as 12h")
    return value


def share(name: Name, *, hub: str, expires: int, say: Callable[[str], None]) -> str:
    """A URL by which anybody can `pull` a version until it expires, without credentials.

    The presigned URLs of the version's files go into an index in the hub, whose own is the result.
    Indexes of this name that have expired are deleted.

    Args:
        name: the version.
        hub: the hub's root, in S3.
        expires: after so many seconds.
        say: is told what may shorten that time.

    Raises:
        HubError: there is no such version, the hub is a folder, or there are no credentials.
        StorageError: the hub cannot be written.
    """
    if storage.is_local(hub):
        raise HubError(f"{hub} is a folder, which no URL leads to; share from a hub in S3")
    found = find(name, hub)
    uri = uri_of(found, hub)
    files = [*checkpoint.load(uri).files, checkpoint.MANIFEST]
    shares = storage.join(hub, found.path, SHARES)
    for old in storage.list_names(shares):
        if (match := _INDEX.fullmatch(old)) and int(match["expires"]) < time.time():
            storage.delete(storage.join(shares, old))
    ends = int(time.time()) + expires
    place = storage.join(shares, f"{ends}-{secrets.token_hex(16)}.json")
    with _signing(expires, say) as signed:
        urls = {file: signed(storage.join(uri, file)) for file in files}
        storage.write_json(place, _Index(name=f"{SCHEME}{found}", files=urls).model_dump())
        return signed(place)


def pull(
    source: str, target: str, *, hub: str | None = None, say: Callable[[str], None]
) -> checkpoint.Checkpoint:
    """Fetch a checkpoint, verified; files that are there already are not fetched again.

    Args:
        source: a shared URL, a hub's name, a checkpoint, or a run for its newest one.
        target: the folder or URI that the files go to; a checkpoint when all have arrived.
        hub: the hub's root; None for that of the environment.
        say: is told of each file.

    Raises:
        HubError: the URL was refused or is not that of a share; the target has another checkpoint.
        CheckpointError: there is no such checkpoint, or it is damaged.
        StorageError: a file cannot be read or written.
    """
    read = _reader(source, hub)
    target = storage.absolute(target)
    manifest = read(checkpoint.MANIFEST, _SMALL)
    if _at(storage.join(target, checkpoint.MANIFEST), _SMALL) not in (None, manifest):
        raise HubError(f"{target} has another checkpoint: choose another folder")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / checkpoint.MANIFEST).write_bytes(manifest)
        files = checkpoint.load(folder).files
    large = [file for file, (size, _) in files.items() if size > _LARGE]
    if large:
        raise HubError(f"{', '.join(large)}: larger than the {_LARGE >> 30} GiB that are fetched")
    for file, (size, digest) in files.items():

        def is_sound(data: bytes | None, wanted: str = digest) -> bool:
            return data is not None and hashlib.sha256(data).hexdigest() == wanted

        place = storage.join(target, file)
        if is_sound(_at(place, size)):
            say(f"{file} is there already")
            continue
        data = read(file, size)
        if not is_sound(data):
            raise checkpoint.CheckpointError(f"{file} did not arrive as it was published")
        storage.write_bytes(place, data)
        say(f"{file}: {size:,} bytes")
    storage.write_bytes(storage.join(target, checkpoint.MANIFEST), manifest)
    return checkpoint.load(target)


def _reader(source: str, hub: str | None) -> Callable[[str, int], bytes]:
    """Reads a file of a checkpoint, by its name, that should have so many bytes at most."""
    if not source.startswith(("http://", "https://")):
        uri = resolve(source, hub)
        return lambda file, limit: storage.read_bytes(storage.join(uri, file), limit)
    try:
        index = _Index.model_validate_json(_fetched(source, _SMALL))
    except ValidationError as error:
        raise HubError(f"{_told(source)}: this is no shared version") from error

    def read(file: str, limit: int) -> bytes:
        if file not in index.files:
            raise HubError(f"{_told(source)}: the shared version lacks {file}")
        return _fetched(index.files[file], limit)

    return read


@retried
def _fetched(place: Uri, limit: int) -> bytes:
    url = str(place)
    if not url.startswith(("http://", "https://")):
        raise HubError(f"{_told(url)}: expected http(s)://")
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as response:
            # In parts: whoever is behind the URL may claim any size.
            parts, left = [], limit
            while left and (part := response.read(min(left, _PART))):
                parts.append(part)
                left -= len(part)
            return b"".join(parts)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 429 or error.code >= 500:
            raise PassingError(f"{_told(url)}: {error}") from error
        raise HubError(
            f"{_told(url)}: refused ({error.code}): the URL has expired or is not whole; ask for "
            "another one, and give it in quotes"
        ) from error
    except (OSError, http.client.HTTPException) as error:
        raise HubError(f"{_told(url)}: {error}; the same command again continues") from error


def _told(url: str) -> str:
    # What follows lets others in.
    return url.partition("?")[0]


def _at(uri: str, limit: int) -> bytes | None:
    """What is in a file; nothing where there is none, or too much."""
    try:
        return storage.read_bytes(uri, limit)
    except (storage.MissingError, storage.ContentError):
        return None


@contextmanager
def _signing(expires: int, say: Callable[[str], None]) -> Iterator[Callable[[str], str]]:
    """Makes URLs by which a file in S3 can be read for so many seconds."""
    try:
        credentials = boto3.Session().get_credentials()
        if credentials is not None and credentials.token:
            say("note: your credentials are temporary; the URL ends with them, if not before")
        with s3.client(signature_version="s3v4") as client:
            yield lambda uri: s3.signed_url(client, uri, expires)
    except BotoCoreError as error:
        raise HubError(f"no URL could be signed: {error}") from error
