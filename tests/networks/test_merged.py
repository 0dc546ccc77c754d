"""The merged end of SR networks against the same convolutions one after the other."""

import pytest
import torch

from sr4ir_dist.benchmark.step_cost import count
from sr4ir_dist.networks.edsr import EDSR
from sr4ir_dist.networks.swinir import SwinIR


def swinir(scale):
    return SwinIR(scale, blocks=1, features=8, depth=2, heads=2, window=2, reconstruction=4)


def edsr(scale):
    return EDSR(scale, blocks=1, features=8)


def outcome(network, lr, merged):
    """The image, and every gradient of a sum that weighs each of its pixels differently."""
    network.merged = merged
    network.zero_grad()
    lr = lr.clone().requires_grad_()
    image = network(lr)
    weights = torch.sin(torch.arange(image.numel(), dtype=image.dtype)).view_as(image)
    (image * weights).sum().backward()
    gradients = {k: p.grad.clone() for k, p in network.named_parameters() if p.grad is not None}
    return {"image": image.detach(), "lr": lr.grad, **gradients}


@pytest.mark.parametrize("build", [edsr, swinir])
@pytest.mark.parametrize("scale", [2, 4, 8])
@pytest.mark.parametrize("size", [(7, 5), (1, 1), (1, 4), (3, 1), (2, 2), (16, 3)])
def test_images_and_gradients_are_those_of_one_layer_after_the_other(build, scale, size):
    torch.manual_seed(0)
    network = build(scale).double().eval()  # stochastic depth would draw twice
    lr = torch.rand(2, 3, *size, dtype=torch.float64)
    expected, found = (outcome(network, lr, merged) for merged in (False, True))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].shape == value.shape, name
        assert (found[name] - value).norm() <= 1e-12 * value.norm(), name


@pytest.mark.parametrize("build", [edsr, swinir])
def test_an_empty_batch_gives_every_weight_a_zero_gradient(build):
    network = build(4)
    found = outcome(network, torch.rand(0, 3, 4, 4), merged=True)
    assert found["image"].shape == (0, 3, 16, 16)
    expected = {name for name, p in network.named_parameters() if p.requires_grad}
    assert found.keys() - {"image", "lr"} == expected
    assert all(not value.any() for value in found.values())


def test_float32_and_bfloat16_round_no_more_than_the_layers_apart():
    torch.manual_seed(0)
    network = EDSR(8, blocks=2)
    lr = torch.rand(2, 3, 12, 9)
    with torch.no_grad():
        exact = EDSR(8, blocks=2).double()
        exact.load_state_dict(network.state_dict())
        truth = exact(lr.double())
        for dtype in (torch.float32, torch.bfloat16):
            errors = []
            for merged in (False, True):
                network.merged = merged
                with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                    errors.append((network(lr).double() - truth).norm())
            assert errors[1] <= 1.5 * errors[0], dtype


def test_it_takes_a_fraction_of_the_work_and_of_the_memory():
    network = EDSR(8)
    lr = torch.rand(1, 3, 28, 28)
    costs = {}
    for merged in (False, True):
        network.merged = merged
        costs[merged] = count(lambda: network(lr).sum().backward(), [network])
    assert costs[True].peak_mb < 0.7 * costs[False].peak_mb
    # The weights are made once for all images, so a single one pays for all of it.
    assert costs[True].gflops < 0.75 * costs[False].gflops
