"""A split of one dataset, or of several as if they were one: none of them is written again.

The split of a mix is the concatenation of its parts' splits in the order given. Everything behind
it (order, resume, augmentation, digests, cache) sees rows and shards of one split.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from sr4ir_dist import storage
from sr4ir_dist.data.schema import DatasetError, Manifest
from sr4ir_dist.data.shards import has_split, load_manifest


@dataclass(frozen=True)
class Split:
    """The rows of a split and where they lie.

    Attributes:
        parts: the URI of each dataset and its manifest of the split, in the order of the rows.
        absent: the datasets of a mix that have no such split.
    """

    parts: tuple[tuple[str, Manifest], ...]
    absent: tuple[str, ...] = ()

    def __str__(self) -> str:
        """The URIs of its datasets."""
        return ", ".join(uri for uri, _ in self.parts)

    @cached_property
    def manifest(self) -> Manifest:
        """What its parts are together: of a single part its own manifest.

        `tasks` are those that all parts can be used for, with the same classes.
        """
        manifests = [manifest for _, manifest in self.parts]
        first, *others = manifests
        if not others:
            return first
        same = all(other.class_names == first.class_names for other in others)
        shared = set(first.tasks).intersection(*(other.tasks for other in others))
        return replace(
            first,
            name=" + ".join(manifest.name for manifest in manifests),
            tasks=tuple(task for task in first.tasks if task in shared) if same else ("images",),
            class_names=first.class_names if same else (),
            shards=tuple(shard for manifest in manifests for shard in manifest.shards),
            # What all agree on: a bad image is left out where all datasets ask for that.
            source={
                key: value
                for key, value in first.source.items()
                if all(key in other.source and other.source[key] == value for other in others)
            },
        )

    @cached_property
    def _folders(self) -> list[str]:
        """The folder of each shard."""
        folders: list[str] = []
        for uri, manifest in self.parts:
            folders += [storage.join(uri, manifest.split)] * len(manifest.shards)
        return folders

    def shard_uri(self, shard: int) -> str:
        """Where a shard lies, by its index in `manifest.shards`."""
        return storage.join(self._folders[shard], self.manifest.shards[shard].path)


def dataset_uris(data: str | Sequence[str]) -> tuple[str, ...]:
    """The absolute URIs of a dataset, or of each one of a mix.

    Raises:
        DatasetError: there is none.
    """
    uris = tuple(map(storage.absolute, [data] if isinstance(data, str) else data))
    if not uris:
        raise DatasetError("data names no dataset: expected one URI or several")
    return uris


def open_split(data: str | Sequence[str], name: str) -> Split:
    """Read the manifests of a split.

    Args:
        data: URI of the dataset, or of each one of a mix.
        name: the split's name. For `val` it is enough that one dataset of a mix has it.

    Raises:
        DatasetError: a dataset has no such split, its manifest has another format version or is
            malformed, or there is no dataset at one of the URIs.
        StorageError: the storage did not answer.
    """
    uris = dataset_uris(data)
    absent: tuple[str, ...] = ()
    if name == "val" and len(uris) > 1:
        absent = tuple(uri for uri in uris if has_split(uri, "train") and not has_split(uri, name))
    present = [uri for uri in uris if uri not in absent] or uris
    return Split(tuple((uri, load_manifest(uri, name)) for uri in present), absent)
