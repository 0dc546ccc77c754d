"""Layers that compute the same faster, in place of a network's own: same weights, same keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign

from sr4ir_dist.networks.edsr import EDSR
from sr4ir_dist.networks.swinir import SwinIR


def speed_up(module: nn.Module, *, precision: str) -> nn.Module:
    """Exchange a network's slow layers, in place; results agree to rounding.

    Args:
        module: a network on the device where it will run.
        precision: `fp32`, or `bf16` for autocast.
    """
    on_cpu = all(parameter.device.type == "cpu" for parameter in module.parameters())
    for layer in module.modules():
        if isinstance(layer, EDSR | SwinIR):
            layer.merged = True
        elif type(layer) is FrozenBatchNorm2d:
            layer.__class__ = FusedFrozenBatchNorm2d
        elif type(layer) is nn.Conv2d and on_cpu and precision == "bf16" and _depthwise(layer):
            layer.__class__ = DepthwiseConv2d
        elif type(layer) is MultiScaleRoIAlign and on_cpu:
            layer.__class__ = SeparableRoIAlign
        elif isinstance(layer, BackboneWithFPN):
            if _channels_last not in layer._forward_pre_hooks.values():
                layer.register_forward_pre_hook(_channels_last)
    return module


def _channels_last(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    # A detector joins its resized images to a batch in the layout that convolutions are slow in.
    return tuple(images.contiguous(memory_format=torch.channels_last) for images in args)


class FusedFrozenBatchNorm2d(FrozenBatchNorm2d):
    """Frozen batch norm as one operator, which keeps bfloat16 images in bfloat16.

    torchvision's multiplies and adds, and both make float32 of them.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Normalise N,C,H,W by the layer's fixed statistics."""
        buffers: Any = (self.running_mean, self.running_var, self.weight, self.bias)
        return F.batch_norm(x, *buffers, eps=self.eps)


class DepthwiseConv2d(nn.Conv2d):
    """A depthwise convolution whose backward computes in float32.

    On CPUs that is three to seven times as fast as oneDNN's in bfloat16, channels last.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Convolve N,C,H,W, under autocast in bfloat16."""
        if not torch.is_autocast_enabled(input.device.type):
            return super().forward(input)
        assert self.bias is None
        settings = self.stride, self.padding, self.dilation, self.groups
        return _Depthwise.apply(input, self.weight, *settings)


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, *settings: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        kind, ctx.settings = torch.get_autocast_dtype(x.device.type), settings
        ctx.given = x.dtype
        x = x.to(kind)
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight.to(kind), None, *settings)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.settings
        wanted = [*ctx.needs_input_grad[:2], False]
        places = (None, stride, padding, dilation, False, [0, 0], groups, wanted)
        grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
            grad_output.float(), x.float(), weight, *places
        )
        return None if grad_x is None else grad_x.to(ctx.given), grad_weight, *[None] * 4


def _depthwise(layer: nn.Conv2d) -> bool:
    single = layer.groups == layer.in_channels > 1
    return single and layer.bias is None and layer.padding_mode == "zeros"


class SeparableRoIAlign(MultiScaleRoIAlign):
    """RoI Align (He et al., Mask R-CNN, ICCV 2017) as two matrix products for each image.

    A box's samples lie on a grid, so bilinear interpolation and their mean are a matrix along the
    rows and one along the columns. torchvision's kernel walks through the samples one by one, and
    backward on a single thread, which takes a quarter of a detector's step on a CPU.
    """

    def forward(
        self,
        x: dict[str, Tensor],
        boxes: list[Tensor],
        image_shapes: list[tuple[int, int]],
    ) -> Tensor:
        """Pool boxes from the feature map of their level.

        Args:
            x: feature maps N,C,H,W by name; all boxes must be pooled from the first of
                `featmap_names`, as the detector's constant level mapper has it.
            boxes: of each image n,4 (x0, y0, x1, y1 in pixels).
            image_shapes: not used; the scale is settled.

        Returns:
            The boxes of all images in turn, K,C,s,s.
        """
        assert self.scales is not None
        features, scale = x[self.featmap_names[0]], self.scales[0]
        with torch.autocast(features.device.type, enabled=False):
            pooled = [
                self._pool(image, own.to(features.dtype) * scale)
                for image, own in zip(features, boxes, strict=True)
            ]
            return torch.cat(pooled)

    def _pool(self, image: Tensor, boxes: Tensor) -> Tensor:
        channels, height, width = image.shape
        rows, columns = (
            _weights(boxes[:, at], boxes[:, at + 2], bins, self.sampling_ratio, side)
            for at, bins, side in (
                (1, self.output_size[0], height),
                (0, self.output_size[1], width),
            )
        )
        count, bins = rows.shape[:2]
        lines = rows.flatten(0, 1) @ image.permute(1, 2, 0).reshape(height, width * channels)
        lines = lines.view(count * bins, width, channels)
        pooled = columns.repeat_interleave(bins, 0) @ lines
        return pooled.view(count, bins, columns.shape[1], channels).permute(0, 3, 1, 2)


def _weights(start: Tensor, end: Tensor, bins: int, samples: int, side: int) -> Tensor:
    """What each of K boxes' bins takes of each pixel along one side: K,bins,side."""
    step = (end - start).clamp(min=1) / (bins * samples)
    number = torch.arange(bins * samples, device=start.device, dtype=start.dtype)
    place = start[:, None] + (number + 0.5) * step[:, None]
    inside = (place >= -1) & (place <= side)
    pixel = torch.arange(side, device=start.device, dtype=start.dtype)
    nearness = 1 - (place.clamp(0, side - 1)[..., None] - pixel).abs()
    weights = nearness.clamp(min=0) * inside[..., None]
    return weights.view(len(start), bins, samples, side).mean(2)
