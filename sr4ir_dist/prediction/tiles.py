"""Super-resolving an image that is too large for memory: tile by tile, each with a margin."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sr4ir_dist.settings import SRNetwork

# Most memory is taken by the last features, at the SR image's size, and in SwinIR by attention. On
# CPUs EDSR-baseline then takes 0.8 to 1.4 GB at x2 to x8, and SwinIR-M 1.3 to 1.9 GB.
_SR_SIDE = 1024
_SWINIR_SIDE, _SWINIR_OVERLAP = 256, 32


@dataclass(frozen=True)
class Tiling:
    """How an LR image is cut.

    Attributes:
        tile: side in LR pixels of what a tile contributes to the result; 0 for never cutting.
        overlap: margin in LR pixels that the network sees around it, as far as there is image.

    Raises:
        ValueError: a number is negative.
    """

    tile: int
    overlap: int

    def __post_init__(self) -> None:
        """Checks the numbers."""
        for name, value in vars(self).items():
            if value < 0:
                raise ValueError(f"{name}={value}: expected 0 or more LR pixels")

    def cuts(self, height: int, width: int) -> bool:
        """Whether an image is cut: it is larger than a tile with its margins."""
        return self.tile > 0 and height * width > (self.tile + 2 * self.overlap) ** 2


def make_tiling(
    sr: SRNetwork, scale: int, tile: int | None = None, overlap: int | None = None
) -> Tiling:
    """The tiling for an SR network.

    EDSR's default overlap is its reach, so that no pixel of the result depends on the tiling.
    SwinIR's windows pass on what they see from block to block, over hundreds of pixels, so that
    its default is a compromise; its tiles lie on the windows of the whole image. Interpolation
    takes little memory and is never cut.

    Args:
        sr: the network's settings.
        scale: how many times larger its images are.
        tile: side in LR pixels, 0 for never cutting; None for one that takes 1 to 2 GB.
        overlap: margin in LR pixels; None for the default.

    Raises:
        ValueError: a number is negative, or no multiple of SwinIR's window.
    """
    if sr.network not in ("edsr", "swinir"):
        return Tiling(0, 0)
    window, default = 1, Tiling(_SR_SIDE // scale, reach(sr))
    if sr.network == "swinir":
        window, side = sr.window, min(_SR_SIDE // scale, _SWINIR_SIDE)
        default = Tiling(_multiple(side, window), _multiple(_SWINIR_OVERLAP, window))
    tile = default.tile if tile is None else tile
    overlap = default.overlap if overlap is None else overlap
    for name, value in (("tile", tile), ("overlap", overlap)):
        if value % window:
            raise ValueError(
                f"{name}={value}: SwinIR's tiles lie on its windows; expected multiples of {window}"
            )
    return Tiling(tile, overlap)


def reach(sr: SRNetwork) -> int:
    """How many LR pixels away a pixel can be on which an SR pixel of EDSR or SwinIR depends.

    With that overlap (for SwinIR its next multiple of the window) a cut image is the whole one's.
    """
    if sr.network == "swinir":
        # Each block can carry a value from one end of a window to the other.
        body = 3 + sr.blocks * (sr.depth * (sr.window - 1) + 1)
    else:
        body = 2 + 2 * sr.blocks
    # Convolutions between the doublings: 1 + 1/2 + 1/4 + ... LR pixels.
    return body + 2


def render(
    network: Callable[[Tensor], Tensor],
    lr: Tensor,
    scale: int,
    tiling: Tiling,
    finish: Callable[[Tensor], Tensor] = lambda sr: sr,
) -> Tensor:
    """Super-resolve an image, tile by tile where the tiling cuts it.

    Args:
        network: gives N,3,h*scale,w*scale for N,3,h,w in [0, 1].
        lr: 1,3,H,W in [0, 1].
        scale: how many times larger the result is.
        tiling: how it is cut.
        finish: what a tile's result goes through before the next one is made, such as a
            quantisation to bytes.

    Returns:
        1,3,H*scale,W*scale on the device of what `finish` returns.
    """
    height, width = lr.shape[-2:]
    if not tiling.cuts(height, width):
        return finish(network(lr))
    whole: Tensor | None = None
    for rows in _spans(height, tiling):
        for columns in _spans(width, tiling):
            sr = finish(network(lr[..., rows.seen, columns.seen]))
            if whole is None:
                size = (1, 3, height * scale, width * scale)
                whole = torch.empty(size, dtype=sr.dtype, device=sr.device)
            part = sr[..., rows.kept(scale), columns.kept(scale)]
            whole[..., rows.place(scale), columns.place(scale)] = part
    assert whole is not None
    return whole


@dataclass(frozen=True)
class _Span:
    """A tile along one side, in LR pixels: what the network sees, and what it contributes."""

    seen: slice
    own: slice

    def kept(self, scale: int) -> slice:
        """Its contribution within the network's result."""
        start = self.own.start - self.seen.start
        return slice(start * scale, (start + self.own.stop - self.own.start) * scale)

    def place(self, scale: int) -> slice:
        """Its contribution within the whole result."""
        return slice(self.own.start * scale, self.own.stop * scale)


def _spans(side: int, tiling: Tiling) -> Iterator[_Span]:
    for start in range(0, side, tiling.tile):
        stop = min(start + tiling.tile, side)
        seen = slice(max(0, start - tiling.overlap), min(side, stop + tiling.overlap))
        yield _Span(seen, slice(start, stop))


def _multiple(value: int, of: int) -> int:
    return max(1, math.ceil(value / of)) * of
