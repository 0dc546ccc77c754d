"""Versions in a hub: publish, find, tag, verify, delete.

A version is a checkpoint's directory with a card and a readme beside its files, so whatever reads
checkpoints reads it in place. It never changes after its manifest was written.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sr4ir_dist import checkpoint, retention, storage
from sr4ir_dist.hub.cards import CARD, README, Line, load_card, make_card, now, readme, user
from sr4ir_dist.hub.names import (
    LATEST,
    SCHEME,
    TAG,
    TAGS,
    VERSION,
    VERSIONS,
    HubError,
    Name,
    check_tag,
    is_name,
    new_version,
    parse,
    root,
)


class _Target(BaseModel):
    model_config = ConfigDict(frozen=True)
    version: Annotated[str, Field(pattern=f"^{VERSION.pattern}$")]
    when: Line
    by: Line


_COPY_DAYS = 1
_MOST_TAG_BYTES = 1 << 20  # a promotion adds a hundred


class _Tag(BaseModel):
    model_config = ConfigDict(frozen=True)
    targets: Annotated[tuple[_Target, ...], Field(min_length=1)]
    """What the tag names, and before it what it named earlier, as far as that is known."""


def publish(source: str, path: str, *, hub: str, note: str = "", tag: str | None = None) -> Name:
    """Copy a checkpoint into a hub, as a new version that appears whole or not at all.

    Args:
        source: a checkpoint, a run for its newest one, or another name of the hub.
        path: the name to publish it under: `team/voc_seg-edsr-x8`.
        hub: the hub's root.
        note: one line for the card.
        tag: a tag to give to the version.

    Returns:
        The name with the new version's id.

    Raises:
        HubError: the name, the note or the tag is malformed.
        CheckpointError: there is no such checkpoint, it is damaged, or the copy is.
        StorageError: the hub cannot be written.
    """
    if parse(path).which is not None:
        raise HubError(f"{path}: versions get their ids from the hub; leave out what follows the @")
    if tag is not None:
        check_tag(tag)
    saved = checkpoint.load(resolve(source, hub))
    name = Name(parse(path).path, new_version())
    with retention.held(saved.uri, by=uri_of(name, hub), days=_COPY_DAYS):
        checkpoint.write(uri_of(name, hub), _files(saved, name, uri_of(name, hub), note))
    if tag is not None:
        promote(name, tag, hub=hub)
    return name


def resolve(uri: str, hub: str | None = None) -> str:
    """The URI of the checkpoint that a user means.

    Args:
        uri: `hub://NAME[@VERSION-or-TAG]`, a checkpoint, or a run for its newest one.
        hub: the hub's root; None for that of the environment.

    Raises:
        HubError: the name is malformed or not in the hub, or there is no hub.
        CheckpointError: the URI is neither a checkpoint nor a run with one.
    """
    if not is_name(uri):
        return checkpoint.resolve(storage.absolute(uri))
    hub = root(hub)
    return uri_of(find(parse(uri), hub), hub)


def uri_of(name: Name, hub: str) -> str:
    """Where the version of a name with an id lies."""
    return storage.join(hub, name.path, VERSIONS, str(name.which))


def find(name: Name, hub: str) -> Name:
    """The name with the id of the version that it means.

    Raises:
        HubError: there is no such version or tag; the message says which there are.
    """
    which = name.which or LATEST
    if which == LATEST:
        for version in reversed(_ids(name.path, hub)):
            if _exists(found := Name(name.path, version), hub):
                return found
        raise HubError(f"{SCHEME}{name}: nothing is published under this name in {hub}")
    if VERSION.fullmatch(which):
        if not _exists(name, hub):
            raise HubError(f"{SCHEME}{name}: {hub} has no such version")
        return name
    named = tags(name.path, hub)
    if not named and not _ids(name.path, hub):
        raise HubError(f"{SCHEME}{name}: nothing is published under this name in {hub}")
    if which not in named:
        known = ", ".join([LATEST, *named])
        raise HubError(f"{SCHEME}{name}: {name.path} has no tag {which!r}; it has {known}")
    found = Name(name.path, named[which])
    if not _exists(found, hub):
        raise HubError(f"{SCHEME}{name}: the tag names {found.which}, which was deleted")
    return found


def versions(path: str, hub: str) -> tuple[list[Name], list[Name]]:
    """All versions under a name, the newest first.

    Returns:
        Those that are published, and those whose publication or deletion has not ended, or was
        interrupted.
    """
    names = [Name(path, version) for version in reversed(_ids(path, hub))]
    published = [name for name in names if _exists(name, hub)]
    return published, [name for name in names if name not in published]


def tags(path: str, hub: str) -> dict[str, str]:
    """The tags under a name and the id of the version that each names.

    Raises:
        HubError: a tag's file is malformed.
    """
    names = storage.list_names(storage.join(hub, path, TAGS))
    found = [name.removesuffix(".json") for name in names]
    return {tag: _tag(path, tag, hub).targets[0].version for tag in found if TAG.fullmatch(tag)}


def promote(name: Name, tag: str, *, hub: str) -> Name:
    """Let a tag name a version, whatever it named before.

    It is one small write: of two at once the later one holds.

    Returns:
        The version that the tag now names.

    Raises:
        HubError: there is no such version, or the tag is malformed.
    """
    check_tag(tag)
    found = find(name, hub)
    try:
        earlier = _tag(found.path, tag, hub).targets
    except (HubError, storage.MissingError):
        earlier = ()  # it is new, or damaged, which writing it mends
    target = _Target(version=str(found.which), when=now(), by=user())
    value = _Tag(targets=(target, *earlier)).model_dump()
    storage.write_json(_tag_uri(found.path, tag, hub), value)
    return found


def verify(name: Name, hub: str) -> list[str]:
    """Compare every file of a version with its digest.

    Returns:
        What is wrong, in words; nothing where the version is sound.

    Raises:
        HubError: there is no such version.
    """
    uri = uri_of(find(name, hub), hub)
    try:
        saved = checkpoint.load(uri)
        load_card(saved)
    except checkpoint.CheckpointError as error:
        return [str(error)]
    return [str(error) for error in checkpoint.faults(saved)]


def delete(name: Name, *, hub: str, force: bool = False) -> None:
    """Delete a version, or what is left of one; it disappears whole.

    Args:
        name: with the version's id.
        hub: the hub's root.
        force: delete it with the tags that name it.

    Raises:
        HubError: it is not there, no id was given, or a tag names it and `force` is not given.
    """
    for tag in check_deletable(name, hub=hub, force=force):
        # Before the version, so that no tag is left that names nothing.
        storage.delete(_tag_uri(name.path, tag, hub))
    checkpoint.delete(uri_of(name, hub))


def check_deletable(name: Name, *, hub: str, force: bool = False) -> list[str]:
    """The tags that go with a version.

    Raises:
        HubError: as `delete` does.
    """
    if name.which is None or not VERSION.fullmatch(name.which):
        raise HubError(f"{name}: name one version by its id, as in {name.path}@20260131-235959-...")
    if not storage.exists(uri_of(name, hub)):
        raise HubError(f"{name}: {hub} has no such version")
    naming = [tag for tag, version in tags(name.path, hub).items() if version == name.which]
    if naming and not force:
        raise HubError(
            f"{name} is {' and '.join(naming)}: promote another version first, or use --force"
        )
    return naming


def _files(
    saved: checkpoint.Checkpoint, name: Name, uri: str, note: str
) -> Iterator[tuple[str, bytes]]:
    """The files of a version, one in memory at a time; each is read back before the next."""
    card = make_card(saved, note)
    copied = [file for file in saved.files if file not in (CARD, README)]
    made = {
        CARD: (card.model_dump_json(indent=1) + "\n").encode(),
        README: readme(card, f"{SCHEME}{name}").encode(),
    }
    for file in (*copied, *made):
        data = made[file] if file in made else saved.read(file)
        yield file, data
        # The manifest is written when all files were, and read back, soundly.
        if storage.read_bytes(storage.join(uri, file)) != data:
            raise checkpoint.CheckpointError(
                f"{file} of {uri} reads back differently than it was written: does the store need "
                "AWS_REQUEST_CHECKSUM_CALCULATION=when_required?"
            )


def _ids(path: str, hub: str) -> list[str]:
    names = storage.list_names(storage.join(hub, path, VERSIONS))
    return [name for name in names if VERSION.fullmatch(name)]


def _exists(name: Name, hub: str) -> bool:
    return storage.exists(storage.join(uri_of(name, hub), checkpoint.MANIFEST))


def _tag_uri(path: str, tag: str, hub: str) -> str:
    return storage.join(hub, path, TAGS, f"{tag}.json")


def _tag(path: str, tag: str, hub: str) -> _Tag:
    uri = _tag_uri(path, tag, hub)
    try:
        return _Tag.model_validate_json(storage.read_bytes(uri, _MOST_TAG_BYTES))
    except (ValidationError, storage.ContentError) as error:
        raise HubError(f"{uri} is malformed: promote a version to {tag} anew") from error
