from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from sr4ir_dist.degradation import (
    DEGRADATIONS,
    crop_back,
    degrade,
    enlarge_bilinear,
    gaussian_blur,
    pad_to,
    pad_to_multiple,
    quantize,
)


def random_hr(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, generator=generator).to(dtype) / 255


def test_quantize_rounds_ties_to_even_and_clamps() -> None:
    x = torch.tensor([-1.0, 0.5 / 255, 1.5 / 255, 2.5 / 255, 2.0], dtype=torch.float64)
    assert (quantize(x) * 255).tolist() == [0, 0, 2, 2, 255]


def test_quantize_keeps_the_8_bit_grid_bit_for_bit() -> None:
    grid = torch.arange(256, dtype=torch.float32) / 255
    assert torch.equal(quantize(grid), grid)


@pytest.mark.parametrize("scale", [4, 8])
def test_bicubic_is_a_strided_filter_of_four_taps(scale: int) -> None:
    hr = random_hr(2, 3, 48, 64, dtype=torch.float64)
    taps = torch.tensor([-0.09375, 0.59375, 0.59375, -0.09375], dtype=torch.float64)
    first = scale // 2 - 2
    blocks = hr.unfold(2, scale, scale).unfold(3, scale, scale)
    blocks = blocks[..., first : first + 4, first : first + 4]
    expected = torch.einsum("ncijab,a,b->ncij", blocks, taps, taps)
    grey = degrade(hr, scale) * 255
    assert grey.shape == (2, 3, 48 // scale, 64 // scale)
    torch.testing.assert_close(grey, grey.round(), rtol=0, atol=1e-9)
    torch.testing.assert_close(grey, expected.clamp(0, 1) * 255, rtol=0, atol=0.5 + 1e-9)


@pytest.mark.parametrize("kind", list(DEGRADATIONS))
@pytest.mark.parametrize("scale", [1, 2, 3, 8])
def test_degrade_keeps_constant_images_dtype_and_empty_batches(kind: str, scale: int) -> None:
    hr = torch.full((1, 3, 48, 24), 77 / 255, dtype=torch.float64)
    lr = degrade(hr, scale, kind=kind)
    assert lr.dtype == torch.float64
    assert torch.equal(lr, hr[..., : 48 // scale, : 24 // scale])
    assert degrade(hr[:0], scale, kind=kind).shape == (0, 3, 48 // scale, 24 // scale)


def test_antialias_removes_detail_that_the_plain_kind_aliases() -> None:
    # A grating of period 4 has nothing that an image four times smaller can hold.
    stripes = torch.tensor([0.0, 1.0, 1.0, 0.0]).repeat(16).expand(1, 3, 64, 64)
    plain = degrade(stripes, 4)
    smooth = degrade(stripes, 4, kind="bicubic_antialias")[..., 2:-2]
    assert (plain - 0.5).abs().min() > 0.4
    assert (smooth - 0.5).abs().max() < 0.01


@pytest.mark.parametrize(
    ("hr", "scale", "kind", "message"),
    [
        (torch.rand(1, 3, 30, 32), 4, "bicubic", "30x32.*multiples of the scale 4"),
        (torch.rand(1, 3, 32, 30), 4, "bicubic", "32x30"),
        (torch.rand(1, 3, 32, 32), 4, "lanczos", "'lanczos' is unknown.*'bicubic'"),
        (torch.rand(1, 3, 32, 32), 0, "bicubic", "scale is 0"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), 4, "bicubic", "uint8"),
    ],
)
def test_degrade_refuses(hr: Tensor, scale: int, kind: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        degrade(hr, scale, kind=kind)


def test_enlarge_bilinear_aligns_corners() -> None:
    lr = random_hr(2, 3, 5, 7)
    up = enlarge_bilinear(lr, 4)
    assert up.shape == (2, 3, 20, 28)
    torch.testing.assert_close(up[..., [0, 0, -1, -1], [0, -1, 0, -1]],
                               lr[..., [0, 0, -1, -1], [0, -1, 0, -1]])  # fmt: skip
    ramp = torch.arange(7.0).view(1, 1, 1, 7).expand(1, 3, 5, 7)
    torch.testing.assert_close(enlarge_bilinear(ramp, 4)[0, 0, 0], torch.linspace(0, 6, 28))
    assert enlarge_bilinear(lr[:0], 8).shape == (0, 3, 40, 56)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float64])
def test_padding_reflects_or_replicates_and_crops_back(dtype: torch.dtype) -> None:
    image = torch.arange(3 * 5 * 6).view(1, 3, 5, 6).to(dtype)
    replicated = pad_to_multiple(image, 4)
    assert replicated.shape == (1, 3, 8, 8)
    assert torch.equal(replicated[..., 5:, :6], image[..., 4:5, :].expand(-1, -1, 3, -1))
    assert torch.equal(replicated[..., :5, 6:], image[..., 5:6].expand(-1, -1, -1, 2))
    reflected = pad_to_multiple(image, 4, "reflect")
    assert torch.equal(reflected[..., 5:, :6], image[..., [3, 2, 1], :])
    assert torch.equal(reflected[..., :5, 6:], image[..., [4, 3]])
    for padded in (replicated, reflected):
        assert torch.equal(crop_back(padded, torch.tensor([[5, 6]]))[0], image[0])


def test_reflection_needs_pads_smaller_than_the_sides() -> None:
    image = random_hr(1, 3, 5, 6)
    for height, width in ((10, 6), (5, 12)):
        expected = pad_to(image, height, width, "replicate")
        assert torch.equal(pad_to(image, height, width, "reflect"), expected)
    assert not torch.equal(pad_to(image, 9, 11, "reflect"), pad_to(image, 9, 11, "replicate"))


def test_padding_leaves_multiples_alone_and_takes_empty_batches() -> None:
    image = random_hr(1, 3, 8, 12)
    assert pad_to_multiple(image, 4) is image
    assert pad_to_multiple(random_hr(0, 3, 7, 9), 8, "reflect").shape == (0, 3, 8, 16)
    assert crop_back(random_hr(0, 3, 8, 8), torch.zeros(0, 2, dtype=torch.int64)) == []


def test_padding_and_cropping_refuse() -> None:
    image = random_hr(1, 3, 8, 8)
    with pytest.raises(ValueError, match=r"'circular' is unknown"):
        pad_to_multiple(image, 3, "circular")
    with pytest.raises(ValueError, match=r"8x8; cannot pad to 4x8"):
        pad_to(image, 4, 8)
    with pytest.raises(ValueError, match=r"2 entries for 1 images"):
        crop_back(image, [(4, 4), (4, 4)])
    with pytest.raises(ValueError, match=r"9x8 exceeds the canvas 8x8"):
        crop_back(image, [(9, 8)])


def read(path: Path) -> Tensor:
    grey = torch.from_numpy(np.array(Image.open(path).convert("RGB")))
    return grey.permute(2, 0, 1)[None].float() / 255


@pytest.mark.parametrize("scale", [4, 8])
def test_antialias_agrees_with_set5s_lr_files(real_data: Path, scale: int) -> None:
    folder = real_data / "sr_benchmarks" / "Set5"
    inside, everywhere, plain = [], [], []
    for path in sorted((folder / "HR").glob("*.png")):
        lr = read(folder / "LR_bicubic" / f"X{scale}" / f"{path.stem}x{scale}.png")
        height, width = (side * scale for side in lr.shape[-2:])
        hr = read(path)[..., :height, :width]
        difference = (degrade(hr, scale, kind="bicubic_antialias") - lr).mul(255).round().abs()
        inside.append(difference[..., 2:-2, 2:-2].flatten())
        everywhere.append(difference.flatten())
        plain.append((degrade(hr, scale) - lr).mul(255).abs().flatten())
    assert len(inside) == 5
    # Measured: at most 2 inside and 16 at the borders; means 0.11 inside, 0.14 in all.
    assert torch.cat(inside).max() <= 2
    assert torch.cat(everywhere).mean() < 0.25
    assert torch.cat(plain).mean() > 4


@pytest.mark.parametrize("sigma", [5, 10, 15])
def test_the_blur_is_scipys_gaussian_and_keeps_level_images(sigma):
    from scipy.ndimage import gaussian_filter

    image = torch.rand(2, 3, 96, 100, dtype=torch.float64)
    expected = [
        gaussian_filter(plane.numpy(), sigma, mode="mirror", radius=3 * sigma)
        for plane in image.flatten(0, 1)
    ]
    blurred = gaussian_blur(image, sigma)
    torch.testing.assert_close(
        blurred.flatten(0, 1), torch.stack([torch.from_numpy(plane) for plane in expected])
    )
    level = torch.full((1, 3, 20, 70), 0.3, dtype=torch.float64)  # too small to be mirrored
    torch.testing.assert_close(gaussian_blur(level, sigma), level)
    assert gaussian_blur(image[:0], sigma).shape == (0, 3, 96, 100)


def test_a_blur_comes_before_the_degradation():
    hr = torch.rand(2, 3, 64, 64)
    assert torch.equal(degrade(hr, 8, blur=5.0), degrade(gaussian_blur(hr, 5.0), 8))
    assert torch.equal(degrade(hr, 8, blur=0.0), degrade(hr, 8))
