"""Checking a dataset through and through: every digest, every image, every mask and box."""

import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import pyarrow as pa

from sr4ir_dist import storage
from sr4ir_dist.data.groups import aspect_group
from sr4ir_dist.data.schema import (
    VOID,
    DatasetError,
    Manifest,
    Shard,
    arrow_schema,
    checked_row,
)
from sr4ir_dist.data.shards import ShardReader, has_split, load_manifest, verify_shard
from sr4ir_dist.parallel import Run, on_threads, threads_of_job


@dataclass(frozen=True)
class Problem:
    """Something in a dataset that is not as it must be.

    Attributes:
        split: the split that it is in.
        what: what is wrong, and what was expected.
        shard: the shard's path, if it is in one.
        row: the row's number in the split, if it is in one.
        id: the row's sample id.
    """

    split: str
    what: str
    shard: str | None = None
    row: int | None = None
    id: str | None = None

    def __str__(self) -> str:
        places = (("shard", self.shard), ("row", self.row), ("sample", self.id))
        named = [self.split, *(f"{kind} {value}" for kind, value in places if value is not None)]
        return f"{', '.join(named)}: {self.what}"


@dataclass(frozen=True)
class VerifiedSplit:
    """What was checked of a split, and found.

    Attributes:
        rows: its rows, as its manifest says.
        shards: its shards.
        bytes: their size together.
        problems: what is wrong, in the order of the rows.
    """

    rows: int
    shards: int
    bytes: int
    problems: tuple[Problem, ...]


def verify(
    uri: str,
    splits: Sequence[str] = (),
    *,
    threads: int | None = None,
    run: Run | None = None,
    progress: Callable[[str, int, int], None] = lambda split, done, total: None,
) -> dict[str, VerifiedSplit]:
    """Check a dataset: manifests, digests, record batches, and every row.

    Of a row these are the image, which must decode to the size that the row states, labels, the
    mask with its class numbers, boxes, and that it is in a record batch of its aspect-ratio group.

    Args:
        uri: the dataset.
        splits: the splits to check; all by default.
        threads: how many rows of a shard are checked at once; by default all shards together take
            as many as there are CPUs.
        run: where shards are checked; two at a time in this process by default.
        progress: called after each shard with its split, and the number of rows done and of all.

    Returns:
        What was found in each split.

    Raises:
        DatasetError: there is no dataset.
        StorageError: the storage did not answer.
    """
    names = splits or [name for name in storage.list_names(uri) if has_split(uri, name)]
    if not names:
        raise DatasetError(f"{uri}: no dataset here")
    manifests: dict[str, Manifest] = {}
    problems: dict[str, list[tuple[int, list[Problem]]]] = {split: [] for split in names}
    for split in names:
        try:
            manifests[split] = load_manifest(uri, split)
            progress(split, 0, manifests[split].rows)
        except DatasetError as error:
            problems[split].append((0, [Problem(split, str(error))]))
    jobs = chain.from_iterable(
        _jobs(uri, manifest, threads or threads_of_job()) for manifest in manifests.values()
    )
    done: Counter[str] = Counter()
    for job, found in (run or on_threads())(_check_shard, jobs):
        problems[job.split].append((job.row_start, found))
        done[job.split] += job.shard.rows
        progress(job.split, done[job.split], manifests[job.split].rows)
    return {split: _verified(manifests.get(split), problems[split]) for split in names}


@dataclass(frozen=True)
class _Job:
    """A shard to check, as its manifest describes it."""

    uri: str
    split: str
    shard: Shard
    row_start: int
    schema: pa.Schema
    classes: int
    threads: int


def _jobs(uri: str, manifest: Manifest, threads: int) -> list[_Job]:
    schema = arrow_schema(manifest.name, manifest.tasks)
    starts = accumulate((shard.rows for shard in manifest.shards), initial=0)
    return [
        _Job(uri, manifest.split, shard, start, schema, len(manifest.class_names), threads)
        for shard, start in zip(manifest.shards, starts, strict=False)
    ]


def _verified(
    manifest: Manifest | None, problems: list[tuple[int, list[Problem]]]
) -> VerifiedSplit:
    in_order = sorted(problems, key=lambda found: found[0])
    found = tuple(chain.from_iterable(of_shard for _, of_shard in in_order))
    if manifest is None:
        return VerifiedSplit(0, 0, 0, found)
    size = sum(shard.bytes for shard in manifest.shards)
    return VerifiedSplit(manifest.rows, len(manifest.shards), size, found)


def _check_shard(job: _Job) -> tuple[_Job, list[Problem]]:
    uri = storage.join(job.uri, job.split, job.shard.path)
    with tempfile.TemporaryDirectory(prefix="sr4ir-verify-") as folder:
        try:
            if storage.is_local(uri):
                path = storage.local_path(uri)
            else:
                path = Path(folder) / "shard.arrow"
                storage.download(uri, path)
            verify_shard(path, job.shard, job.row_start)
            reader = ShardReader(path)
            _check_layout(reader, job)
        except (DatasetError, storage.MissingError) as error:
            return job, [Problem(job.split, str(error), job.shard.path)]
        return job, _check_rows(reader, job)


def _check_layout(reader: ShardReader, job: _Job) -> None:
    for what, found, expected in (
        ("record batches", reader.batch_rows, job.shard.batch_rows),
        ("columns", reader.columns, tuple(job.schema.names)),
    ):
        if found != expected:
            raise DatasetError(f"has {what} {list(found)}, the manifest says {list(expected)}")


def _check_rows(reader: ShardReader, job: _Job) -> list[Problem]:
    groups = job.shard.batch_groups or [None] * len(reader.batch_rows)
    group_of_row = [
        group for group, count in zip(groups, reader.batch_rows, strict=True) for _ in range(count)
    ]

    def check(number: int) -> Problem | None:
        row = reader.row(number)
        try:
            _check_row(row, job.schema, job.classes, group_of_row[number])
        except (TypeError, ValueError) as error:
            place = job.row_start + number
            return Problem(job.split, str(error), job.shard.path, place, row.get("id"))
        return None

    with ThreadPoolExecutor(job.threads) as pool:
        return [problem for problem in pool.map(check, range(len(reader))) if problem]


def _check_row(row: dict[str, Any], schema: pa.Schema, classes: int, group: int | None) -> None:
    # Here, because torch takes seconds to import: a job's --help comes without it.
    from sr4ir_dist.data.targets import decode_mask
    from sr4ir_dist.data.transforms import decode

    checked_row(row, schema, classes)
    height, width = row["height"], row["width"]
    found = tuple(decode(row["image"]).shape[1:])
    if found != (height, width):
        raise DatasetError(f"image of {found[0]}x{found[1]} pixels, expected {height}x{width}")
    if group is not None and aspect_group(height, width) != group:
        raise DatasetError(f"in a record batch of group {group}, of {height}x{width} pixels")
    if "mask" in row:
        mask = decode_mask(row["mask"])
        if tuple(mask.shape) != (height, width):
            found = "x".join(map(str, mask.shape))
            raise DatasetError(f"mask of {found} pixels, expected {height}x{width}")
        wrong = mask[(mask > classes) & (mask != VOID)].unique().tolist()
        if wrong:
            raise DatasetError(f"mask has class numbers {wrong}, expected 0 to {classes} or {VOID}")
