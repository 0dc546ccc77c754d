"""Which samples each rank stepped on, told by the ranks themselves.

As a program it is `jobs/train.py` whose workers note each step in files of their own:

    python step_records.py FOLDER ARGUMENTS...

While FOLDER/pace is there, they rest for so many seconds after each step, so that faults meet a run
that is training.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

JOB = Path(__file__).parents[2] / "jobs" / "train.py"


@dataclass(frozen=True)
class Step:
    """What one rank did in one step.

    Attributes:
        attempt: one start of all ranks; later ones sort after earlier ones.
        rank: of `ranks` in that attempt.
        ranks: how many there were.
        step: the step of the run, from 1.
        ids: the samples, none where the rank had no share.
        time: when it was done, in seconds since 1970.
    """

    attempt: str
    rank: int
    ranks: int
    step: int
    ids: tuple[str, ...]
    time: float


def applied(steps: Iterable[Step]) -> dict[int, list[Step]]:
    """The steps that a run's final state is made of, with what each rank did in them.

    An attempt goes on from a checkpoint, so whatever earlier attempts did from its first step on is
    lost. One that did no step changes nothing.
    """
    attempts: dict[str, list[Step]] = {}
    for step in steps:
        attempts.setdefault(step.attempt, []).append(step)
    kept: dict[int, list[Step]] = {}
    for name in sorted(attempts):
        first = min(step.step for step in attempts[name])
        kept = {number: ranks for number, ranks in kept.items() if number < first}
        for step in attempts[name]:
            kept.setdefault(step.step, []).append(step)
    return {number: sorted(kept[number], key=lambda each: each.rank) for number in sorted(kept)}


def samples(ranks: Iterable[Step]) -> list[str]:
    """The samples of a step over all ranks, sorted.

    Raises:
        ValueError: a rank is missing, or there twice.
    """
    ranks = list(ranks)
    if sorted(each.rank for each in ranks) != list(range(ranks[0].ranks)):
        present = [each.rank for each in ranks]
        raise ValueError(f"step {ranks[0].step} has ranks {present} of {ranks[0].ranks}")
    return sorted(name for each in ranks for name in each.ids)


def read(folder: Path) -> list[Step]:
    """All steps noted so far, by time; a line that is being written is left out."""
    found = []
    for path in folder.glob("*.jsonl"):
        for line in path.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                fields = json.loads(line)
                found.append(Step(**fields | {"ids": tuple(fields["ids"])}))
    return sorted(found, key=lambda step: step.time)


def recorded(
    worker: Callable[[dict[str, Any]], Any], folder: str
) -> Callable[[dict[str, Any]], Any]:
    """A worker function that notes its steps in a file of its own in a folder."""

    def run(config: dict[str, Any]) -> Any:
        import torch.distributed as dist

        from sr4ir_dist.training.loop import LossLog
        from sr4ir_dist.training.saving import shared

        rank, ranks = dist.get_rank(), dist.get_world_size()
        attempt = shared(lambda: f"{time.time_ns()}-{os.getpid()}", rank)
        add, pace = LossLog.add, Path(folder, "pace")
        with Path(folder, f"{attempt}-{rank}.jsonl").open("a") as file:

            def note(log: LossLog, step: int, ids: tuple[str, ...], terms: Any) -> None:
                add(log, step, ids, terms)
                line = {"attempt": attempt, "rank": rank, "ranks": ranks, "step": step}
                print(json.dumps(line | {"ids": ids, "time": time.time()}), file=file, flush=True)
                os.fsync(file.fileno())
                if pace.exists():
                    time.sleep(float(pace.read_text()))

            # The loop calls it once for each step, as soon as the networks are updated.
            LossLog.add = note
            return worker(config)

    return run


if __name__ == "__main__":
    from sr4ir_dist.training import launch

    _, into, *arguments = sys.argv
    launch.run_worker = recorded(launch.run_worker, into)
    sys.argv = [str(JOB), *arguments]
    runpy.run_path(str(JOB), run_name="__main__")
