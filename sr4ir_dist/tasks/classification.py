"""Image classification with torchvision's ResNet18."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet18

from sr4ir_dist.metrics.topk import TopK
from sr4ir_dist.networks.normalize import imagenet_normalize
from sr4ir_dist.networks.pretrained import Backbone


@dataclass(frozen=True)
class Classification:
    """The classification task.

    Attributes:
        num_classes: Classes that the network tells apart.
        network: `resnet18`.

    Raises:
        ValueError: Fewer than one class, or another network.
    """

    num_classes: int
    network: str = "resnet18"

    target: Literal["label"] = field(default="label", init=False, repr=False)
    figure: Literal["top1"] = field(default="top1", init=False, repr=False)
    padding: Literal["replicate"] = field(default="replicate", init=False, repr=False)
    quality_on_canvas: bool = field(default=False, init=False, repr=False)
    min_images: int = field(default=1, init=False, repr=False)
    feature_channels: int = field(default=512, init=False, repr=False)

    def __post_init__(self) -> None:
        """Checks the settings."""
        if self.num_classes < 1:
            raise ValueError(f"num_classes is {self.num_classes}; it must be at least 1")
        if self.network != "resnet18":
            raise ValueError(f"network is {self.network!r}; classification has 'resnet18'")

    @property
    def feature_weights(self) -> Mapping[str, float]:
        """The TDP loss's layers and their weights (paper, section 3.2: the last feature map)."""
        return MappingProxyType({"l4": 1.0})

    @property
    def published(self) -> Backbone:
        """Where ImageNet weights go: everywhere but into the classifier."""
        return Backbone("", "", ("fc.",))

    def build(self) -> nn.Module:
        """Makes ResNet18 with random weights, drawn from torch's global generator."""
        return resnet18(weights=None, num_classes=self.num_classes)

    def forward(
        self, network: Callable[[Tensor], Tensor], images: Tensor, targets: Any = None
    ) -> Tensor:
        """Runs the network, or an engine over it, on ImageNet-normalised images.

        Args:
            network: The module or its engine.
            images: N,3,H,W in [0, 1]; N may be 0.
            targets: Not used.

        Returns:
            N,num_classes logits.
        """
        return network(imagenet_normalize(images)).to(images.dtype)

    def features(self, network: nn.Module, images: Tensor) -> dict[str, Tensor]:
        """Runs the backbone alone, without pooling and classifier.

        Args:
            network: The plain module, never an engine.
            images: N,3,H,W in [0, 1]; N may be 0.

        Returns:
            `l4`: N,512,H/32,W/32, layer4's output after its last ReLU.
        """
        x: Any = imagenet_normalize(images)
        net: Any = network
        x = net.maxpool(net.relu(net.bn1(net.conv1(x))))
        return self.select(net.layer4(net.layer3(net.layer2(net.layer1(x)))))

    def backbone(self, network: nn.Module) -> nn.Module:
        """The submodule from whose output `select` takes the features."""
        return network.get_submodule("layer4")

    def select(self, output: Tensor) -> dict[str, Tensor]:
        """Takes the features from the output of `backbone`."""
        return {"l4": output}

    def blocks(self, network: nn.Module) -> tuple[nn.Module, ...]:
        """The four stages."""
        return tuple(network.get_submodule(f"layer{stage}") for stage in range(1, 5))

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Computes the mean cross-entropy; an empty batch gives a zero that has a graph.

        Args:
            outputs: N,num_classes logits.
            targets: N int64 class numbers.
        """
        if len(outputs) == 0:
            return outputs.sum()
        return F.cross_entropy(outputs, targets)

    def loss_count(self, targets: Tensor) -> None:
        """The loss is a mean over images."""

    def parameter_groups(self, network: nn.Module) -> tuple[tuple[str, list[nn.Parameter]], ...]:
        """All trainable parameters as `main`."""
        return (("main", [p for p in network.parameters() if p.requires_grad]),)

    def predict(self, outputs: Tensor) -> Tensor:
        """Returns the likeliest class of each image: N int64."""
        return outputs.argmax(dim=1)

    def metric(self) -> TopK:
        """Makes the empty metric of the paper's tables, top-1 accuracy in per cent."""
        return TopK(k=1)
