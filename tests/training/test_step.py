"""One training step of every recipe: who moves, in which mode, on which views, at which losses."""

import json
import math
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_runs import RATES, drawn_batch, tiny_experiment, tiny_setup

from sr4ir_dist.overrides import override
from sr4ir_dist.recipes import RECIPES
from sr4ir_dist.training.build import open_loader
from sr4ir_dist.training.loop import learning_rates
from sr4ir_dist.training.step import train_step
from sr4ir_dist.training.views import Views, make_inputs

GOLDEN = Path(__file__).parents[1] / "assets" / "losses"
BOTH = {"sr", "task"}
MOVES = {
    "pretrain": {"sr"},
    "h2t": {"task"},
    "l2t": {"task"},
    "s": {"sr"},
    "s2t": {"task"},
    "t2s": {"sr"},
    "joint": BOTH,
    "sr4ir": BOTH,
    "sr4ir-no-tdp": BOTH,
    "sr4ir-only-sr": BOTH,
    "sr4ir-only-hr": BOTH,
    "sr4ir-no-cqmix": BOTH,
    "sr4ir-vgg": BOTH,
    "sr4ir-fixed-tdp": BOTH,
    "joint-tdp": BOTH,
    "tdsr": {"sr"},
    "sod-mtgan": BOTH,
    "s-vgg": {"sr"},
    "s-vgg2t": {"task"},
    "sr4ir2t": {"task"},
    "h2t-on-s": set(),
    "h2t-on-s-vgg": set(),
    "h2t-on-sr4ir": set(),
}
# For each network, train (True) or eval mode of each of its forwards after the warm-up.
TRAIN, EVAL = True, False
PAIR = [EVAL, EVAL]  # features of SR and of HR
MODES = {
    "pretrain": {"sr": [TRAIN]},
    "h2t": {"task": [TRAIN]},
    "l2t": {"task": [TRAIN]},
    "s": {"sr": [TRAIN]},
    "s2t": {"sr": [EVAL], "task": [TRAIN]},
    "t2s": {"sr": [TRAIN], "task": [EVAL]},
    "joint": {"sr": [TRAIN], "task": [TRAIN]},
    # Phase 1: SR, then features of SR and HR; phase 2: SR again, then SR, HR and CQMix.
    "sr4ir": {"sr": [TRAIN] * 2, "task": [*PAIR, TRAIN, TRAIN, TRAIN]},
    "sr4ir-no-tdp": {"sr": [TRAIN] * 2, "task": [TRAIN] * 3},
    "sr4ir-only-sr": {"sr": [TRAIN] * 2, "task": [*PAIR, TRAIN]},
    "sr4ir-only-hr": {"sr": [TRAIN], "task": [*PAIR, TRAIN]},
    "sr4ir-no-cqmix": {"sr": [TRAIN] * 2, "task": [*PAIR, TRAIN, TRAIN]},
    "sr4ir-vgg": {"sr": [TRAIN] * 2, "task": [TRAIN] * 3, "vgg": PAIR},
    "sr4ir-fixed-tdp": {"sr": [TRAIN] * 2, "task": [TRAIN] * 3, "oracle": PAIR},
    # Its own forwards of SR and HR give features and outputs.
    "joint-tdp": {"sr": [TRAIN], "task": [TRAIN] * 3},
    "tdsr": {"sr": [TRAIN], "task": [EVAL]},
    "sod-mtgan": {"sr": [TRAIN] * 2, "task": [EVAL, TRAIN, TRAIN]},
    "s-vgg": {"sr": [TRAIN], "vgg": PAIR},
    "s-vgg2t": {"sr": [EVAL], "task": [TRAIN]},
    "sr4ir2t": {"sr": [EVAL], "task": [TRAIN]},
    "h2t-on-s": {},
    "h2t-on-s-vgg": {},
    "h2t-on-sr4ir": {},
}
MIXED = ["task_sr", "task_hr", "task_cqmix"]
TERMS = {
    "pretrain": ["pixel_sr"],
    "h2t": ["task_hr"],
    "l2t": ["task_lr_up"],
    "s": ["pixel_sr"],
    "s2t": ["task_sr"],
    "t2s": ["pixel_sr", "task_sr"],
    "joint": ["pixel_sr", "task_sr"],
    "sr4ir": ["pixel_sr", "tdp_sr", *MIXED],
    "sr4ir-no-tdp": ["pixel_sr", *MIXED],
    "sr4ir-only-sr": ["pixel_sr", "tdp_sr", "task_sr"],
    "sr4ir-only-hr": ["pixel_sr", "tdp_sr", "task_hr"],
    "sr4ir-no-cqmix": ["pixel_sr", "tdp_sr", "task_sr", "task_hr"],
    "sr4ir-vgg": ["pixel_sr", "perceptual_sr", *MIXED],
    "sr4ir-fixed-tdp": ["pixel_sr", "tdp_sr", *MIXED],
    "joint-tdp": ["pixel_sr", "tdp_sr", *MIXED],
    "tdsr": ["pixel_sr", "task_sr"],
    "sod-mtgan": [
        "pixel_sr",
        "task_sr",
        "adversarial_sr",
        "task_hr",
        "real_fake_sr",
        "real_fake_hr",
    ],
    "s-vgg": ["pixel_sr", "perceptual_sr"],
    "s-vgg2t": ["task_sr"],
    "sr4ir2t": ["task_sr"],
    "h2t-on-s": [],
    "h2t-on-s-vgg": [],
    "h2t-on-sr4ir": [],
}
# What the end of the warm-up adds: a term, and how many forwards of a network before its others.
WAITS = {
    "sr4ir": ("tdp_sr", "task", 2),
    "sr4ir-only-sr": ("tdp_sr", "task", 2),
    "sr4ir-only-hr": ("tdp_sr", "task", 2),
    "sr4ir-no-cqmix": ("tdp_sr", "task", 2),
    "sr4ir-vgg": ("perceptual_sr", "vgg", 2),
    "sr4ir-fixed-tdp": ("tdp_sr", "oracle", 2),
    "joint-tdp": ("tdp_sr", "task", 0),
    "tdsr": ("task_sr", "task", 1),
}
every_recipe = pytest.mark.parametrize("recipe", RECIPES)
every_training_recipe = pytest.mark.parametrize("recipe", [r for r in RECIPES if MOVES[r]])


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
        layer = module
        if role in ("task", "oracle"):
            layer = getattr(module, "network", module).layer4
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
    if recipe in WAITS and not after_warmup:
        term, network, forwards = WAITS[recipe]
        terms.remove(term)
        modes[network] = modes[network][forwards:]
    assert list(losses) == terms
    assert seen == {network: order for network, order in modes.items() if order}
    assert all(loss.grad_fn is None and loss.ndim == 0 for loss in losses.values())


def test_joint_tdp_reaches_the_task_network_through_sr_and_hr_features():
    def gradient(*settings):
        setup = tiny_setup(tiny_experiment("joint-tdp", *settings), engine="plain", double=True)
        engine, found = setup.engines["task"], {}

        def keep(rates):
            found.update({n: p.grad.clone() for n, p in engine.module.named_parameters()})

        engine.step = keep
        inputs = make_inputs(setup, drawn_batch(0, 3, dtype=torch.float64), epoch=1)
        train_step(setup, inputs, after_warmup=True, rates={"sr": [0.0], "task": [0.0]})
        return setup, inputs, found

    # Task losses are off, so that all that is left in the task network is TDP's.
    setup, inputs, found = gradient("losses.task=0")
    module = setup.modules["task"].train()
    module.zero_grad()
    sr = setup.modules["sr"](inputs.lr).detach()
    features = [setup.task.features(module, images)["l4"] for images in (sr, inputs.hr)]
    (features[0] - features[1]).abs().mean().backward()
    for name, parameter in module.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-9, atol=1e-15)
            assert found[name].any(), name


def test_features_of_a_network_that_learns_are_compared_in_float32_under_bf16():
    setup = tiny_setup(tiny_experiment("joint-tdp", "precision=bf16"), engine="plain")
    inputs = make_inputs(setup, drawn_batch(0, 3), epoch=1)
    views = Views(setup, setup.recipe.phases[0], inputs)
    assert views.compared("sr", "task")[0]["l4"].dtype == torch.float32


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

        def __call__(self, *inputs):
            called.append(self.role)
            allowed.append(next(iter(self.trainable)).requires_grad)
            return self.engine(*inputs)

        def __getattr__(self, name):
            return getattr(self.engine, name)

    engines = {role: Watched(role, engine) for role, engine in setup.engines.items()}
    step(replace(setup, engines=engines))
    expected = {
        role: sum(1 for training in MODES[recipe][role] if training) for role in MOVES[recipe]
    }
    if len(RECIPES[recipe].phases) == 2:
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
    waits = recipe in WAITS or "sr4ir" in recipe
    epochs = ["epochs=2", f"warmup_epochs={int(waits)}"]
    experiment = override(tiny_experiment(recipe), ["batch_size=8", *epochs])
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


@every_training_recipe
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
