"""Time and traffic of a training step at several numbers of ranks, on this machine.

The real training loop runs on DeepSpeed engines in plain processes (gloo over loopback, CPU); see
`watch.py` for what is wrapped. How a step is split:

- *data*: the loop waits for its loader.
- *waiting* and *transfer*: the time inside collectives. A collective begins when the last rank
  enters it: before that this rank waits, which is told from the ranks' start times, because all
  processes of a machine read one monotonic clock; no barrier is put in, so nothing is disturbed.
- *compute*: all the rest, the loop's bookkeeping included.

Traffic is what the kernel counted on this process's TCP connections (`sockets.py`) from the start
to the end of each phase, next to the least that the phase needs.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from sr4ir_dist import recipes, storage
from sr4ir_dist.benchmark.processes import run_ranks
from sr4ir_dist.benchmark.scaling_rank import Request
from sr4ir_dist.benchmark.watch import LARGE_BYTES
from sr4ir_dist.config import Experiment, ExperimentError
from sr4ir_dist.data.convert.drawn import DRAWN, open_drawn
from sr4ir_dist.data.convert.write import convert
from sr4ir_dist.data.splits import open_split
from sr4ir_dist.overrides import override
from sr4ir_dist.training.build import build_networks
from sr4ir_dist.training.engines import build_cpu_operator, cpu_operator

_DRAWN_IMAGES = 512


@dataclass(frozen=True)
class Times:
    """Where a step's seconds go, as means over ranks and medians over steps.

    Attributes:
        step: from one request for a batch to the next.
        compute: outside of collectives and loader.
        transfer: in collectives that all ranks have entered.
        waiting: in collectives that another rank has not entered yet.
        data: waiting for the loader.
    """

    step: float
    compute: float
    transfer: float
    waiting: float
    data: float

    @property
    def communication(self) -> float:
        """Seconds in collectives."""
        return self.transfer + self.waiting


@dataclass(frozen=True)
class Traffic:
    """Bytes that each rank sends in a phase of a step, on average over ranks.

    Attributes:
        updates: the networks that the phase updates.
        measured: what the kernel counted.
        gradients: the least for these networks' gradients in float32: 2(n-1)/n of their bytes.
        batch_norm: the least for synchronised batch norm's statistics and their gradients.
        other: the least for what else the phase's collectives hold.
    """

    updates: tuple[str, ...]
    measured: float
    gradients: float
    batch_norm: float
    other: float

    @property
    def rest(self) -> float:
        """Headers, and what the collectives send beyond the least."""
        return self.measured - self.gradients - self.batch_norm - self.other


@dataclass(frozen=True)
class Run:
    """One run of several ranks.

    Attributes:
        ranks: how many.
        times: of a step.
        phases: each phase's traffic.
        outside: bytes a rank must send at least in collectives outside of the phases.
        calls: collectives of a step.
        link: seconds of the smallest all-reduce (a mean) and bytes/s that each rank sends in a
            large one (a median), without waiting; None for one rank.
        load: the machine's load average before the run.
    """

    ranks: int
    times: Times
    phases: tuple[Traffic, ...]
    outside: float
    calls: int
    link: tuple[float, float] | None
    load: float


def prepare(experiment: Experiment, data: Sequence[str]) -> Experiment:
    """The experiment as it is measured.

    No step is before the end of a warm-up, so that every loss is there. Networks start at random,
    with learning rates that leave them there: what a step costs does not depend on the weights,
    except for how many boxes a detector proposes.

    Raises:
        ValueError: the dataset is not for the experiment's task, or its recipe trains nothing.
    """
    recipe = recipes.get(experiment.recipe)
    if not recipe.phases:
        raise ExperimentError(f"recipe {experiment.recipe} trains nothing: pick one that does")
    settings = ["warmup_epochs=0", "lr_warmup_epochs=0", "evaluation.lpips=null"]
    settings += [f"optimizers.{role}.lr_floor=0" for role in ("sr", "task")]
    settings += [f"optimizers.{role}.lr=1e-6" for role in ("sr", "task")]
    manifest = open_split(data, "train").manifest
    if experiment.task is not None:
        if experiment.task.name not in manifest.tasks:
            raise ExperimentError(
                f"experiment {experiment.name} needs a dataset for {experiment.task.name}, but "
                f"this one is for {', '.join(manifest.tasks)}"
            )
        if experiment.task.classes is None:
            settings.append(f"task.classes={len(manifest.class_names)}")
    return override(experiment, settings)


@contextmanager
def drawn_data(
    experiment: Experiment, *, images: int = _DRAWN_IMAGES, whole: int = 64
) -> Iterator[str]:
    """A drawn dataset in a temporary folder, of the size that the experiment's images are cut to.

    Args:
        experiment: what to draw for.
        images: of the training split.
        whole: side in pixels where images are not cut, as for detection.
    """
    settings = experiment.data
    size = settings.shrink or (whole if settings.transform == "flip" else settings.resize)
    with tempfile.TemporaryDirectory() as folder:
        uri = str(Path(folder, "data"))
        convert(DRAWN, open_drawn(train_count=images, val_count=8, size=max(32, size)), uri)
        yield uri


def measure(
    experiment: Experiment,
    data: Sequence[str],
    *,
    ranks: Sequence[int],
    steps: int,
    warm_up: int,
    repeats: int,
    threads: int,
    say: Callable[[str], None],
) -> list[Run]:
    """Run each number of ranks several times, in turn: a slow spell of the machine falls on all.

    Args:
        experiment: as `prepare` returns it.
        data: the dataset.
        ranks: numbers of ranks; the global batch is the experiment's at each of them.
        steps: measured in each run.
        warm_up: steps before them.
        repeats: runs of each number of ranks.
        threads: of each rank's networks.
        say: told what happens.

    Raises:
        RankError: a rank failed; the end of its log is told.
        ValueError: a number of ranks is below one.
    """
    if not ranks or min(ranks) < 1:
        raise ValueError(f"ranks {list(ranks)}: expected numbers of 1 or more")
    if cpu_operator() is None:
        say("building DeepSpeed's CPU operator")
        build_cpu_operator()
    gradient_bytes = trainable_bytes(experiment)
    runs = []
    for repeat in range(repeats):
        for count in ranks:
            load = os.getloadavg()[0]
            with tempfile.TemporaryDirectory() as folder:
                request = Request(
                    experiment.model_dump_json(),
                    tuple(map(storage.absolute, data)),
                    count,
                    warm_up + steps,
                    threads,
                    folder,
                )
                records = run_ranks(
                    "sr4ir_dist.benchmark.scaling_rank",
                    json.dumps(asdict(request)),
                    ranks=count,
                    threads=threads,
                    folder=folder,
                )
            run = combine(experiment, records, gradient_bytes, warm_up=warm_up, load=load)
            runs.append(run)
            say(
                f"run {repeat + 1} of {repeats}, {count} ranks: {1e3 * run.times.step:,.0f} ms a "
                f"step, {1e3 * run.times.communication:,.0f} ms of it in {run.calls} collectives"
            )
    return runs


def time_loop(
    experiment: Experiment,
    data: Sequence[str],
    images: int,
    *,
    ranks: int,
    threads: int,
    steps: int,
    warm_up: int,
    say: Callable[[str], None],
) -> Run:
    """One run of `measure`, with so many images on each rank; ranks share the threads."""
    prepared = prepare(override(experiment, [f"batch_size={images * ranks}"]), data)
    options = {"steps": steps, "warm_up": warm_up, "repeats": 1}
    share = max(1, threads // ranks)
    (run,) = measure(prepared, data, ranks=[ranks], threads=share, **options, say=say)
    return run


def trainable_bytes(experiment: Experiment) -> dict[str, int]:
    """Bytes of each network's trainable parameters in float32."""
    return {
        name: 4 * sum(p.numel() for p in module.parameters() if p.requires_grad)
        for name, module in build_networks(experiment).items()
    }


def combine(
    experiment: Experiment,
    records: Sequence[Mapping[str, Any]],
    gradient_bytes: Mapping[str, int],
    *,
    warm_up: int,
    load: float,
) -> Run:
    """A run's figures from what its ranks recorded."""
    count = len(records)
    steps = list(zip(*(record["steps"][warm_up:] for record in records), strict=True))
    phases = recipes.get(experiment.recipe).phases
    least = {
        (number, kind): statistics.median(_least(step, number, kind) for step in steps)
        for number in (*range(len(phases)), None)
        for kind in ("gradients", "batch_norm", "other")
    }
    traffic = tuple(
        Traffic(
            phase.updates,
            statistics.median(statistics.fmean(r["sent"][number] for r in step) for step in steps),
            sum(2 * (count - 1) / count * gradient_bytes[role] for role in phase.updates),
            least[number, "batch_norm"],
            least[number, "other"],
        )
        for number, phase in enumerate(phases)
    )
    times = [split_times(step) for step in steps]
    return Run(
        count,
        median(times),
        traffic,
        sum(least[None, kind] for kind in ("gradients", "batch_norm", "other")),
        round(statistics.median(len(step[0]["calls"]) for step in steps)),
        _link([record["link"] for record in records]) if count > 1 else None,
        load,
    )


def split_times(step: Sequence[Mapping[str, Any]]) -> Times:
    """Where the seconds of one step go, as means over its ranks."""
    totals, transfers, waits, data = [], [], [], []
    # Every rank makes the same calls in the same order.
    last_starts = [
        max(call["start"] for call in calls)
        for calls in zip(*(rank["calls"] for rank in step), strict=True)
    ]
    for rank in step:
        transfer = wait = 0.0
        for call, last in zip(rank["calls"], last_starts, strict=True):
            # A rank whose part is done without the last one has not waited for it.
            begins = min(max(last, call["start"]), call["end"])
            wait += begins - call["start"]
            transfer += call["end"] - begins
        totals.append(rank["ended"] - rank["began"])
        transfers.append(transfer)
        waits.append(wait)
        data.append(rank["ready"] - rank["began"])
    total, transfer, wait, waited = map(statistics.fmean, (totals, transfers, waits, data))
    return Times(total, total - transfer - wait - waited, transfer, wait, waited)


def _link(links: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    seconds = {
        name: [
            statistics.fmean(end for _, end in calls) - max(start for start, _ in calls)
            for calls in zip(*(link[name] for link in links), strict=True)
        ]
        for name in ("tiny", "large")
    }
    sent = 2 * (len(links) - 1) / len(links) * LARGE_BYTES
    return statistics.fmean(seconds["tiny"]), sent / statistics.median(seconds["large"])


def median(times: Sequence[Times]) -> Times:
    """The median of each part; so the parts need not add up to the step."""
    return Times(
        *(statistics.median(getattr(t, field.name) for t in times) for field in fields(Times))
    )


def _least(step: Sequence[Mapping[str, Any]], phase: int | None, kind: str) -> float:
    return sum(
        call["least"]
        for call in step[0]["calls"]
        if call["phase"] == phase and call["kind"] == kind
    )
