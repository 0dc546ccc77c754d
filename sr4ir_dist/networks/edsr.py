"""EDSR-baseline, with the parameter names of its public weights.

Lim et al., "Enhanced Deep Residual Networks for Single Image Super-Resolution", CVPR Workshops
2017.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sr4ir_dist.networks import merged

RGB_MEAN = (0.4488, 0.4371, 0.4040)
"""Mean colour of DIV2K in [0, 1]."""


def _conv(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


class _MeanShift(nn.Conv2d):
    """Adds sign * 255 * mean to an image in [0, 255]; a fixed 1x1 convolution in the weights."""

    def __init__(self, sign: int) -> None:
        super().__init__(3, 3, 1)
        with torch.no_grad():
            self.weight.copy_(torch.eye(3).view(3, 3, 1, 1))
            assert self.bias is not None
            self.bias.copy_(sign * 255 * torch.tensor(RGB_MEAN))
        self.requires_grad_(False)


class _ResidualBlock(nn.Module):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _conv(features, features), nn.ReLU(inplace=True), _conv(features, features)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + x


class PixelShuffle(nn.PixelShuffle):
    """torch's pixel shuffle, for empty batches too."""

    def forward(self, input: Tensor) -> Tensor:
        """Rearranges N,C*r*r,H,W to N,C,H*r,W*r; N may be 0."""
        # torch's own backward gives an empty batch a gradient of a wrong shape.
        # Not len(): it would fix the batch size of an exported graph.
        if input.shape[0] == 0:
            batch, channels, height, width = input.shape
            factor = self.upscale_factor
            return input.reshape(batch, channels // factor**2, height * factor, width * factor)
        return super().forward(input)


class EDSR(nn.Module):
    """EDSR-baseline: residual blocks without batch norm, then pixel shuffles.

    The 24 numbers of `sub_mean` and `add_mean` are parameters that never require gradients.

    Args:
        scale: 2, 4, 8, ...: a power of two.
        blocks: Residual blocks.
        features: Channels inside.

    Raises:
        ValueError: A scale that is no power of two from 2, or no block or feature.
    """

    def __init__(self, scale: int, *, blocks: int = 16, features: int = 64) -> None:
        super().__init__()
        if scale < 2 or scale & (scale - 1):
            raise ValueError(f"scale is {scale}; EDSR needs a power of two: 2, 4, 8, ...")
        if blocks < 1 or features < 1:
            raise ValueError(
                f"blocks is {blocks} and features is {features}; both must be at least 1"
            )
        self.scale = scale
        self.sub_mean = _MeanShift(-1)
        self.add_mean = _MeanShift(1)
        self.head = nn.Sequential(_conv(3, features))
        self.body = nn.Sequential(
            *(_ResidualBlock(features) for _ in range(blocks)), _conv(features, features)
        )
        doublings: list[nn.Module] = []
        for _ in range(scale.bit_length() - 1):
            doublings += [_conv(features, 4 * features), PixelShuffle(2)]
        self.tail = nn.Sequential(nn.Sequential(*doublings), _conv(features, 3))
        self.merged = False
        """Compute all doublings and the last convolution as one (`networks.merged`)."""

    def forward(self, lr: Tensor) -> Tensor:
        """Super-resolves a batch.

        Args:
            lr: N,3,h,w in [0, 1]; N may be 0.

        Returns:
            N,3,h*scale,w*scale, about [0, 1] and not clamped.
        """
        x = self.head(self.sub_mean(lr * 255))
        x = self.body(x) + x
        return self.add_mean(self._enlarge(x)) / 255

    def _enlarge(self, x: Tensor) -> Tensor:
        if not self.merged:
            return self.tail(x)
        tail: Any = self.tail
        return merged.enlarge(x, tail[0][::2], tail[1])
