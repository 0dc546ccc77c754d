"""Data: can every split be read, and is its first shard what the manifest names?"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from sr4ir_dist.data.cache import ShardCache
from sr4ir_dist.data.splits import Split, open_split
from sr4ir_dist.doctor.finding import Finding, probe

_SHARD_LIMIT_S = 300
_MEND = "make it with jobs/prepare_data.py, or copy it again from where it is whole"


def findings(data: str | Sequence[str]) -> Iterator[Finding]:
    """The checks of a dataset, or of several that are trained on together.

    Args:
        data: URI of the dataset, or of each one of a mix.
    """
    for name in ("train", "val"):
        yield probe(f"data {name}", partial(manifest, data, name), mend=_MEND)
    yield probe("data shard", partial(shard, data), mend=_MEND, limit_s=_SHARD_LIMIT_S)


def manifest(data: str | Sequence[str], name: str) -> str:
    """What the manifest of a split says.

    Raises:
        DatasetError: there is no such split, or it is malformed.
        StorageError: the storage did not answer.
    """
    found = open_split(data, name).manifest
    return (
        f"{found.rows} rows in {len(found.shards)} shard(s) for {', '.join(found.tasks)}; "
        f"format {found.format_version}, digest {found.digest[:12]}"
    )


def shard(data: str | Sequence[str]) -> str:
    """Read the first shard of the training split, wholly.

    Raises:
        DatasetError: there is none, or its bytes are not those that the manifest names.
        StorageError: the storage did not answer.
    """
    split: Split = open_split(data, "train")
    # Not the node's cache, where a copy may lie already.
    with tempfile.TemporaryDirectory() as folder:
        with ShardCache(split, directory=Path(folder)).open(0) as opened:
            opened.reader.row(0)
    first = split.manifest.shards[0]
    return f"{split.shard_uri(0)}: {first.bytes / 1e6:.1f} MB, its digest is right"
