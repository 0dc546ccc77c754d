import pytest
import torch

from sr4ir_dist.networks import SR_NETWORKS
from sr4ir_dist.networks.edsr import EDSR
from sr4ir_dist.networks.interpolation import Interpolation

MEAN = torch.tensor([0.4488, 0.4371, 0.4040])


@pytest.mark.parametrize(
    ("scale", "parameters", "tensors"), [(2, 1_369_883, 76), (4, 1_517_595, 78), (8, 1_665_307, 80)]
)
def test_size_keys_and_frozen_mean_shifts(scale: int, parameters: int, tensors: int) -> None:
    network = EDSR(scale)
    assert sum(p.numel() for p in network.parameters()) == parameters
    frozen = {name: p for name, p in network.named_parameters() if not p.requires_grad}
    assert sorted(frozen) == [
        "add_mean.bias",
        "add_mean.weight",
        "sub_mean.bias",
        "sub_mean.weight",
    ]
    assert sum(p.numel() for p in frozen.values()) == 24
    assert torch.equal(frozen["sub_mean.bias"], -frozen["add_mean.bias"])
    torch.testing.assert_close(frozen["add_mean.bias"], 255 * MEAN)
    stems = ["sub_mean", "add_mean", "head.0", "body.16", "tail.1"]
    stems += [f"body.{block}.body.{conv}" for block in range(16) for conv in (0, 2)]
    stems += [f"tail.0.{2 * stage}" for stage in range({2: 1, 4: 2, 8: 3}[scale])]
    expected = {f"{stem}.{kind}" for stem in stems for kind in ("weight", "bias")}
    assert set(network.state_dict()) == expected
    assert len(expected) == tensors


def test_forward_follows_the_formula() -> None:
    torch.manual_seed(0)
    network = EDSR(2, blocks=2, features=8).double()
    lr = torch.rand(2, 3, 6, 5, dtype=torch.float64)
    mean = 255 * MEAN.double().view(1, 3, 1, 1)
    state = network.state_dict()

    def conv(x: torch.Tensor, name: str) -> torch.Tensor:
        return torch.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], padding=1)

    head = conv(lr * 255 - mean, "head.0")
    x = head
    for block in range(2):
        inner = conv(x, f"body.{block}.body.0").relu()
        x = x + conv(inner, f"body.{block}.body.2")
    x = conv(x, "body.2") + head
    x = torch.pixel_shuffle(conv(x, "tail.0.0"), 2)
    expected = (conv(x, "tail.1") + mean) / 255
    torch.testing.assert_close(network(lr), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", list(SR_NETWORKS))
@pytest.mark.parametrize("scale", [2, 4, 8])
def test_every_network_enlarges_and_takes_an_empty_batch(name: str, scale: int) -> None:
    sizes = {"edsr": {"blocks": 1, "features": 4}, "swinir": {"blocks": 1, "features": 6}}
    network = SR_NETWORKS[name](scale, **sizes.get(name, {}))
    assert network(torch.rand(2, 3, 6, 5)).shape == (2, 3, 6 * scale, 5 * scale)
    empty = network(torch.rand(0, 3, 6, 5))
    assert empty.shape == (0, 3, 6 * scale, 5 * scale)
    if name in sizes:
        empty.sum().backward()
        for parameter in network.parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None
                assert parameter.grad.count_nonzero() == 0


def test_interpolation_has_no_state_and_differs_by_mode() -> None:
    lr = torch.rand(1, 3, 6, 5)
    bilinear, bicubic = Interpolation(4), Interpolation(4, mode="bicubic")
    assert not bilinear.state_dict()
    assert not list(bicubic.parameters())
    torch.testing.assert_close(bilinear(lr)[..., -1, -1], lr[..., -1, -1])
    assert (bilinear(lr) - bicubic(lr)).abs().max() > 0.01
    assert "scale=4, mode='bicubic'" in repr(bicubic)


@pytest.mark.parametrize("scale", [0, 1, 3, 6])
def test_edsr_refuses_scales(scale: int) -> None:
    with pytest.raises(ValueError, match=f"scale is {scale}; EDSR needs a power of two"):
        EDSR(scale)


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="blocks is 0"):
        EDSR(4, blocks=0)
    with pytest.raises(ValueError, match="'nearest' is unknown"):
        Interpolation(4, mode="nearest")
    with pytest.raises(ValueError, match="scale is 0"):
        Interpolation(0)
