"""Metrics as states: update with batches, add the states of ranks, compute.

Every metric here is a mean over samples of `metrics.mean.Mean`: its whole state is one small
float64 tensor of sums, so ranks combine theirs by one all-reduce.
"""

from __future__ import annotations

from collections.abc import Callable

from sr4ir_dist.metrics.mean import Mean
from sr4ir_dist.metrics.psnr import PSNR
from sr4ir_dist.metrics.ssim import SSIM
from sr4ir_dist.metrics.topk import TopK

METRICS: dict[str, Callable[..., Mean]] = {"psnr": PSNR, "ssim": SSIM, "topk": TopK}
"""Name -> builder(**settings)."""
