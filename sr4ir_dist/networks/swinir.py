"""SwinIR for classical super-resolution, with the parameter names of its public weights.

Liang et al., "SwinIR: Image Restoration Using Swin Transformer", ICCV Workshops 2021; its blocks
are those of Liu et al., "Swin Transformer", ICCV 2021. With the defaults it is SwinIR-M.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import stochastic_depth

from sr4ir_dist.degradation import pad_to_multiple
from sr4ir_dist.networks import merged
from sr4ir_dist.networks.edsr import RGB_MEAN, PixelShuffle

_MASKED = -100.0


def _conv(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


def _linear(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.trunc_normal_(layer.weight, std=0.02)
    nn.init.zeros_(layer.bias)
    return layer


def _partition(x: Tensor, window: int) -> Tensor:
    """Cuts N,H,W,C into windows, row by row: N,K,window*window,C."""
    batch, height, width, channels = x.shape
    rows, columns = height // window, width // window
    x = x.reshape(batch, rows, window, columns, window, channels).transpose(2, 3)
    return x.reshape(batch, rows * columns, window * window, channels)


def _assemble(windows: Tensor, height: int, width: int, window: int) -> Tensor:
    """Puts the windows of `_partition` back: N,H,W,C."""
    batch, channels = windows.shape[0], windows.shape[-1]
    rows, columns = height // window, width // window
    x = windows.reshape(batch, rows, columns, window, window, channels).transpose(2, 3)
    return x.reshape(batch, height, width, channels)


def _relative_positions(window: int) -> Tensor:
    """Numbers the offset between each two places of a window: T,T int64 in [0, (2*window-1)^2)."""
    place = torch.arange(window * window)
    row, column = place // window, place % window
    vertical = row[:, None] - row[None, :] + window - 1
    horizontal = column[:, None] - column[None, :] + window - 1
    return vertical * (2 * window - 1) + horizontal


def _make_mask(height: int, width: int, window: int) -> Tensor:
    """K,T,T: 0 where two places of a shifted window are neighbours in the image, else -100."""

    def regions(side: int) -> Tensor:
        # Rolling by half a window puts what left at the start behind the last half window.
        position = torch.arange(side)
        return (position >= side - window).long() + (position >= side - window // 2).long()

    region = 3 * regions(height)[:, None] + regions(width)[None, :]
    windows = _partition(region[None, :, :, None], window)[0, ..., 0]
    apart = windows[:, :, None] != windows[:, None, :]
    return torch.zeros(apart.shape).masked_fill(apart, _MASKED)


# Kept per size: the 18 shifted blocks share one, and images of one size come again and again.
@functools.lru_cache(maxsize=8)
def _shift_mask(
    height: int, width: int, window: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    # First made during evaluation, it would otherwise be an inference tensor, which training
    # cannot save for its backward pass.
    with torch.inference_mode(False):
        return _make_mask(height, width, window).to(device=device, dtype=dtype)


class _WindowAttention(nn.Module):
    """Multi-head self-attention within windows, with a learned bias per relative position."""

    relative_position_index: Tensor

    def __init__(self, features: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads = heads
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window - 1) ** 2, heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.register_buffer("relative_position_index", _relative_positions(window))
        self.qkv = _linear(features, 3 * features)
        self.proj = _linear(features, features)

    def forward(self, windows: Tensor, mask: Tensor | None) -> Tensor:
        """Attends within each of N,K,T,C, under a mask K,T,T if there is one."""
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)
        if mask is not None:
            bias = bias + mask.unsqueeze(1)
        qkv = self.qkv(windows).unflatten(-1, (3, self.heads, -1))
        query, key, value = qkv.permute(3, 0, 1, 4, 2, 5)
        # Written out: torch's fused attention gives the bias of an empty batch no gradient, and its
        # fast kernels need heads of 8, 16, ... channels; these have 30.
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1) + bias
        return self.proj((scores.softmax(dim=-1) @ value).transpose(2, 3).flatten(3))


class _Block(nn.Module):
    """One transformer block; in every other one the windows are shifted by half of their side."""

    def __init__(
        self,
        features: int,
        heads: int,
        window: int,
        mlp_ratio: float,
        drop_path: float,
        mask: Tensor | None,
    ) -> None:
        super().__init__()
        self.window = window
        self.shift = window // 2 if mask is not None else 0
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(features)
        self.attn = _WindowAttention(features, heads, window)
        self.norm2 = nn.LayerNorm(features)
        hidden = int(features * mlp_ratio)
        self.mlp = nn.Sequential(
            OrderedDict(fc1=_linear(features, hidden), act=nn.GELU(), fc2=_linear(hidden, features))
        )
        if mask is not None:
            self.register_buffer("attn_mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._drop(self._attend(self.norm1(x)))
        return x + self._drop(self.mlp(self.norm2(x)))

    def _attend(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        if not self.shift:
            windows = self.attn(_partition(x, self.window), None)
            return _assemble(windows, height, width, self.window)
        dtype = self.attn.relative_position_bias_table.dtype
        if torch.compiler.is_compiling():  # sizes may have no value yet, and caches are not seen
            mask = _make_mask(height, width, self.window).to(device=x.device, dtype=dtype)
        else:
            mask = _shift_mask(height, width, self.window, dtype, x.device)
        x = torch.roll(x, (-self.shift, -self.shift), dims=(1, 2))
        x = _assemble(self.attn(_partition(x, self.window), mask), height, width, self.window)
        return torch.roll(x, (self.shift, self.shift), dims=(1, 2))

    def _drop(self, x: Tensor) -> Tensor:
        return stochastic_depth(x, self.drop_path, "row", self.training)


class _Group(nn.Module):
    """Transformer blocks, a convolution and a residual connection: an RSTB of the paper."""

    def __init__(self, blocks: list[_Block], features: int) -> None:
        super().__init__()
        self.residual_group = nn.ModuleDict({"blocks": nn.Sequential(*blocks)})
        self.conv = _conv(features, features)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.residual_group["blocks"](x)
        return x + self.conv(inner.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class SwinIR(nn.Module):
    """SwinIR with the pixel-shuffle reconstruction of classical super-resolution.

    Images of any size are padded at their right and bottom to a multiple of the window, by
    reflection, or by repeating the edge where the pad is not smaller than the side; the result is
    cropped back. In train mode stochastic depth draws from torch's global generator. The buffers
    `attn_mask` and `relative_position_index` are in the state dict because public files hold them.

    Args:
        scale: 2, 4, 8, ...: a power of two.
        blocks: Groups of transformer blocks, each with a convolution and a residual connection.
        features: Channels of the transformer; a multiple of `heads`.
        depth: Transformer blocks of each group; every second one shifts its windows.
        heads: Attention heads.
        window: Side of a window in LR pixels, even.
        mlp_ratio: Hidden channels of the MLPs over `features`.
        drop_path: Chance to skip a residual branch in the last transformer block; it grows
            linearly from 0 in the first.
        recompute: Keep each group's input alone for the backward, which computes the rest again.
        reconstruction: Channels of the upsampler.
        image_size: Side in LR pixels, padded to windows, for which the stored `attn_mask` holds;
            it restricts nothing.

    Raises:
        ValueError: A setting that is out of range.
    """

    mean: Tensor

    def __init__(
        self,
        scale: int,
        *,
        blocks: int = 6,
        features: int = 180,
        depth: int = 6,
        heads: int = 6,
        window: int = 8,
        mlp_ratio: float = 2,
        drop_path: float = 0.1,
        recompute: bool = False,
        reconstruction: int = 64,
        image_size: int = 48,
    ) -> None:
        super().__init__()
        if scale < 2 or scale & (scale - 1):
            raise ValueError(f"scale is {scale}; SwinIR needs a power of two: 2, 4, 8, ...")
        counts = {"blocks": blocks, "depth": depth, "heads": heads}
        counts |= {"reconstruction": reconstruction, "image_size": image_size}
        _check_settings(counts, features, window, mlp_ratio, drop_path)
        self.scale = scale
        self.window = window
        self.recompute = recompute
        self.merged = False
        """Compute all doublings and the last convolution as one (`networks.merged`)."""
        # In the state dict of no public file.
        self.register_buffer("mean", torch.tensor(RGB_MEAN).view(1, 3, 1, 1), persistent=False)
        self.conv_first = _conv(3, features)
        self.patch_embed = nn.ModuleDict({"norm": nn.LayerNorm(features)})
        last = max(blocks * depth - 1, 1)
        side = -(-image_size // window) * window

        def block(number: int) -> _Block:
            shifted = number % depth % 2 == 1
            mask = _make_mask(side, side, window) if shifted else None
            return _Block(features, heads, window, mlp_ratio, drop_path * number / last, mask)

        self.layers = nn.Sequential(
            *(
                _Group([block(group * depth + i) for i in range(depth)], features)
                for group in range(blocks)
            )
        )
        self.norm = nn.LayerNorm(features)
        self.conv_after_body = _conv(features, features)
        self.conv_before_upsample = nn.Sequential(
            _conv(features, reconstruction), nn.LeakyReLU(inplace=True)
        )
        doublings: list[nn.Module] = []
        for _ in range(scale.bit_length() - 1):
            doublings += [_conv(reconstruction, 4 * reconstruction), PixelShuffle(2)]
        self.upsample = nn.Sequential(*doublings)
        self.conv_last = _conv(reconstruction, 3)

    def forward(self, lr: Tensor) -> Tensor:
        """Super-resolves a batch.

        Args:
            lr: N,3,h,w in [0, 1]; N may be 0.

        Returns:
            N,3,h*scale,w*scale, about [0, 1] and not clamped.
        """
        height, width = lr.shape[-2:]
        x = self.conv_first(pad_to_multiple(lr, self.window, "reflect") - self.mean)
        tokens = self.patch_embed["norm"](x.permute(0, 2, 3, 1))
        for group in self.layers:
            if self.recompute and torch.is_grad_enabled():
                tokens = checkpoint(group, tokens, use_reentrant=False)
            else:
                tokens = group(tokens)
        tokens = self.norm(tokens)
        x = self.conv_after_body(tokens.permute(0, 3, 1, 2)) + x
        x = self._enlarge(self.conv_before_upsample(x)) + self.mean
        return x[..., : height * self.scale, : width * self.scale]

    def _enlarge(self, x: Tensor) -> Tensor:
        if not self.merged:
            return self.conv_last(self.upsample(x))
        doublings: Any = self.upsample[::2]
        return merged.enlarge(x, doublings, self.conv_last)


def _check_settings(
    counts: dict[str, int],
    features: int,
    window: int,
    mlp_ratio: float,
    drop_path: float,
) -> None:
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    if features < 1 or features % counts["heads"]:
        raise ValueError(
            f"features is {features}; it must be a multiple of heads, {counts['heads']}"
        )
    if window < 2 or window % 2:
        raise ValueError(f"window is {window}; it must be even and at least 2")
    if int(features * mlp_ratio) < 1:
        raise ValueError(f"mlp_ratio is {mlp_ratio}; the MLP must keep a channel")
    if not 0 <= drop_path < 1:
        raise ValueError(f"drop_path is {drop_path}; it must be in [0, 1)")
