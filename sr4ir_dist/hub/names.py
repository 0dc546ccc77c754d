"""Names in a hub, and the layout that they stand for.

`hub://team/voc_seg-edsr-x8@best` names a version of `team/voc_seg-edsr-x8`: by its id, by a tag, or
the newest one (`@latest`, or nothing). Below the hub's root lie

    NAME/versions/ID/    a checkpoint, whose manifest is written last
    NAME/tags/TAG.json   the version that a tag names, and those it named before
    NAME/shares/         indexes of shared versions, until they expire

Nothing is ever written twice but a tag, so people who publish at once need no lock.
"""

from __future__ import annotations

import os
import re
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime

from sr4ir_dist import storage
from sr4ir_dist.checkpoint import CheckpointError

ROOT_VARIABLE = "SR4IR_HUB"
"""The environment variable with the hub's root: a path or URI."""
LATEST = "latest"
"""What stands for the newest version."""
SCHEME = "hub://"
VERSIONS, TAGS, SHARES = "versions", "tags", "shares"
VERSION = re.compile(r"\d{8}-\d{6}-[0-9a-f]{8}")
"""A version's id: when it was published (UTC), and a random part."""
# It begins with a letter, so that none looks like a version's id.
TAG = re.compile(r"[a-z][a-z0-9_.-]{0,99}")
_PART = r"[a-z0-9][a-z0-9_.-]{0,99}"
PATH = re.compile(rf"{_PART}(?:/{_PART})*")


class HubError(CheckpointError):
    """A name that is malformed or not in the hub, or what the hub refuses to do."""


@dataclass(frozen=True)
class Name:
    """A name in a hub.

    Attributes:
        path: such as `team/voc_seg-edsr-x8`.
        which: a version's id or a tag; None where neither was said.
    """

    path: str
    which: str | None = None

    def __str__(self) -> str:
        return self.path if self.which is None else f"{self.path}@{self.which}"


def is_name(text: str) -> bool:
    """Whether a text is a hub's name rather than a path or another URI."""
    return text.startswith(SCHEME)


def parse(text: str) -> Name:
    """A name as people write it: `hub://NAME`, `NAME`, with or without `@VERSION-or-TAG`.

    Raises:
        HubError: it is malformed; says what is allowed.
    """
    path, at, which = text.removeprefix(SCHEME).partition("@")
    if not PATH.fullmatch(path) or {VERSIONS, TAGS, SHARES} & set(path.split("/")):
        raise HubError(
            f"{text!r} is no name of a hub: expected lower case letters, digits and - _ . in parts "
            f"between slashes (team/voc_seg-edsr-x8), none of them {VERSIONS}, {TAGS} or {SHARES}"
        )
    if at and not (VERSION.fullmatch(which) or TAG.fullmatch(which)):
        raise HubError(
            f"{text!r}: after the @ goes a version's id, a tag, or {LATEST} for the newest version"
        )
    return Name(path, which if at else None)


def check_tag(tag: str) -> str:
    """A tag that may be given to a version.

    Raises:
        HubError: it is malformed, or reserved.
    """
    if not TAG.fullmatch(tag) or tag == LATEST:
        raise HubError(
            f"{tag!r} is no tag: expected lower case letters, digits and - _ . after a letter, and "
            f"not {LATEST}, which is always the newest version"
        )
    return tag


def new_version() -> str:
    """An id that sorts by time to the second and that nobody else makes."""
    return f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(4)}"


def root(uri: str | None = None) -> str:
    """The hub's root, absolute: a URI if it is given, else that of the environment.

    Raises:
        HubError: neither is there.
    """
    found = uri or os.environ.get(ROOT_VARIABLE)
    if not found:
        raise HubError(
            f"no hub: set {ROOT_VARIABLE} (or give --hub) to a folder or s3://bucket/prefix"
        )
    return storage.absolute(found)
