"""The task-driven perceptual (TDP) loss."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from sr4ir_dist.losses.pixel import l1


def tdp(
    features_sr: Mapping[str, Tensor],
    features_hr: Mapping[str, Tensor],
    weights: Mapping[str, float],
) -> Tensor:
    """Sums w_k * mean|F_k(SR) - F_k(HR)| over layers k (paper, equation 2).

    Features are compared as they are, without normalisation. The HR side's are to be computed
    without gradient, as the published method does. An empty batch gives a zero that has a graph.

    Args:
        features_sr: The task network's feature maps of the SR images, by layer.
        features_hr: Those of the HR images, of the same shapes.
        weights: The layers to compare and their weights; other layers are ignored.

    Raises:
        ValueError: No layer, a layer that is not among the features, or shapes that differ.
    """
    if not weights:
        raise ValueError("weights names no layer; the TDP loss needs at least one")
    for name in weights:
        if name not in features_sr or name not in features_hr:
            raise ValueError(
                f"weights names layer {name!r}; the features have {sorted(features_sr)} for SR "
                f"and {sorted(features_hr)} for HR"
            )
    terms = [weight * l1(features_sr[name], features_hr[name]) for name, weight in weights.items()]
    return sum(terms[1:], start=terms[0])
