"""Layers that compute what torchvision's do, faster."""

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign
from torchvision.ops.poolers import initLevelMapper

from sr4ir_dist.networks import SR_NETWORKS
from sr4ir_dist.networks.kernels import (
    DepthwiseConv2d,
    FusedFrozenBatchNorm2d,
    SeparableRoIAlign,
    speed_up,
)
from sr4ir_dist.networks.vgg import VGG19
from sr4ir_dist.tasks.classification import Classification
from sr4ir_dist.tasks.detection import LOSSES, Detection
from sr4ir_dist.tasks.segmentation import Segmentation

STRIDE = 32
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "classification": Classification(3).build,
    "segmentation": Segmentation(3).build,
    "detection": Detection(3, min_size=64, max_size=96).build,
    "edsr": lambda: SR_NETWORKS["edsr"](4, blocks=1, features=8),
    "bicubic": lambda: SR_NETWORKS["bicubic"](4),
    "vgg": lambda: VGG19("conv2_2"),
}
# What of a network is exchanged on a CPU, by precision.
EXCHANGED = {
    "segmentation": {"fp32": set(), "bf16": {DepthwiseConv2d}},
    "detection": {
        "fp32": {FusedFrozenBatchNorm2d, SeparableRoIAlign},
        "bf16": {FusedFrozenBatchNorm2d, SeparableRoIAlign, DepthwiseConv2d},
    },
}


def pooling(kind: type[MultiScaleRoIAlign], bins: int, samples: int) -> MultiScaleRoIAlign:
    """Of two levels, of which the first has all boxes, as in the detector."""
    layer = kind(["0", "1"], bins, samples)
    level = STRIDE.bit_length() - 1
    layer.scales = [1 / STRIDE] * 2
    layer.map_levels = initLevelMapper(level, level)
    return layer


def assert_pooled_alike(images: Tensor, boxes: list[Tensor], bins: int = 7, samples: int = 2):
    """Output and gradient of both layers, in float64."""
    found = []
    for kind in (MultiScaleRoIAlign, SeparableRoIAlign):
        maps = images.clone().requires_grad_()
        levels = {"0": maps, "1": torch.full_like(maps, torch.nan), "pool": maps}
        shapes = [(STRIDE * images.shape[-2], STRIDE * images.shape[-1])] * len(images)
        pooled = pooling(kind, bins, samples)(levels, boxes, shapes)
        weights = torch.randn(pooled.shape, generator=seeded(1), dtype=pooled.dtype)
        (pooled * weights).sum().backward()
        assert maps.grad is not None
        found.append((pooled.detach(), maps.grad))
    for expected, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def maps(count: int, height: int, width: int, channels: int = 3) -> Tensor:
    shape = (count, channels, height, width)
    return torch.randn(shape, generator=seeded(0), dtype=torch.float64)


@pytest.mark.parametrize(
    "box",
    [
        (0, 0, 160, 128),  # the whole map
        (33.7, 20.1, 90.3, 100.9),
        (32, 32, 64, 64),  # on pixels
        (50, 60, 50, 60),  # nothing
        (50, 60, 50.001, 60.5),
        (-40, -90, 30, 20),
        (130, 100, 400, 300),
        (-300, -300, 500, 500),
        (-900, 10, -700, 60),  # outside, with nothing of the map
        (10, 700, 60, 900),
        (-32, -32, 200, 160),  # samples at the very limits
    ],
)
@pytest.mark.parametrize(("bins", "samples"), [(7, 2), (3, 1)])
def test_pooled_as_torchvision_does(box: tuple[float, ...], bins: int, samples: int):
    assert_pooled_alike(maps(1, 4, 5), [torch.tensor([box], dtype=torch.float64)], bins, samples)


sides = st.tuples(*[st.floats(-300, 500, width=32)] * 2).map(sorted)


@given(
    boxes=st.lists(st.lists(st.tuples(sides, sides), max_size=4), min_size=1, max_size=3),
    height=st.integers(1, 6),
    width=st.integers(1, 6),
)
def test_any_boxes_of_any_images_are_pooled_as_torchvision_does(boxes, height: int, width: int):
    # From x0, x1 and y0, y1.
    own = [torch.tensor(of_one).double().reshape(-1, 2, 2).mT.flatten(1) for of_one in boxes]
    assert_pooled_alike(maps(len(own), height, width), own)


def test_images_without_boxes_pool_nothing():
    none, one = torch.zeros(0, 4).double(), torch.tensor([[10.0, 20, 90, 70]]).double()
    for boxes in ([none, one], [one, none, one], [none], [none, none]):
        assert_pooled_alike(maps(len(boxes), 4, 5), boxes)


def test_pooled_in_the_features_precision_under_autocast():
    boxes = torch.tensor([[10.0, 20, 90, 70]])
    features = {"0": maps(1, 4, 5).float()}
    layer = pooling(SeparableRoIAlign, 7, 2)
    expected = layer(features, [boxes], [])
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(features, [boxes], [])
    assert torch.equal(found, expected)
    assert found.dtype == torch.float32


def test_a_detector_pools_no_batch_without_images():
    # torchvision's pooling refuses it, too.
    with pytest.raises((RuntimeError, ValueError)):
        pooling(SeparableRoIAlign, 7, 2)({"0": maps(0, 1, 1)}, [], [])
    detector = speed_up(NETWORKS["detection"](), precision="fp32")
    assert detector([], []).keys() == set(LOSSES)
    assert detector([]) == []


def frozen_norm(kind: type[FrozenBatchNorm2d], channels: int = 6) -> FrozenBatchNorm2d:
    layer = kind(channels, eps=1e-5)
    generator = seeded(2)
    for buffer in layer.buffers():
        buffer.copy_(torch.rand(channels, generator=generator) + 0.1)
    return layer


@pytest.mark.parametrize("training", [True, False])
def test_frozen_batch_norm_as_torchvision_computes_it(training: bool):
    found = []
    for kind in (FrozenBatchNorm2d, FusedFrozenBatchNorm2d):
        layer = frozen_norm(kind).double().train(training)
        before = copy.deepcopy(layer.state_dict())
        x = maps(2, 4, 5, channels=6).requires_grad_()
        output = layer(x)
        (output * maps(2, 4, 5, channels=6).cos()).sum().backward()
        assert all(torch.equal(value, before[n]) for n, value in layer.state_dict().items())
        found.append((output.detach(), x.grad))
    for expected, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def test_frozen_batch_norm_keeps_bfloat16():
    x = maps(2, 4, 5, channels=6).bfloat16().contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        plain, ours = (frozen_norm(k)(x) for k in (FrozenBatchNorm2d, FusedFrozenBatchNorm2d))
        nothing = frozen_norm(FusedFrozenBatchNorm2d)(x[:0])
    assert (plain.dtype, ours.dtype) == (torch.float32, torch.bfloat16)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(ours, plain.bfloat16())
    assert nothing.shape == (0, 6, 4, 5)


# Of a convolution: channels, kernel, stride, dilation.
SIZES = [(16, 3, 1, 1), (24, 5, 2, 1), (8, 3, 1, 2), (40, 5, 1, 2)]


def depthwise(kind: type[nn.Conv2d], size: tuple[int, ...]) -> nn.Conv2d:
    channels, kernel, stride, dilation = size
    torch.manual_seed(0)
    layer = nn.Conv2d(
        *(channels, channels, kernel, stride),
        padding=(kernel - 1) // 2 * dilation,
        dilation=dilation,
        groups=channels,
        bias=False,
    )
    layer.__class__ = kind
    return layer


def convolved(layer: nn.Conv2d, x: Tensor, *, autocast: bool) -> tuple[Tensor, Tensor, Tensor]:
    """A layer's output, and the gradients of its images and its weights."""
    x = x.detach().clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = layer(x)
    weights = torch.randn(output.shape, generator=seeded(3)).bfloat16()
    output.backward(weights.to(output).contiguous(memory_format=torch.channels_last))
    assert x.grad is not None
    assert layer.weight.grad is not None
    return output.detach(), x.grad, layer.weight.grad


def wrong(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_depthwise_convolution_under_autocast(size: tuple[int, ...], dtype: torch.dtype):
    x = maps(2, 13, 10, size[0]).to(dtype).contiguous(memory_format=torch.channels_last)
    plain = convolved(depthwise(nn.Conv2d, size), x, autocast=True)
    ours = convolved(depthwise(DepthwiseConv2d, size), x, autocast=True)
    layer = depthwise(nn.Conv2d, size)
    # What both see: an image and, for the image's gradient, weights as bfloat16 has them or not.
    exact = convolved(layer.double(), x.double(), autocast=False)
    assert torch.equal(ours[0], plain[0])
    assert ours[0].dtype == torch.bfloat16
    assert ours[1].dtype == dtype
    assert ours[2].dtype == torch.float32
    for image in ours[:2]:
        assert image.is_contiguous(memory_format=torch.channels_last)
    for found, other, expected in zip(ours[1:], plain[1:], exact[1:], strict=True):
        assert wrong(found, expected) <= wrong(other, expected) < 4e-3


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_depthwise_convolution_without_autocast_is_the_plain_one(size: tuple[int, ...]):
    x = maps(2, 13, 10, size[0]).float()
    pair = [
        convolved(depthwise(kind, size), x, autocast=False) for kind in (nn.Conv2d, DepthwiseConv2d)
    ]
    assert all(torch.equal(*each) for each in zip(*pair, strict=True))


def test_depthwise_convolution_of_frozen_weights_and_of_no_image():
    layer = depthwise(DepthwiseConv2d, SIZES[0]).requires_grad_(False)
    x = maps(2, 6, 6, 16).float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        layer(x).sum().backward()
        assert layer(x.detach()).grad_fn is None
        assert layer(x[:0]).shape == (0, 16, 6, 6)
    assert x.grad is not None
    assert layer.weight.grad is None


def kinds(network: nn.Module) -> dict[str, type[nn.Module]]:
    return {name: type(layer) for name, layer in network.named_modules()}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", NETWORKS)
def test_only_slow_layers_are_exchanged_and_keys_and_parameters_stay(name: str, precision: str):
    torch.manual_seed(0)
    network = NETWORKS[name]()
    before, types = dict(network.state_dict(keep_vars=True)), kinds(network)
    assert speed_up(network, precision=precision) is network
    after = network.state_dict(keep_vars=True)
    assert list(after) == list(before)
    assert all(value is before[key] for key, value in after.items())
    exchanged = {key: kind for key, kind in kinds(network).items() if kind is not types[key]}
    assert set(exchanged.values()) == EXCHANGED.get(name, {}).get(precision, set())
    for key, kind in exchanged.items():
        assert types[key] is kind.__base__, key
    # Once is enough.
    again = kinds(speed_up(network, precision=precision))
    assert again == types | exchanged


@pytest.mark.parametrize("name", ["segmentation", "detection"])
def test_every_depthwise_convolution_is_exchanged_under_bf16(name: str):
    layers = speed_up(NETWORKS[name](), precision="bf16").modules()
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            assert (type(layer) is DepthwiseConv2d) == (layer.groups > 1)
