"""The scaling model on real figures: this machine, to check it, and clusters of GPUs."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

from sr4ir_dist import experiments
from sr4ir_dist.benchmark import scaling
from sr4ir_dist.benchmark.scaling import Run
from sr4ir_dist.benchmark.scaling_model import (
    Cluster,
    PhaseWork,
    Prediction,
    predict,
    smallest_batch,
)
from sr4ir_dist.benchmark.scaling_work import CLASSES, VOC_SIDE, count_work
from sr4ir_dist.config import Experiment
from sr4ir_dist.overrides import override

DGX_H100 = Cluster(
    # Assumed: a tenth of the datasheet's 989 TFLOP/s (bf16, dense), for small convolutions.
    flops=99e12,
    # Assumed: PyTorch in eager mode.
    launch_s=5e-6,
    gpus_per_node=8,
    # 450 GB/s on the datasheet, of which NCCL's rings get 370 (NVIDIA/nccl-tests issue 212).
    inside_bytes_s=370e9,
    # Eight adapters of 400 Gbit/s, each of which gives 46 to 48 GB/s (nccl-tests issue 290).
    between_bytes_s=8 * 46e9,
    # The constants of NCCL's own tuning model (src/graph/tuning.cc), rounded up.
    call_s=5e-6,
    inside_s=1e-6,
    between_s=5e-6,
    # Assumed: 8 ranks with 8 decoding threads at 500 images/s, as measured on two virtual cores.
    images_s=32_000,
)
"""Nodes of eight H100, by datasheets and by what others measured; nothing of it was measured here.
"""


@dataclass(frozen=True)
class Check:
    """A measured step next to what the model says of it, in seconds.

    Attributes:
        ranks: how many.
        measured: compute, transfer and data; waiting is not in the model.
        predicted: from this machine's own compute and link.
    """

    ranks: int
    measured: float
    predicted: float

    @property
    def error(self) -> float:
        """Of the prediction, as a part of what was measured."""
        return self.predicted / self.measured - 1


def this_machine(
    phases: Sequence[PhaseWork],
    batch: int,
    whole: scaling.Times,
    share: scaling.Times,
    share_batch: int,
    link: tuple[float, float],
    link_ranks: int,
) -> Cluster:
    """This machine as the model knows one: a node without end, whose cores are its GPUs.

    Args:
        phases: the measured experiment's work.
        batch: its global batch.
        whole: times of one rank at that batch.
        share: times of one rank at a smaller one, to tell what a step costs without images.
        share_batch: the smaller one.
        link: of a run, as `Run` has it.
        link_ranks: of that run.
    """
    an_image = (whole.compute - share.compute) / (batch - share_batch)
    assert an_image > 0
    latency, rate = link
    return Cluster(
        flops=sum(phase.flops for phase in phases) / an_image,
        launch_s=0.0,
        gpus_per_node=1 << 30,
        inside_bytes_s=rate,
        between_bytes_s=math.inf,
        call_s=0.0,
        inside_s=latency / (2 * (link_ranks - 1)),
        between_s=0.0,
        images_s=math.inf,
        fixed_s=max(0.0, whole.compute - batch * an_image),
    )


def check(
    phases: Sequence[PhaseWork], machine: Cluster, runs: Sequence[Run], batch: int, cores: int
) -> list[Check]:
    """Predict what was measured; ranks beyond the cores share them, for compute and transfer."""
    checks = []
    for ranks in sorted({run.ranks for run in runs}):
        crowd = max(1.0, ranks / cores)
        crowded = replace(
            machine,
            flops=machine.flops / crowd,
            fixed_s=machine.fixed_s * crowd,
            inside_bytes_s=machine.inside_bytes_s / crowd,
            inside_s=machine.inside_s * crowd,
        )
        times = scaling.median([run.times for run in runs if run.ranks == ranks])
        measured = times.compute + times.transfer + times.data
        step = predict(phases, crowded, gpus=ranks, batch=batch)
        checks.append(Check(ranks, measured, step.seconds))
    return checks


def measure_here(
    experiment: Experiment,
    data: Sequence[str] | None,
    *,
    ranks: Sequence[int],
    steps: int,
    warm_up: int,
    repeats: int,
    threads: int,
    say: Callable[[str], None],
) -> tuple[list[Run], list[Check]]:
    """Run each number of ranks here, and check the model where there are several of them.

    Args:
        experiment: what to measure.
        data: the dataset; None draws one in a temporary folder.
        ranks: as for `scaling.measure`.
        steps: the same.
        warm_up: the same.
        repeats: the same.
        threads: the same.
        say: told what happens.
    """
    options = {"steps": steps, "warm_up": warm_up, "repeats": repeats, "threads": threads}
    with nullcontext(data) if data else scaling.drawn_data(experiment) as found:
        uris = [found] if isinstance(found, str) else found
        prepared = scaling.prepare(experiment, uris)
        runs = scaling.measure(prepared, uris, ranks=ranks, **options, say=say)
        checks = check_here(prepared, uris, runs, **options, say=say) if max(ranks) > 1 else []
    return runs, checks


def as_result(
    experiment: Experiment, runs: Sequence[Run], checks: Sequence[Check]
) -> dict[str, Any]:
    """What `measure_here` returned, as JSON has it."""
    counts = dict.fromkeys(run.ranks for run in runs)
    return {
        "batch_size": experiment.batch_size,
        "medians": {str(count): _medians(runs, count) for count in counts},
        "runs": [asdict(run) for run in runs],
        "check": [asdict(each) | {"error": each.error} for each in checks],
    }


def _medians(runs: Sequence[Run], ranks: int) -> dict[str, Any]:
    of_ranks = [run for run in runs if run.ranks == ranks]
    phases = [asdict(phase) | {"rest": phase.rest} for phase in of_ranks[0].phases]
    return asdict(scaling.median([run.times for run in of_ranks])) | {"phases_of_first_run": phases}


def check_here(
    experiment: Experiment,
    data: Sequence[str],
    runs: Sequence[Run],
    *,
    steps: int,
    warm_up: int,
    repeats: int,
    threads: int,
    say: Callable[[str], None],
) -> list[Check]:
    """Feed the model with this machine's own figures and compare it with the runs.

    Of the runs it is told one rank's compute and the link of the fewest ranks that have one, and
    for what a step costs without images one rank runs once more, at the largest run's share. So
    more ranks are true predictions.

    Args:
        experiment: as it was measured.
        data: the same dataset.
        runs: what was measured; nothing is checked where no run has one rank, or all have, nor
            where the machine is so busy that fewer images take longer.
        steps: of the further runs, as for `scaling.measure`.
        warm_up: the same.
        repeats: the same.
        threads: the same.
        say: told what happens.
    """
    counts, batch = sorted({run.ranks for run in runs}), experiment.batch_size
    share = -(-batch // counts[-1])
    if counts[0] != 1 or share == batch:
        return []
    say(f"once more one rank, with {share} images a step, to check the model")
    small = scaling.measure(
        override(experiment, [f"batch_size={share}"]),
        data,
        ranks=[1],
        steps=steps,
        warm_up=warm_up,
        repeats=repeats,
        threads=threads,
        say=say,
    )
    whole = scaling.median([run.times for run in runs if run.ranks == 1])
    part = scaling.median([run.times for run in small])
    if part.compute >= whole.compute:
        say(f"not checked: {share} images took no less than {batch}, so the machine is too busy")
        return []
    work = count_work(experiment, data, gathered=False)
    link = median_link(runs, counts[1])
    machine = this_machine(work, batch, whole, part, share, link, counts[1])
    return check(work, machine, runs, batch, len(os.sched_getaffinity(0)) // threads or 1)


def median_link(runs: Sequence[Run], ranks: int) -> tuple[float, float]:
    """The link of all runs of so many ranks."""
    links = [run.link for run in runs if run.ranks == ranks and run.link is not None]
    latency, rate = map(statistics.median, zip(*links, strict=True))
    return latency, rate


def experiment_work(name: str, *settings: str) -> tuple[int, tuple[PhaseWork, ...]]:
    """The global batch of an experiment at full size, and its work, counted on drawn images.

    Takes seconds to a minute or two.

    Raises:
        ExperimentError: no such experiment or setting.
    """
    experiment = override(experiments.make(name), settings)
    data = name.split("/")[0]
    if experiment.task is not None and experiment.task.classes is None and data in CLASSES:
        experiment = override(experiment, [f"task.classes={CLASSES[data]}"])
    with scaling.drawn_data(experiment, images=8, whole=VOC_SIDE) as uri:
        prepared = scaling.prepare(experiment, [uri])
        return experiment.batch_size, count_work(prepared, [uri])


@dataclass(frozen=True)
class Outlook:
    """The model's word on a number of GPUs.

    Attributes:
        steps: at each global batch that was asked for.
        batch_50: the smallest global batch of at least 50 % efficiency; None if there is none.
        batch_80: the same for 80 %.
    """

    steps: tuple[Prediction, ...]
    batch_50: int | None
    batch_80: int | None


def outlook(
    phases: Sequence[PhaseWork], cluster: Cluster, gpus: Sequence[int], batches: Sequence[int]
) -> list[Outlook]:
    """The model at several numbers of GPUs and global batches."""
    return [
        Outlook(
            tuple(predict(phases, cluster, gpus=count, batch=batch) for batch in batches),
            smallest_batch(phases, cluster, gpus=count, efficiency=0.5),
            smallest_batch(phases, cluster, gpus=count, efficiency=0.8),
        )
        for count in gpus
    ]


def numbers(option: str, text: str) -> list[int]:
    """The numbers that an option lists.

    Raises:
        ValueError: it lists something else.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise ValueError(f"{option} {text}: expected whole numbers above 0, such as 1,2,4")
    return [int(part) for part in parts]
