"""VGG19's features, for the conventional perceptual loss (paper, Table 6 A and Table S1)."""

from __future__ import annotations

from torch import Tensor, nn
from torchvision.models.vgg import cfgs, make_layers

from sr4ir_dist.networks.normalize import imagenet_normalize
from sr4ir_dist.networks.pretrained import Backbone


def _convolutions() -> dict[str, int]:
    """Where torchvision's VGG19 has its convolutions: name -> place in its features."""
    places = {}
    stage, number, place = 1, 1, 0
    for entry in cfgs["E"]:
        if entry == "M":
            stage, number, place = stage + 1, 1, place + 1
        else:
            places[f"conv{stage}_{number}"] = place
            number, place = number + 1, place + 2
    return places


CONVOLUTIONS = _convolutions()


class VGG19(nn.Module):
    """torchvision's VGG19 up to a convolution, before its ReLU; it never learns.

    The weights are random until `pretrained.load_weights(vgg, uri, backbone=vgg.backbone)` fills
    them from torchvision's ImageNet file: a random VGG's features say nothing.

    Which layer the paper compares is not known. `conv5_4` before its ReLU, on ImageNet-normalised
    images, is the one that ESRGAN (Wang et al., ECCV Workshops 2018, section 3.3) introduced and
    that the field's toolboxes use.

    Args:
        layer: `conv1_1` to `conv5_4`: stage and number of the convolution.

    Attributes:
        layer: The layer's name.
        backbone: How torchvision's file maps to this network.

    Raises:
        ValueError: Unknown layer.
    """

    def __init__(self, layer: str = "conv5_4") -> None:
        super().__init__()
        if layer not in CONVOLUTIONS:
            raise ValueError(f"layer {layer!r} is unknown; choose from {list(CONVOLUTIONS)}")
        self.layer = layer
        place = CONVOLUTIONS[layer]
        self.network = make_layers(cfgs["E"])[: place + 1].requires_grad_(False)
        beyond = tuple(f"features.{later}." for later in CONVOLUTIONS.values() if later > place)
        self.backbone = Backbone("features.", "network.", ("classifier.", *beyond))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Computes the features, as `losses.tdp.tdp` compares them.

        Args:
            images: N,3,H,W in [0, 1], at least 16 pixels on each side; N may be 0.

        Returns:
            The layer's name -> its output, N,C,H/2^p,W/2^p after p = stage - 1 poolings.
        """
        return {self.layer: self.network(imagenet_normalize(images))}
