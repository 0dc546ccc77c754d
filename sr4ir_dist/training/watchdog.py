"""Who keeps the others waiting: what each rank was last seen doing."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from types import TracebackType

import torch.distributed as dist
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

_STORE_TIMEOUT = timedelta(seconds=10)
_GATHER_S = 1.0


class LostRankError(RuntimeError):
    """A rank did not come to a collective in time; the message names it and where it was seen."""


@dataclass(frozen=True)
class Sighting:
    """What a rank was last seen doing.

    Attributes:
        where: its node and process, for people.
        step: steps of the run that it has done.
        doing: the part of the step, or what else.
        since: when it began that, in seconds of the epoch.
        seen: when it said so last.
    """

    where: str
    step: int
    doing: str
    since: float
    seen: float


class Watchdog:
    """Keeps a list of what every rank is doing, beside the collectives; a context manager.

    A thread of each rank reports to a key-value store on rank 0. Collectives give up by themselves
    at their own limit; what they say then does not name anyone, and this does. A rank that does the
    same for nearly as long says so, and where the others are.

    Args:
        rank: this process among those that train.
        world_size: how many they are.
        address: of this rank's node, as the others reach it.
        limit_s: how long ranks wait for one another.
        say: is told that this rank has not come further for long.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        *,
        address: str,
        limit_s: float,
        say: Callable[[str], None],
    ) -> None:
        self._rank, self._world_size = rank, world_size
        self._limit_s, self._say = limit_s, say
        self._where = f"{address}, process {os.getpid()}"
        self._step, self._doing, self._since = 0, "starting", time.time()
        self._told = 0.0
        self._beat_s = min(5.0, limit_s / 5)
        self._store = _store(rank, address) if world_size > 1 else None
        self._beat()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        """Begins to watch."""
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Ends watching.

        Raises:
            LostRankError: the error that leaves the context came from a collective.
        """
        self._ended.set()
        self._thread.join()
        if error is not None and from_collective(error):
            raise LostRankError(f"{self.missing()} ({_first_line(error)})") from error

    def entered(self, doing: str, step: int) -> None:
        """Note what this rank does now."""
        self._step, self._doing, self._since = step, doing, time.time()

    def missing(self) -> str:
        """Who is not where this rank is, or does not answer, in words."""
        here = self._sighting()
        try:
            # Where one dies, the others get here in the same moment: let them say where they are.
            self._beat()
            time.sleep(_GATHER_S)
            others = self._others()
        except RuntimeError:
            return f"rank 0 does not answer rank {self._rank} ({self._where}) at step {here.step}"
        late = self._elsewhere(here, others)
        if not late:
            return (
                f"every rank is at step {here.step} ({here.doing}), and rank {self._rank} does not "
                "hear from them: the network between them may be cut"
            )
        return f"rank {self._rank} at step {here.step} ({here.doing}) waited in vain for {late}"

    def _elsewhere(self, here: Sighting, others: dict[int, Sighting]) -> str:
        return "; ".join(
            f"rank {rank} ({other.where}), last heard of {here.seen - other.seen:.0f} s ago at "
            f"step {other.step}, {other.doing} for {other.seen - other.since:.0f} s"
            for rank, other in others.items()
            if (other.step, other.doing) != (here.step, here.doing)
            or here.seen - other.seen > 3 * self._beat_s
        )

    def _sighting(self) -> Sighting:
        return Sighting(self._where, self._step, self._doing, self._since, time.time())

    def _beat(self) -> None:
        if self._store is not None:
            self._store.set(str(self._rank), json.dumps(asdict(self._sighting())))

    def _others(self) -> dict[int, Sighting]:
        if self._store is None:
            return {}
        ranks = [rank for rank in range(self._world_size) if rank != self._rank]
        told = self._store.multi_get([str(rank) for rank in ranks])
        return {rank: Sighting(**json.loads(each)) for rank, each in zip(ranks, told, strict=True)}

    def _watch(self) -> None:
        answers = True
        while not self._ended.wait(self._beat_s):
            try:
                if answers:
                    self._beat()
            except RuntimeError:
                # Rank 0 has gone, and with it the list; whoever waits for rank 0 tells of it.
                answers = False
            # Before the limit, at which NCCL may end the process without an error to catch.
            if time.time() - self._since > 0.9 * self._limit_s and self._told != self._since:
                self._told = self._since
                self._tell()

    def _tell(self) -> None:
        here, others = self._sighting(), ""
        with suppress(RuntimeError):
            others = self._elsewhere(here, self._others())
        doing = f"{here.doing} for {here.seen - here.since:.0f} s"
        meanwhile = f"; meanwhile {others}" if others else ""
        self._say(f"rank {self._rank} ({self._where}), step {here.step}: {doing}{meanwhile}")


def from_collective(error: BaseException) -> bool:
    """Whether an error says no more than that another rank, or the group of them, was lost."""
    if isinstance(error, LostRankError | dist.DistError):
        return True
    text = str(error)
    if isinstance(error, ValueError):
        # Ray takes it from ranks that still train, when it ends them for another one.
        return "process group has not been initialized" in text
    if any(kind.__name__ == "CollectiveTimeoutError" for kind in type(error).__mro__):
        return True  # Ray Train's, of which it makes no public name
    marks = ("gloo", "Gloo", "NCCL", "Connection closed by peer")
    return isinstance(error, RuntimeError) and any(mark in text for mark in marks)


def _store(rank: int, address: str) -> TCPStore:
    """A store of our own: the process group's is busy while a group is made."""
    place: list[tuple[str, int] | None] = [None]
    store = None
    if rank == 0:
        store = TCPStore(address, 0, is_master=True, wait_for_workers=False, timeout=_STORE_TIMEOUT)
        place = [(address, store.port)]
    dist.broadcast_object_list(place, src=0)
    assert place[0] is not None
    return store or TCPStore(*place[0], is_master=False, timeout=_STORE_TIMEOUT)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
