"""Interpolation as an SR "network" without parameters: the LR baselines."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from sr4ir_dist.degradation import enlarge_bilinear


class Interpolation(nn.Module):
    """Enlarges by interpolation.

    Args:
        scale: How many times larger the result is.
        mode: `"bilinear"` aligns corners, as L->T does; `"bicubic"` has a = -0.75 and half-pixel
            centres, and may leave [0, 1] a little.

    Raises:
        ValueError: Unknown mode, or a scale below 1.
    """

    def __init__(self, scale: int, mode: str = "bilinear") -> None:
        super().__init__()
        if mode not in ("bilinear", "bicubic"):
            raise ValueError(f"mode {mode!r} is unknown; choose from ['bilinear', 'bicubic']")
        if scale < 1:
            raise ValueError(f"scale is {scale}; it must be at least 1")
        self.scale = scale
        self.mode = mode

    def forward(self, lr: Tensor) -> Tensor:
        """Enlarges N,3,h,w to N,3,h*scale,w*scale; N may be 0."""
        if self.mode == "bilinear":
            return enlarge_bilinear(lr, self.scale)
        size = (lr.shape[-2] * self.scale, lr.shape[-1] * self.scale)
        return F.interpolate(lr, size=size, mode="bicubic", align_corners=False)

    def extra_repr(self) -> str:
        """Shows the settings when the module is printed."""
        return f"scale={self.scale}, mode={self.mode!r}"
