import pytest
import torch

from sr4ir_dist.losses.pixel import l1
from sr4ir_dist.losses.tdp import tdp


def test_l1_is_the_mean_over_everything() -> None:
    sr = torch.tensor([[[[0.0, 2.0]]], [[[-1.0, 1.0]]]])
    hr = torch.tensor([[[[1.0, 0.0]]], [[[0.5, 1.0]]]])
    assert l1(sr, hr).item() == (1 + 2 + 1.5 + 0) / 4


def test_tdp_weighs_layers() -> None:
    a = {"0": torch.tensor([[1.0, 3.0]], requires_grad=True), "1": torch.tensor([[2.0]])}
    b = {"0": torch.tensor([[0.0, 0.0]], requires_grad=True), "1": torch.tensor([[-1.0]])}
    loss = tdp(a, b, {"0": 0.5, "1": 0.25})
    assert loss.item() == 0.5 * 2 + 0.25 * 3
    loss.backward()
    assert a["0"].grad is not None
    assert a["0"].grad.tolist() == [[0.25, 0.25]]
    # Whether HR's features carry a gradient is decided where they are computed.
    assert b["0"].grad is not None
    assert b["0"].grad.tolist() == [[-0.25, -0.25]]
    assert tdp(a, b, {"1": 1.0}).item() == 3


def test_empty_batches_give_a_zero_with_a_graph() -> None:
    sr = torch.zeros(0, 3, 8, 8, requires_grad=True)
    hr = torch.zeros(0, 3, 8, 8)
    for loss in (l1(sr, hr), tdp({"l4": sr}, {"l4": hr}, {"l4": 1.0})):
        assert loss.item() == 0
        assert loss.requires_grad
        loss.backward()


def test_shapes_and_layers_are_checked() -> None:
    a, b = torch.zeros(2, 3, 4, 4), torch.zeros(1, 3, 4, 4)
    with pytest.raises(ValueError, match=r"sr is \(2, 3, 4, 4\) but hr is \(1, 3, 4, 4\)"):
        l1(a, b)
    with pytest.raises(ValueError, match="layer 'l3'; the features have"):
        tdp({"l4": a}, {"l4": a}, {"l3": 1.0})
    with pytest.raises(ValueError, match="names no layer"):
        tdp({"l4": a}, {"l4": a}, {})
