"""One training step: the recipe's phases, each with its own networks, images and losses.

`train_step` knows neither DeepSpeed nor Ray, and no scenario by name: it walks the phases of a
recipe (`sr4ir_dist.recipes`), renders the views that their terms name (`views.py`), and hands the
losses to the engines of the networks that learn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from sr4ir_dist.config import Experiment, Role
from sr4ir_dist.losses.adversarial import real_fake
from sr4ir_dist.losses.pixel import l1
from sr4ir_dist.losses.tdp import tdp
from sr4ir_dist.recipes import Phase, Term
from sr4ir_dist.training.views import Inputs, Setup, Views, in_passes

Rates = Mapping[Role, Sequence[float]]
"""The learning rates of each network that learns, one for each group of its parameters."""


def train_step(
    setup: Setup,
    inputs: Inputs,
    *,
    after_warmup: bool,
    rates: Rates,
    timed: Callable[[str], AbstractContextManager[Any]] = nullcontext,
) -> dict[str, Tensor]:
    """Run every phase of the recipe once (paper equation 3 for SR4IR).

    Args:
        setup: networks and engines, which are updated in place.
        inputs: this rank's images; a rank without images joins with none.
        after_warmup: whether terms that wait for the end of the warm-up are active.
        rates: learning rates.
        timed: is entered for each phase, `phase 1` or `phase 2`.

    Returns:
        Each active term's weighted loss, detached, on the device, times this rank's share: the mean
        over ranks is the global batch's.
    """
    reported = {}
    parts = in_passes(setup, inputs)
    for number, phase in enumerate(setup.recipe.phases, 1):
        terms = [term for term in phase.terms if after_warmup or not term.after_warmup]
        groups = by_graph(setup.experiment, phase, terms)
        with timed(f"phase {number}"), only_trainable(setup, phase):
            told: dict[str, Tensor] = {}
            for part in parts:
                views = Views(setup, phase, part)
                for group in groups:
                    losses = {
                        term: _loss(setup, term, views, part)
                        * (part.task_share if term.loss == "task" else part.share)
                        for term in group
                    }
                    last = part is parts[-1] and group is groups[-1]
                    _backward(setup, phase, losses, views, last=last)
                    views.forget_runs()
                    for term, loss in losses.items():
                        known = told.get(term.name)
                        told[term.name] = loss.detach() if known is None else known + loss.detach()
            for role in phase.updates:
                setup.engines[role].step(rates[role])
        reported |= {term.name: told[term.name] for term in terms}
    return reported


@contextmanager
def only_trainable(setup: Setup, phase: Phase) -> Iterator[None]:
    """Freeze every network that a phase does not update, and set the modes it asks for.

    With DeepSpeed this is correctness, not thrift: gradients that reach another engine's weights
    would be applied at that engine's next step.
    """
    for role, module in setup.modules.items():
        module.train(role in phase.updates or phase.frozen_modes.get(role) == "train")
    for role, engine in setup.engines.items():
        for parameter in engine.trainable:
            parameter.requires_grad_(role in phase.updates)
    try:
        yield
    finally:
        for engine in setup.engines.values():
            for parameter in engine.trainable:
                parameter.requires_grad_(True)


def by_graph(experiment: Experiment, phase: Phase, terms: Sequence[Term]) -> list[list[Term]]:
    """A phase's terms in groups that have no graph in common, in their order.

    Each group's backward frees its graph before the next group's forward. Where only the task
    network learns, every view has a forward of its own, unless views are joined, and gradients add
    up to those of the sum. ZeRO 2 sends gradients after every backward, so it has one.
    """
    own_forwards = all(term.loss in ("task", "real_fake") for term in terms)
    whole = experiment.joined_views or experiment.zero.task == 2
    if phase.updates != ("task",) or not own_forwards or whole:
        return [list(terms)]
    views = dict.fromkeys(term.view for term in terms)
    return [[term for term in terms if term.view == view] for view in views]


def _loss(setup: Setup, term: Term, views: Views, inputs: Inputs) -> Tensor:
    weight = term.weight * getattr(setup.experiment.losses, term.loss)
    if term.loss == "pixel":
        return weight * l1(views.image(term.view), inputs.hr)
    if term.loss == "perceptual":
        pair = views.compared(term.view, term.network)
        return weight * tdp(*pair, dict.fromkeys(pair[0], 1.0))
    if term.loss == "adversarial":
        return weight * real_fake(views.scores(term.view), real=True)
    if term.loss == "real_fake":
        return weight * real_fake(views.scores(term.view), real=term.view == "hr")
    assert setup.task is not None
    if term.loss == "tdp":
        pair = views.compared(term.view, term.network)
        return weight * tdp(*pair, setup.task.feature_weights)
    return weight * setup.task.loss(views.task_outputs(term.view), inputs.targets)


def _backward(
    setup: Setup, phase: Phase, losses: Mapping[Term, Tensor], views: Views, *, last: bool
) -> None:
    if set(phase.updates) == {"sr", "task"}:
        through_task = [loss for term, loss in losses.items() if term.loss != "pixel"]
        direct = [loss for term, loss in losses.items() if term.loss == "pixel"]
        setup.engines["task"].backward(torch.stack(through_task).sum(), last=last)
        assert views.relay is not None
        assert views.relay.grad is not None
        relayed = (views.image("sr") * views.relay.grad).sum()
        setup.engines["sr"].backward(torch.stack([*direct, relayed]).sum(), last=last)
    else:
        (role,) = phase.updates
        setup.engines[role].backward(torch.stack(list(losses.values())).sum(), last=last)
