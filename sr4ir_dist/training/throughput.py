"""Where a rank's time goes: waiting for data, each phase; and what of memory it takes."""

from __future__ import annotations

import resource
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from sr4ir_dist.batch import Batch

DATA = "data"
"""The part of a step in which a rank waits for its images."""
SAVING = "saving"
"""What lies between two steps and counts for neither."""
PHASES = ("phase 1", "phase 2")


class Meter:
    """Times the parts of steps, on this rank, until they are read for all ranks.

    On a GPU phases are timed by its own events, which cost no synchronisation.

    Args:
        device: where the networks are.
        world_size: how many ranks train together.
        entered: is told which part begins, in words.
    """

    def __init__(
        self,
        device: torch.device,
        world_size: int = 1,
        entered: Callable[[str], None] = lambda part: None,
    ) -> None:
        self._device, self._world_size = device, world_size
        self._entered = entered
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._images = self._steps = 0
        self._started = time.perf_counter()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time what happens inside as a part of the step, one of `DATA`, `PHASES` and `SAVING`."""
        self._entered(name)
        if self._device.type == "cuda" and name in PHASES:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._events.append((name, begin, end))
            return
        started = time.perf_counter()
        yield
        self._seconds[name] += time.perf_counter() - started

    def batches(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The same batches; waiting for them is timed and their images are counted."""
        batches = iter(batches)
        while True:
            with self.part(DATA):
                batch = next(batches, None)
            if batch is None:
                return
            self._images += batch.global_size
            self._steps += 1
            yield batch

    def pause(self) -> None:
        """Begin anew, so that what lies between two steps counts for none of them."""
        self._seconds.clear()
        self._events.clear()
        self._images = self._steps = 0
        self._started = time.perf_counter()

    def read(self) -> dict[str, float]:
        """Figures of the steps since the last call or `pause`; every rank must call it.

        Returns:
            `images_per_second` over all ranks; seconds per step in `data_wait` and `phase_1`,
            `phase_2`, each of the rank with the most; `data_wait_rank`, which one waited longest;
            `memory_gib`, the most that a rank held at any time (of the GPU's, or of the process).
        """
        elapsed = time.perf_counter() - self._started - self._seconds[SAVING]
        if self._events:
            torch.cuda.synchronize(self._device)
        for name, begin, end in self._events:
            self._seconds[name] += begin.elapsed_time(end) / 1000
        steps = max(1, self._steps)
        own = [*(self._seconds[name] / steps for name in (DATA, *PHASES)), _memory(self._device)]
        every = torch.tensor([own])
        if self._world_size > 1:
            every = every.to(self._device)
            parts = [torch.empty_like(every) for _ in range(self._world_size)]
            dist.all_gather(parts, every)
            every = torch.cat(parts).cpu()
        most = every.max(0).values.tolist()
        figures = {
            "images_per_second": self._images / elapsed,
            "data_wait": most[0],
            "data_wait_rank": int(every[:, 0].argmax()),
            "phase_1": most[1],
            "phase_2": most[2],
            "memory_gib": most[3],
        }
        self.pause()
        return figures


def _memory(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
