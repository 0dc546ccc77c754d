import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from sr4ir_dist.metrics.mean import Mean
from sr4ir_dist.metrics.psnr import PSNR, luma
from sr4ir_dist.metrics.ssim import SSIM
from sr4ir_dist.metrics.topk import TopK


def grey(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, generator=generator).float() / 255


def noisy(hr: Tensor, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return hr + 0.1 * torch.randn(hr.shape, generator=generator)


def test_psnr_of_a_known_error() -> None:
    hr = torch.full((1, 3, 20, 20), 100 / 255)
    sr = torch.full((1, 3, 20, 20), 110.4 / 255)  # rounds to 110
    metric = PSNR()
    metric.update(sr, hr)
    assert metric.compute() == pytest.approx(20 * math.log10(255 / 10), rel=1e-6)


def test_psnr_crops_clamps_and_averages_images_not_pixels() -> None:
    hr = grey(2, 3, 24, 20)
    sr = noisy(hr)
    expected = []
    for a, b in zip(sr.double(), hr.double(), strict=True):
        a = (a * 255).round().clamp(0, 255)[:, 8:-8, 8:-8]
        error = (a - b[:, 8:-8, 8:-8] * 255).square().mean().item()
        expected.append(10 * math.log10(255**2 / error))
    metric = PSNR()
    metric.update(sr, hr)
    assert metric.compute() == pytest.approx(sum(expected) / 2, rel=1e-6)
    sr[..., :8, :], sr[..., -8:] = 5, -5
    outside = PSNR()
    outside.update(sr, hr)
    assert outside.compute() == metric.compute()
    whole = PSNR(border=0)
    whole.update(sr, hr)
    assert whole.compute() < metric.compute() - 5


def test_psnr_drops_identical_images_and_counts_them() -> None:
    hr = grey(3, 3, 20, 20)
    sr = noisy(hr)
    sr[1] = hr[1] + 0.001  # the same grey levels
    metric, without = PSNR(), PSNR()
    metric.update(sr, hr)
    without.update(sr[[0, 2]], hr[[0, 2]])
    assert (metric.count, metric.dropped) == (2, 1)
    assert metric.compute() == pytest.approx(without.compute(), rel=1e-12)
    same = PSNR()
    same.update(hr, hr)
    assert math.isnan(same.compute())


def test_values_that_are_not_finite_are_never_dropped() -> None:
    hr = grey(2, 3, 32, 32)
    sr = noisy(hr)
    sr[0, 0, 16, 16] = float("nan")
    for metric in (PSNR(), SSIM()):
        metric.update(sr, hr)
        assert metric.count == 2
        assert math.isnan(metric.compute())


def test_luma_is_matlabs() -> None:
    colours = torch.tensor([[0, 0, 0], [255, 255, 255], [255, 0, 0], [0, 255, 0], [0, 0, 255.0]])
    y = luma(colours.view(5, 3, 1, 1).double()).flatten()
    expected = torch.tensor([16, 235, 81.481, 144.553, 40.966], dtype=torch.float64)
    torch.testing.assert_close(y, expected)


def test_psnr_on_y_compares_luma() -> None:
    hr = torch.full((1, 3, 12, 12), 100 / 255)
    sr = hr.clone()
    sr[:, 0] = 110 / 255
    metric = PSNR(border=2, channel="y")
    metric.update(sr, hr)
    assert metric.compute() == pytest.approx(20 * math.log10(255 / (10 * 65.481 / 255)), rel=1e-5)


def ssim_by_windows(x: np.ndarray, y: np.ndarray) -> float:
    """SSIM of two planes in [0, 255], one window at a time."""
    offsets = np.arange(11) - 5
    kernel = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    kernel /= kernel.sum()
    values = []
    for i in range(x.shape[0] - 10):
        for j in range(x.shape[1] - 10):
            a, b = x[i : i + 11, j : j + 11], y[i : i + 11, j : j + 11]
            ma, mb = (kernel * a).sum(), (kernel * b).sum()
            va, vb = (kernel * (a - ma) ** 2).sum(), (kernel * (b - mb) ** 2).sum()
            cov = (kernel * (a - ma) * (b - mb)).sum()
            values.append(
                (2 * ma * mb + 6.5025) * (2 * cov + 58.5225)
                / ((ma**2 + mb**2 + 6.5025) * (va + vb + 58.5225))
            )  # fmt: skip
    return float(np.mean(values))


@pytest.mark.parametrize("channel", ["rgb", "y"])
def test_ssim_equals_one_window_at_a_time(channel: str) -> None:
    hr = F.avg_pool2d(grey(2, 3, 36, 30), 5, stride=1)
    sr = noisy(hr)
    x, y = (sr * 255).round().clamp(0, 255)[..., 2:-2, 2:-2].double(), hr[..., 2:-2, 2:-2].double()
    y = y * 255
    if channel == "y":
        x, y = luma(x), luma(y)
    planes = zip(x.flatten(0, 1).numpy(), y.flatten(0, 1).numpy(), strict=True)
    expected = np.mean([ssim_by_windows(a, b) for a, b in planes])
    metric = SSIM(border=2, channel=channel)
    metric.update(sr, hr)
    assert 0.05 < expected < 0.95
    assert metric.compute() == pytest.approx(expected, rel=1e-6)


def test_ssim_of_identical_and_of_constant_images() -> None:
    hr = grey(1, 3, 30, 30)
    metric = SSIM(border=0)
    metric.update(hr, hr)
    assert metric.compute() == pytest.approx(1, abs=1e-12)
    flat = SSIM(border=0)
    flat.update(torch.full((1, 3, 11, 11), 50 / 255), torch.full((1, 3, 11, 11), 150 / 255))
    expected = (2 * 50 * 150 + 6.5025) / (50**2 + 150**2 + 6.5025)
    assert flat.compute() == pytest.approx(expected, rel=1e-6)


def test_topk_counts_samples() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0], [1.0, 3.0, 2.0], [1.0, 2.0, 3.0], [3.0, 1.0, 2.0]])
    targets = torch.tensor([0, 2, 1, 1])
    for k, expected in ((1, 25), (2, 75), (3, 100)):
        metric = TopK(k)
        metric.update(logits[:3], targets[:3])  # uneven batches: a mean of means would differ
        metric.update(logits[3:], targets[3:])
        assert metric.compute() == expected


def fill(metric: Mean, part: slice) -> Mean:
    hr = grey(5, 3, 30, 32)
    sr = noisy(hr)
    sr[3] = hr[3]
    if isinstance(metric, TopK):
        metric.update(hr.mean((2, 3))[part], torch.tensor([0, 1, 2, 0, 1])[part])
    else:
        assert isinstance(metric, PSNR | SSIM)
        metric.update(sr[part], hr[part])
    return metric


@pytest.mark.parametrize("make", [PSNR, SSIM, TopK, lambda: PSNR(4, "y"), lambda: SSIM(4, "y")])
def test_merged_parts_equal_the_whole(make: Callable[[], Mean]) -> None:
    whole = fill(make(), slice(None))
    parts = [fill(make(), part) for part in (slice(0, 0), slice(0, 1), slice(1, 5))]
    merged = parts[0].merge(parts[1]).merge(parts[2])
    summed = make().from_state(sum((p.state() for p in parts), start=make().state()))
    for other in (merged, summed):
        assert other.compute() == pytest.approx(whole.compute(), rel=1e-12)
        assert (other.count, other.dropped) == (whole.count, whole.dropped)
        assert other.count + other.dropped == 5
    assert parts[1].count + parts[1].dropped == 1  # merging changed neither side
    assert math.isnan(parts[0].compute())
    assert whole.details() == {}
    assert whole.state().dtype == torch.float64
    assert whole.state("cpu").shape == make().state("cpu").shape == (3,)


def test_state_is_a_copy() -> None:
    metric = fill(TopK(), slice(None))
    before = metric.compute()
    metric.state().zero_()
    metric.state("cpu").zero_()
    metric.merge(TopK()).state().zero_()
    assert metric.compute() == before


def test_refuses() -> None:
    small = grey(1, 3, 26, 40)
    with pytest.raises(ValueError, match="26x40; a border crop of 8 and a window of 11 need .* 27"):
        SSIM().update(small, small)
    with pytest.raises(ValueError, match="border crop of 13 and a window of 1 need at least 27"):
        PSNR(border=13).update(small, small)
    with pytest.raises(ValueError, match="sr is .* but hr is"):
        PSNR().update(small[..., :20], small)
    with pytest.raises(ValueError, match="'lab' is unknown"):
        SSIM(channel="lab")
    with pytest.raises(ValueError, match="border is -1"):
        PSNR(border=-1)
    with pytest.raises(ValueError, match="k is 0"):
        TopK(0)
    with pytest.raises(ValueError, match="k is 5 but there are 3 classes"):
        TopK(5).update(torch.zeros(2, 3), torch.zeros(2))
    with pytest.raises(ValueError, match="expected"):
        TopK().update(torch.zeros(2, 3), torch.zeros(2, 1))
    with pytest.raises(ValueError, match="cannot merge"):
        PSNR(4).merge(PSNR(8))
    with pytest.raises(ValueError, match="3 numbers"):
        PSNR().from_state(torch.zeros(2))


def test_bicubic_on_set5_has_its_well_known_values(real_data: Path) -> None:
    folder = real_data / "sr_benchmarks" / "Set5"
    psnr, ssim = PSNR(border=4, channel="y"), SSIM(border=4, channel="y")
    for path in sorted((folder / "HR").glob("*.png")):
        hr, lr = (
            torch.from_numpy(np.array(Image.open(p).convert("RGB"))).permute(2, 0, 1)[None] / 255
            for p in (path, folder / "LR_bicubic" / "X4" / f"{path.stem}x4.png")
        )
        height, width = (side * 4 for side in lr.shape[-2:])
        up = F.interpolate(lr, size=(height, width), mode="bicubic", antialias=True)
        psnr.update(up, hr[..., :height, :width])
        ssim.update(up, hr[..., :height, :width])
    assert psnr.compute() == pytest.approx(28.43, abs=0.01)
    assert ssim.compute() == pytest.approx(0.811, abs=0.001)
