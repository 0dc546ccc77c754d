"""Structural similarity.

Wang et al., "Image Quality Assessment: From Error Visibility to Structural Similarity", IEEE TIP
2004.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sr4ir_dist.metrics.mean import Mean
from sr4ir_dist.metrics.psnr import check_settings, comparable
from sr4ir_dist.settings import SSIM_WINDOW

SIGMA = 1.5
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
_GAUSSIAN = [math.exp(-((i - SSIM_WINDOW // 2) ** 2) / (2 * SIGMA**2)) for i in range(SSIM_WINDOW)]
_WEIGHTS = [value / sum(_GAUSSIAN) for value in _GAUSSIAN]


def _blur(images: Tensor) -> Tensor:
    """Filters N,C,H,W with the Gaussian window, keeping only places where all of it fits."""
    # Shifted sums: on the CPU ten times faster than a float64 convolution of single planes.
    for dim in (-2, -1):
        length = images.shape[dim] - SSIM_WINDOW + 1
        blurred = images.narrow(dim, 0, length) * _WEIGHTS[0]
        for i in range(1, SSIM_WINDOW):
            blurred.add_(images.narrow(dim, i, length), alpha=_WEIGHTS[i])
        images = blurred
    return images


@dataclass(eq=False)
class SSIM(Mean):
    """Mean SSIM over images.

    An 11x11 Gaussian window with sigma 1.5 at every place where it fits, K1 0.01, K2 0.03,
    dynamic range 255; on RGB the mean of the three channels' values. SR is rounded to the 8-bit
    grid first.

    Attributes:
        border: Pixels cut from every side before.
        channel: `"rgb"` or `"y"` (BT.601, as MATLAB's `rgb2ycbcr`).

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
            ValueError: Shapes that differ, or images smaller than border crop and window.
        """
        x, y = comparable(sr, hr, border=self.border, channel=self.channel, window=SSIM_WINDOW)
        mean_x, mean_y, mean_xx, mean_yy, mean_xy = _blur(
            torch.cat([x, y, x * x, y * y, x * y])
        ).chunk(5)
        covariance = mean_xy - mean_x * mean_y
        variances = mean_xx - mean_x.square() + mean_yy - mean_y.square()
        luminance = (2 * mean_x * mean_y + _C1) / (mean_x.square() + mean_y.square() + _C1)
        structure = (2 * covariance + _C2) / (variances + _C2)
        self.add((luminance * structure).mean(dim=(1, 2, 3)))
