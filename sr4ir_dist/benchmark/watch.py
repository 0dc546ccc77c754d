"""Watches a rank while it trains: when it computes, communicates and waits for data.

The training loop itself runs, unchanged; its collectives, its phases and its loader are wrapped
from outside, in this process alone.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from itertools import chain, count
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from sr4ir_dist.batch import Batch
from sr4ir_dist.benchmark.sockets import bytes_sent
from sr4ir_dist.data.loader import Loader
from sr4ir_dist.recipes import Phase
from sr4ir_dist.training import step as training_step
from sr4ir_dist.training.views import Setup

Kind = Literal["gradients", "batch_norm", "other"]
LARGE_BYTES = 32_000_000
"""Of the large all-reduces of `link`."""

_COLLECTIVES = (
    "all_reduce",
    "all_gather",
    "all_gather_single",
    "all_gather_into_tensor",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "reduce",
    "broadcast",
    "barrier",
    "all_gather_object",
    "broadcast_object_list",
)
# Who calls tells what for.
_KINDS: dict[str, Kind] = {
    "deepspeed": "gradients",
    "sr4ir_dist.training.batch_norm": "batch_norm",
    "torch.nn.modules._functions": "batch_norm",
}


@dataclass(frozen=True)
class Call:
    """One collective of a rank.

    Attributes:
        start: on the machine's monotonic clock, in seconds, which its processes share.
        end: when it returned.
        phase: index of the recipe's phase; None outside of them.
        kind: what it was for.
        least: bytes that a rank must send at least for it, on average over ranks.
    """

    start: float
    end: float
    phase: int | None
    kind: Kind
    least: float


@dataclass
class Step:
    """One training step of a rank; times on the machine's monotonic clock in seconds.

    Attributes:
        began: the loop asked for a batch.
        ready: it got one.
        ended: it asks for the next one.
        sent: bytes sent in each phase of the recipe.
        calls: the collectives, in their order, the same on all ranks.
    """

    began: float
    ready: float
    ended: float = 0.0
    sent: list[int] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)


class Enough(Exception):  # noqa: N818, it is no error
    """Ends the loop when as many steps as wanted have been watched."""


class Watch:
    """Records the steps of this rank while `installed`."""

    def __init__(self) -> None:
        """Nothing recorded yet."""
        self.steps: list[Step] = []
        self._phase: int | None = None
        self._before = 0

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Wrap torch's collectives and the step's phases.

        Must be open before the engines are made, because DeepSpeed keeps some of the functions.
        """
        originals = {name: getattr(dist, name) for name in _COLLECTIVES if hasattr(dist, name)}
        try:
            for name, original in originals.items():
                setattr(dist, name, self._timed(name, original))
            with watch_phases(self._enter, self._leave):
                yield
        finally:
            for name, original in originals.items():
                setattr(dist, name, original)

    def loader(self, loader: Loader, steps: int) -> WatchedLoader:
        """A loader that tells this watch of every batch, and ends the loop after so many steps."""
        return WatchedLoader(self, loader, steps)

    def _timed(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            caller = sys._getframe(1).f_globals["__name__"]
            start = time.perf_counter()
            work = original(*args, **kwargs)
            if isinstance(work, dist.Work):
                work.wait()
            if self.steps:
                least = _least_bytes(name, (*args, *kwargs.values()), dist.get_world_size())
                self.steps[-1].calls.append(
                    Call(start, time.perf_counter(), self._phase, _kind(caller), least)
                )
            return work

        return timed

    def _enter(self, phase: int) -> None:
        self._phase, self._before = phase, bytes_sent()

    def _leave(self, phase: int) -> None:
        self.steps[-1].sent.append(bytes_sent() - self._before)
        self._phase = None


class WatchedLoader:
    """Stands in for a rank's loader in the training loop: one long epoch of all its epochs."""

    def __init__(self, watch: Watch, loader: Loader, steps: int) -> None:
        """Nothing is read yet."""
        self._watch, self._loader, self._steps = watch, loader, steps
        self.steps_per_epoch = steps + 1  # so that the loop never comes to its evaluation
        self.bad_rows: frozenset[int] = frozenset()

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """The batches, and then `Enough`."""
        watch = self._watch
        batches = chain.from_iterable(map(self._loader.epoch, count(1)))
        for _ in range(self._steps):
            began = time.perf_counter()
            batch = next(batches)
            watch.steps.append(Step(began, time.perf_counter()))
            yield batch
            watch.steps[-1].ended = time.perf_counter()
        raise Enough


@contextmanager
def watch_phases(enter: Callable[[int], None], leave: Callable[[int], None]) -> Iterator[None]:
    """Call these at the start and at the end of each phase of a step, with the phase's index."""
    original = training_step.only_trainable

    @contextmanager
    def watched(setup: Setup, phase: Phase) -> Iterator[None]:
        number = setup.recipe.phases.index(phase)
        with original(setup, phase):
            enter(number)
            yield
            leave(number)

    _replace_phases(watched)
    try:
        yield
    finally:
        _replace_phases(original)


def _replace_phases(function: Callable[[Setup, Phase], AbstractContextManager[None]]) -> None:
    training_step.only_trainable = function  # pyright: ignore[reportAttributeAccessIssue]


def _kind(caller: str) -> Kind:
    return _KINDS.get(caller) or _KINDS.get(caller.split(".")[0]) or "other"


def _least_bytes(name: str, values: tuple[Any, ...], ranks: int) -> float:
    """What a rank must send on average; of Python objects and barriers nothing is counted."""
    tensors = [v for v in values if isinstance(v, Tensor)]
    if not tensors or ranks == 1:
        return 0.0
    sizes = [tensor.numel() * tensor.element_size() for tensor in tensors]
    if name.startswith("all_gather"):
        return (ranks - 1) * min(sizes)
    once = max(sizes) * (ranks - 1) / ranks
    return 2 * once if name == "all_reduce" else once


def link() -> dict[str, list[tuple[float, float]]]:
    """Starts and ends of all-reduces of 4 bytes and of `LARGE_BYTES`; every rank must call it.

    There is compute between them, as in a step: a process that does nothing but communicate
    answers sooner.
    """
    matrix = torch.rand(256, 256)

    def calls(tensor: Tensor, times: int) -> list[tuple[float, float]]:
        taken = []
        for _ in range(times):
            for _ in range(4):
                matrix.matmul(matrix)
            start = time.perf_counter()
            dist.all_reduce(tensor)
            taken.append((start, time.perf_counter()))
        return taken

    return {"tiny": calls(torch.zeros(1), 200), "large": calls(torch.zeros(LARGE_BYTES // 4), 9)}
