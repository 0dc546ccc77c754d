"""Where runs are kept: can it do all that training asks of it?"""

from __future__ import annotations

import http.client
import os
import random
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from functools import partial
from urllib.parse import SplitResult, urlsplit

from botocore.exceptions import ClientError
from botocore.session import Session

from sr4ir_dist import s3, storage
from sr4ir_dist.doctor.finding import Finding, probe
from sr4ir_dist.faults import StorageError

_LIMIT_S, _ANSWER_S = 120, 10
# S3 refuses requests whose clock is off by more.
_REFUSED_SKEW_S, _SKEW_S = 900, 60
# Above the size from which clients upload a file in parts.
_LARGE = 12 << 20
_SMALL = b"small"
_REQUIRED: dict[str, str] = dict.fromkeys(s3.CHECKSUM_VARIABLES, "when_required")
_ACCESS = "let these credentials get, put, list and delete objects below this URI"


def findings(uri: str) -> Iterator[Finding]:
    """The checks of a folder or bucket, in a folder of their own that is deleted in the end.

    Args:
        uri: where runs are to be kept.
    """
    uri = storage.absolute(uri)
    local = storage.is_local(uri)
    if not local:
        reached = endpoint()
        yield reached
        if reached.status == "fail":
            yield Finding("storage", "skipped", "not tried without an endpoint")
            return
        yield clock()
        yield credentials()
    folder = storage.join(uri, f".doctor-{uuid.uuid4().hex}")
    carried = _carried(folder)
    yield from carried
    if not local:
        yield checksums(folder, carried)
    if carried[0].status == "fail":
        _probe("delete", folder, delete)  # what may have come of it; nobody need hear of it
        return
    yield _probe("overwrite", folder, overwrite)
    yield _probe("list", folder, list_names)
    if not local:
        yield probe("storage conditional put", partial(conditional_put, folder), limit_s=_LIMIT_S)
    yield _probe("delete", folder, delete)


def endpoint() -> Finding:
    """Whether a server answers where S3 is said to be."""
    mend = "set AWS_ENDPOINT_URL (a store other than AWS) and AWS_REGION; see that its port is open"

    def reach() -> str:
        target = _target()
        started = time.monotonic()
        _date(target)
        wait = (time.monotonic() - started) * 1000
        return f"{target.scheme}://{_host(target)} answers in {wait:.0f} ms"

    return probe("storage endpoint", reach, mend=mend, limit_s=2 * _ANSWER_S)


def clock() -> Finding:
    """How far this computer's clock is from the server's, which signs by it."""
    skews: list[float] = []

    def ask() -> str:
        said = _date(_target())
        if said is None:
            return "the server tells no time"
        skews.append(time.time() - parsedate_to_datetime(said).timestamp())
        side = "ahead of" if skews[0] > 0 else "behind"
        return f"{abs(skews[0]):.0f} s {side} the server's"

    found = probe("storage clock", ask, limit_s=2 * _ANSWER_S)
    skew = abs(skews[0]) if skews else 0.0
    if skew <= _SKEW_S:
        return found
    told = f"this clock is {found.told}; S3 refuses above {_REFUSED_SKEW_S // 60} minutes"
    status = "fail" if skew > _REFUSED_SKEW_S else "warn"
    return Finding("storage clock", status, told, "set the clock: timedatectl set-ntp true")


def credentials() -> Finding:
    """Whether the AWS chain has credentials, and where it found them."""
    mend = "aws configure, AWS_PROFILE, AWS_ACCESS_KEY_ID with its secret, or a role of the machine"

    def look() -> str:
        found = Session().get_credentials()
        if found is None:
            raise StorageError("none in the environment, profiles or the machine's role")
        found.get_frozen_credentials()  # fails where they have expired and cannot be renewed
        return f"found by: {found.method}{', temporary' if found.token else ''}"

    return probe("storage credentials", look, mend=mend)


def write(folder: str) -> str:
    """Write a small file."""
    storage.write_bytes(storage.join(folder, "small"), _SMALL)
    return f"{len(_SMALL)} bytes"


def read(folder: str) -> str:
    """Read the small file back."""
    _same(storage.read_bytes(storage.join(folder, "small")), _SMALL)
    return "what was written"


def multipart(folder: str) -> str:
    """Write a file that is uploaded in parts, and read it back."""
    started = time.monotonic()
    storage.write_bytes(storage.join(folder, "large"), _large())
    _same(storage.read_bytes(storage.join(folder, "large")), _large())
    return f"{_LARGE >> 20} MiB there and back in {time.monotonic() - started:.1f} s"


def ranges(folder: str) -> str:
    """Read a piece from the middle of the large file."""
    system, path = storage.filesystem(storage.join(folder, "large"))
    start, size = _LARGE // 2, 1 << 16
    with system.open_input_file(path) as source:
        _same(source.read_at(size, start), _large()[start : start + size])
    return f"{size >> 10} KiB from the middle"


def checksums(folder: str, carried: list[Finding]) -> Finding:
    """Whether the store takes the integrity checksums that clients send by default.

    Args:
        folder: where to write.
        carried: what `write`, `read`, `multipart` and `ranges` gave with the present settings.
    """
    name = "storage checksums"
    required = [each for each in _REQUIRED if os.environ.get(each, "").lower() == "when_required"]
    if len(required) == len(_REQUIRED):
        return Finding(name, "ok", "sent only where S3 requires them, as the environment says")
    if all(each.status == "ok" for each in carried):
        return Finding(name, "ok", "the store takes those that clients send by default")
    with _environment(_REQUIRED):
        again = _carried(folder)
    if any(each.status != "ok" for each in again):
        return Finding(name, "skipped", "not the cause: it fails without them too")
    mend = "export " + " ".join(f"{name}={value}" for name, value in _REQUIRED.items())
    told = "the store breaks on those that clients send by default, and works without them"
    return Finding(name, "fail", told, f"{mend}, where Ray is started and where jobs are")


def conditional_put(folder: str) -> str:
    """Whether a put can be refused where a file is already; nothing here relies on it."""
    bucket, _, key = storage.join(folder, "once").removeprefix("s3://").partition("/")
    with s3.client() as client:
        put = partial(client.put_object, Bucket=bucket, Key=key, Body=_SMALL, IfNoneMatch="*")
        try:
            put()
            put()
        except ClientError as error:
            code = error.response["Error"]["Code"]
            enforced = code in ("PreconditionFailed", "412")
            return "enforced" if enforced else f"answered by {code}; not needed"
    return "ignored, so names must be unique, which those of runs and checkpoints are"


def overwrite(folder: str) -> str:
    """Replace a file, and read the new content."""
    storage.write_bytes(storage.join(folder, "small"), _SMALL[::-1])
    _same(storage.read_bytes(storage.join(folder, "small")), _SMALL[::-1])
    return "the new content is read at once"


def list_names(folder: str) -> str:
    """List the folder."""
    found = storage.list_names(folder)
    if "small" not in found:
        raise StorageError(f"{folder}: small was written and is not listed, but {found}")
    return f"{len(found)} names"


def delete(folder: str) -> str:
    """Delete the folder with all that is in it."""
    storage.delete(folder)
    if left := storage.list_files(folder):
        raise StorageError(f"{folder}: deleted, and yet there are {', '.join(left)}")
    return "nothing is left behind"


def _probe(name: str, folder: str, action: Callable[[str], str]) -> Finding:
    mend = "choose a folder that can be written" if storage.is_local(folder) else _ACCESS
    return probe(f"storage {name}", partial(action, folder), mend=mend, limit_s=_LIMIT_S)


def _carried(folder: str) -> list[Finding]:
    """What writing and reading gave; where the first write failed the rest is not tried."""
    first = _probe("write", folder, write)
    if first.status == "fail":
        return [first]
    actions = {"read": read, "multipart": multipart, "ranges": ranges}
    return [first, *(_probe(name, folder, action) for name, action in actions.items())]


def _large() -> bytes:
    return random.Random(0).randbytes(_LARGE)


def _same(found: bytes, expected: bytes) -> None:
    if found != expected:
        raise StorageError(
            f"what was written reads back differently ({len(expected)} bytes written, "
            f"{len(found)} read)"
        )


def _target() -> SplitResult:
    with s3.client() as client:
        return urlsplit(client.meta.endpoint_url)


def _host(target: SplitResult) -> str:
    # Without a name and password, which an address may hold.
    return f"{target.hostname}:{target.port}" if target.port else f"{target.hostname}"


def _date(target: SplitResult) -> str | None:
    """The time that the server tells, whatever else it answers."""
    kinds = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
    connection = kinds[target.scheme](_host(target), timeout=_ANSWER_S)
    try:
        connection.request("HEAD", "/")
        return connection.getresponse().getheader("Date")
    except OSError as error:
        raise StorageError(f"{target.scheme}://{_host(target)}: {error}") from error
    finally:
        connection.close()


@contextmanager
def _environment(settings: dict[str, str]) -> Iterator[None]:
    """Other settings in the environment for a while: clients read them from there."""
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
