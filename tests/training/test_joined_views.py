"""One pass for SR, HR and CQMix images against one for each."""

import pytest
import torch
from tiny_runs import (
    COUNT,
    RATES,
    masked_batch,
    outcome,
    run_steps,
    share_of,
    tiny_experiment,
    tiny_setup,
)

from sr4ir_dist import experiments
from sr4ir_dist.config import ExperimentError
from sr4ir_dist.overrides import override
from sr4ir_dist.training.batch_norm import apart
from sr4ir_dist.training.step import train_step
from sr4ir_dist.training.views import make_inputs


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for kind, tensors in expected.items():
        assert found[kind].keys() == tensors.keys()
        for name, value in tensors.items():
            # Some running means are of values that cancel: nothing but rounding.
            bound = 1e-9 * value.double().norm() + 1e-14
            assert (found[kind][name] - value).double().norm() <= bound, name


def pair(recipe, *settings):
    setups = []
    for joined in ("false", "true"):
        experiment = tiny_experiment(recipe, f"joined_views={joined}", *settings)
        setups.append(tiny_setup(experiment, engine="plain", double=True))
    return setups


@pytest.mark.parametrize("recipe", ["sr4ir", "sr4ir-no-cqmix", "sod-mtgan", "h2t", "joint"])
def test_losses_weights_and_statistics_are_those_of_separate_passes(recipe):
    apart_, joined = pair(recipe)
    last = COUNT - 1  # without the step of a single image, which batch norm makes chaotic
    expected = outcome(apart_, run_steps(apart_, last=last))
    assert_same(outcome(joined, run_steps(joined, last=last)), expected)


def test_in_parts_of_a_batch_too():
    apart_, joined = pair("sr4ir", "micro_batch=3")
    expected = outcome(apart_, run_steps(apart_, last=2))
    assert_same(outcome(joined, run_steps(joined, last=2)), expected)


def test_segmentation():
    found = []
    for joined in ("false", "true"):
        small = ["data.resize=32", "data.crop=32", "sr.blocks=1", "sr.features=8"]
        name = "drawn_seg/edsr-x4/sr4ir"
        settings = [*small, "task.classes=4", f"joined_views={joined}"]
        experiment = override(experiments.make(name), settings)
        setup = tiny_setup(experiment, engine="plain", double=True)
        for layer in setup.modules["task"].modules():
            if isinstance(layer, torch.nn.Dropout):
                layer.p = 0.0  # it draws for a pass
        inputs = make_inputs(setup, share_of(masked_batch(0), 0, 1), epoch=1)
        rates = RATES | {"task": [1e-3, 1e-2]}
        found.append(outcome(setup, train_step(setup, inputs, after_warmup=True, rates=rates)))
    assert_same(found[1], found[0])


def test_the_task_network_runs_once_in_phase_2():
    _, setup = pair("sr4ir")
    seen = []
    setup.modules["task"].register_forward_hook(lambda m, args, out: seen.append(len(args[0])))
    run_steps(setup, last=1)
    assert seen == [15]


def test_detection_refuses():
    experiment = experiments.make("drawn_det/edsr-x4/sr4ir")
    with pytest.raises(ExperimentError, match="joined_views=True is not for task.name='detection'"):
        override(experiment, ["joined_views=true"])


def test_compiled_blocks_refuse():
    experiment = experiments.make("drawn_cls/edsr-x4/sr4ir")
    with pytest.raises(ExperimentError, match="joined_views=True is not for compile=True"):
        override(experiment, ["joined_views=true", "compile=true"])


def test_layers_are_as_they_were_afterwards():
    layer = torch.nn.BatchNorm2d(2)
    images = torch.rand(6, 2, 3, 3)
    with apart(layer, 3):
        layer(images)
    with pytest.raises(ValueError, match="expected 4D"), apart(layer, 3):
        layer(images[0])
    assert layer.num_batches_tracked == 3
    layer(images)
    assert layer.num_batches_tracked == 4
