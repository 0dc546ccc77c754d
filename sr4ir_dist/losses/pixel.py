"""The pixel loss."""

from __future__ import annotations

from torch import Tensor


def l1(sr: Tensor, hr: Tensor) -> Tensor:
    """Computes the mean absolute difference of two batches (paper, equation 3: L_pix).

    Nothing is clamped. An empty batch gives a zero that has a graph.

    Args:
        sr: N,3,H,W as the SR network returns it.
        hr: The same shape, in [0, 1].

    Raises:
        ValueError: The shapes differ.
    """
    if sr.shape != hr.shape:
        raise ValueError(f"sr is {tuple(sr.shape)} but hr is {tuple(hr.shape)}")
    if sr.numel() == 0:
        return sr.sum()
    return (sr - hr).abs().mean()
