import math
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.vgg import cfgs, make_layers

from sr4ir_dist.metrics.lpips import LPIPS, load_lpips
from sr4ir_dist.networks.pretrained import WeightsError

TAPS = (3, 8, 15, 22, 29)  # the last ReLU before each pooling, and the last of all


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """Random weights under torchvision's names: no LPIPS, but its formula."""
    torch.manual_seed(0)
    layers = make_layers(cfgs["D"])
    for layer in layers:  # torch's own start lets a deep network's biases drown its input
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
    return {f"features.{name}": value for name, value in layers.state_dict().items()}


@pytest.fixture(scope="module")
def uri(state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("weights") / "vgg16.pth"
    torch.save(state | {"classifier.0.weight": torch.zeros(1)}, path)
    return str(path)


@pytest.fixture(scope="module")
def network(uri: str) -> nn.Module:
    return load_lpips(uri)


def pair(count: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    hr = torch.randint(0, 256, (count, 3, 40, 36), generator=generator).float() / 255
    return hr + 0.2 * torch.randn(hr.shape, generator=generator), hr


def by_hand(sr: Tensor, hr: Tensor, state: dict[str, Tensor]) -> list[float]:
    """The paper's equation 1 on the 8-bit grid, 8 pixels cut, with the package's linear weights."""
    linear = torch.load(
        Path(str(files("lpips"))) / "weights" / "v0.1" / "vgg.pth", map_location="cpu"
    )
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    layers = make_layers(cfgs["D"])
    layers.load_state_dict({n.removeprefix("features."): v for n, v in state.items()})
    values = torch.zeros(len(sr))
    x = torch.cat([(sr * 255).round().clamp(0, 255) / 255, hr])[..., 8:-8, 8:-8] * 2 - 1
    x = (x - shift.view(3, 1, 1)) / scale.view(3, 1, 1)
    with torch.no_grad():
        for number, layer in enumerate(layers[:30]):
            x = layer(x)
            if number in TAPS:
                unit = x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)
                squares = (unit[: len(sr)] - unit[len(sr) :]).square()
                weight = linear[f"lin{TAPS.index(number)}.model.1.weight"]
                values += (squares * weight.view(-1, 1, 1)).sum(1).mean((1, 2))
    return values.tolist()


def test_equals_the_formula(network: nn.Module, state: dict[str, Tensor]) -> None:
    sr, hr = pair()
    expected = by_hand(sr, hr, state)
    assert min(expected) > 1e-4
    assert max(expected) / min(expected) > 1.005
    metric = LPIPS(network)
    metric.update(sr[:1], hr[:1])
    metric.update(sr[1:], hr[1:])
    assert metric.compute() == pytest.approx(sum(expected) / 3, rel=1e-4)
    assert metric.count == 3
    one = LPIPS(network)
    one.update(sr[1:2], hr[1:2])
    assert one.compute() == pytest.approx(expected[1], rel=1e-4)


def test_crops_the_border(network: nn.Module) -> None:
    sr, hr = pair()
    metric, disturbed, whole = LPIPS(network), LPIPS(network), LPIPS(network, border=0)
    metric.update(sr, hr)
    sr[..., :8, :], sr[..., -8:] = 1, 0
    disturbed.update(sr, hr)
    whole.update(sr, hr)
    assert disturbed.compute() == metric.compute()
    assert whole.compute() != pytest.approx(metric.compute(), rel=1e-3)


def test_identical_images_are_dropped_and_nan_is_not(network: nn.Module) -> None:
    sr, hr = pair()
    sr[1] = hr[1] + 0.001  # the same grey levels
    metric, without = LPIPS(network), LPIPS(network)
    metric.update(sr, hr)
    without.update(sr[[0, 2]], hr[[0, 2]])
    assert (metric.count, metric.dropped) == (2, 1)
    assert metric.compute() == pytest.approx(without.compute(), rel=1e-6)
    sr[0, 0, 20, 20] = float("nan")
    metric.update(sr[:1], hr[:1])
    assert metric.count == 3
    assert math.isnan(metric.compute())


def test_states_of_ranks_add_up(network: nn.Module) -> None:
    sr, hr = pair()
    whole, parts = LPIPS(network), [LPIPS(network) for _ in range(3)]
    whole.update(sr, hr)
    for metric, part in zip(parts, (slice(0, 0), slice(0, 1), slice(1, 3)), strict=True):
        metric.update(sr[part], hr[part])
    merged = parts[0].merge(parts[1]).merge(parts[2])
    summed = LPIPS(network).from_state(parts[0].state() + parts[1].state() + parts[2].state())
    for other in (merged, summed):
        assert other.compute() == pytest.approx(whole.compute(), rel=1e-5)
        assert other.count == 3
    assert math.isnan(parts[0].compute())
    assert whole.merge(LPIPS(nn.Identity())).count == 3  # a state knows no network
    with pytest.raises(ValueError, match="cannot merge"):
        whole.merge(LPIPS(network, border=4))


def test_the_network_is_frozen_and_random_generators_are_left_alone(
    uri: str, network: nn.Module
) -> None:
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    again = load_lpips(uri)
    assert torch.equal(torch.rand(3), expected)
    one, other = network.state_dict(), again.state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("features.28.bias"), "missing: features.28.bias\n"),
        (lambda s: s.update(extra=torch.zeros(1)), "unexpected: extra\n"),
        (
            lambda s: s.update({"features.0.weight": torch.zeros(64, 1, 3, 3)}),
            r"features.0.weight is \[64, 1, 3, 3\] there, \[64, 3, 3, 3\] here",
        ),
    ],
)
def test_never_random(
    change: Callable[[dict[str, Tensor]], object],
    message: str,
    state: dict[str, Tensor],
    tmp_path: Path,
) -> None:
    changed = dict(state)
    change(changed)
    torch.save(changed, tmp_path / "vgg16.pth")
    with pytest.raises(WeightsError, match=message):
        load_lpips(str(tmp_path / "vgg16.pth"))


def test_refuses(network: nn.Module) -> None:
    sr, hr = pair(1)
    with pytest.raises(ValueError, match="a window of 16 need at least 32 pixels"):
        LPIPS(network).update(sr[..., :31], hr[..., :31])
    with pytest.raises(ValueError, match="sr is .* but hr is"):
        LPIPS(network).update(sr[..., :20], hr)
    with pytest.raises(ValueError, match="border is -1"):
        LPIPS(network, border=-1)
