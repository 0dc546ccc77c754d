"""Peak signal-to-noise ratio."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sr4ir_dist.degradation import quantize
from sr4ir_dist.metrics.mean import Mean

CHANNELS = ("rgb", "y")


def luma(images: Tensor) -> Tensor:
    """Computes Y of BT.601 as MATLAB's `rgb2ycbcr` does: 16 for black, 235 for white, no rounding.

    Args:
        images: N,3,H,W with values in [0, 255].

    Returns:
        N,1,H,W.
    """
    red, green, blue = images.unbind(dim=1)
    return (16 + (65.481 * red + 128.553 * green + 24.966 * blue) / 255).unsqueeze(1)


def comparable(
    sr: Tensor, hr: Tensor, *, border: int, channel: str, window: int = 1
) -> tuple[Tensor, Tensor]:
    """Brings two batches to what image metrics compare.

    SR is rounded to the 8-bit grid and clamped, HR is taken as it is.

    Args:
        sr: N,3,H,W; N may be 0.
        hr: N,3,H,W in [0, 1].
        border: Pixels cut from every side.
        channel: `"rgb"` keeps three channels, `"y"` makes one.
        window: The smallest side that must be left.

    Returns:
        Both as N,C,H-2*border,W-2*border float64 with values in [0, 255].

    Raises:
        ValueError: Shapes that differ, or images that are too small.
    """
    if sr.shape != hr.shape:
        raise ValueError(f"sr is {tuple(sr.shape)} but hr is {tuple(hr.shape)}")
    height, width = hr.shape[-2:]
    if min(height, width) < 2 * border + window:
        raise ValueError(
            f"images are {height}x{width}; a border crop of {border} and a window of {window} "
            f"need at least {2 * border + window} pixels on each side"
        )
    # In HR's dtype, so that equal grey levels are equal numbers.
    pair = [quantize(sr.detach().to(hr.dtype)), hr.detach()]
    rows, columns = slice(border, height - border), slice(border, width - border)
    pair = [image[..., rows, columns].to(torch.float64) * 255 for image in pair]
    if channel == "y":
        pair = [luma(image) for image in pair]
    return pair[0], pair[1]


def check_settings(border: int, channel: str) -> None:
    """Checks the settings that PSNR and SSIM share.

    Raises:
        ValueError: A negative border or an unknown channel.
    """
    if border < 0:
        raise ValueError(f"border is {border}; it must be at least 0")
    if channel not in CHANNELS:
        raise ValueError(f"channel {channel!r} is unknown; choose from {list(CHANNELS)}")


@dataclass(eq=False)
class PSNR(Mean):
    """Mean PSNR in dB over images.

    With the defaults it is the paper's: RGB, 8 pixels cut from every side at every scale, SR on
    the 8-bit grid. An image that equals its HR has no PSNR: it is dropped, and counted as such.
    SR benchmarks use `channel="y"` and a border of the scale.

    Attributes:
        border: Pixels cut from every side.
        channel: `"rgb"` or `"y"`.

    Raises:
        ValueError: A negative border or an unknown channel.
    """

    border: int = 8
    channel: str = "rgb"

    def __post_init__(self) -> None:
        """Checks the settings."""
        check_settings(self.border, self.channel)

    def update(self, sr: Tensor, hr: Tensor) -> None:
        """Adds a batch.

        Args:
            sr: N,3,H,W as the network returns it; N may be 0.
            hr: N,3,H,W in [0, 1].

        Raises:
            ValueError: Shapes that differ, or images smaller than the border crop.
        """
        sr, hr = comparable(sr, hr, border=self.border, channel=self.channel)
        error = (sr - hr).square().mean(dim=(1, 2, 3))
        self.add(10 * torch.log10(255**2 / error), counted=error != 0)
