"""Batch norm over several ranks: shared statistics in training, one state everywhere after it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F


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
        channels, count = x.shape[1], x.numel() // x.shape[1]
        sums = torch.zeros(2 * channels + 1, dtype=torch.float64, device=x.device)
        if count:
            mean, variance = (v.double() for v in torch.batch_norm_update_stats(x, None, None, 0.0))
            sums = torch.cat([mean, variance + mean.square(), mean.new_ones(1)]) * count
        dist.all_reduce(sums)
        total = sums[-1].clone()
        # In float64, E[x^2] - E[x]^2 is exact enough for float32 activations.
        mean = sums[:channels] / total
        variance = (sums[channels:-1] / total - mean.square()).clamp_(min=0)
        ctx.save_for_backward(x, weight, mean, variance, total)
        ctx.eps = eps
        kind = weight.dtype
        output = F.batch_norm(x, mean.to(kind), variance.to(kind), weight, bias, eps=eps)
        ctx.mark_non_differentiable(mean, variance, total)
        return output, mean, variance, total

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_output: Tensor, *_: Any
    ) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, mean, variance, total = ctx.saved_tensors
        kind = weight.dtype
        inverse = torch.rsqrt(variance + ctx.eps).to(kind)
        centred = x.to(kind) - mean.to(kind)[:, None, None]
        grad = grad_output.to(kind)
        grad_bias = grad.sum((0, 2, 3))
        grad_weight = (grad * centred).sum((0, 2, 3)) * inverse
        sums = torch.cat([grad_bias, grad_weight])
        dist.all_reduce(sums)
        mean_grad, mean_product = (sums / total.to(kind)).chunk(2)
        # weight * inverse * (grad - mean_grad - normalised * mean_product), by channel constants.
        scale = weight * inverse
        grad_x = centred.mul_((-scale * inverse * mean_product)[:, None, None])
        grad_x.sub_((scale * mean_grad)[:, None, None]).addcmul_(grad, scale[:, None, None])
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


@contextmanager
def apart(module: nn.Module, kinds: int) -> Iterator[None]:
    """Let batch norm take each kind of image by itself where a batch joins several of them.

    Statistics and running statistics are those of one forward for each kind, in their order.

    Args:
        module: a network; inside, its batches are equal parts of so many kinds.
        kinds: one changes nothing.
    """
    # On GPUs a synchronised layer is torch's own, no BatchNorm2d.
    every = (x for x in module.modules() if isinstance(x, nn.BatchNorm2d | nn.SyncBatchNorm))
    layers = list(every) if kinds > 1 else []
    for layer in layers:
        whole = layer.forward

        def forward(input: Tensor, whole: Callable[[Tensor], Tensor] = whole) -> Tensor:
            return torch.cat([whole(part) for part in input.tensor_split(kinds)])

        layer.forward = forward
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


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
