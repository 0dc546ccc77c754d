"""One training step of every recipe: who moves, in which mode, on which views, at which losses."""

import json
import math
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_runs import RATES, drawn_batch, tiny_experiment, tiny_setup

from sr4ir_dist.config import override
from sr4ir_dist.recipes import RECIPES
from sr4ir_dist.training.build import open_loader
from sr4ir_dist.training.loop import learning_rates
from sr4ir_dist.training.step import Views, make_inputs, train_step

GOLDEN = Path(__file__).parents[1] / "assets" / "losses"
MOVES = {
    "pretrain": {"sr"},
    "h2t": {"task"},
    "l2t": {"task"},
    "s": {"sr"},
    "s2t": {"task"},
    "t2s": {"sr"},
    "joint": {"sr", "task"},
    "sr4ir": {"sr", "task"},
}
# For each network, train (True) or eval mode of each of its forwards after the warm-up.
MODES = {
    "pretrain": {"sr": [True]},
    "h2t": {"task": [True]},
    "l2t": {"task": [True]},
    "s": {"sr": [True]},
    "s2t": {"sr": [False], "task": [True]},
    "t2s": {"sr": [True], "task": [False]},
    "joint": {"sr": [True], "task": [True]},
    # Phase 1: SR, then features of SR and HR; phase 2: SR again, then SR, HR and CQMix.
    "sr4ir": {"sr": [True, True], "task": [False, False, True, True, True]},
}
TERMS = {
    "pretrain": ["pixel_sr"],
    "h2t": ["task_hr"],
    "l2t": ["task_lr_up"],
    "s": ["pixel_sr"],
    "s2t": ["task_sr"],
    "t2s": ["pixel_sr", "task_sr"],
    "joint": ["pixel_sr", "task_sr"],
    "sr4ir": ["pixel_sr", "tdp_sr", "task_sr", "task_hr", "task_cqmix"],
}
every_recipe = pytest.mark.parametrize("recipe", RECIPES)


def step(setup, *, after_warmup=True, number=0):
    inputs = make_inputs(setup, drawn_batch(number, 3), epoch=1)
    rates = {role: RATES[role] for role in setup.engines}
    return train_step(setup, inputs, after_warmup=after_warmup, rates=rates)


def states(setup):
    return {
        role: {name: value.clone() for name, value in module.state_dict().items()}
        for role, module in setup.modules.items()
    }


def watched_modes(setup):
    """Modes of each network's forwards; the backbone's for the task network, which TDP calls."""
    seen = defaultdict(list)
    for role, module in setup.modules.items():
        layer = module.layer4 if role == "task" else module
        layer.register_forward_hook(
            lambda *_, role=role, module=module: seen[role].append(module.training)
        )
    return seen


def test_the_tables_here_name_every_recipe():
    assert MOVES.keys() == MODES.keys() == TERMS.keys() == RECIPES.keys()


@every_recipe
def test_exactly_the_named_networks_move(recipe):
    setup = tiny_setup(tiny_experiment(recipe), engine="plain")
    before = states(setup)
    step(setup)
    after = states(setup)
    assert setup.modules.keys() == RECIPES[recipe].init_from.keys()
    for role, module in setup.modules.items():
        fixed = {
            name for name, value in after[role].items() if torch.equal(value, before[role][name])
        }
        if role in MOVES[recipe]:
            assert fixed == {name for name in after[role] if "_mean." in name and role == "sr"}
        else:
            # Buffers too: a frozen network in eval mode keeps its running statistics.
            assert fixed == after[role].keys()
        assert all(parameter.grad is None for parameter in module.parameters())
        learns = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
        names = {name for name, _ in module.named_parameters() if "_mean." not in name}
        assert learns == (names if role in MOVES[recipe] else set())


@every_recipe
@pytest.mark.parametrize("after_warmup", [False, True])
def test_modes_views_and_terms_are_the_recipes(recipe, after_warmup):
    setup = tiny_setup(tiny_experiment(recipe), engine="plain")
    seen = watched_modes(setup)
    losses = step(setup, after_warmup=after_warmup)
    modes = {role: list(order) for role, order in MODES[recipe].items()}
    terms = list(TERMS[recipe])
    if recipe == "sr4ir" and not after_warmup:
        terms.remove("tdp_sr")
        modes["task"] = modes["task"][2:]
    assert list(losses) == terms
    assert seen == modes
    assert all(loss.grad_fn is None and loss.ndim == 0 for loss in losses.values())


def test_running_statistics_see_phase_2_alone_and_each_of_its_images():
    setup = tiny_setup(tiny_experiment("sr4ir"), engine="plain")
    step(setup)
    counts = {
        int(value)
        for name, value in setup.modules["task"].named_buffers()
        if name.endswith("tracked")
    }
    assert counts == {3}


@every_recipe
def test_frozen_networks_are_called_past_their_engines_and_learning_ones_through_them(recipe):
    setup = tiny_setup(tiny_experiment(recipe), engine="plain")
    called, allowed = [], []

    class Watched:
        def __init__(self, role, engine):
            self.role, self.engine = role, engine
            self.module, self.trainable = engine.module, engine.trainable

        def __call__(self, images):
            called.append(self.role)
            allowed.append(next(iter(self.trainable)).requires_grad)
            return self.engine(images)

        def __getattr__(self, name):
            return getattr(self.engine, name)

    engines = {role: Watched(role, engine) for role, engine in setup.engines.items()}
    step(replace(setup, engines=engines))
    expected = {
        role: sum(1 for training in MODES[recipe][role] if training) for role in MOVES[recipe]
    }
    if recipe == "sr4ir":
        expected["sr"] = 1  # phase 2 renders with the frozen network, in train mode
    assert {role: called.count(role) for role in set(called)} == expected
    assert all(allowed)


def test_phase_2_sees_the_sr_network_that_phase_1_has_updated():
    setup = tiny_setup(tiny_experiment("sr4ir"), engine="plain")
    images = []
    setup.modules["sr"].register_forward_hook(lambda *call: images.append(call[2].detach().clone()))
    step(setup)
    assert not torch.equal(images[0], images[1])
    inputs = make_inputs(setup, drawn_batch(0, 3), epoch=1)
    assert torch.equal(setup.modules["sr"](inputs.lr), images[1])


def test_a_view_is_rendered_once():
    setup = tiny_setup(tiny_experiment("sr4ir"), engine="plain")
    inputs = make_inputs(setup, drawn_batch(0, 3), epoch=1)
    views = Views(setup, setup.recipe.phases[1], inputs)
    for view in ("sr", "cqmix", "hr", "lr_up"):
        assert views.image(view) is views.image(view)
    assert views.image("hr") is inputs.hr


def test_loss_weights_multiply_terms():
    plain = step(tiny_setup(tiny_experiment("sr4ir"), engine="plain"))
    settings = ["losses.pixel=0.5", "losses.tdp=2", "losses.task=0.25"]
    changed = step(tiny_setup(tiny_experiment("sr4ir", *settings), engine="plain"))
    assert changed["pixel_sr"].item() == pytest.approx(0.5 * plain["pixel_sr"].item(), rel=1e-6)
    assert changed["tdp_sr"].item() == pytest.approx(2 * plain["tdp_sr"].item(), rel=1e-6)


def golden_losses(recipe, data):
    """Losses of ten steps: five without and five with the terms that wait for the warm-up."""
    experiment = override(tiny_experiment(recipe), ["batch_size=8", "epochs=2", "warmup_epochs=1"])
    if experiment.task is not None:
        experiment = override(experiment, ["task.classes=8"])
    setup = tiny_setup(experiment, engine="plain", double=True)
    losses = []
    with open_loader(setup, data, "train") as loader:
        for epoch in (1, 2):
            for batch in loader.epoch(epoch):
                # Off the 8-bit grid: a value on it can degrade to exactly half a grey level, where
                # the last bit, which differs between processors, would decide.
                hr = batch.hr.double() / 255 * (math.pi / 3.2)
                inputs = make_inputs(setup, replace(batch, hr=hr), epoch)
                rates = learning_rates(setup, len(losses), loader.steps_per_epoch)
                terms = train_step(setup, inputs, after_warmup=epoch > 1, rates=rates)
                losses.append({name: loss.item() for name, loss in terms.items()})
    return losses


@every_recipe
def test_golden_losses(recipe, drawn, request):
    """Ten steps repeat the stored losses; `pytest tests/training/test_step.py --write-golden`.

    The option stores what this machine computes. It is for changes that are meant to change
    training; a change that is not must leave these files alone.
    """
    path = GOLDEN / f"{recipe}.json"
    found = golden_losses(recipe, drawn)
    if request.config.getoption("--write-golden"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=1) + "\n")
    expected = json.loads(path.read_text())
    assert len(found) == len(expected) == 10
    for number, (terms, stored) in enumerate(zip(found, expected, strict=True), 1):
        assert terms == pytest.approx(stored, rel=1e-6), f"step {number}"
    assert len({tuple(terms.values()) for terms in found}) == 10
