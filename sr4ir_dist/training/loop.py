"""The training loop: epochs, steps, evaluations, checkpoints. Read this first, then `step.py`."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from sr4ir_dist.config import Role
from sr4ir_dist.data.loader import Loader
from sr4ir_dist.training.agreement import Wish
from sr4ir_dist.training.batch_norm import average_running_statistics
from sr4ir_dist.training.evaluate import evaluate
from sr4ir_dist.training.schedules import halving, learning_rate
from sr4ir_dist.training.state import Progress
from sr4ir_dist.training.step import Rates, train_step
from sr4ir_dist.training.throughput import SAVING, Meter
from sr4ir_dist.training.views import Setup, make_inputs


class NonFiniteLossError(ValueError):
    """A loss that is not finite; every rank raises it, naming the step, the term and the ids."""


class _LeaveError(Exception):
    """The ranks have to leave in the middle of an evaluation."""


@dataclass(frozen=True)
class Hooks:
    """What the loop tells its surroundings; every rank calls them at the same steps.

    Attributes:
        publish: save a checkpoint of the engines at this progress.
        entered: what this rank does from now on, and how many steps of the run are done.
        logged: since the last call: the mean losses with the learning rates, and `Meter.read`.
        evaluated: a new record at the end of the progress's history.
        judging: how far an evaluation is, in words.
        wish: asked after each step and each batch of an evaluation; what to do before the next one,
            the same on every rank.
    """

    publish: Callable[[Progress], None]
    entered: Callable[[str, int], None] = lambda doing, step: None
    logged: Callable[[Progress, dict[str, float], dict[str, float]], None] = (
        lambda progress, losses, speed: None
    )
    evaluated: Callable[[Progress], None] = lambda progress: None
    judging: Callable[[str], None] = lambda text: None
    wish: Callable[[], Wish] = lambda: Wish.NONE


def train(
    setup: Setup,
    training: Loader,
    validation: Loader,
    progress: Progress,
    hooks: Hooks,
    *,
    log_every: int = 10,
) -> Progress:
    """Train from `progress` to the experiment's last epoch, or only judge what learns nothing.

    Every rank must call it with its own loaders. It ends early where `hooks.wish` says so, having
    published the state after the last step, without an evaluation of it. What a step computes
    depends on the experiment, the data and the number of ranks alone, so a run that resumes repeats
    an uninterrupted one.

    Raises:
        NonFiniteLossError: a loss is not finite; nothing is published after that step.
    """
    experiment = setup.experiment
    steps = training.steps_per_epoch
    losses = LossLog(setup)
    meter = Meter(setup.device, setup.world_size, lambda part: hooks.entered(part, progress.step))
    last = experiment.epochs if setup.recipe.phases else 1
    for epoch in range(progress.epoch, last + 1):
        after_warmup = epoch > experiment.warmup_epochs
        batches = training.epoch(epoch, progress.step_in_epoch) if setup.recipe.phases else ()
        wish, started = Wish.NONE, time.perf_counter()
        meter.pause()
        for batch in meter.batches(batches):
            _reseed(setup, progress.step)
            inputs = make_inputs(setup, batch, epoch)
            rates = learning_rates(setup, progress.step, steps)
            terms = train_step(
                setup, inputs, after_warmup=after_warmup, rates=rates, timed=meter.part
            )
            _share_running_statistics(setup, inputs.share)
            progress = replace(
                progress, step=progress.step + 1, step_in_epoch=progress.step_in_epoch + 1
            )
            losses.add(progress.step, batch.ids, terms)

            epoch_ends = progress.step_in_epoch == steps
            wish = hooks.wish()
            due = _due(progress.step, experiment.checkpoint.every_steps)
            publish_now = wish is Wish.LEAVE or (not epoch_ends and (due or wish is Wish.SAVE))
            log_now = _due(progress.step, log_every)
            if epoch_ends or publish_now:
                progress = replace(progress, bad_rows=_bad_rows(setup, training, progress))
            if epoch_ends or publish_now or log_now:
                losses.collect()
                now = time.perf_counter()
                progress = replace(progress, seconds=progress.seconds + now - started)
                if log_now:
                    means = losses.means() | {f"lr_{k}": v[0] for k, v in rates.items()}
                    hooks.logged(progress, means, meter.read())
                if publish_now:
                    with meter.part(SAVING):
                        hooks.publish(progress)
                if wish is Wish.LEAVE:
                    return progress
                started = time.perf_counter()

        judged = epoch == last or _due(epoch, experiment.evaluation.every_epochs)
        if judged:
            try:
                progress = _judge(setup, validation, progress, hooks)
            except _LeaveError:
                hooks.publish(progress)
                return progress
        progress = replace(progress, epoch=epoch + 1, step_in_epoch=0, bad_rows=())
        due = _due(epoch, experiment.checkpoint.every_epochs)
        due |= _due(progress.step, experiment.checkpoint.every_steps)
        # A figure without the networks that reached it could not be checked.
        if judged or due or wish is Wish.SAVE:
            hooks.entered("saving", progress.step)
            hooks.publish(progress)
    return progress


def _judge(setup: Setup, validation: Loader, progress: Progress, hooks: Hooks) -> Progress:
    def after_batch() -> None:
        # A checkpoint comes after the evaluation anyway.
        if hooks.wish() is Wish.LEAVE:
            raise _LeaveError

    hooks.entered("evaluating", progress.step)
    figures = {"epoch": progress.epoch, "step": progress.step}
    figures |= evaluate(setup, validation, hooks.judging, after_batch)
    if progress.bad_rows:
        figures["bad_training_images"] = len(progress.bad_rows)
    progress = replace(progress, history=(*progress.history, figures))
    hooks.evaluated(progress)
    return progress


def learning_rates(setup: Setup, step: int, steps_per_epoch: int) -> Rates:
    """The learning rates of each network that learns, after `step` completed steps.

    A recipe that restarts has cosine periods `[warm-up, rest]`, so that the rates jump back when
    the TDP loss sets in; others have one period of all epochs. A linear rise in the first
    `lr_warmup_epochs` comes before them: out of the first period where there are two, else the
    cosine ends early, both as published.
    """
    experiment = setup.experiment
    epochs = [experiment.epochs]
    if setup.recipe.restart:
        epochs = [
            experiment.warmup_epochs - experiment.lr_warmup_epochs,
            experiment.epochs - experiment.warmup_epochs,
        ]
    periods = [count * steps_per_epoch for count in epochs if count > 0]

    def rate(role: Role, base_rate: float) -> float:
        rising = experiment.lr_warmup_epochs * steps_per_epoch
        if role == "sr" and experiment.optimizers.sr.halve_at and step >= rising:
            total = experiment.epochs * steps_per_epoch
            at = experiment.optimizers.sr.halve_at
            return halving(step, base_lr=base_rate, steps=total, at=at)
        return learning_rate(
            step,
            base_lr=base_rate,
            floor=getattr(experiment.optimizers, role).lr_floor,
            periods_in_steps=periods,
            warmup_steps=rising,
        )

    return {
        role: [rate(role, base_rate) for base_rate in engine.base_rates]
        for role, engine in setup.engines.items()
    }


class LossLog:
    """Losses that stay on the device until they are read together, once for many steps."""

    def __init__(self, setup: Setup) -> None:
        """Start with none."""
        self._setup = setup
        self._steps: list[int] = []
        self._ids: list[tuple[str, ...]] = []
        self._names: list[str] = []
        self._values: list[Tensor] = []
        self._read: dict[str, list[float]] = {}

    def add(self, step: int, ids: tuple[str, ...], terms: dict[str, Tensor]) -> None:
        """Keep a step's losses as `train_step` returns them; all until `collect` are the same."""
        self._names = list(terms)
        self._steps.append(step)
        self._ids.append(ids)
        self._values.append(torch.stack(list(terms.values())) / self._setup.world_size)

    def collect(self) -> None:
        """Read what was added; every rank must call it at the same steps.

        Raises:
            NonFiniteLossError: a loss is not finite; raised on every rank.
        """
        values = torch.stack(self._values)
        if self._setup.world_size > 1:
            dist.all_reduce(values)
        values = values.cpu()
        bad = (~values.isfinite()).nonzero()
        if len(bad):
            row, column = bad[0].tolist()
            raise NonFiniteLossError(
                f"the loss {self._names[column]} is {values[row, column].item()} at step "
                f"{self._steps[row]} on samples {', '.join(self._global_ids(row))}"
            )
        for name, column in zip(self._names, values.T.tolist(), strict=True):
            self._read.setdefault(name, []).extend(column)
        self._steps, self._ids, self._values = [], [], []

    def means(self) -> dict[str, float]:
        """Mean of each term over what was collected since the last call."""
        means = {name: sum(values) / len(values) for name, values in self._read.items()}
        self._read = {}
        return means

    def _global_ids(self, row: int) -> tuple[str, ...]:
        if self._setup.world_size == 1:
            return self._ids[row]
        gathered: list[tuple[str, ...]] = [()] * self._setup.world_size
        dist.all_gather_object(gathered, self._ids[row])
        return tuple(name for part in gathered for name in part)


def _bad_rows(setup: Setup, training: Loader, progress: Progress) -> tuple[int, ...]:
    """The bad rows of the epoch so far, over all ranks and, after a resume, the steps before."""
    found = [training.bad_rows]
    if setup.world_size > 1:
        found = [frozenset()] * setup.world_size
        dist.all_gather_object(found, training.bad_rows)
    return tuple(sorted(set(progress.bad_rows).union(*found)))


def _due(count: int, every: int | None) -> bool:
    return every is not None and count % every == 0


def _reseed(setup: Setup, step: int) -> None:
    """Key what draws from torch's global generator by the step, so that resumes repeat it."""
    key = f"{setup.experiment.seed}/{step}/{setup.rank}".encode()
    torch.manual_seed(int.from_bytes(hashlib.sha256(key).digest()[:8], "little", signed=True))


def _share_running_statistics(setup: Setup, share: float) -> None:
    # Synchronised layers hold equal statistics already.
    if setup.world_size > 1 and setup.experiment.batch_norm == "local" and "task" in setup.engines:
        average_running_statistics(setup.modules["task"], share / setup.world_size)
