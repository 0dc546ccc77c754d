"""How a source is cut into parts, known before anything is read in full, and the same each time."""

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from sr4ir_dist import storage
from sr4ir_dist.data.convert.parts import OnBadRow, Part, PartMaker
from sr4ir_dist.data.convert.source import Source
from sr4ir_dist.data.schema import DatasetError, arrow_schema
from sr4ir_dist.data.shards import payload_bytes

RECORDS_PREFIX = ".converting-"
# Samples of a split that are read to learn how large its images are.
_PROBED = 64


@dataclass(frozen=True)
class Conversion:
    """What is to be converted.

    Attributes:
        digest: of all that rows and parts depend on.
        make: makes a part.
        parts: the parts, each split's in order.
    """

    digest: str
    make: PartMaker
    parts: tuple[Part, ...]


def plan_conversion(
    source: Source,
    uri: str,
    *,
    name: str,
    tasks: tuple[str, ...],
    facts: dict[str, Any],
    on_bad_row: OnBadRow,
    threads: int,
    shard_bytes: int,
    batch_bytes: int,
    min_batches: int,
) -> Conversion:
    """Cut each split into parts of about a shard, by the size of some of its images.

    Args:
        source: the opened source.
        uri: where the dataset goes.
        name: the dataset's name.
        tasks: what its rows are for.
        facts: what else its manifests say of where it is from.
        on_bad_row: whether a sample that cannot be read may be left out. It is not part of the
            digest: parts without such samples are the same either way.
        threads: how many samples are read at once.
        shard_bytes: see ``convert``, like the others.
        batch_bytes: of a record batch.
        min_batches: of a split.

    Raises:
        DatasetError: one of those images is bad and may not be left out.
        StorageError: the source cannot be read.
    """
    content = {
        "dataset": (name, tasks, source.class_names, facts),
        "limits": (shard_bytes, batch_bytes, min_batches),
    }
    sha256 = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
    parts: list[Part] = []
    for split in source.splits:
        items = list(source.items(split))
        row_bytes = _mean_bytes(source, items, on_bad_row, threads) or batch_bytes
        count = -(-len(items) // max(1, round(shard_bytes / row_bytes)))
        bounds = [len(items) * number // count for number in range(count + 1)]
        batch_rows = max(1, len(items) // min_batches)
        parts += [
            Part(split, number, tuple(items[start:end]), batch_rows)
            for number, (start, end) in enumerate(pairwise(bounds))
        ]
        for text in (split, bounds, *items):
            sha256.update(repr(text).encode())
    make = PartMaker(
        uri=uri,
        records=storage.join(uri, RECORDS_PREFIX + sha256.hexdigest()[:16]),
        read=source.read,
        schema=arrow_schema(name, tasks),
        classes=len(source.class_names),
        on_bad_row=on_bad_row,
        threads=threads,
        shard_bytes=shard_bytes,
        batch_bytes=batch_bytes,
    )
    return Conversion(sha256.hexdigest(), make, tuple(parts))


def _mean_bytes(
    source: Source, items: Sequence[Any], on_bad_row: OnBadRow, threads: int
) -> float | None:
    """The mean payload of evenly spaced samples; None if all of them are bad."""
    count = min(len(items), _PROBED)
    probed = [items[(2 * number + 1) * len(items) // (2 * count)] for number in range(count)]

    def size(item: Any) -> int | None:
        try:
            return payload_bytes(source.read(item))
        except DatasetError:
            # Once it is repaired, the plan would be another one and what was made until then lost.
            if on_bad_row == "fail":
                raise
            return None

    with ThreadPoolExecutor(threads) as pool:
        sizes = [found for found in pool.map(size, probed) if found is not None]
    return sum(sizes) / len(sizes) if sizes else None
