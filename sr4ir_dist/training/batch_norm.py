"""Batch norm over several ranks: shared statistics in training, one state everywhere after it."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional


class SyncBatchNorm2d(nn.BatchNorm2d):
    """Batch norm whose training statistics are those of all ranks' images together.

    It does on any device what `torch.nn.SyncBatchNorm`, which refuses CPU tensors, does on GPUs;
    its state has the same keys as `torch.nn.BatchNorm2d`. Ranks may hold different numbers of
    images, also none.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalise N,C,H,W; in training every rank must call it."""
        if not self.training:
            return super().forward(input)
        output, mean, variance, count = _SyncNorm.apply(input, self.weight, self.bias, self.eps)
        assert self.momentum is not None
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        with torch.no_grad():
            self.num_batches_tracked += 1
            # One value in all has no variance; the biased one is 0 then.
            unbiased = variance * (count / (count - 1).clamp(min=1))
            self.running_mean.lerp_(mean.to(self.running_mean), self.momentum)
            self.running_var.lerp_(unbiased.to(self.running_var), self.momentum)
        return output


class _SyncNorm(torch.autograd.Function):
    """Ioffe and Szegedy's normalisation with sums over all ranks, one collective each way."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        # float64 sums keep E[x^2] - E[x]^2 exact enough for float32 activations.
        wide = x.double()
        count = torch.tensor([x.numel() // x.shape[1]], dtype=torch.float64, device=x.device)
        sums = torch.cat([wide.sum((0, 2, 3)), wide.square().sum((0, 2, 3)), count])
        dist.all_reduce(sums)
        channels, total = x.shape[1], sums[-1].clone()
        mean = sums[:channels] / total
        variance = (sums[channels:-1] / total - mean.square()).clamp_(min=0)
        ctx.save_for_backward(x, weight, mean, variance, total)
        ctx.eps = eps
        kind = weight.dtype
        output = functional.batch_norm(
            x, mean.to(kind), variance.to(kind), weight, bias, False, 0.0, eps
        )
        ctx.mark_non_differentiable(mean, variance, total)
        return output, mean, variance, total

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_output: Tensor, *_: Any
    ) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, mean, variance, total = ctx.saved_tensors
        kind = weight.dtype
        inverse = torch.rsqrt(variance + ctx.eps).to(kind)[:, None, None]
        normalised = (x.to(kind) - mean.to(kind)[:, None, None]) * inverse
        grad = grad_output.to(kind)
        grad_bias = grad.sum((0, 2, 3))
        grad_weight = (grad * normalised).sum((0, 2, 3))
        sums = torch.cat([grad_bias, grad_weight])
        dist.all_reduce(sums)
        mean_grad, mean_product = (sums / total.to(kind))[:, None, None].chunk(2)
        grad_x = (grad - mean_grad - normalised * mean_product) * inverse * weight[:, None, None]
        return grad_x.to(x.dtype), grad_weight, grad_bias, None


def synchronise(module: nn.Module) -> nn.Module:
    """Replace every BatchNorm2d by one that shares its training statistics over ranks.

    On GPUs that is torch's own. Parameters and buffers are kept.
    """
    if next(module.parameters()).is_cuda:
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    for layer in module.modules():
        if type(layer) is nn.BatchNorm2d:
            layer.__class__ = SyncBatchNorm2d
    return module


def average_running_statistics(module: nn.Module, weight: float) -> None:
    """Make running statistics the mean over ranks, so that every rank reads one state.

    Args:
        module: a network with batch norm layers; every rank must call it with the same one.
        weight: this rank's part of the step's images; the ranks' weights add up to 1.
    """
    buffers = [
        buffer
        for layer in module.modules()
        if isinstance(layer, nn.BatchNorm2d)
        for buffer in (layer.running_mean, layer.running_var)
        if buffer is not None
    ]
    if buffers:
        flat = torch.cat(buffers) * weight
        dist.all_reduce(flat)
        for buffer, part in zip(buffers, flat.split([len(b) for b in buffers]), strict=True):
            buffer.copy_(part)
