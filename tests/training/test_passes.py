"""A phase's terms in backwards of their own: the same gradients, for less memory."""

from dataclasses import replace

import pytest
import torch
from tiny_runs import RATES, drawn_batch, tiny_experiment, tiny_setup

from sr4ir_dist import experiments
from sr4ir_dist.benchmark.step_cost import count
from sr4ir_dist.overrides import override
from sr4ir_dist.recipes import RECIPES
from sr4ir_dist.training import step
from sr4ir_dist.training.step import by_graph, train_step
from sr4ir_dist.training.views import make_inputs

PLAIN = tiny_experiment("sr4ir")
PHASES = [(name, phase) for name, recipe in RECIPES.items() for phase in recipe.phases]


def at_once(experiment, phase, terms):
    """`by_graph` of a single backward."""
    return [list(terms)]


def test_terms_that_share_a_graph_stay_together():
    for name, phase in PHASES:
        groups = by_graph(PLAIN, phase, phase.terms)
        assert sorted(t.name for group in groups for t in group) == sorted(
            t.name for t in phase.terms
        )
        compared = [t for t in phase.terms if t.loss in ("tdp", "perceptual")]
        if "sr" in phase.updates or compared:
            assert groups == [list(phase.terms)], name
        views = [{term.view for term in group} for group in groups]
        assert sum(map(len, views)) == len(set().union(*views)), name


def test_features_of_a_network_that_learns_are_of_forwards_in_common():
    (phase,) = RECIPES["joint-tdp"].phases
    alone = replace(phase, updates=("task",))
    assert by_graph(PLAIN, alone, alone.terms) == [list(alone.terms)]


def test_views_of_the_task_network_have_backwards_of_their_own():
    def names(recipe):
        phase = RECIPES[recipe].phases[1]
        return [[term.name for term in group] for group in by_graph(PLAIN, phase, phase.terms)]

    assert names("sr4ir") == [["task_sr"], ["task_hr"], ["task_cqmix"]]
    assert names("sod-mtgan") == [["task_sr", "real_fake_sr"], ["task_hr", "real_fake_hr"]]


@pytest.mark.parametrize("setting", ["joined_views=true", "zero.task=2"])
def test_settings_that_need_one_backward_get_one(setting):
    phase = RECIPES["sr4ir"].phases[1]
    groups = by_graph(tiny_experiment("sr4ir", setting), phase, phase.terms)
    assert groups == [list(phase.terms)]


@pytest.mark.parametrize("micro_batch", [None, 2])
@pytest.mark.parametrize("recipe", ["sr4ir", "sod-mtgan"])
def test_gradients_are_those_of_one_backward(monkeypatch, recipe, micro_batch):
    def outcome():
        experiment = tiny_experiment(recipe).model_copy(update={"micro_batch": micro_batch})
        setup = tiny_setup(experiment, engine="plain", double=True)
        second = replace(setup.recipe, phases=setup.recipe.phases[1:])
        setup = replace(setup, recipe=second)
        engine, backwards, gradients = setup.engines["task"], [], {}
        backward = engine.backward

        def listen(loss, *, last):
            backwards.append(last)
            backward(loss, last=last)

        def keep(rates):
            gradients.update({n: p.grad for n, p in engine.module.named_parameters()})

        engine.backward, engine.step = listen, keep
        inputs = make_inputs(setup, drawn_batch(0, 5, dtype=torch.float64), epoch=1)
        losses = train_step(setup, inputs, after_warmup=True, rates=RATES)
        return losses, gradients, dict(engine.module.named_buffers()), backwards

    *found, backwards = outcome()
    views = len({term.view for term in RECIPES[recipe].phases[1].terms})
    passes = 1 if micro_batch is None else 3
    assert backwards == [False] * (views * passes - 1) + [True]
    monkeypatch.setattr(step, "by_graph", at_once)
    *expected, backwards = outcome()
    assert len(backwards) == passes
    assert [list(part) for part in found] == [list(part) for part in expected]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_a_step_of_segmentation_needs_less_memory_than_one_backward(monkeypatch):
    settings = ["data.resize=64", "data.crop=64", "sr.blocks=1", "sr.features=8", "task.classes=4"]
    experiment = override(experiments.make("drawn_seg/edsr-x4/sr4ir"), settings)
    setup = tiny_setup(experiment, engine="plain")
    batch = drawn_batch(0, 4, size=64)
    masks = torch.randint(5, (4, 64, 64), dtype=torch.uint8)
    inputs = make_inputs(setup, replace(batch, targets=masks), epoch=1)
    rates = {"sr": [1e-4], "task": [1e-3, 1e-2]}

    def run():
        train_step(setup, inputs, after_warmup=True, rates=rates)

    def peak():
        return count(run, list(setup.modules.values())).peak_mb

    run()  # makes the optimizers' states
    ours = peak()
    monkeypatch.setattr(step, "by_graph", at_once)
    assert ours < 0.9 * peak()


SWINIR = ["sr.blocks=1", "sr.depth=2", "sr.features=8", "sr.heads=2", "sr.drop_path=0"]


@pytest.mark.slow
@pytest.mark.parametrize("network", ["edsr", "swinir"])
def test_a_compiled_step_computes_what_an_eager_one_does(network):
    def outcome(*settings):
        experiment = tiny_experiment("pretrain", *settings)
        if network == "swinir":
            named = experiments.make("drawn_cls/swinir-x4/pretrain")
            size = ["data.resize=32", "data.crop=32", "batch_size=5"]
            experiment = override(named, [*size, *SWINIR, *settings])
        setup = tiny_setup(experiment, engine="plain")
        inputs = make_inputs(setup, drawn_batch(0, 5), epoch=1)
        rates = {"sr": RATES["sr"]}
        losses = train_step(setup, inputs, after_warmup=True, rates=rates)
        return losses, dict(setup.modules["sr"].named_parameters())

    from torch._dynamo.utils import counters

    counters.clear()
    expected = outcome()
    assert counters["frames"]["total"] == 0
    found = outcome("compile=true")
    assert counters["frames"]["ok"] > 0
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
