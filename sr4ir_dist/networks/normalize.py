"""ImageNet's colour statistics, which torchvision's networks expect their images to have."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


# Kept per device: copying six numbers to the device in every forward would wait for it.
@functools.cache
def _mean_and_std(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    # First made during evaluation, they would otherwise be inference tensors, which training
    # cannot save for its backward pass.
    with torch.inference_mode(False):
        mean, std = (
            torch.tensor(values, dtype=dtype, device=device).view(1, 3, 1, 1)
            for values in (IMAGENET_MEAN, IMAGENET_STD)
        )
    return mean, std


def imagenet_normalize(images: Tensor) -> Tensor:
    """Subtracts ImageNet's mean and divides by its standard deviation.

    Args:
        images: N,3,H,W in [0, 1], of any floating dtype.
    """
    mean, std = _mean_and_std(images.dtype, images.device)
    return (images - mean) / std
