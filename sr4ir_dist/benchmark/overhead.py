"""What DeepSpeed, and a Ray Train worker's surroundings, add to a training step.

The real networks step on a tiny input, so that what does not depend on the images is what is seen:

- *plain*: degradation and `train_step` on plain PyTorch's engines;
- *deepspeed*: the same on DeepSpeed's engines;
- *loop*: the training loop itself on DeepSpeed's engines, with all that a worker has around it:
  randomness keyed anew, learning rates, the meter, the losses kept and read, the watchdog and the
  agreement with other ranks. Losses are read every step; training reads those of ten at once.

They step in turn, in one process, with equal starts. The loop is not copied: its loader lets the
others step before it gives the loop a batch, and a step of the loop is from one batch to the next.
"""

from __future__ import annotations

import logging
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import ray.util
import torch
import torch.distributed as dist

from sr4ir_dist import recipes
from sr4ir_dist.batch import Batch
from sr4ir_dist.benchmark.step import (
    Clock,
    compare,
    contender,
    make_experiment,
    random_batch,
    start_networks,
)
from sr4ir_dist.benchmark.watch import Enough
from sr4ir_dist.config import Experiment, ExperimentError
from sr4ir_dist.overrides import override
from sr4ir_dist.training import launch
from sr4ir_dist.training.agreement import Agreement
from sr4ir_dist.training.build import make_setup
from sr4ir_dist.training.capacity import Resources, check_resources, has_more_room
from sr4ir_dist.training.loop import Hooks, train
from sr4ir_dist.training.state import Progress
from sr4ir_dist.training.step import Rates, train_step
from sr4ir_dist.training.views import Setup, make_inputs
from sr4ir_dist.training.watchdog import Watchdog
from sr4ir_dist.training.worker import notice, prepare_worker

PLAIN, DEEPSPEED, LOOP = "plain", "deepspeed", "loop"
_PATIENCE_S = 600.0


@dataclass(frozen=True)
class Request:
    """What is measured.

    Attributes:
        experiment: as `tiny` gives it.
        images: of a step.
        steps: timed steps of each.
        warm_up: steps of each before them.
        threads: of the networks.
    """

    experiment: Experiment
    images: int
    steps: int
    warm_up: int
    threads: int


@dataclass(frozen=True)
class Overhead:
    """Milliseconds of a step, medians over steps; differences are within a round.

    Attributes:
        plain: of a step of plain engines.
        deepspeed: of DeepSpeed's.
        loop: of the loop with DeepSpeed's.
        by_deepspeed: what DeepSpeed's engines add.
        by_loop: what the worker's surroundings add to that.
        both: what both add.
        rounds: milliseconds of each in every round.
    """

    plain: float
    deepspeed: float
    loop: float
    by_deepspeed: float
    by_loop: float
    both: float
    rounds: tuple[Mapping[str, float], ...]


@dataclass(frozen=True)
class FullSize:
    """The step of which something is a share.

    Attributes:
        seconds: that it takes.
        experiment: what was timed, on plain engines; None where the seconds were given.
        images: of that step.
    """

    seconds: float
    experiment: str | None = None
    images: int | None = None


def full_size(
    of: str, settings: Sequence[str], images: int, steps: int, *, say: Callable[[str], None]
) -> FullSize:
    """A number of seconds, or the median of an experiment's steps at its own size.

    Args:
        of: the number or the experiment's name.
        settings: of the experiment.
        images: of a step.
        steps: that are timed, after one that is not.
        say: is told what is timed.
    """
    with suppress(ValueError):
        return FullSize(float(of))
    say(f"timing {steps} steps of {of} with {images} images, at its own size")
    experiment = make_experiment(of, [f"batch_size={images}", *settings])
    own = contender("ours", experiment, random_batch(experiment, images))
    (found,) = compare([own], steps=steps, warm_up=1)
    return FullSize(found.seconds, of, images)


def tiny(experiment: Experiment, pixels: int) -> Experiment:
    """The experiment on a tiny input, with its own networks and learning rates that leave them.

    Raises:
        ExperimentError: its recipe trains nothing, or its images cannot be so small.
    """
    if not recipes.get(experiment.recipe).phases:
        raise ExperimentError(f"recipe {experiment.recipe} trains nothing: pick one that does")
    settings = ["warmup_epochs=0", "lr_warmup_epochs=0", "evaluation.lpips=null"]
    settings += [f"optimizers.{role}.lr_floor=0" for role in ("sr", "task")]
    settings += [f"optimizers.{role}.lr=1e-6" for role in ("sr", "task")]
    if experiment.data.transform == "flip":
        settings.append(f"data.shrink={pixels}")
    else:
        settings += [f"data.resize={pixels}", f"data.crop={pixels}"]
    return override(experiment, settings)


def measure_plainly(request: Request) -> Overhead:
    """Measure in this process, which Ray does not run."""
    torch.set_num_threads(request.threads)
    with _alone():
        return _measure(request, "127.0.0.1", lambda: None, lambda: False)


def measure_in_ray(request: Request, *, gpu: bool | None = None) -> Overhead:
    """Measure in a Ray Train worker on the cluster that `parallel.connect` joined.

    Raises:
        ExperimentError: the cluster has not the CPUs for as many threads.
        TrainingError: the worker failed.
    """
    given = check_resources(Resources(1, request.threads, gpu))
    with tempfile.TemporaryDirectory() as folder:
        trainer = launch.make_trainer(_work, (request, given), given, folder=folder)
        found = launch.fit(trainer, "the measurement")
    return Overhead(**found)


def _work(config: dict[str, tuple[Request, Resources]]) -> dict[str, Any]:
    request, given = config["job"]
    prepare_worker(given)
    address = ray.util.get_node_ip_address()
    return asdict(_measure(request, address, notice, lambda: has_more_room(given, 1)))


def _measure(
    request: Request,
    address: str,
    told: Callable[[], Sequence[str] | None],
    grow: Callable[[], bool],
) -> Overhead:
    """In a process with a process group of its own: its only rank's rounds."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    experiment = request.experiment
    batch = random_batch(experiment, request.images)
    bare = {name: _bare(experiment, batch, name) for name in (PLAIN, DEEPSPEED)}
    setup = _setup(experiment, batch, DEEPSPEED)
    turns = _Turns(batch, bare, Clock(setup.device), request.warm_up + request.steps)
    watchdog = Watchdog(0, 1, address=address, limit_s=_PATIENCE_S, say=print)
    agreement = Agreement(
        1,
        every_minutes=experiment.checkpoint.every_minutes,
        notice=told,
        grow=grow,
        patience_s=_PATIENCE_S,
    )
    hooks = Hooks(
        publish=lambda progress: agreement.saved(),
        entered=watchdog.entered,
        wish=agreement.after_step,
    )
    loader = cast(Any, turns)
    with agreement, watchdog:
        try:
            train(setup, loader, loader, Progress(), hooks, log_every=1)
        except Enough:
            return _overhead(turns.rounds[request.warm_up :])
    raise AssertionError("the loop ended before its loader did")


def _setup(experiment: Experiment, batch: Batch, engine: Literal["plain", "deepspeed"]) -> Setup:
    return make_setup(experiment, start_networks(experiment, batch), engine=engine)


def _bare(
    experiment: Experiment, batch: Batch, engine: Literal["plain", "deepspeed"]
) -> Callable[[], object]:
    setup = _setup(experiment, batch, engine)
    rates: Rates = {role: each.base_rates for role, each in setup.engines.items()}

    def run() -> object:
        inputs = make_inputs(setup, batch, epoch=1)
        return train_step(setup, inputs, after_warmup=True, rates=rates)

    return run


class _Turns:
    """A loader for the loop, before each batch of which the others step."""

    bad_rows: frozenset[int] = frozenset()

    def __init__(
        self, batch: Batch, others: Mapping[str, Callable[[], object]], clock: Clock, count: int
    ) -> None:
        self.steps_per_epoch = count + 1  # the epoch is left before it ends and is judged
        self.rounds: list[dict[str, float]] = []
        self._batch, self._others = batch, others
        self._clock, self._count = clock, count

    def epoch(self, epoch: int, step: int) -> Iterator[Batch]:
        """The same batch again and again, and then `Enough`."""
        clock = self._clock
        for _ in range(self._count):
            clock.seconds.clear()
            for name, run in self._others.items():
                with clock.part(name):
                    run()
            with clock.part(LOOP):
                yield self._batch
            self.rounds.append({name: 1e3 * each for name, each in clock.seconds.items()})
        raise Enough


def _overhead(rounds: Sequence[Mapping[str, float]]) -> Overhead:
    def added(to: str, by: str) -> float:
        return statistics.median(each[by] - each[to] for each in rounds)

    return Overhead(
        *(statistics.median(each[name] for each in rounds) for name in (PLAIN, DEEPSPEED, LOOP)),
        by_deepspeed=added(PLAIN, DEEPSPEED),
        by_loop=added(DEEPSPEED, LOOP),
        both=added(PLAIN, LOOP),
        rounds=tuple(rounds),
    )


@contextmanager
def _alone() -> Iterator[None]:
    """A process group of this process alone, which DeepSpeed's engines need."""
    if dist.is_initialized():
        yield
        return
    os.environ.setdefault("LOCAL_RANK", "0")  # which DeepSpeed asks for
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder, "rendezvous").as_uri()
        dist.init_process_group("gloo", init_method=place, rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()
