"""Super-resolution networks and how their published weights are read."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from sr4ir_dist.networks.edsr import EDSR
from sr4ir_dist.networks.interpolation import Interpolation
from sr4ir_dist.networks.swinir import SwinIR


def _bilinear(scale: int) -> nn.Module:
    return Interpolation(scale, mode="bilinear")


def _bicubic(scale: int) -> nn.Module:
    return Interpolation(scale, mode="bicubic")


SR_NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "edsr": EDSR,
    "swinir": SwinIR,
    "bilinear": _bilinear,
    "bicubic": _bicubic,
}
"""Name -> builder(scale, **settings)."""
