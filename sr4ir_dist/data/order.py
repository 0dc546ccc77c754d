"""Which samples a step sees: a pure function of (seed, epoch, step), the same at any rank count.

Nothing is stored between steps, so the whole resume state is (epoch, step), and nothing is listed
per sample: the function works on record batches, of which 100,000 shards have a few million.

The samples of an epoch stand in a *line*: shards in a random order, each shard's record batches
in a random order, rows as they lie in their record batch. A place in the line is found again by
binary search. The line is cut into windows of about `window_rows` rows; within its window a row
may come at any time, so an epoch touches only a few shards at once.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Int64s = NDArray[np.int64]


@dataclass(frozen=True)
class _Line:
    """One epoch's line: record batches in their drawn order and the windows over them."""

    starts: Int64s  # first row, in the split, of the record batch at each index of the line
    places: Int64s  # place in the line of each record batch's first row, and the end
    windows: Int64s  # place in the line of each window's first row, and the end


def _random_ranks(count: int, *key: int) -> Int64s:
    """A permutation of range(count), drawn from a key."""
    # Sorting raw 64-bit numbers rather than Generator.permutation: numpy promises that the raw
    # stream of a bit generator never changes, and orders must outlive numpy versions.
    raw = np.random.Philox(np.random.SeedSequence(key)).random_raw(count)
    return np.argsort(raw, kind="stable")


class Order:
    """The order of a split's rows over epochs and steps.

    Orders built from equal arguments are equal; one may be shared between threads.

    Args:
        batch_rows: for each shard the rows of each of its record batches, as in a manifest.
        seed: the run's seed, 0 or more.
        batch_size: samples of a step over all ranks.
        shuffle: False keeps the split's own order in every epoch, for evaluation.
        window_rows: about how many rows are shuffled together; at least one record batch.
        drop_last: leaves out the last step of an epoch where it would be short.

    Raises:
        ValueError: an argument is out of range, or the split has no row (with `drop_last`: not
            even one full step).
    """

    def __init__(
        self,
        batch_rows: Sequence[Sequence[int]],
        *,
        seed: int,
        batch_size: int,
        shuffle: bool,
        window_rows: int = 16384,
        drop_last: bool = False,
    ) -> None:
        for name, value, least in (
            ("seed", seed, 0),
            ("batch_size", batch_size, 1),
            ("window_rows", window_rows, 1),
        ):
            if value < least:
                raise ValueError(f"{name} must be {least} or more, got {value}")
        self.seed = seed
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.window_rows = window_rows
        self.drop_last = drop_last
        batches = np.fromiter((len(rows) for rows in batch_rows), np.int64, len(batch_rows))
        self._rows = np.fromiter(
            itertools.chain.from_iterable(batch_rows), np.int64, int(batches.sum())
        )
        if (self._rows < 1).any():
            raise ValueError("batch_rows must hold no empty record batch")
        self._starts = _offsets(self._rows)
        self._shard_of_batch = np.repeat(np.arange(len(batches)), batches)
        self._shard_starts = self._starts[_offsets(batches)]
        self.total = int(self._starts[-1])
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"a split of {self.total} rows has no step of {batch_size} samples"
                + (" with drop_last" if drop_last else "")
            )
        # Two epochs and a few windows: what one loader needs at once, across an epoch's end.
        self._line = lru_cache(maxsize=2)(self._draw_line)
        self._window = lru_cache(maxsize=4)(self._draw_window)

    @property
    def steps_per_epoch(self) -> int:
        """How many steps an epoch has; the last one may be short unless `drop_last`."""
        full, rest = divmod(self.total, self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    def global_size(self, step: int) -> int:
        """How many samples a step has over all ranks; the same in every epoch.

        Raises:
            ValueError: an epoch has no such step.
        """
        if not 0 <= step < self.steps_per_epoch:
            raise ValueError(f"step must be in 0..{self.steps_per_epoch - 1}, got {step}")
        return min(self.batch_size, self.total - step * self.batch_size)

    def global_batch(self, epoch: int, step: int) -> Int64s:
        """The rows of one step over all ranks.

        Args:
            epoch: counts from 1.
            step: counts from 0 within the epoch.

        Returns:
            int64 row numbers in the split, without repeats, ordered by their place in the
            epoch's line.

        Raises:
            ValueError: the epoch is negative, or it has no such step.
        """
        if epoch < 0:
            raise ValueError(f"epoch must be 0 or more, got {epoch}")
        begin = step * self.batch_size
        end = begin + self.global_size(step)
        if not self.shuffle:
            return np.arange(begin, end, dtype=np.int64)
        line = self._line(epoch)
        first = int(np.searchsorted(line.windows, begin, "right")) - 1
        last = int(np.searchsorted(line.windows, end, "left"))
        parts = []
        for window in range(first, last):
            start, stop = int(line.windows[window]), int(line.windows[window + 1])
            drawn = self._window(epoch, window)
            parts.append(drawn[max(begin - start, 0) : min(end, stop) - start])
        places = np.sort(np.concatenate(parts))
        batch = np.searchsorted(line.places, places, "right") - 1
        return line.starts[batch] + places - line.places[batch]

    def share(self, epoch: int, step: int, rank: int, world_size: int) -> Int64s:
        """One rank's rows of a step; shares in rank order make up the global batch.

        Shares differ by one row at most and are empty where a step has fewer rows than ranks.

        Raises:
            ValueError: as in `global_batch`, or rank is not in 0..world_size-1.
        """
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in 0..{world_size - 1}, got {rank}")
        rows = self.global_batch(epoch, step)
        # Contiguous shares of rows in line order: a batch is a sample of its window, so rank r
        # always lands in about the r-th part of the window and reads only the shards there.
        # Each node then fetches its part of a window, not all of it.
        begin, end = (len(rows) * r // world_size for r in (rank, rank + 1))
        return rows[begin:end]

    def locate(self, rows: Int64s) -> tuple[Int64s, Int64s]:
        """Where rows of the split lie: their shards' indices and their row numbers in these."""
        shards = np.searchsorted(self._shard_starts, rows, "right") - 1
        return shards, rows - self._shard_starts[shards]

    def shard_start(self, shard: int) -> int:
        """The row number in the split of a shard's first row."""
        return int(self._shard_starts[shard])

    def _draw_line(self, epoch: int) -> _Line:
        shard_rank = _random_ranks(len(self._shard_starts) - 1, self.seed, epoch, 0)
        batch_rank = _random_ranks(len(self._rows), self.seed, epoch, 1)
        drawn = np.lexsort((batch_rank, shard_rank[self._shard_of_batch]))
        places = _offsets(self._rows[drawn])
        window_of_batch = places[:-1] // self.window_rows
        first = np.flatnonzero(np.diff(window_of_batch, prepend=-1))
        windows = np.append(places[first], self.total)
        return _Line(self._starts[:-1][drawn], places, windows)

    def _draw_window(self, epoch: int, window: int) -> Int64s:
        """A window's places in the line, in the order in which its rows come."""
        begin, end = self._line(epoch).windows[window : window + 2]
        return begin + _random_ranks(int(end - begin), self.seed, epoch, 2, window)


def _offsets(counts: Int64s) -> Int64s:
    return np.concatenate(([0], np.cumsum(counts, dtype=np.int64)))
