"""Losses on a real/fake score, for the comparison with SOD-MTGAN (paper, Table 7)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def real_fake(scores: Tensor, *, real: bool) -> Tensor:
    """Computes the mean binary cross-entropy of scores against "HR" or "SR".

    An empty batch gives a zero that has a graph.

    Args:
        scores: N logits; above 0 means HR.
        real: Whether the scored images count as HR. The SR network learns with True on its own
            images (the adversarial loss), the task network with True on HR and False on SR.
    """
    if scores.numel() == 0:
        return scores.sum()
    return F.binary_cross_entropy_with_logits(scores, torch.full_like(scores, float(real)))
