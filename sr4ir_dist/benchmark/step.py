"""How long a training step takes, next to the step as it was published (`published.py`).

All contenders step in turn on the same images in one process, so that a slow spell of the machine
falls on all of them; each has networks of its own, which start equal.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from sr4ir_dist import experiments
from sr4ir_dist.batch import Batch
from sr4ir_dist.benchmark.published import PublishedStep
from sr4ir_dist.benchmark.scaling_work import CLASSES
from sr4ir_dist.benchmark.step_cost import Cost, count
from sr4ir_dist.config import Experiment, Network, Role
from sr4ir_dist.overrides import override
from sr4ir_dist.training.build import build_networks, make_setup, settle_on
from sr4ir_dist.training.engines import Engine
from sr4ir_dist.training.step import Rates, train_step
from sr4ir_dist.training.views import Inputs, Setup, make_inputs

PUBLISHED = "published"
PARTS = ("phase 1", "phase 2", "forward", "backward", "optimizer")
_VOC_IMAGE = (375, 500)
_BOXES = 3
_CLASSES_ELSEWHERE = 20
_MATRIX, _PRODUCTS = 2048, 5


class Clock:
    """Seconds of the parts of steps; a part may lie inside another."""

    def __init__(self, device: torch.device) -> None:
        """Nothing timed yet."""
        self.device = device
        self.seed = 0
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time what happens inside; on a GPU its work, too, which is waited for."""
        if name.startswith("phase"):
            # Dropout and a detector's sampling draw the same in every contender's phase.
            torch.manual_seed(self.seed)
        started = self._now()
        yield
        self.seconds[name] += self._now() - started

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


@dataclass
class _TimedEngine:
    """An engine whose backward and update are timed."""

    engine: Engine
    clock: Clock

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def __call__(self, *inputs: Any) -> Any:
        return self.engine(*inputs)

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        with self.clock.part("backward"):
            self.engine.backward(loss, last=last)

    def step(self, rates: Sequence[float]) -> None:
        with self.clock.part("optimizer"):
            self.engine.step(rates)


@dataclass
class Contender:
    """Something that steps.

    Attributes:
        label: what it is called.
        run: a step; gives its losses by the recipe's names.
        clock: times its parts.
        modules: its networks.
        images: of one step.
        precision: of its networks.
        seconds: of each timed step.
        parts: of each timed step, by name.
    """

    label: str
    run: Callable[[], dict[str, Tensor]]
    clock: Clock
    modules: tuple[nn.Module, ...]
    images: int
    precision: str
    seconds: list[float] = field(default_factory=list)
    parts: list[dict[str, float]] = field(default_factory=list)

    def cost(self) -> Cost:
        """The counts of one more step."""
        return count(self.run, self.modules)


@dataclass(frozen=True)
class Result:
    """A contender's figures.

    Attributes:
        label: what it is called.
        images: of a step.
        seconds: of a step, the median.
        images_per_second: of a step of this time.
        parts: median seconds by part; backward and optimizer lie inside the phases.
        losses: of the first step.
        cost: what a step costs, counted.
        speedup: over the first contender, the median of the ratios of neighbouring steps.
        peak_share: FLOPs in a second as a share of what a matrix product of its precision reaches.
    """

    label: str
    images: int
    seconds: float
    images_per_second: float
    parts: dict[str, float]
    losses: dict[str, float]
    cost: Cost
    speedup: float
    peak_share: float


def with_classes(experiment: Experiment) -> Experiment:
    """The experiment with its dataset's number of classes, for networks of the right size."""
    if experiment.task is None or experiment.task.classes is not None:
        return experiment
    data = experiment.name.split("/")[0]
    return override(experiment, [f"task.classes={CLASSES.get(data, _CLASSES_ELSEWHERE)}"])


def random_batch(experiment: Experiment, images: int) -> Batch:
    """Random images and targets of the experiment's size; VOC's usual 375x500 for detection."""
    draw = torch.Generator().manual_seed(experiment.seed)
    data = experiment.data
    height, width = _VOC_IMAGE if data.transform == "flip" else (data.crop, data.crop)
    if data.transform == "flip" and data.shrink is not None:
        height, width = data.shrink, round(data.shrink * width / height)
    hr = torch.randint(0, 256, (images, 3, height, width), generator=draw, dtype=torch.uint8)
    task, targets = experiment.task, None
    if task is not None and task.classes is not None:
        if task.name == "classification":
            targets = torch.randint(0, task.classes, (images,), generator=draw)
        elif task.name == "segmentation":
            shape = (images, height, width)
            targets = torch.randint(0, task.classes + 1, shape, generator=draw, dtype=torch.uint8)
        else:
            targets = tuple(_boxes(height, width, task.classes, draw) for _ in range(images))
    sizes = torch.tensor([[height, width]] * images)
    ids = tuple(f"random-{number}" for number in range(images))
    return Batch(hr, sizes, targets, ids, torch.arange(images), images)


def start_networks(experiment: Experiment, batch: Batch) -> dict[Network, nn.Module]:
    """The recipe's networks with a random start that can step: a detector needs images for it."""
    modules = build_networks(experiment)
    if "task" in modules:
        settle_on(experiment, modules["task"], lambda: batch)
    return modules


def contender(label: str, experiment: Experiment, batch: Batch) -> Contender:
    """Builds networks and what steps them; this system's step on plain PyTorch's engines.

    Args:
        label: `PUBLISHED` for the published step; any other for this system's.
        experiment: with its number of classes.
        batch: the images of each step.

    Raises:
        ValueError: no published step for these settings.
    """
    modules = start_networks(experiment, batch)
    clock = Clock(next(p.device for module in modules.values() for p in module.parameters()))
    networks = tuple(modules.values())
    if label == PUBLISHED:
        try:
            inputs, step = _published(experiment, modules, batch)
        except ValueError as error:
            raise ValueError(f"{error} (--no-published leaves it out)") from error

        def run() -> dict[str, Tensor]:
            losses = step(inputs, timed=clock.part)
            step.log(inputs)
            return losses
    else:
        setup = make_setup(experiment, modules, engine="plain")
        timed: dict[Role, Any] = {
            role: _TimedEngine(each, clock) for role, each in setup.engines.items()
        }
        setup = replace(setup, engines=timed)
        inputs = make_inputs(setup, batch, epoch=1)
        rates: Rates = {role: each.base_rates for role, each in timed.items()}

        def run() -> dict[str, Tensor]:
            return train_step(setup, inputs, after_warmup=True, rates=rates, timed=clock.part)

    return Contender(label, run, clock, networks, len(batch.hr), experiment.precision)


def compare(
    contenders: Sequence[Contender],
    *,
    steps: int,
    warm_up: int,
    peaks: Mapping[str, float] = MappingProxyType({}),
    told: Callable[[int, int], None] = lambda done, total: None,
) -> list[Result]:
    """Let contenders step in turn.

    Args:
        contenders: the first is what the others are compared with.
        steps: timed steps of each.
        warm_up: steps of each before them, at least one, whose losses are kept.
        peaks: FLOP/s that this machine reaches, by precision (`measured_peaks`).
        told: how many rounds are done.
    """
    losses: list[dict[str, float]] = [{} for _ in contenders]
    for number in range(warm_up + steps):
        for place, each in enumerate(contenders):
            each.clock.seed = number
            each.clock.seconds.clear()
            with each.clock.part("step"):
                found = each.run()
            if number == 0:
                losses[place] = {name: loss.item() for name, loss in found.items()}
            if number >= warm_up:
                each.seconds.append(each.clock.seconds["step"])
                each.parts.append(dict(each.clock.seconds))
        told(number + 1, warm_up + steps)
    return [_result(each, contenders[0], losses[n], peaks) for n, each in enumerate(contenders)]


def measured_peaks(device: torch.device) -> dict[str, float]:
    """FLOP/s of a product of two large square matrices, the best of several, by precision."""
    clock, peaks = Clock(device), {}
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        left = torch.rand(_MATRIX, _MATRIX, device=device, dtype=dtype)
        best = float("inf")
        for _ in range(_PRODUCTS):
            clock.seconds.clear()
            with clock.part("product"):
                torch.mm(left, left)
            best = min(best, clock.seconds["product"])
        peaks[precision] = 2 * _MATRIX**3 / best
    return peaks


def _result(
    each: Contender, first: Contender, losses: dict[str, float], peaks: Mapping[str, float]
) -> Result:
    for parts in each.parts:
        apart = parts.get("backward", 0.0) + parts.get("optimizer", 0.0)
        parts["forward"] = parts["step"] - apart
    seconds = statistics.median(each.seconds)
    ratios = [theirs / own for theirs, own in zip(first.seconds, each.seconds, strict=True)]
    cost = each.cost()
    peak = peaks.get(each.precision, float("inf"))
    return Result(
        label=each.label,
        images=each.images,
        seconds=seconds,
        images_per_second=each.images / seconds,
        parts={n: statistics.median(part.get(n, 0.0) for part in each.parts) for n in PARTS},
        losses=losses,
        cost=cost,
        speedup=statistics.median(ratios),
        peak_share=cost.gflops * 1e9 / seconds / peak,
    )


def _published(
    experiment: Experiment, modules: dict[Any, Any], batch: Batch
) -> tuple[Inputs, PublishedStep]:
    setup: Setup = make_setup(experiment, {}, engine="none")
    if setup.task is None or set(modules) != {"sr", "task"}:
        raise ValueError(f"recipe={experiment.recipe!r} has no published step; expected 'sr4ir'")
    step = PublishedStep(experiment, setup.task, modules["sr"], modules["task"])
    inputs = make_inputs(replace(setup, modules=modules), batch, epoch=1)
    assert inputs.lr is not None
    # In torch's default layout, as published.
    return replace(inputs, hr=inputs.hr.contiguous(), lr=inputs.lr.contiguous()), step


def _boxes(height: int, width: int, classes: int, draw: torch.Generator) -> dict[str, Tensor]:
    size = torch.tensor([width, height])
    corner = torch.rand(_BOXES, 2, generator=draw) * size / 2
    side = (0.1 + 0.4 * torch.rand(_BOXES, 2, generator=draw)) * size
    return {
        "boxes": torch.cat([corner, corner + side], dim=1),
        "labels": torch.randint(1, classes + 1, (_BOXES,), generator=draw),
        "crowd": torch.zeros(_BOXES, dtype=torch.bool),
        "image_id": torch.zeros(1, dtype=torch.int64),
    }


def line_up(
    name: str, settings: Sequence[str], also: Sequence[str], images: int, *, published: bool
) -> list[Contender]:
    """Contenders of a comparison, called by their settings.

    Args:
        name: the first experiment's.
        settings: its settings.
        also: settings on top of these, or a name with settings of its own, separated by spaces.
        images: of a step.
        published: the first experiment's published step comes before them.

    Raises:
        ValueError: a name or setting is wrong, or there is no such published step.
    """
    size = f"batch_size={images}"
    chosen = {" ".join([name, *settings]): make_experiment(name, [size, *settings])}
    first = next(iter(chosen.values()))
    for text in also:
        word, *others = text.split()
        own = (name, [*settings, word, *others]) if "=" in word else (word, others)
        chosen[text] = make_experiment(own[0], [size, *own[1]])
    if published:
        chosen = {PUBLISHED: first, **chosen}
    return [contender(label, each, random_batch(each, images)) for label, each in chosen.items()]


def make_experiment(name: str, settings: Sequence[str]) -> Experiment:
    """An experiment by name and settings, with its dataset's number of classes."""
    return with_classes(override(experiments.make(name), settings))
