"""DeepSpeed's engines against plain PyTorch, on one rank and on two with uneven shares.

Two ranks are real processes (`rank_process.py`); the reference of both is plain PyTorch in one
process that sees every whole batch.
"""

import contextlib
import os
import shutil
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_runs import (
    COUNT,
    CUT,
    RATES,
    STEPS,
    canvas_inputs,
    drawn_batch,
    outcome,
    run_steps,
    segmentation_outcome,
    staged,
    tiny_experiment,
)
from torch import nn

from sr4ir_dist.training import engines, step
from sr4ir_dist.training.engines import DeepSpeedEngine, PlainEngine
from sr4ir_dist.training.step import train_step
from sr4ir_dist.training.views import cut, make_inputs

tiny_setup = partial(tiny_runs.tiny_setup, smooth=True)
restored = partial(tiny_runs.restored, smooth=True)
STAGES = (0, 1, 2)
ALTERNATING, JOINT = "sr4ir", "joint"
# Float32 sums in another order: a few 1e-4 here; wrong shares or averages make 0.1 and more.
ROUNDING = 2e-2
pytestmark = [pytest.mark.usefixtures("process_group"), pytest.mark.timeout(900)]


@dataclass(frozen=True)
class Reference:
    """Outcomes of plain engines in one process on whole batches, at the cut and at the end."""

    cut: dict[str, Any]
    end: dict[str, Any]


@pytest.fixture(scope="module")
def whole():
    """References by (recipe, double)."""
    results = {}
    for recipe in (ALTERNATING, JOINT):
        for double in (False, True):
            setup = tiny_setup(tiny_experiment(recipe), engine="plain", double=double)
            losses = run_steps(setup, last=CUT)
            cut = outcome(setup, {})
            end = outcome(setup, losses | run_steps(setup, first=CUT))
            results[recipe, double] = Reference(cut, end)
    return results


def in_order(stage):
    """What rounding makes: at stage 2 phase 2 has one backward, which adds in another order."""
    return 1e-4 if stage == 2 else 1e-5


def start_of(recipe):
    return outcome(tiny_setup(tiny_experiment(recipe), engine="none"), {})


def flat(result, kind, role):
    """All numbers of a network; AdamW's count of steps would drown its moments."""
    names = [name for name in sorted(result[kind]) if name.startswith(role)]
    return torch.cat([result[kind][n].double() for n in names if n != "sr.step"])


def assert_same_training(found, expected, recipe, tolerance):
    """Weights, measured by how far training moved them, and all else that a run has."""
    start = start_of(recipe)
    for role in ("sr", "task"):
        weights = flat(expected, "weights", role)
        moved = (weights - flat(start, "weights", role)).norm()
        assert moved > 0
        assert (flat(found, "weights", role) - weights).norm() <= tolerance * moved
        states = flat(expected, "optimizers", role)
        assert (flat(found, "optimizers", role) - states).norm() <= tolerance * states.norm()
    assert found["optimizers"]["sr.step"] == expected["optimizers"]["sr.step"]
    buffers = flat(expected, "buffers", "task")
    assert (flat(found, "buffers", "task") - buffers).norm() <= tolerance * buffers.norm()
    assert found["losses"].keys() == expected["losses"].keys()
    for name, loss in expected["losses"].items():
        assert found["losses"][name].item() == pytest.approx(loss.item(), rel=tolerance), name


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for kind, tensors in expected.items():
        assert found[kind].keys() == tensors.keys()
        for name, value in tensors.items():
            assert torch.equal(found[kind][name], value), name


def test_the_steps_hold_both_sides_of_the_warm_up_and_uneven_shares(whole):
    names = set(whole[ALTERNATING, True].end["losses"])
    assert {f"{CUT - 1}/tdp_sr", f"{CUT}/tdp_sr"} & names == {f"{CUT}/tdp_sr"}
    assert {5, 1} < set(STEPS)


@pytest.mark.parametrize("recipe", [ALTERNATING, JOINT])
@pytest.mark.parametrize("stage", STAGES)
def test_one_rank_equals_plain_pytorch(whole, recipe, stage):
    setup = tiny_setup(staged(recipe, stage), engine="deepspeed")
    found = outcome(setup, run_steps(setup))
    assert_same_training(found, whole[recipe, False].end, recipe, tolerance=in_order(stage))


@pytest.mark.parametrize("recipe", [ALTERNATING, JOINT])
def test_two_ranks_with_plain_engines_equal_one_process_in_float64(two_ranks, whole, recipe):
    for results in two_ranks.by_rank:
        found = results["engines"][f"{recipe}/double"]
        assert_same_training(found, whole[recipe, True].end, recipe, tolerance=1e-9)


@pytest.mark.parametrize("recipe", [ALTERNATING, JOINT])
@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_equal_plain_engines_with_the_same_shares(two_ranks, recipe, stage):
    for results in two_ranks.by_rank:
        found, expected = (
            results["stages"][f"{recipe}/{stage}"]["end"],
            results["engines"][f"{recipe}/plain"],
        )
        assert_same_training(found, expected, recipe, tolerance=in_order(stage))


@pytest.mark.parametrize("recipe", [ALTERNATING, JOINT])
@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_equal_one_process_on_whole_batches(two_ranks, whole, recipe, stage):
    found = two_ranks.by_rank[0]["stages"][f"{recipe}/{stage}"]
    expected = whole[recipe, False]
    assert_same_training(found["cut"], expected.cut, recipe, tolerance=1e-3)
    # Batch norm over a single image magnifies rounding: gradients that have gone through it agree
    # in float64 alone (above), losses also here.
    for name, loss in expected.end["losses"].items():
        assert found["end"]["losses"][name].item() == pytest.approx(loss.item(), rel=1e-2), name
    if recipe == ALTERNATING:
        assert_same_training(found["end"], expected.end, recipe, tolerance=ROUNDING)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("recipe", [ALTERNATING, JOINT])
def test_passes_of_a_step_add_up_in_deepspeed_as_in_plain_pytorch(recipe, stage):
    experiment = staged(recipe, stage).model_copy(update={"micro_batch": 3})
    found = tiny_setup(experiment, engine="deepspeed")
    expected = tiny_setup(experiment, engine="plain")
    # Without the last step, of one image: batch norm needs more of them.
    assert_same_training(
        outcome(found, run_steps(found, last=COUNT - 1)),
        outcome(expected, run_steps(expected, last=COUNT - 1)),
        recipe,
        tolerance=1e-5,
    )


@pytest.mark.parametrize("recipe", ["pretrain", "t2s"])
def test_passes_of_a_step_equal_the_whole_where_no_batch_norm_learns(recipe):
    outcomes = []
    for micro_batch in (None, 1, 2, 5):
        experiment = tiny_experiment(recipe).model_copy(update={"micro_batch": micro_batch})
        setup = tiny_setup(experiment, engine="plain", double=True)
        outcomes.append(outcome(setup, run_steps(setup)))
    whole = outcomes[0]
    for found in outcomes[1:]:
        for kind in ("weights", "losses"):
            for name, value in whole[kind].items():
                torch.testing.assert_close(found[kind][name], value, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_in_passes_equal_plain_engines_in_passes(two_ranks, stage):
    for results in two_ranks.by_rank:
        found, expected = (results["passes"][kind] for kind in (stage, "plain"))
        assert_same_training(found, expected, ALTERNATING, tolerance=in_order(stage))


@pytest.mark.parametrize("stage", STAGES)
def test_gradients_that_travel_in_bfloat16_are_rounded(two_ranks, stage):
    first, second = (results["short"][stage] for results in two_ranks.by_rank)
    expected = two_ranks.by_rank[0]["short"]["plain"]
    assert_same_training(first, expected, ALTERNATING, tolerance=ROUNDING)
    for role in ("sr", "task"):
        states = flat(expected, "optimizers", role)
        assert (flat(first, "optimizers", role) - states).norm() > 1e-4 * states.norm()
    assert_equal(second, first)


@settings(max_examples=200, deadline=None)
@given(images=st.integers(1, 200), world_size=st.integers(1, 16), micro_batch=st.integers(1, 50))
def test_every_rank_has_as_many_passes_and_each_image_is_in_one(images, world_size, micro_batch):
    most = -(-images // world_size)
    shares = [images // world_size, most]
    cuts = [cut(share, most, micro_batch) for share in shares]
    assert len(cuts[0]) == len(cuts[1]) == -(-most // micro_batch)
    for share, slices in zip(shares, cuts, strict=True):
        rows = [row for at in slices for row in range(share)[at]]
        assert rows == list(range(share))
        assert all(at.stop - at.start <= micro_batch for at in slices)


def test_the_weights_of_uneven_shares_are_a_guard(two_ranks):
    found = two_ranks.by_rank[0]["engines"]["unweighted"]
    setup = tiny_setup(tiny_experiment(ALTERNATING), engine="plain", double=True)
    expected = outcome(setup, run_steps(setup, last=1))
    start = start_of(ALTERNATING)
    for role in ("sr", "task"):
        weights = flat(expected, "weights", role)
        moved = (weights - flat(start, "weights", role)).norm()
        assert (flat(found, "weights", role) - weights).norm() > 2 * ROUNDING * moved


def test_ranks_hold_equal_networks_and_states(two_ranks):
    first, second = two_ranks.by_rank
    for key, result in first["stages"].items():
        for moment, found in result.items():
            assert_equal(second["stages"][key][moment], found)


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_continue_from_a_checkpoint_as_if_uninterrupted(two_ranks, stage):
    for results in two_ranks.by_rank:
        result = results["stages"][f"{ALTERNATING}/{stage}"]
        assert result["cut"]["weights"].keys() == result["restored"]["weights"].keys()
        assert_equal(result["restored"], result["cut"])
        resumed, end = dict(result["resumed"]), dict(result["end"])
        losses = resumed.pop("losses"), end.pop("losses")
        assert_equal(resumed, end)
        assert len(losses[0]) > 0
        assert all(torch.equal(value, losses[1][name]) for name, value in losses[0].items())


@pytest.mark.parametrize(("written", "read"), [(1, 0), (0, 2)])
def test_another_number_of_ranks_and_stage_takes_a_checkpoint_over(two_ranks, whole, written, read):
    experiment = staged(ALTERNATING, read)
    setup = restored(experiment, str(two_ranks.folder / f"stage-{written}"))
    result = two_ranks.by_rank[0]["stages"][f"{ALTERNATING}/{written}"]
    assert_equal(outcome(setup, {}), result["cut"])
    found = outcome(setup, run_steps(setup, first=CUT))
    expected = whole[ALTERNATING, False].end
    found["losses"] |= {
        name: loss for name, loss in expected["losses"].items() if int(name[0]) < CUT
    }
    assert_same_training(found, expected, ALTERNATING, tolerance=ROUNDING)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "sgd without momentum"])
def test_optimizer_state_round_trip(stage, optimizer):
    def engine():
        torch.manual_seed(0)
        layer = nn.Linear(3, 2)
        parameters = layer.parameters()
        made = {
            "adamw": lambda: torch.optim.AdamW(parameters, 0.1),
            "sgd": lambda: torch.optim.SGD(parameters, 0.1, momentum=0.9),
            "sgd without momentum": lambda: torch.optim.SGD(parameters, 0.1),
        }[optimizer]()
        return DeepSpeedEngine(layer, made, stage=stage, precision="fp32", micro_batch=2)

    def train(engine, first, last):
        for number in range(first, last):
            inputs = torch.randn(4, 3, generator=torch.Generator().manual_seed(number))
            engine.backward(engine(inputs).square().sum())
            engine.step([0.1 / (1 + number)])

    whole, first, second = engine(), engine(), engine()
    train(whole, 0, 4)
    train(first, 0, 2)
    state = first.optimizer_state()
    second.module.load_state_dict(first.module.state_dict())
    # ZeRO copies weights when it is made, so the second engine is made from these.
    second = DeepSpeedEngine(
        second.module,
        rebuilt(second.module, optimizer),
        stage=stage,
        precision="fp32",
        micro_batch=2,
    )
    second.load_optimizer_state(state)
    assert second.optimizer_state().keys() == state.keys()
    for name, value in second.optimizer_state().items():
        assert torch.equal(value, state[name]), name
    train(second, 2, 4)
    for found, expected in zip(second.trainable, whole.trainable, strict=True):
        assert torch.equal(found, expected)


def rebuilt(module, optimizer):
    if optimizer == "adamw":
        return torch.optim.AdamW(module.parameters(), 0.1)
    momentum = 0.0 if "without" in optimizer else 0.9
    return torch.optim.SGD(module.parameters(), 0.1, momentum=momentum)


def large_gradient_update(stage):
    layer = nn.Linear(3, 2, bias=False)
    before = layer.weight.detach().clone()
    engine = DeepSpeedEngine(
        layer,
        torch.optim.SGD(layer.parameters(), 0.5),
        stage=stage,
        precision="fp32",
        micro_batch=1,
    )
    engine.backward((engine(torch.ones(1, 3)) * 1000).sum())
    engine.step([0.5])
    return layer.weight.detach() - before


@pytest.mark.parametrize("stage", STAGES)
def test_a_large_gradient_is_applied_whole(stage):
    torch.testing.assert_close(large_gradient_update(stage), torch.full((2, 3), -500.0))


@pytest.mark.parametrize("stage", STAGES)
def test_the_guard_against_clipping_guards(monkeypatch, stage):
    import deepspeed

    initialize = deepspeed.initialize

    def without_the_key(*, config, **arguments):
        del config["gradient_clipping"]
        return initialize(config=config, **arguments)

    monkeypatch.setattr(deepspeed, "initialize", without_the_key)
    assert large_gradient_update(stage).norm() < 1


def first_phase_only(setup):
    recipe = replace(setup.recipe, phases=setup.recipe.phases[:1])
    return replace(setup, recipe=recipe)


def one_step(setup):
    inputs = make_inputs(setup, drawn_batch(0, 5), epoch=1)
    return train_step(setup, inputs, after_warmup=True, rates=RATES)


@pytest.mark.parametrize("stage", STAGES)
def test_phase_1_leaves_nothing_in_the_task_network(stage):
    setup = first_phase_only(tiny_setup(staged(ALTERNATING, stage), engine="deepspeed"))
    task = setup.modules["task"]
    before = {name: value.clone() for name, value in task.state_dict().items()}
    sr_before = [p.detach().clone() for p in setup.engines["sr"].trainable]
    assert "tdp_sr" in one_step(setup)
    assert all(torch.equal(value, before[name]) for name, value in task.state_dict().items())
    assert all(parameter.grad is None for parameter in task.parameters())
    moved = zip(setup.engines["sr"].trainable, sr_before, strict=True)
    assert all(not torch.equal(now, then) for now, then in moved)
    # An update without losses of its own shows what a leak would have left in the engine: only
    # weight decay may move the weights.
    inputs = torch.zeros(2, 3, 36, 36)
    task.requires_grad_(True)
    task.eval()
    setup.engines["task"].backward(setup.engines["task"](inputs).sum() * 0)
    setup.engines["task"].step([1.0])
    decay = setup.experiment.optimizers.task.weight_decay
    for name, parameter in task.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name] * (1 - decay))


@contextlib.contextmanager
def modes_only(setup, phase):
    """`only_trainable` without the freezing."""
    for role, module in setup.modules.items():
        module.train(role in phase.updates or phase.frozen_modes.get(role) == "train")
    yield


@pytest.mark.parametrize("kind", ["plain", 0, 1])
def test_the_guard_against_leaks_guards(monkeypatch, kind):
    def late_steps():
        if kind == "plain":
            setup = tiny_setup(tiny_experiment(ALTERNATING), engine="plain")
        else:
            setup = tiny_setup(staged(ALTERNATING, kind), engine="deepspeed")
        return outcome(setup, run_steps(setup, first=CUT))

    frozen = late_steps()
    monkeypatch.setattr(step, "only_trainable", modes_only)
    with pytest.raises(AssertionError):  # the same again would be equal
        assert_same_training(late_steps(), frozen, ALTERNATING, tolerance=1e-4)


def test_the_guard_against_leaks_guards_at_stage_2(monkeypatch):
    monkeypatch.setattr(step, "only_trainable", modes_only)
    setup = tiny_setup(staged(ALTERNATING, 2), engine="deepspeed")
    with pytest.raises(AssertionError, match="already been reduced"):
        one_step(setup)


def test_a_joint_phase_equals_one_graph_through_both_networks():
    setup = tiny_setup(tiny_experiment(JOINT), engine="plain", double=True)
    reference = tiny_setup(tiny_experiment(JOINT), engine="plain", double=True)
    sr, task = reference.modules["sr"], reference.modules["task"]
    assert isinstance(reference.engines["sr"], PlainEngine)
    assert reference.task is not None
    optimizers = {role: engine._optimizer for role, engine in reference.engines.items()}
    for number, count in enumerate((4, 3)):
        batch = drawn_batch(number, count, dtype=torch.float64)
        inputs = make_inputs(setup, batch, epoch=1)
        train_step(setup, inputs, after_warmup=True, rates=RATES)

        image = sr.train()(inputs.lr)
        outputs = reference.task.forward(task.train(), image)
        loss = (image - inputs.hr).abs().mean() + F.cross_entropy(outputs, inputs.targets)
        loss.backward()
        for role, optimizer in optimizers.items():
            (optimizer.param_groups[0]["lr"],) = RATES[role]
            optimizer.step()
            optimizer.zero_grad()
    for role, module in setup.modules.items():
        for name, value in module.state_dict().items():
            torch.testing.assert_close(
                value, reference.modules[role].state_dict()[name], rtol=1e-9, atol=1e-12
            )


def test_two_ranks_weigh_valid_pixels_as_one_process_does(two_ranks):
    expected = segmentation_outcome(0, 1)
    for results in two_ranks.by_rank:
        found = results["segmentation"]
        for name, loss in expected["losses"].items():
            assert found["losses"][name].item() == pytest.approx(loss.item(), rel=1e-9), name
        for kind in ("weights", "buffers", "optimizers"):
            assert found[kind].keys() == expected[kind].keys()
            for name, value in expected[kind].items():
                torch.testing.assert_close(found[kind][name], value, rtol=1e-6, atol=1e-11)


def test_ranks_agree_on_detections_canvas(two_ranks):
    alone = canvas_inputs(0, 1)
    for results in two_ranks.by_rank:
        found = results["canvas"]
        assert found["size"] == alone["size"] == (36, 36)
        assert found["loss"].item() == pytest.approx(alone["loss"].item(), rel=1e-12)
    assert sum(len(results["canvas"]["cells"]) for results in two_ranks.by_rank) == 5


def test_the_operator_is_always_built_by_the_environments_own_ninja(monkeypatch, tmp_path):
    # ninja tells by its own version's hash whether a command has changed: two versions in turn
    # build all anew, each time.
    other = tmp_path / "ninja"
    other.write_text("#!/bin/sh\n")
    other.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "unchanged")
    assert shutil.which("ninja") == str(other)
    engines._settle_build()
    own = Path(sys.executable).parent / "ninja"
    assert shutil.which("ninja") == str(own)
    settled = os.environ["PATH"]
    engines._settle_build()
    assert os.environ["PATH"] == settled
