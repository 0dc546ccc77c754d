"""One rank's batches of a split: order, shards, decoding and augmentation behind one iterator."""

import contextlib
import logging
import os
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path

import torch

from sr4ir_dist.batch import Batch
from sr4ir_dist.data.cache import DEFAULT_CACHE_BYTES, ShardCache
from sr4ir_dist.data.order import Int64s, Order
from sr4ir_dist.data.pools import Pools
from sr4ir_dist.data.schema import DatasetError
from sr4ir_dist.data.splits import Split
from sr4ir_dist.data.stream import Sample, Stream
from sr4ir_dist.data.targets import COLUMNS, TASKS, Target, join_targets
from sr4ir_dist.data.transforms import Transform, replicate_into

log = logging.getLogger(__name__)
# So many bad images are named; all are counted.
_WARNINGS = 5


class Loader:
    """Yields a rank's share of every step of an epoch.

    What a step holds depends on (seed, epoch, step) alone: not on ranks, threads or resumes.
    Where the dataset says so (`Manifest.on_bad_row`), an image that cannot be read does not end
    the epoch: in training a row near it stands in, in the split's own order it is left out of
    its batch; see `bad_rows`.
    A context manager; `close` it to end its threads.

    Args:
        split: what to read, of `splits.open_split`.
        transform: applied to every sample.
        batch_size: samples of a step over all ranks.
        seed: the run's seed: keys the order and the augmentation.
        rank: this rank.
        world_size: the number of ranks.
        shuffle: True for training; False yields the split's own order.
        target: "label", "mask" or "boxes" for the targets that `Batch` describes; None for none.
        drop_last: leaves out a short last step.
        grouped: every step holds images of one aspect-ratio group (detection's training).
        threads: how many threads decode; by default this process's CPUs, at most 8.
        prefetch_steps: how many steps are decoded ahead.
        cache_dir: where shards from remote storage are kept; see `cache.default_cache_dir`.
        cache_bytes: how much disk the node's cache may take.

    Raises:
        DatasetError: the split has no such targets or no groups.
        ValueError: an argument is out of range, the transform cannot transform such targets, or
            the split has no step.
    """

    def __init__(
        self,
        split: Split,
        *,
        transform: Transform,
        batch_size: int,
        seed: int,
        rank: int,
        world_size: int,
        shuffle: bool,
        target: Target | None = None,
        drop_last: bool = False,
        grouped: bool = False,
        threads: int | None = None,
        prefetch_steps: int = 4,
        cache_dir: Path | None = None,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
    ) -> None:
        shards = split.manifest.shards
        if target is not None:
            _check_target(split, target, transform)
        if grouped and "detection" not in split.manifest.tasks:
            raise DatasetError(f"{split} has no aspect-ratio groups: {_made_for(split)}")
        threads = min(8, len(os.sched_getaffinity(0))) if threads is None else threads
        for name, value in (("threads", threads), ("prefetch_steps", prefetch_steps)):
            if value < 1:
                raise ValueError(f"{name} must be 1 or more, got {value}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in 0..{world_size - 1}, got {rank}")
        self._order = Order(
            [shard.batch_rows for shard in shards],
            seed=seed,
            batch_size=batch_size,
            shuffle=shuffle,
            drop_last=drop_last,
            batch_groups=[shard.batch_groups for shard in shards] if grouped else None,
        )
        self._cache = ShardCache(
            split,
            columns=("id", "image", *(COLUMNS[target] if target else ())),
            directory=cache_dir,
            max_bytes=cache_bytes,
        )
        self._shard_bytes = tuple(shard.bytes for shard in shards)
        self._ahead_bytes = cache_bytes // 2
        self._transform = transform
        self._target: Target | None = target
        self._rank, self._world_size = rank, world_size
        self._prefetch_steps = prefetch_steps
        self._skip_bad = split.manifest.on_bad_row == "skip"
        self._bad_rows: dict[int, str] = {}
        self._warned: set[int] = set()
        self._pools = Pools(threads)

    @property
    def order(self) -> Order:
        """The split's order."""
        return self._order

    @property
    def steps_per_epoch(self) -> int:
        """How many batches an epoch has, on every rank."""
        return self._order.steps_per_epoch

    @property
    def bad_rows(self) -> frozenset[int]:
        """The rows of this rank that could not be read, in the batches of the last epoch so far."""
        return frozenset(self._bad_rows)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, or of what remains of it.

        Every rank gets one batch a step, also where its share is empty. Closing the iterator,
        or dropping it, stops the reading ahead.

        Args:
            epoch: counts from 1.
            start_step: the first step to yield, to resume; counts from 0, and the number of
                steps is allowed and yields nothing.

        Raises:
            ValueError: epoch or start_step is out of range.
            DatasetError: from the iterator: a shard or a sample cannot be read; names the shard
                and its row range.
        """
        return self._batches(self.samples(epoch, start_step), start_step)

    def samples(self, epoch: int, start_step: int = 0) -> Generator[tuple[Int64s, list[Sample]]]:
        """The same as `epoch`, not yet joined: of each step the row numbers and their samples."""
        if epoch < 1:
            raise ValueError(f"epoch must be 1 or more, got {epoch}")
        if not 0 <= start_step <= self.steps_per_epoch:
            raise ValueError(f"start_step must be in 0..{self.steps_per_epoch}, got {start_step}")
        return self._samples(epoch, start_step)

    def close(self) -> None:
        """Ends the threads, waiting for a fetch that is under way; may be called again."""
        self._pools.close()

    def __enter__(self) -> "Loader":
        """The loader itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Ends the threads."""
        self.close()

    def _batches(
        self, steps: Generator[tuple[Int64s, list[Sample]]], start_step: int
    ) -> Iterator[Batch]:
        with contextlib.closing(steps):
            for step, (rows, samples) in enumerate(steps, start_step):
                yield self._collate(rows, samples, self._order.global_size(step))

    def _samples(self, epoch: int, start_step: int) -> Generator[tuple[Int64s, list[Sample]]]:
        stream = Stream(
            self._order,
            self._cache,
            self._shard_bytes,
            self._transform,
            self._target,
            self._pools,
            epoch=epoch,
            start_step=start_step,
            rank=self._rank,
            world_size=self._world_size,
            prefetch_steps=self._prefetch_steps,
            ahead_bytes=self._ahead_bytes,
            skip_bad=self._skip_bad,
        )
        self._bad_rows = stream.bad_rows
        try:
            for step in stream:
                self._warn()
                yield step
        finally:
            stream.close()

    def _warn(self) -> None:
        for row in sorted(self._bad_rows.keys() - self._warned):
            if len(self._warned) < _WARNINGS:
                log.warning("skipped %s", self._bad_rows[row])
            self._warned.add(row)

    def _collate(self, rows: Int64s, samples: Sequence[Sample], global_size: int) -> Batch:
        sizes = [tuple(sample.image.shape[-2:]) for sample in samples]
        if samples:
            height, width = (max(side) for side in zip(*sizes, strict=True))
        else:
            height, width = self._transform.size
        # Channels last, as decoders give them: each image is copied once, line by line.
        hr = torch.empty(len(samples), height, width, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
        for canvas, sample in zip(hr, samples, strict=True):
            replicate_into(canvas, sample.image)
        targets = join_targets([s.target for s in samples], self._target, height, width)
        batch = Batch(
            hr=hr,
            sizes=torch.tensor(sizes, dtype=torch.int64).reshape(-1, 2),
            targets=targets,
            ids=tuple(sample.id for sample in samples),
            keys=torch.from_numpy(rows.copy()),
            global_size=global_size,
        )
        # In memory that a GPU copies from while the host goes on.
        return batch.pinned() if torch.cuda.is_available() else batch


def _check_target(split: Split, target: Target, transform: Transform) -> None:
    if target not in TASKS:
        raise ValueError(f"target must be one of {', '.join(TASKS)} or None, got {target!r}")
    if TASKS[target] not in split.manifest.tasks:
        name = "labels" if target == "label" else "masks" if target == "mask" else target
        raise DatasetError(f"{split} has no {name}: {_made_for(split)}")
    if target not in transform.targets:
        raise ValueError(
            f"{type(transform).__name__} cannot transform target {target!r}, "
            f"only {', '.join(transform.targets)}"
        )


def _made_for(split: Split) -> str:
    return f"it is made for {', '.join(split.manifest.tasks)}"
