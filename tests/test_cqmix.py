import pytest
import torch
from torch import Tensor

from sr4ir_dist.cqmix import cqmix, draw_cells


def images(*shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    sr = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return sr, torch.rand(*shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(
    ("grid", "height", "width"),
    [(4, 224, 224), (8, 480, 480), (8, 252, 320), (8, 250, 97), (4, 5, 4), (1, 3, 3)],
)
def test_every_pixel_comes_from_its_cell(grid: int, height: int, width: int) -> None:
    sr, hr = images(2, 3, height, width)
    cells = draw_cells(0, 1, torch.tensor([5, 9]), grid)
    rows = torch.arange(height) * grid // height
    columns = torch.arange(width) * grid // width
    mask = cells[:, :, rows][..., columns].expand_as(hr)
    mixed = cqmix(sr, hr, cells)
    assert torch.equal(mixed[mask], sr[mask])
    assert torch.equal(mixed[~mask], hr[~mask])


@pytest.mark.parametrize(("grid", "patch"), [(4, 56), (8, 60)])
def test_equals_whole_patches_and_the_formula_on_crops(grid: int, patch: int) -> None:
    sr, hr = images(3, 3, grid * patch, grid * patch)
    cells = draw_cells(7, 2, torch.arange(3), grid)
    mask = torch.kron(cells.double(), torch.ones(patch, patch, dtype=torch.float64))
    assert torch.equal(cqmix(sr, hr, cells), mask * sr + (1 - mask) * hr)
    assert torch.equal(cqmix(sr, hr, cells.to(torch.uint8)), mask * sr + (1 - mask) * hr)


def test_borders_are_at_most_one_pixel_late_where_float_rounding_bites() -> None:
    for side in (164, 188, 376, 488):
        cells = torch.arange(8).remainder(2).view(1, 1, 1, 8).expand(1, 1, 8, 8)
        mask = cqmix(torch.ones(1, 1, side, side), torch.zeros(1, 1, side, side), cells)[0, 0, 0]
        exact = (torch.arange(side) * 8 // side) % 2
        late = (mask != exact).nonzero().flatten()
        starts = {-(-k * side // 8) for k in range(1, 8)}
        assert set(late.tolist()) <= starts


def test_sr_values_that_are_not_finite_stay_in_their_cells() -> None:
    _, hr = images(1, 3, 8, 8)
    sr = torch.full_like(hr, float("nan"))
    cells = torch.tensor([[[[True, False], [False, False]]]])
    mixed = cqmix(sr, hr, cells)
    assert mixed[..., :4, :4].isnan().all()
    assert mixed.isnan().sum() == 3 * 16


def test_gradients_reach_sr_only_in_sr_cells() -> None:
    sr, hr = images(1, 3, 8, 8)
    cells = torch.tensor([[[[True, False], [False, True]]]])
    cqmix(sr.requires_grad_(), hr, cells).sum().backward()
    expected = torch.kron(cells[0, 0].double(), torch.ones(4, 4)).expand_as(hr)
    assert sr.grad is not None
    assert torch.equal(sr.grad, expected.double())


def test_cells_are_fair_and_depend_on_seed_epoch_and_sample_only() -> None:
    keys = torch.arange(2000)
    cells = draw_cells(3, 4, keys, 4)
    assert cells.shape == (2000, 1, 4, 4)
    assert cells.dtype == torch.bool
    # 32,000 fair coins: a standard deviation of 0.0028.
    assert abs(cells.double().mean() - 0.5) < 0.015
    assert (cells.double().mean(0) - 0.5).abs().max() < 0.06
    order = torch.randperm(2000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(draw_cells(3, 4, keys[order], 4), cells[order])
    for other in (draw_cells(4, 4, keys, 4), draw_cells(3, 5, keys, 4), cells.roll(1, 0)):
        assert abs((other == cells).double().mean() - 0.5) < 0.015


def test_empty_batch() -> None:
    cells = draw_cells(0, 1, torch.zeros(0, dtype=torch.int64), 4)
    assert cells.shape == (0, 1, 4, 4)
    assert cqmix(torch.zeros(0, 3, 8, 8), torch.zeros(0, 3, 8, 8), cells).shape == (0, 3, 8, 8)


def test_refuses_what_does_not_belong_together() -> None:
    sr, hr = images(2, 3, 8, 8)
    cells = draw_cells(0, 1, torch.arange(2), 4)
    with pytest.raises(ValueError, match="sr is .*hr is"):
        cqmix(sr[..., :4], hr, cells)
    with pytest.raises(ValueError, match=r"cells is \(1, 1, 4, 4\); expected \(2, 1"):
        cqmix(sr, hr, cells[:1])
    with pytest.raises(ValueError, match="finer than the 8x2 image"):
        cqmix(sr[..., :2], hr[..., :2], cells)
    with pytest.raises(ValueError, match="grid is 0"):
        draw_cells(0, 1, torch.arange(2), 0)
