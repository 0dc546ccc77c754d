"""Which samples a step sees: a pure function of (seed, epoch, step), the same at any rank count.

Nothing is stored between steps, so the whole resume state is (epoch, step), and nothing is listed
per sample: the function works on record batches, of which 100,000 shards have a few million.

The samples of an epoch stand in a *line*: shards in a random order, each shard's record batches
in a random order, rows as they lie in their record batch. A place in the line is found again by
binary search. The line is cut into windows of about `window_rows` rows; within its window a row
may come at any time, so an epoch touches only a few shards at once.

Where a step must hold one aspect-ratio group, each group has a line of its own, over the same
drawn shards, and its own windows. The steps of the groups alternate so that all lines are read at
an even pace, in about the same shards.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from sr4ir_dist.data.groups import steps_of_groups

Int64s = NDArray[np.int64]
_WINDOW_ROWS = 16384


@dataclass(frozen=True)
class _Line:
    """One epoch's line: record batches in their drawn order and the windows over them."""

    key: tuple[int, ...]  # what its windows are drawn from, besides their number
    starts: Int64s  # first row, in the split, of the record batch at each index of the line
    places: Int64s  # place in the line of each record batch's first row, and the end
    windows: Int64s  # place in the line of each window's first row, and the end


def _random_bits(count: int, key: tuple[int, ...]) -> NDArray[np.uint64]:
    # Raw 64-bit numbers rather than a Generator's methods: numpy promises that the raw stream of
    # a bit generator never changes, and orders must outlive numpy versions.
    return np.random.Philox(np.random.SeedSequence(key)).random_raw(count)


def _random_ranks(count: int, *key: int) -> Int64s:
    """A permutation of range(count), drawn from a key."""
    return np.argsort(_random_bits(count, key), kind="stable")


class Order:
    """The order of a split's rows over epochs and steps.

    Orders built from equal arguments are equal; one may be shared between threads.

    Args:
        batch_rows: for each shard the rows of each of its record batches, as in a manifest.
        seed: the run's seed, 0 or more.
        batch_size: samples of a step over all ranks.
        shuffle: False keeps the split's own order in every epoch, for evaluation.
        window_rows: about how many rows are shuffled together; at least one record batch. By
            default 16,384, or four steps of each group where that is more: rows of one step are
            not apart.
        drop_last: leaves out the last step of an epoch where it would be short.
        batch_groups: for each shard the group of each of its record batches. With it every step
            holds `batch_size` rows of one group and an epoch has floor(rows / batch_size) steps:
            each group's full ones, some that are completed by repeats from their group, and the
            rest of the rows is left out in that epoch (`groups.steps_of_groups`). In a group
            smaller than a step all rows repeat.

    Raises:
        ValueError: an argument is out of range, or the split has no row (with `drop_last` or
            `batch_groups`: not even one full step), or groups are asked for without `shuffle`.
    """

    def __init__(
        self,
        batch_rows: Sequence[Sequence[int]],
        *,
        seed: int,
        batch_size: int,
        shuffle: bool,
        window_rows: int | None = None,
        drop_last: bool = False,
        batch_groups: Sequence[Sequence[int]] | None = None,
    ) -> None:
        for name, value, least in (
            ("seed", seed, 0),
            ("batch_size", batch_size, 1),
            ("window_rows", 1 if window_rows is None else window_rows, 1),
        ):
            if value < least:
                raise ValueError(f"{name} must be {least} or more, got {value}")
        self.seed = seed
        self.batch_size = batch_size
        self.shuffle = shuffle
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
        self._group_of_batch: Int64s | None = None
        self._groups: tuple[tuple[int, int], ...] = ()  # each group's number and rows
        if batch_groups is not None:
            self._take_groups(batch_rows, batch_groups)
        self.window_rows = window_rows or max(
            _WINDOW_ROWS, 4 * batch_size * max(1, len(self._groups))
        )
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"a split of {self.total} rows has no step of {batch_size} samples"
                + (" in groups" if self.grouped else " with drop_last" if drop_last else "")
            )
        # Two epochs and a few windows of each line: what one loader needs at once, across an
        # epoch's end.
        self._lines = lru_cache(maxsize=2)(self._draw_lines)
        self._plan = lru_cache(maxsize=2)(self._draw_plan)
        self._window = lru_cache(maxsize=4 * max(1, len(self._groups)))(self._draw_window)

    @property
    def grouped(self) -> bool:
        """Whether every step holds one group."""
        return self._group_of_batch is not None

    @property
    def steps_per_epoch(self) -> int:
        """How many steps an epoch has; the last one may be short unless `drop_last`."""
        full, rest = divmod(self.total, self.batch_size)
        return full + (rest > 0 and not self.drop_last and not self.grouped)

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
            int64 row numbers in the split, ordered by their place in the epoch's line; without
            repeats but where a step of a group was completed.

        Raises:
            ValueError: the epoch is negative, or it has no such step.
        """
        if epoch < 0:
            raise ValueError(f"epoch must be 0 or more, got {epoch}")
        size = self.global_size(step)
        if not self.shuffle:
            return np.arange(step * self.batch_size, step * self.batch_size + size)
        which, number = 0, step
        if self.grouped:
            lines, numbers = self._plan(epoch)
            which, number = int(lines[step]), int(numbers[step])
        line = self._lines(epoch)[which]
        end = min((number + 1) * self.batch_size, int(line.places[-1]))
        # A group's last step is completed by the rows that came just before: their shards are
        # still open. np.resize repeats the rows of a group that is smaller than a step.
        places = self._places(epoch, which, max(0, end - size), end)
        places = np.sort(np.resize(places, size))
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

    def stand_ins(self, shard: int, row: int) -> Int64s:
        """The rows of a shard that may take the place of one of them, the next one first.

        Those after it and then those before it, in groups those of its group; they depend on
        neither the epoch nor the ranks.
        """
        first, end = np.searchsorted(self._shard_of_batch, (shard, shard + 1))
        rows = np.arange(int(self._starts[end] - self._starts[first]))
        if self._group_of_batch is not None:
            groups = np.repeat(self._group_of_batch[first:end], self._rows[first:end])
            rows = rows[groups == groups[row]]
        return np.concatenate((rows[rows > row], rows[rows < row]))

    def _take_groups(
        self, batch_rows: Sequence[Sequence[int]], batch_groups: Sequence[Sequence[int]]
    ) -> None:
        if not self.shuffle:
            raise ValueError("groups need shuffle: an unshuffled order keeps the split's own")
        if [len(rows) for rows in batch_rows] != [len(groups) for groups in batch_groups]:
            raise ValueError("batch_groups must name one group for each record batch")
        groups = np.fromiter(itertools.chain.from_iterable(batch_groups), np.int64, len(self._rows))
        present = np.unique(groups).tolist()
        self._groups = tuple((group, int(self._rows[groups == group].sum())) for group in present)
        self._group_of_batch = groups

    def _places(self, epoch: int, which: int, begin: int, end: int) -> Int64s:
        """The places in a line of the rows that come as its `begin`-th to before its `end`-th."""
        windows = self._lines(epoch)[which].windows
        first = int(np.searchsorted(windows, begin, "right")) - 1
        last = int(np.searchsorted(windows, end, "left"))
        parts = []
        for window in range(first, last):
            start, stop = int(windows[window]), int(windows[window + 1])
            drawn = self._window(epoch, which, window)
            parts.append(drawn[max(begin - start, 0) : min(end, stop) - start])
        return np.concatenate(parts)

    def _draw_lines(self, epoch: int) -> tuple[_Line, ...]:
        """The epoch's line, or one for each group."""
        shard_rank = _random_ranks(len(self._shard_starts) - 1, self.seed, epoch, 0)
        batch_rank = _random_ranks(len(self._rows), self.seed, epoch, 1)
        # One sort by both: a third of the time of lexsort where there are millions.
        drawn = np.argsort(shard_rank[self._shard_of_batch] * len(self._rows) + batch_rank)
        if self._group_of_batch is None:
            return (self._make_line(drawn, (2,), self.window_rows),)
        group_of_drawn = self._group_of_batch[drawn]
        return tuple(
            # Windows of all groups together shuffle window_rows, so they use as many shards.
            self._make_line(
                drawn[group_of_drawn == group],
                (3, group),
                max(1, self.window_rows * rows // self.total),
            )
            for group, rows in self._groups
        )

    def _make_line(self, drawn: Int64s, key: tuple[int, ...], window_rows: int) -> _Line:
        places = _offsets(self._rows[drawn])
        first = np.flatnonzero(np.diff(places[:-1] // window_rows, prepend=-1))
        windows = np.append(places[first], places[-1])
        return _Line(key, self._starts[:-1][drawn], places, windows)

    def _draw_window(self, epoch: int, which: int, window: int) -> Int64s:
        """A window's places in its line, in the order in which its rows come."""
        line = self._lines(epoch)[which]
        begin, end = line.windows[window : window + 2]
        return begin + _random_ranks(int(end - begin), self.seed, epoch, *line.key, window)

    def _draw_plan(self, epoch: int) -> tuple[Int64s, Int64s]:
        """For each step of an epoch in groups: whose line it reads, and its number there."""
        counts = steps_of_groups([rows for _, rows in self._groups], self.batch_size, epoch)
        lines = np.repeat(np.arange(len(counts)), counts)
        numbers = np.concatenate([np.arange(count) for count in counts])
        # One step of a line at random in each of as many equal parts of the epoch.
        drawn = [
            _random_bits(count, (self.seed, epoch, 4, group)) >> np.uint64(11)
            for (group, _), count in zip(self._groups, counts, strict=True)
        ]
        within = np.concatenate(drawn).astype(np.float64) * 2.0**-53
        order = np.lexsort((lines, (numbers + within) / np.repeat(counts, counts)))
        return lines[order], numbers[order]


def _offsets(counts: Int64s) -> Int64s:
    return np.concatenate(([0], np.cumsum(counts, dtype=np.int64)))
