"""What each ZeRO stage saves of a rank's memory, and costs of its time, on this machine.

With a GPU for each rank on these, else on CPUs.

`python -m sr4ir_dist.benchmark.zero REQUEST RANK` is one rank; plain processes, as in `scaling`.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from sr4ir_dist.benchmark.processes import run_ranks
from sr4ir_dist.benchmark.step import random_batch
from sr4ir_dist.benchmark.step_cost import count
from sr4ir_dist.config import Experiment, from_json
from sr4ir_dist.settings import ZeroStages
from sr4ir_dist.training.build import build_networks, make_setup
from sr4ir_dist.training.engines import build_cpu_operator
from sr4ir_dist.training.step import Rates, train_step
from sr4ir_dist.training.views import make_inputs

STAGES = (0, 1, 2, 3)
"""Stage 3 is measured, though no experiment has it: these networks are small."""


@dataclass(frozen=True)
class Figures:
    """A rank's, at one stage.

    Attributes:
        stage: of both engines.
        held_mb: in tensors between two steps, in 1e6 bytes: weights, optimizer states, buffers.
        peak_mb: the most in a step, with images and what the backward needs.
        seconds: of a step, the median.
    """

    stage: int
    held_mb: float
    peak_mb: float
    seconds: float


def measure(
    experiment: Experiment,
    *,
    images: int,
    ranks: int = 2,
    steps: int = 3,
    stages: Sequence[int] = STAGES,
    told: Callable[[str], None] = lambda text: None,
) -> list[Figures]:
    """Train some steps at each stage; of each figure the rank's that has the most.

    Args:
        experiment: with its number of classes.
        images: of each rank's step.
        ranks: how many train together, each with one thread.
        steps: timed at each stage, after two others.
        stages: which ones.
        told: told which stage is next.

    Raises:
        RankError: a rank failed.
    """
    build_cpu_operator()
    found = []
    for stage in stages:
        told(f"stage {stage}")
        with tempfile.TemporaryDirectory() as folder:
            text = experiment.model_dump_json()
            request = json.dumps([text, stage, images, ranks, steps, folder])
            gpus = torch.cuda.device_count() >= ranks
            results = run_ranks(
                "sr4ir_dist.benchmark.zero",
                request,
                ranks=ranks,
                threads=1,
                folder=folder,
                gpus=gpus,
            )
        found.append(Figures(**{name: max(each[name] for each in results) for name in results[0]}))
    return found


def _rank(
    text: str, stage: int, images: int, ranks: int, steps: int, folder: str, *, rank: int
) -> None:
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/rendezvous"
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(rank)
        backend = "nccl"
    dist.init_process_group(backend, init_method=rendezvous, rank=rank, world_size=ranks)
    # Stage 3 is none that the experiment's own check lets through.
    stages = ZeroStages.model_construct(sr=stage, task=stage)
    experiment = from_json(text).model_copy(update={"zero": stages})
    modules = build_networks(experiment)
    setup = make_setup(experiment, modules, rank=rank, world_size=ranks)
    batch = replace(random_batch(experiment, images), global_size=images * ranks)
    inputs = make_inputs(setup, batch, epoch=1)
    rates: Rates = {role: [1e-6] * len(engine.base_rates) for role, engine in setup.engines.items()}

    def step() -> None:
        train_step(setup, inputs, after_warmup=True, rates=rates)

    seconds = []
    for _ in range(2 + steps):
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    held = _held_bytes() / 1e6
    peak = count(step, tuple(modules.values())).peak_mb
    figures = Figures(stage, held, peak, statistics.median(seconds[2:]))
    Path(folder, f"rank-{rank}.json").write_text(json.dumps(asdict(figures)))
    dist.barrier()
    dist.destroy_process_group()


def _held_bytes() -> int:
    """Bytes of all storages of tensors that live."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, Tensor) and thing.layout == torch.strided:
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


if __name__ == "__main__":
    _rank(*json.loads(sys.argv[1]), rank=int(sys.argv[2]))
