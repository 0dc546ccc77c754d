"""Counted costs of the paper's networks, held against the paper's and independent counts."""

import pytest
import torch
from random_runs import publish_random
from torch import nn

from sr4ir_dist import experiments
from sr4ir_dist.analysis.efficiency import PAPER, gflops, measure, parameters
from sr4ir_dist.networks.edsr import EDSR
from sr4ir_dist.overrides import override
from sr4ir_dist.training.build import build_networks, make_task

# Parameters and GFLOPs of the networks at the paper's image sizes, as counted elsewhere.
SR = {
    "cars/edsr-x4/s": (1_517_595, 12.44),
    "cars/edsr-x8/s": (1_665_307, 6.94),
    "voc_seg/edsr-x8/s": (1_665_307, 31.9),
    "voc_det/edsr-x8/s": (1_665_307, 26.2),
    "cars/swinir-x8/s": (12_047_911, 31.8),
}
TASK = {
    "cars/h2t": (11_277_060, 3.63),
    "voc_seg/x8/l2t": (11_029_328, 17.30),
    "voc_seg_resnet50/x8/l2t": (42_004_074, 304.6),
}


@pytest.fixture(scope="module")
def costs():
    return measure({name: name for name in (*SR, *TASK, *PAPER)}, timed=1)


def test_counts_equal_those_made_elsewhere(costs):
    for name, (count, operations) in SR.items():
        assert costs[name].parameters == count
        assert costs[name].sr_gflops == pytest.approx(operations, rel=3e-3)
    for name, (count, operations) in TASK.items():
        assert costs[name].parameters == count
        assert costs[name].gflops == pytest.approx(operations, rel=3e-3)
        assert costs[name].sr_gflops == 0


def test_a_detectors_counts_equal_those_made_elsewhere():
    """Its features, and all of it where an untrained network proposes as many boxes as it may."""
    experiment = override(experiments.make("voc_det/x8/l2t"), ["task.classes=20"])
    (network,) = build_networks(experiment, torch.device("cpu"), only=("task",)).values()
    task, images = make_task(experiment), [torch.rand(3, 375, 500)]
    assert parameters(network.eval()) == 19_027_604
    with torch.inference_mode():
        features = gflops(lambda: task.features(network, images))
        everything = gflops(lambda: task.forward(network, images, None))
    assert features == pytest.approx(9.87, rel=3e-3)
    assert everything == pytest.approx(40.2, rel=3e-3)


def test_table_s3s_parameters_and_operations_are_the_papers(costs):
    for name, paper in PAPER.items():
        assert costs[name].parameters == pytest.approx(paper["parameters"], rel=5e-3)
        assert costs[name].gflops == pytest.approx(paper["gflops"], rel=0.015)
        # Weights and the largest activations at least, and no more than a few of them.
        assert costs[name].memory_mb > 4e-6 * costs[name].parameters
        assert costs[name].images_per_second > 0
    ordered = sorted(PAPER, key=lambda name: costs[name].memory_mb)
    assert ordered == sorted(PAPER, key=lambda name: PAPER[name]["memory_mb"])


def test_torchs_counter_counts_each_convolution_once():
    """By hand: 2 x kernel x channels in x channels out x pixels of each convolution."""
    network, lr = EDSR(4), torch.rand(1, 3, 7, 9)
    expected, hooks = 0.0, []

    def count(module, inputs, output):
        nonlocal expected
        rows, columns = module.kernel_size
        each = module.in_channels * rows * columns // module.groups
        expected += 2 * each * output.numel()

    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            hooks.append(module.register_forward_hook(count))
    with torch.no_grad():
        found = gflops(lambda: network(lr))
    assert hooks
    assert found == pytest.approx(expected / 1e9, rel=1e-12)


def test_a_finished_run_tells_its_device_hours(tmp_path):
    modules = publish_random(
        tmp_path, "drawn_cls/edsr-x4/sr4ir", "sr.blocks=1", "sr.features=8", "task.classes=8"
    )
    cost = measure({"ours": str(tmp_path)})["ours"]
    assert cost.training_hours == 0.0
    assert cost.parameters == sum(parameters(module) for module in modules.values())
    assert (cost.height, cost.width) == (64, 64)


@pytest.mark.parametrize("name", ["voc_seg/edsr-x9/sr4ir", "cars/h2"])
def test_a_wrong_name_is_told(name):
    with pytest.raises(ValueError, match="unknown experiment"):
        measure({"a": name})
    assert name not in experiments.names()
