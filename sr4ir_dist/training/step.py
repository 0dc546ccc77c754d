"""One training step: the recipe's phases, each with its own networks, images and losses.

`train_step` knows neither DeepSpeed nor Ray, and no scenario by name: it walks the phases of a
recipe (`sr4ir_dist.recipes`), renders the views that their terms name, and hands the losses to the
engines of the networks that learn.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sr4ir_dist import degradation
from sr4ir_dist.batch import Batch
from sr4ir_dist.config import Experiment, Role
from sr4ir_dist.cqmix import cqmix, draw_cells
from sr4ir_dist.losses.pixel import l1
from sr4ir_dist.losses.tdp import tdp
from sr4ir_dist.recipes import Phase, Recipe, Term, View
from sr4ir_dist.tasks import Task
from sr4ir_dist.training.engines import Engine


@dataclass(frozen=True)
class Setup:
    """What stays the same from step to step on one rank.

    Attributes:
        experiment: all settings.
        recipe: the experiment's phases and terms.
        modules: the networks that the recipe uses, on this rank's device.
        engines: an engine for each network that the recipe updates.
        task: the task's adapter, or None where the recipe has no task network.
        rank: this process among those that train.
        world_size: number of ranks.
    """

    experiment: Experiment
    recipe: Recipe
    modules: Mapping[Role, nn.Module]
    engines: Mapping[Role, Engine]
    task: Task | None
    rank: int = 0
    world_size: int = 1

    @property
    def device(self) -> torch.device:
        """The device of the networks."""
        parameters = (p for module in self.modules.values() for p in module.parameters())
        return next(parameters).device

    def autocast(self) -> torch.autocast:
        """The precision of every forward, of engines and of frozen networks alike."""
        enabled = self.experiment.precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)


@dataclass(frozen=True)
class Inputs:
    """A rank's images of one step, on its device.

    Attributes:
        hr: N,3,H,W in [0,1].
        lr: N,3,H/scale,W/scale in [0,1], on the 8-bit grid.
        cells: N,1,grid,grid CQMix cells, 1 for SR; None where no term needs them.
        targets: what the task's loss compares with.
        share: this rank's images over an even share of the global batch.
    """

    hr: Tensor
    lr: Tensor
    cells: Tensor | None
    targets: Any
    share: float = 1.0


def make_inputs(setup: Setup, batch: Batch, epoch: int) -> Inputs:
    """Degrade a batch and draw its CQMix cells (paper section 3.3), keyed by sample and epoch."""
    experiment = setup.experiment
    batch = batch.to(setup.device)
    cells = None
    if any(term.view == "cqmix" for phase in setup.recipe.phases for term in phase.terms):
        cells = draw_cells(experiment.seed, epoch, batch.keys, experiment.cqmix.grid)
    return Inputs(
        hr=batch.hr,
        lr=degradation.degrade(batch.hr, experiment.scale, kind=experiment.degradation.kind),
        cells=cells,
        targets=batch.targets,
        share=len(batch.hr) * setup.world_size / batch.global_size,
    )


class Views:
    """The images of one phase, each rendered when it is first asked for.

    The networks are as they are at that moment, so phase 2 of SR4IR sees the SR network that phase
    1 has just updated.
    """

    def __init__(self, setup: Setup, phase: Phase, inputs: Inputs) -> None:
        """Render nothing yet."""
        self._setup = setup
        self._phase = phase
        self._inputs = inputs
        self._images: dict[View, Tensor] = {"hr": inputs.hr}
        self.relay: Tensor | None = None

    def image(self, view: View) -> Tensor:
        """An image of the phase, N,3,H,W; SR images are neither clamped nor quantised."""
        if view not in self._images:
            self._images[view] = self._render(view)
        return self._images[view]

    def task_image(self, view: View) -> Tensor:
        """The image as the task network gets it.

        Where both networks learn, the graph is cut at the SR image: no gradient may flow from one
        engine's outputs into another engine. `relay` then collects the gradient at the cut.
        """
        if view == "sr" and set(self._phase.updates) == {"sr", "task"}:
            if self.relay is None:
                self.relay = self.image("sr").detach().requires_grad_()
            return self.relay
        return self.image(view)

    def task_outputs(self, view: View) -> Any:
        """The task network's outputs on a view, in the precision of the losses."""
        setup = self._setup
        assert setup.task is not None
        learns = "task" in self._phase.updates
        network = setup.engines["task"] if learns else setup.modules["task"]
        with setup.autocast():
            outputs = setup.task.forward(network, self.task_image(view))
        return outputs.to(self._inputs.hr.dtype)

    def features(self, view: View) -> dict[str, Tensor]:
        """Features of the frozen task network for the TDP loss; HR's carry no gradient."""
        setup = self._setup
        assert setup.task is not None
        assert "task" not in self._phase.updates, "TDP features are those of a frozen network"
        with setup.autocast(), torch.set_grad_enabled(view != "hr"):
            features = setup.task.features(setup.modules["task"], self.task_image(view))
        return {name: value.to(self._inputs.hr.dtype) for name, value in features.items()}

    def _render(self, view: View) -> Tensor:
        inputs, setup = self._inputs, self._setup
        if view == "lr_up":
            return degradation.enlarge_bilinear(inputs.lr, setup.experiment.scale)
        if view == "cqmix":
            assert inputs.cells is not None
            return cqmix(self.image("sr"), inputs.hr, inputs.cells)
        with setup.autocast():
            if "sr" in self._phase.updates:
                sr = setup.engines["sr"](inputs.lr)
            else:
                with torch.no_grad():
                    sr = setup.modules["sr"](inputs.lr)
        return sr.to(inputs.hr.dtype)


def train_step(
    setup: Setup, inputs: Inputs, *, after_warmup: bool, rates: Mapping[Role, float]
) -> dict[str, Tensor]:
    """Run every phase of the recipe once (paper equation 3 for SR4IR).

    Args:
        setup: networks and engines, which are updated in place.
        inputs: this rank's images; a rank without images joins with none.
        after_warmup: whether terms that wait for the end of the warm-up are active.
        rates: learning rate of each network that learns.

    Returns:
        Each active term's weighted loss over this rank's images, detached, on the device; its mean
        over ranks weighted by their numbers of images is the global batch's.
    """
    reported = {}
    for phase in setup.recipe.phases:
        terms = [term for term in phase.terms if after_warmup or not term.after_warmup]
        with only_trainable(setup, phase):
            views = Views(setup, phase, inputs)
            losses = {term: _loss(setup, term, views, inputs) for term in terms}
            shared = {term: loss * inputs.share for term, loss in losses.items()}
            _update(setup, phase, shared, views, rates)
        reported |= {term.name: loss.detach() for term, loss in losses.items()}
    return reported


@contextmanager
def only_trainable(setup: Setup, phase: Phase) -> Iterator[None]:
    """Freeze every network that a phase does not update, and set the modes it asks for.

    With DeepSpeed this is correctness, not thrift: gradients that reach another engine's weights
    would be applied at that engine's next step.
    """
    for role, module in setup.modules.items():
        learns = role in phase.updates
        module.train(learns or phase.frozen_modes.get(role) == "train")
    for role, engine in setup.engines.items():
        for parameter in engine.trainable:
            parameter.requires_grad_(role in phase.updates)
    try:
        yield
    finally:
        for engine in setup.engines.values():
            for parameter in engine.trainable:
                parameter.requires_grad_(True)


def _loss(setup: Setup, term: Term, views: Views, inputs: Inputs) -> Tensor:
    weight = term.weight * getattr(setup.experiment.losses, term.loss)
    if term.loss == "pixel":
        return weight * l1(views.image(term.view), inputs.hr)
    assert setup.task is not None
    if term.loss == "tdp":
        features = views.features(term.view), views.features("hr")
        return weight * tdp(*features, setup.task.feature_weights)
    return weight * setup.task.loss(views.task_outputs(term.view), inputs.targets)


def _update(
    setup: Setup,
    phase: Phase,
    losses: Mapping[Term, Tensor],
    views: Views,
    rates: Mapping[Role, float],
) -> None:
    if set(phase.updates) == {"sr", "task"}:
        through_task = [loss for term, loss in losses.items() if term.loss != "pixel"]
        direct = [loss for term, loss in losses.items() if term.loss == "pixel"]
        setup.engines["task"].backward(torch.stack(through_task).sum())
        assert views.relay is not None
        assert views.relay.grad is not None
        relayed = (views.image("sr") * views.relay.grad).sum()
        setup.engines["sr"].backward(torch.stack([*direct, relayed]).sum())
    else:
        (role,) = phase.updates
        setup.engines[role].backward(torch.stack(list(losses.values())).sum())
    for role in phase.updates:
        setup.engines[role].step(rates[role])
