"""Object detection with torchvision's Faster R-CNN on MobileNetV3-Large with FPN."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import mobilenet_backbone
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.poolers import initLevelMapper
from torchvision.transforms.v2.functional import center_crop

from sr4ir_dist.metrics.coco import COCOmAP
from sr4ir_dist.networks.pretrained import Backbone

Target = Mapping[str, Tensor]
"""`boxes` n,4 (x0, y0, x1, y1 in pixels), `labels` n from 1, `crowd` n bool, `image_id`."""
LOSSES: tuple[str, ...] = ("loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg")
_NETWORK = "fasterrcnn_mobilenet_v3_large_fpn"
_TRAINABLE_STAGES = 3
_STRIDE = 32
"""Of both levels that boxes are pooled from; a third one, max-pooled, has anchors only."""
_POOLED_LEVELS = 2
_ANCHOR_SIZES = (32, 64, 128, 256, 512)
_ANCHOR_RATIOS = (0.5, 1.0, 2.0)
_RPN_SCORE_THRESHOLD = 0.05
_SETTLING_SIDE = 320


class Detector(FasterRCNN):
    """Faster R-CNN that answers with losses when it is given targets, else with detections.

    torchvision's goes by its mode; here a frozen detector in eval mode yields losses as well,
    which training an SR network for it needs. The mode changes nothing else: no layer keeps
    statistics. Under autocast the features come in the images' dtype, in which torchvision also
    makes its anchors: bfloat16 would round their coordinates to multiples of 4 pixels.
    """

    def __init__(self, backbone: nn.Module, num_classes: int, **settings: Any) -> None:
        """Makes torchvision's Faster R-CNN of a MobileNetV3 backbone with FPN."""
        super().__init__(backbone, num_classes, **settings)
        self.backbone.register_forward_hook(_features_in_images_dtype)
        # torchvision guesses the stride from the first images that it sees and keeps it: results
        # would hang on their order, and the guess is wrong below about 80 pixels.
        pool: Any = self.roi_heads.box_roi_pool
        pool.scales = [1 / _STRIDE] * _POOLED_LEVELS
        level = _STRIDE.bit_length() - 1
        pool.map_levels = initLevelMapper(level, level, pool.canonical_scale, pool.canonical_level)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, images: Sequence[Tensor], targets: Sequence[Target] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Detects objects, or computes the losses of finding the targets.

        Args:
            images: Images 3,h,w in [0, 1]; none at all is allowed.
            targets: `boxes` in the images' dtype and `labels` of each image.

        Returns:
            With targets a dict of the four losses; else for each image a dict of at most 100
            `boxes`, in pixels of the image that was given, `labels` and `scores`.
        """
        if not images:
            # A rank without images joins the others with gradients of zero.
            zero = torch.stack([p.sum() * 0 for p in self.parameters()]).sum()
            return [] if targets is None else dict.fromkeys(LOSSES, zero)
        parts = (self, self.transform, self.rpn, self.roi_heads)
        modes = [part.training for part in parts]
        for part in parts:
            part.training = targets is not None
        try:
            wanted = None if targets is None else [dict(target) for target in targets]
            outputs: Any = super().forward(list(images), wanted)
        finally:
            for part, mode in zip(parts, modes, strict=True):
                part.training = mode
        if targets is not None and not any(len(target["boxes"]) for target in targets):
            # Without an object and without a proposal these are means over nothing: nan.
            for name in ("loss_classifier", "loss_box_reg"):
                outputs[name] = outputs[name].nan_to_num(nan=0.0, posinf=float("inf"))
        return outputs


def _features_in_images_dtype(
    module: nn.Module, args: tuple[Tensor, ...], output: dict[str, Tensor]
) -> dict[str, Tensor]:
    return {name: level.to(args[0].dtype) for name, level in output.items()}


def settle(network: Detector, images: Sequence[Tensor] | Tensor) -> None:
    """Gives a random start the batch norm statistics that published weights would bring, in place.

    Frozen batch norm has none before weights are loaded, but torchvision's start relies on being
    normalised: through 17 blocks activations shrink to 1e-8 and nothing is learnt. Here the
    statistics become those of some training images, layer by layer, and the convolutions before
    them get He et al.'s variance by their fan-in (from torch's global generator): torchvision's,
    by the fan-out, makes depthwise weights so small that the first steps overthrow them.

    Args:
        network: A detector that was just built.
        images: Some training images 3,h,w in [0, 1], the same on every rank. From 16 on the
            statistics fit other images too; from random noise they do not.
    """
    body: Any = network.backbone.body
    for layer in body.modules():
        if isinstance(layer, nn.Conv2d) and layer.bias is None:
            nn.init.kaiming_normal_(layer.weight, mode="fan_in")
    norms = [layer for layer in body.modules() if isinstance(layer, FrozenBatchNorm2d)]
    hooks = [layer.register_forward_pre_hook(_take_statistics) for layer in norms]
    # Parts of them as large as the detector sees them: all of 16 images would take gigabytes.
    seen = [network.transform([image])[0].tensors for image in images]
    sides = [min(_SETTLING_SIDE, *(image.shape[dim] for image in seen)) for dim in (-2, -1)]
    parts = torch.cat([center_crop(image, sides) for image in seen])
    # In float64, so that ranks with other numbers of threads round to the same float32.
    with torch.no_grad():
        body.double()(parts.double())
    body.float()
    for hook in hooks:
        hook.remove()


def _take_statistics(layer: Any, args: tuple[Tensor, ...]) -> None:
    layer.running_var, layer.running_mean = torch.var_mean(args[0], dim=(0, 2, 3))


@dataclass(frozen=True)
class Detection:
    """The object detection task.

    Attributes:
        num_classes: Classes without background, which is class 0 of outputs.
        network: `fasterrcnn_mobilenet_v3_large_fpn`.
        min_size: Short side in pixels to which the detector resizes its images.
        max_size: Long side that they may not pass; it wins.

    Raises:
        ValueError: Fewer than one class, another network, or sizes that are not
            1 <= min_size <= max_size.
    """

    num_classes: int
    network: str = _NETWORK
    min_size: int = 800
    max_size: int = 1333

    target: Literal["boxes"] = field(default="boxes", init=False, repr=False)
    figure: Literal["map"] = field(default="map", init=False, repr=False)
    padding: Literal["reflect"] = field(default="reflect", init=False, repr=False)
    quality_on_canvas: bool = field(default=True, init=False, repr=False)
    min_images: int = field(default=1, init=False, repr=False)
    feature_channels: int = field(default=256, init=False, repr=False)

    def __post_init__(self) -> None:
        """Checks the settings."""
        if self.num_classes < 1:
            raise ValueError(f"num_classes is {self.num_classes}; it must be at least 1")
        if self.network != _NETWORK:
            raise ValueError(f"network is {self.network!r}; detection has {_NETWORK!r}")
        if not 1 <= self.min_size <= self.max_size:
            raise ValueError(
                f"min_size is {self.min_size} and max_size {self.max_size}; "
                "expected 1 <= min_size <= max_size"
            )

    @property
    def feature_weights(self) -> Mapping[str, float]:
        """The TDP loss's layers and their weights: the FPN's two levels, both of stride 32."""
        return MappingProxyType({"0": 0.5, "1": 0.5})

    @property
    def published(self) -> Backbone:
        """Where ImageNet weights of the backbone go."""
        return Backbone("features.", "backbone.body.", ("classifier.",))

    def build(self) -> Detector:
        """Makes the network with random weights, drawn from torch's global generator.

        Its structure does not depend on where its weights will come from: batch norm is always
        frozen (eps 1e-5) and the backbone's blocks 0 to 6 never learn. To train from a random
        start, `settle` it first.
        """
        backbone = mobilenet_backbone(
            backbone_name="mobilenet_v3_large",
            weights=None,
            fpn=True,
            trainable_layers=_TRAINABLE_STAGES,
        )
        return Detector(
            backbone,
            self.num_classes + 1,
            rpn_anchor_generator=AnchorGenerator(
                (_ANCHOR_SIZES,) * (_POOLED_LEVELS + 1), (_ANCHOR_RATIOS,) * (_POOLED_LEVELS + 1)
            ),
            rpn_score_thresh=_RPN_SCORE_THRESHOLD,
            min_size=self.min_size,
            max_size=self.max_size,
        )

    def forward(
        self,
        network: Callable[..., Any],
        images: Sequence[Tensor] | Tensor,
        targets: Sequence[Target] | None = None,
    ) -> Any:
        """Runs the detector, or an engine over it; it normalises and resizes images itself.

        Args:
            network: The module or its engine, in any mode.
            images: N images 3,h,w in [0, 1], or one tensor N,3,H,W; N may be 0.
            targets: Each image's objects; those of crowds are left out.

        Returns:
            With targets the dict of the four losses; else for each image a dict of `boxes` n,4 in
            its pixels, `labels` n and `scores` n.
        """
        images = list(images)
        if targets is None:
            detections = network(images)
            return [
                {
                    name: value.to(image.dtype) if value.is_floating_point() else value
                    for name, value in found.items()
                }
                for image, found in zip(images, detections, strict=True)
            ]
        wanted = [
            {
                "boxes": target["boxes"][~target["crowd"]].to(image.dtype),
                "labels": target["labels"][~target["crowd"]],
            }
            for image, target in zip(images, targets, strict=True)
        ]
        losses = network(images, wanted)
        return {
            name: value.to(images[0].dtype) if images else value for name, value in losses.items()
        }

    def features(self, network: nn.Module, images: Sequence[Tensor] | Tensor) -> dict[str, Tensor]:
        """Runs the detector's resize and its backbone alone: no proposals, no boxes.

        Args:
            network: The plain module, never an engine.
            images: N images 3,h,w in [0, 1], or one tensor N,3,H,W; N may be 0.

        Returns:
            `0` and `1`: N,256,H/32,W/32 of the canvas that holds the N resized images; its zero
            margins are part of them.
        """
        if len(images) == 0:
            empty = next(network.parameters()).new_zeros(0, self.feature_channels, 1, 1)
            return dict.fromkeys(self.feature_weights, empty)
        detector: Any = network
        canvas, _ = detector.transform(list(images))
        return self.select(detector.backbone(canvas.tensors))

    def backbone(self, network: nn.Module) -> nn.Module:
        """The submodule from whose output `select` takes the features."""
        return network.get_submodule("backbone")

    def select(self, output: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Takes the features from the output of `backbone`."""
        return {name: output[name] for name in self.feature_weights}

    def blocks(self, network: nn.Module) -> tuple[nn.Module, ...]:
        """The backbone and the layers after pooling; what lies between is of no fixed size."""
        return tuple(network.get_submodule(name) for name in ("backbone", "roi_heads.box_head"))

    def loss(self, outputs: Mapping[str, Tensor], targets: Any = None) -> Tensor:
        """Adds the four losses; for an empty batch they are zeros that have a graph.

        Args:
            outputs: The four losses.
            targets: Not used; they are in the losses.
        """
        first, *others = (outputs[name] for name in LOSSES)
        return sum(others, start=first)

    def loss_count(self, targets: Any) -> None:
        """The loss is taken as a mean over images.

        torchvision divides by the anchors and proposals that it draws, as a rule equally many for
        every image.
        """

    def parameter_groups(self, network: nn.Module) -> tuple[tuple[str, list[nn.Parameter]], ...]:
        """The trainable parameters as `main`; frozen stages are not among them."""
        return (("main", [p for p in network.parameters() if p.requires_grad]),)

    def predict(self, outputs: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """Returns each image's detections as they are: `boxes`, `labels` and `scores`."""
        return outputs

    def metric(self) -> COCOmAP:
        """Makes the empty metric of the paper's tables, COCO's mAP in per cent."""
        return COCOmAP(self.num_classes)
