"""Reading ahead: shards opened before they are needed, samples decoded by a thread pool.

Everything is started by whoever asks for the next step, so there is no thread that decides, no
queue that can fill up and nothing to stop but the tasks that were started. While a step trains,
the tasks started for later steps run: fetches for about one shuffle window ahead, decoding for
`prefetch_steps` ahead, and for more while the next step waits for shards that others do not need.
"""

import contextlib
import itertools
import math
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sr4ir_dist import keyed
from sr4ir_dist.data.cache import OpenShard, ShardCache
from sr4ir_dist.data.order import Int64s, Order
from sr4ir_dist.data.pools import Pools
from sr4ir_dist.data.schema import DatasetError
from sr4ir_dist.data.shards import ShardReader
from sr4ir_dist.data.targets import Target, read_target
from sr4ir_dist.data.transforms import Transform, decode

# Limits on what one stream holds at once: open shards, and bytes of decoded steps.
_OPEN_SHARDS = 256
_DECODED_BYTES = 1 << 30
# While the next step waits for a shard, so many bytes of later ones are decoded out of the others.
_MEANWHILE_BYTES = 256 << 20
_LOOK_SECONDS = 0.05
# So many samples a thread is given at most in one go.
_AT_ONCE = 8


@dataclass(frozen=True)
class Sample:
    """One decoded and transformed sample.

    Attributes:
        image: uint8 3,H,W.
        target: the transform's target; None where none was asked for.
        id: the sample's name.
        row: its row number in the split.
    """

    image: Tensor
    target: Any
    id: str
    row: int

    @property
    def bytes(self) -> int:
        """How much memory its pixels take."""
        pixels = self.target.nbytes if isinstance(self.target, Tensor) else 0
        return self.image.nbytes + pixels


@dataclass(frozen=True)
class _Read:
    """A row's sample; where the row is bad a stand-in's or none, and the row and what is wrong."""

    sample: Sample | None
    bad: tuple[int, str] | None = None


_Wanted = tuple[Future[OpenShard], int, int, Tensor]
"""A row to read: its open shard, the shard's number, the row in it and its random numbers."""


class _BadRowError(DatasetError):
    """A row of a sound shard that cannot be decoded or transformed."""


@dataclass
class _Held:
    """An open shard, or one on its way, and the last step that is known to need it."""

    shard: Future[OpenShard]
    bytes: int
    last_step: int


@dataclass(frozen=True)
class _Step:
    """One step of this rank: its rows in the split, and of each its shard and its row there."""

    number: int
    rows: Int64s
    places: tuple[list[int], list[int]]


class Stream:
    """The samples of one rank for the rest of one epoch, step by step.

    An iterator of (rows, samples): int64 row numbers in the split and their samples in this
    order, both empty where the rank has no share. Errors of any thread are raised here. `close`
    it when it is not read to its end.

    Args:
        order: the split's order.
        cache: opens the split's shards.
        shard_bytes: the size of each shard.
        transform: applied to every sample.
        target: the kind of target to read, or None.
        pools: the threads to use; they outlive the stream.
        epoch: counts from 1.
        start_step: the first step to yield.
        rank: which share of each step.
        world_size: of how many shares.
        prefetch_steps: how many steps are decoded ahead, fewer where they would exceed 1 GiB; more,
            up to 256 MiB, while the next step waits for its shards.
        ahead_bytes: how many bytes of shards are fetched ahead.
        skip_bad: goes on where a row cannot be decoded or transformed: a row near it stands in,
            or where the order is not shuffled, it is left out.

    Attributes:
        bad_rows: the bad rows of the steps so far, and what is wrong with each.
    """

    def __init__(
        self,
        order: Order,
        cache: ShardCache,
        shard_bytes: tuple[int, ...],
        transform: Transform,
        target: Target | None,
        pools: Pools,
        *,
        epoch: int,
        start_step: int,
        rank: int,
        world_size: int,
        prefetch_steps: int,
        ahead_bytes: int,
        skip_bad: bool = False,
    ) -> None:
        self.bad_rows: dict[int, str] = {}
        self._skip_bad = skip_bad
        self._order, self._cache, self._pools = order, cache, pools
        self._shard_bytes, self._ahead_bytes = shard_bytes, ahead_bytes
        self._transform = transform
        self._target: Target | None = target
        self._epoch, self._rank, self._world_size = epoch, rank, world_size
        self._prefetch_steps = prefetch_steps
        self._scan_steps = prefetch_steps + order.window_rows // order.batch_size
        self._next_scan = self._next_step = start_step
        self._waiting: _Step | None = None  # looked at, but there was no room for its shards
        self._scanned: deque[_Step] = deque()
        self._decoding: deque[tuple[_Step, list[Future[list[_Read]]]]] = deque()
        self._held: dict[int, _Held] = {}
        self._held_bytes = 0
        self._sample_bytes = 0  # of the largest so far

    def __iter__(self) -> Iterator[tuple[Int64s, list[Sample]]]:
        """The stream itself."""
        return self

    def __next__(self) -> tuple[Int64s, list[Sample]]:
        """The next step's rows and samples.

        Raises:
            DatasetError: a shard cannot be fetched or is not what the manifest says, or a sample
                cannot be decoded or transformed; names the shard and its row range.
        """
        if self._next_step >= self._order.steps_per_epoch:
            self.close()
            raise StopIteration
        try:
            self._start_ahead()
            step, futures = self._decoding[0]
            while wait(futures, _LOOK_SECONDS if self._lacks_shards(step) else None).not_done:
                self._start_ahead()
            reads = [read for future in futures for read in future.result()]
            self._decoding.popleft()
            self._next_step += 1
            samples = [read.sample for read in reads if read.sample]
            rows = np.fromiter((sample.row for sample in samples), np.int64, len(samples))
            self.bad_rows |= dict(read.bad for read in reads if read.bad)
            self._release()
            # Once more, so that the threads have work while the caller trains on this step.
            self._start_ahead()
        except BaseException:
            self.close()
            raise
        return rows, samples

    def close(self) -> None:
        """Cancels what was started and closes the shards; what already runs ends by itself."""
        self._next_step = self._order.steps_per_epoch
        for _, futures in self._decoding:
            for future in futures:
                future.cancel()
        self._decoding.clear()
        self._scanned.clear()
        for held in self._held.values():
            _close_when_open(held.shard)
        self._held.clear()

    def _start_ahead(self) -> None:
        end = min(self._next_step + self._scan_steps, self._order.steps_per_epoch)
        while self._next_scan < end:
            step = self._waiting or self._look_at(self._next_scan)
            # The step that is wanted now must go on however little room there is.
            if not self._hold(step, needed=step.number == self._next_step):
                self._waiting = step
                break
            self._waiting = None
            self._scanned.append(step)
            self._next_scan += 1
        while self._scanned and (not self._decoding or self._may_decode_another()):
            self._start_decoding(self._scanned.popleft())

    def _may_decode_another(self) -> bool:
        # Sizes are known once a sample is there; until then one step at a time is safe.
        first = self._decoding[0][0]
        count = len(self._decoding) + 1
        size = count * len(first.rows) * self._sample_bytes
        if not size:
            return False
        if count <= self._prefetch_steps:
            return size <= _DECODED_BYTES
        return size <= _MEANWHILE_BYTES and self._lacks_shards(first)

    def _lacks_shards(self, step: _Step) -> bool:
        return any(not self._held[shard].shard.done() for shard in dict.fromkeys(step.places[0]))

    def _look_at(self, number: int) -> _Step:
        rows = self._order.share(self._epoch, number, self._rank, self._world_size)
        shards, local = self._order.locate(rows)
        return _Step(number, rows, (shards.tolist(), local.tolist()))

    def _hold(self, step: _Step, *, needed: bool) -> bool:
        """Opens the step's shards, unless they are open; False where there is no room."""
        touched = dict.fromkeys(step.places[0])
        new = [shard for shard in touched if shard not in self._held]
        wanted = sum(self._shard_bytes[shard] for shard in new)
        room = (
            self._held_bytes + wanted <= self._ahead_bytes
            and len(self._held) + len(new) <= _OPEN_SHARDS
        )
        if new and not room and not needed:
            return False
        for shard in new:
            opening = self._pools.fetch.submit(self._cache.open, shard)
            self._held[shard] = _Held(opening, self._shard_bytes[shard], step.number)
        self._held_bytes += wanted
        for shard in touched:
            self._held[shard].last_step = step.number
        return True

    def _release(self) -> None:
        """Closes the shards that no step looked at so far needs any more."""
        done = [shard for shard, held in self._held.items() if held.last_step < self._next_step]
        for shard in done:
            held = self._held.pop(shard)
            self._held_bytes -= held.bytes
            _close_when_open(held.shard)

    def _start_decoding(self, step: _Step) -> None:
        # Keyed by row, hence drawn for the whole share at once whatever thread decodes it.
        draws = keyed.uniform(
            self._order.seed,
            self._epoch,
            torch.from_numpy(step.rows),
            self._transform.draws,
            "augment",
        )
        wanted = [
            (self._held[shard].shard, shard, row, draws[index])
            for shard, row, index in zip(*step.places, range(len(step.rows)), strict=True)
        ]
        # Handing over several at once costs the threads less than the decoding of a single one.
        several = min(_AT_ONCE, math.ceil(len(wanted) / self._pools.threads)) or 1
        futures = [
            self._decoded(part[start : start + several])
            # A step's rows lie shard by shard.
            for _, group in itertools.groupby(wanted, key=lambda each: each[1])
            for part in (list(group),)
            for start in range(0, len(part), several)
        ]
        self._decoding.append((step, futures))

    def _decoded(self, wanted: list[_Wanted]) -> Future[list[_Read]]:
        """Samples of one shard, decoded when it is open: a thread must not wait for it."""
        promise: Future[list[_Read]] = Future()

        def start(opening: Future[OpenShard]) -> None:
            try:
                self._pools.decode.submit(self._keep, promise, wanted)
            except RuntimeError:  # the threads were ended
                promise.cancel()

        wanted[0][0].add_done_callback(start)
        return promise

    def _keep(self, promise: Future[list[_Read]], wanted: list[_Wanted]) -> None:
        if not promise.set_running_or_notify_cancel():
            return
        try:
            reads = [
                self._read(opening.result().reader, shard, row, draws)
                for opening, shard, row, draws in wanted
            ]
            sizes = [read.sample.bytes for read in reads if read.sample]
            self._sample_bytes = max(self._sample_bytes, *sizes, 0)
            promise.set_result(reads)
        except BaseException as error:
            promise.set_exception(error)

    def _read(self, reader: ShardReader, shard: int, row: int, draws: Tensor) -> _Read:
        try:
            return _Read(self._sample(reader, shard, row, draws))
        except _BadRowError as error:
            if not self._skip_bad:
                raise
            bad = self._order.shard_start(shard) + row, str(error)
            if not self._order.shuffle:
                return _Read(None, bad)
            for other in self._order.stand_ins(shard, row).tolist():
                with contextlib.suppress(_BadRowError):
                    return _Read(self._sample(reader, shard, other, draws), bad)
            raise DatasetError(f"no row of the shard can stand in for {error}") from error

    def _sample(self, reader: ShardReader, shard: int, row: int, draws: Tensor) -> Sample:
        record = reader.row(row, mapped=True)
        place = self._order.shard_start(shard) + row
        try:
            target = read_target(record, self._target, place)
            image, target = self._transform(decode(record["image"]), target, draws)
        except (ValueError, RuntimeError) as error:
            raise _BadRowError(
                f"sample {record['id']!r}, row {place}, in {self._cache.describe(shard)}: {error}"
            ) from error
        target = _compact(target) if isinstance(target, Tensor) else target
        return Sample(_compact(image), target, record["id"], place)


def _compact(pixels: Tensor) -> Tensor:
    """The pixels alone: a crop's view would keep the whole image in memory until its step."""
    if pixels.untyped_storage().nbytes() == pixels.nbytes:
        return pixels
    if pixels.dim() == 2:
        return pixels.contiguous()
    return pixels.permute(1, 2, 0).contiguous().permute(2, 0, 1)


def _close_when_open(opening: Future[OpenShard]) -> None:
    def close(done: Future[OpenShard]) -> None:
        if not done.cancelled() and done.exception() is None:
            done.result().close()

    opening.cancel()
    opening.add_done_callback(close)
