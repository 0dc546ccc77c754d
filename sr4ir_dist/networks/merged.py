"""The end of an SR network, all its doublings and its last convolution, as one convolution.

Nothing bends between them: convolutions to four times the channels, pixel shuffles and a last
convolution to RGB are one linear map. Computed one by one, at ever larger sizes, they are two
thirds of EDSR's work at x8 and most of its memory. As one they are a 5x5 convolution of the LR
features to all colours of an LR pixel's square, whose weights are made of theirs at every call: all
learn as they would apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def enlarge(x: Tensor, doublings: Sequence[nn.Conv2d], last: nn.Conv2d) -> Tensor:
    """What doublings and the last convolution give one after the other, to rounding.

    Args:
        x: N,C,h,w; N may be 0.
        doublings: convolutions to four times the channels, each followed by a pixel shuffle; all
            convolutions are 3x3 and padded by zeros.
        last: from a quarter of the last doubling's channels.

    Returns:
        N,c,h * 2^k,w * 2^k for k doublings and `last` with c channels.
    """
    with torch.autocast(x.device.type, enabled=False):
        assert last.bias is not None
        weight, bias, seen = last.weight, last.bias, []
        for doubling in reversed(doublings):
            assert doubling.bias is not None
            seen.insert(0, _before_shuffle(weight))
            bias = bias.repeat_interleave(4) + seen[0].sum((2, 3)) @ doubling.bias
            taps = F.conv2d(doubling.weight.transpose(0, 1), seen[0].flip(2, 3), padding=2)
            weight = taps.transpose(0, 1)
    image = F.conv2d(x, weight, bias, padding=2)
    frame = _Frame.of(x)
    for number, (doubling, after) in enumerate(zip(doublings, seen, strict=True)):
        if number:
            frame = frame.doubled(doublings[number - 1])
        image = _shuffled(image - frame.beyond(doubling, after))
    return image


def _shuffled(x: Tensor) -> Tensor:
    if not len(x):  # torch's own backward gives an empty batch a gradient of a wrong shape
        batch, channels, height, width = x.shape
        return x.reshape(batch, channels // 4, 2 * height, 2 * width)
    return F.pixel_shuffle(x, 2)


def _before_shuffle(weight: Tensor) -> Tensor:
    """A weight c,D,k,k for channels that are not shuffled yet: 4c,4D,3,3; k is 3 or 5.

    Output pixel 2 * n + p sees by tap u pixel 2 * n + p + u - k // 2, of the six from 2 * n - 2 on
    which three pixels before shuffling become.
    """
    side = weight.shape[-1]
    first = 2 - side // 2
    before, after = (first, first + 1), (6 - side - first, 5 - side - first)
    placed = [
        F.pad(weight, (before[x], after[x], before[y], after[y])) for y in (0, 1) for x in (0, 1)
    ]
    return F.pixel_unshuffle(torch.stack(placed, 1).flatten(0, 1), 2)


@dataclass(frozen=True)
class _Frame:
    """The outer two rows and columns of an image on each side, all that borders depend on.

    Beyond its border an image is zero, for each convolution anew. Made one, the convolutions would
    see there what the earlier ones give, one pixel out: rows -1 and h, columns -1 and w.
    """

    top: Tensor
    bottom: Tensor
    left: Tensor
    right: Tensor

    @classmethod
    def of(cls, x: Tensor) -> _Frame:
        """The frame of N,C,h,w; of a side of a single pixel, with zeros beyond."""
        height, width = x.shape[2:]
        x = F.pad(x, (0, max(0, 2 - width), 0, max(0, 2 - height)))
        bottom = x[:, :, :2].flip(2) if height == 1 else x[:, :, -2:]
        right = x[..., :2].flip(3) if width == 1 else x[..., -2:]
        return cls(
            x[:, :, :2, :width], bottom[..., :width], x[..., :height, :2], right[:, :, :height]
        )

    def doubled(self, doubling: nn.Conv2d) -> _Frame:
        """The frame of what a doubling makes of the image."""
        sides = (
            (self.top, (1, 1, 1, 0)),
            (self.bottom, (1, 1, 0, 1)),
            (self.left, (1, 0, 1, 1)),
            (self.right, (0, 1, 1, 1)),
        )
        weight, bias = doubling.weight, doubling.bias
        return _Frame(*(_shuffled(F.conv2d(F.pad(x, pad), weight, bias)) for x, pad in sides))

    def beyond(self, doubling: nn.Conv2d, after: Tensor) -> Tensor:
        """What `after` makes of the doubling's values beyond the border: N,channels,h,w."""
        near, far = slice(0, 1), slice(2, 3)
        weight, bias = doubling.weight, doubling.bias
        rows = (
            (self.top[:, :, :1], weight[:, :, far], after[:, :, near]),
            (self.bottom[:, :, 1:], weight[:, :, near], after[:, :, far]),
        )
        columns = (
            (self.left[..., :1], weight[..., far], after[..., near]),
            (self.right[..., 1:], weight[..., near], after[..., far]),
        )
        top, bottom = (
            F.conv2d(F.conv2d(row, out, bias, padding=(0, 2)), back) for row, out, back in rows
        )
        left, right = (
            F.conv2d(F.conv2d(column, out, bias, padding=(1, 0)), back, padding=(1, 0))
            for column, out, back in columns
        )
        height, width = left.shape[2], top.shape[3]
        across = F.pad(top, (0, 0, 0, height - 1)) + F.pad(bottom, (0, 0, height - 1, 0))
        return across + F.pad(left, (0, width - 1)) + F.pad(right, (width - 1, 0))
