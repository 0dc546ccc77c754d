"""Semantic segmentation with torchvision's DeepLabV3 and its auxiliary head."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import segmentation

from sr4ir_dist.data.schema import VOID
from sr4ir_dist.metrics.miou import MIoU
from sr4ir_dist.networks.normalize import imagenet_normalize
from sr4ir_dist.networks.pretrained import Backbone

AUX_WEIGHT = 0.5
"""The auxiliary head's part in the loss."""
_NETWORKS = {
    "deeplabv3_mobilenet_v3_large": (
        segmentation.deeplabv3_mobilenet_v3_large,
        960,
        Backbone("features.", "backbone.", ("classifier.",)),
    ),
    "deeplabv3_resnet50": (
        segmentation.deeplabv3_resnet50,
        2048,
        Backbone("", "backbone.", ("fc.",)),
    ),
}


@dataclass(frozen=True)
class Segmentation:
    """The semantic segmentation task.

    Attributes:
        num_classes: Classes without background, which is class 0 of masks and outputs.
        network: `deeplabv3_mobilenet_v3_large` (Table 1) or `deeplabv3_resnet50` (Table S3).

    Raises:
        ValueError: Not 1 to 254 classes, which is what masks of bytes hold beside background and
            void, or another network.
    """

    num_classes: int
    network: str = "deeplabv3_mobilenet_v3_large"

    target: Literal["mask"] = field(default="mask", init=False, repr=False)
    figure: Literal["miou"] = field(default="miou", init=False, repr=False)
    padding: Literal["replicate"] = field(default="replicate", init=False, repr=False)
    quality_on_canvas: bool = field(default=False, init=False, repr=False)
    min_images: int = field(default=2, init=False, repr=False)
    """Batch norm after the heads' global pooling needs two values a channel."""

    def __post_init__(self) -> None:
        """Checks the settings."""
        if not 1 <= self.num_classes < VOID:
            raise ValueError(f"num_classes is {self.num_classes}; it must be 1 to {VOID - 1}")
        if self.network not in _NETWORKS:
            raise ValueError(f"network is {self.network!r}; segmentation has {list(_NETWORKS)}")

    @property
    def feature_weights(self) -> Mapping[str, float]:
        """The TDP loss's layers and their weights (paper, section 3.2: the last feature map)."""
        return MappingProxyType({"C5": 1.0})

    @property
    def feature_channels(self) -> int:
        """Channels of C5."""
        return _NETWORKS[self.network][1]

    @property
    def published(self) -> Backbone:
        """Where ImageNet weights of the backbone go."""
        return _NETWORKS[self.network][2]

    def build(self) -> nn.Module:
        """Makes the network with random weights, drawn from torch's global generator."""
        build = _NETWORKS[self.network][0]
        return build(
            weights=None, weights_backbone=None, num_classes=self.num_classes + 1, aux_loss=True
        )

    def forward(
        self, network: Callable[[Tensor], Mapping[str, Tensor]], images: Tensor, targets: Any = None
    ) -> dict[str, Tensor]:
        """Runs the network, or an engine over it, on ImageNet-normalised images.

        Args:
            network: The module or its engine.
            images: N,3,H,W in [0, 1]; N may be 0.
            targets: Not used.

        Returns:
            Logits N,num_classes+1,H,W: `out`, and `aux` of the auxiliary head.
        """
        outputs = network(imagenet_normalize(images))
        return {name: logits.to(images.dtype) for name, logits in outputs.items()}

    def features(self, network: nn.Module, images: Tensor) -> dict[str, Tensor]:
        """Runs the backbone alone, without both heads.

        Args:
            network: The plain module, never an engine.
            images: N,3,H,W in [0, 1]; N may be 0.

        Returns:
            `C5`: N,960,H/16,W/16 after the last hardswish of MobileNetV3, or N,2048,H/8,W/8 after
            the last ReLU of ResNet50.
        """
        return self.select(self.backbone(network)(imagenet_normalize(images)))

    def backbone(self, network: nn.Module) -> nn.Module:
        """The submodule from whose output `select` takes the features."""
        return network.get_submodule("backbone")

    def select(self, output: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Takes the features from the output of `backbone`."""
        return {"C5": output["out"]}

    def blocks(self, network: nn.Module) -> tuple[nn.Module, ...]:
        """The backbone and both heads."""
        names = ("backbone", "classifier", "aux_classifier")
        return tuple(network.get_submodule(name) for name in names)

    def loss(self, outputs: Mapping[str, Tensor], targets: Tensor) -> Tensor:
        """Computes CE(out) + 0.5 * CE(aux), each the mean over pixels that are not void.

        Where every pixel is void, and for an empty batch, it is a zero that has a graph.

        Args:
            outputs: Logits N,num_classes+1,H,W: `out` and `aux`.
            targets: uint8 N,H,W masks.
        """
        labels = targets.long()
        out, aux = (
            F.cross_entropy(outputs[name], labels, ignore_index=VOID, reduction="sum")
            for name in ("out", "aux")
        )
        return (out + AUX_WEIGHT * aux) / (targets != VOID).sum().clamp(min=1)

    def loss_count(self, targets: Tensor) -> Tensor:
        """Counts the pixels over which the loss is a mean: a float64 scalar on their device."""
        return (targets != VOID).sum().double()

    def parameter_groups(self, network: nn.Module) -> tuple[tuple[str, list[nn.Parameter]], ...]:
        """The trainable parameters: `main`, backbone and classifier, and `aux`, the other head."""
        main, aux = (
            [p for part in parts for p in network.get_submodule(part).parameters()]
            for parts in (("backbone", "classifier"), ("aux_classifier",))
        )
        return (
            ("main", [p for p in main if p.requires_grad]),
            ("aux", [p for p in aux if p.requires_grad]),
        )

    def predict(self, outputs: Mapping[str, Tensor]) -> Tensor:
        """Returns each pixel's likeliest class: uint8 N,H,W, 0 is background."""
        return outputs["out"].argmax(dim=1).to(torch.uint8)

    def metric(self) -> MIoU:
        """Makes the empty metric of the paper's tables, mIoU in per cent with the background."""
        return MIoU(self.num_classes + 1)
