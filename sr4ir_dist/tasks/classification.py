"""Image classification with torchvision's ResNet18."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet18

from sr4ir_dist.metrics.topk import TopK

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_SETTINGS = ("zero_init_residual",)


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


@dataclass(frozen=True)
class Classification:
    """The classification task.

    Attributes:
        num_classes: Classes that the network tells apart.

    Raises:
        ValueError: Fewer than one class.
    """

    num_classes: int

    def __post_init__(self) -> None:
        """Checks the number of classes."""
        if self.num_classes < 1:
            raise ValueError(f"num_classes is {self.num_classes}; it must be at least 1")

    @property
    def feature_weights(self) -> Mapping[str, float]:
        """The TDP loss's layers and their weights (paper, section 3.2: the last feature map)."""
        return MappingProxyType({"l4": 1.0})

    def build(self, **settings: Any) -> nn.Module:
        """Makes ResNet18 with random weights, drawn from torch's global generator.

        Args:
            **settings: torchvision's `zero_init_residual`.

        Raises:
            ValueError: Another setting.
        """
        for name in settings:
            if name not in _SETTINGS:
                raise ValueError(
                    f"classification network setting {name!r} is unknown; "
                    f"choose from {list(_SETTINGS)}"
                )
        return resnet18(weights=None, num_classes=self.num_classes, **settings)

    def normalize(self, images: Tensor) -> Tensor:
        """Brings N,3,H,W in [0, 1] to what the network sees."""
        return imagenet_normalize(images)

    def forward(self, network: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        """Classifies images.

        Args:
            network: The network, or the engine that trains it.
            images: N,3,H,W in [0, 1]; N may be 0.

        Returns:
            N,num_classes logits.
        """
        return network(self.normalize(images))

    def features(self, network: nn.Module, images: Tensor) -> dict[str, Tensor]:
        """Runs the backbone alone, without pooling and classifier.

        Args:
            network: The plain module, never an engine.
            images: N,3,H,W in [0, 1]; N may be 0.

        Returns:
            `l4`: N,512,H/32,W/32, layer4's output after its last ReLU.
        """
        x: Any = self.normalize(images)
        net: Any = network
        x = net.maxpool(net.relu(net.bn1(net.conv1(x))))
        return {"l4": net.layer4(net.layer3(net.layer2(net.layer1(x))))}

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Computes the mean cross-entropy; an empty batch gives a zero that has a graph.

        Args:
            outputs: N,num_classes logits.
            targets: N int64 class numbers.
        """
        if len(outputs) == 0:
            return outputs.sum()
        return F.cross_entropy(outputs, targets)

    def predict(self, outputs: Tensor) -> Tensor:
        """Returns the likeliest class of each image: N int64."""
        return outputs.argmax(dim=1)

    def metric(self) -> TopK:
        """Makes the empty metric of the paper's tables, top-1 accuracy in per cent."""
        return TopK(k=1)
