"""LPIPS, the learned perceptual distance.

Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", CVPR 2018.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sr4ir_dist.metrics.mean import Mean
from sr4ir_dist.metrics.psnr import check_settings, comparable
from sr4ir_dist.networks.pretrained import Backbone, load_weights
from sr4ir_dist.settings import LPIPS_SIDE


def load_lpips(uri: str) -> nn.Module:
    """Makes the network behind the paper's LPIPS figures: the lpips package's, VGG16, version 0.1.

    Its linear weights come with the package; nothing is downloaded. The random generators are left
    as they were.

    Args:
        uri: torchvision's ImageNet file of VGG16 (`vgg16-397923af.pth`), a path or a URI; its
            classifier is not used and may be absent.

    Returns:
        A frozen network in eval mode, on the CPU: two batches N,3,H,W in [-1, 1] to N,1,1,1.

    Raises:
        WeightsError: The file does not fill every layer of VGG16's features: an LPIPS with random
            weights is no LPIPS.
        StorageError: There is no such file.
    """
    import lpips  # imports scipy and more, which only evaluation needs

    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        # The package calls torchvision with an argument of old.
        warnings.filterwarnings("ignore", module="torchvision")
        network = lpips.LPIPS(net="vgg", version="0.1", pnet_rand=True, verbose=False)
    # The package keeps torchvision's layers in slices, under their numbers in torchvision.
    layers = {n: layer for part in network.net.children() for n, layer in part.named_children()}
    vgg16 = nn.ModuleDict({"features": nn.ModuleDict(layers)})
    load_weights(vgg16, uri, backbone=Backbone("features.", "features.", ("classifier.",)))
    return network.eval().requires_grad_(False)


@dataclass(eq=False)
class LPIPS(Mean):
    """Mean LPIPS over images; lower is better.

    With the defaults it is the paper's: 8 pixels cut from every side at every scale, SR on the
    8-bit grid. An image whose distance is exactly zero, which is one that equals its HR, is
    dropped, and counted as such.

    Attributes:
        network: What `load_lpips` made, on the device of the batches.
        border: Pixels cut from every side.

    Raises:
        ValueError: A negative border.
    """

    network: nn.Module = field(repr=False)
    border: int = 8

    def __post_init__(self) -> None:
        """Checks the setting."""
        check_settings(self.border, "rgb")

    @torch.no_grad()
    def update(self, sr: Tensor, hr: Tensor) -> None:
        """Adds a batch.

        Args:
            sr: N,3,H,W as the network returns it; N may be 0.
            hr: N,3,H,W in [0, 1].

        Raises:
            ValueError: Shapes that differ, or images with less than 16 pixels inside the border.
        """
        pair = comparable(sr, hr, border=self.border, channel="rgb", window=LPIPS_SIDE)
        dtype = next(self.network.parameters()).dtype
        a, b = ((image / 127.5 - 1).to(dtype) for image in pair)
        distances = self.network(a, b).flatten()
        self.add(distances, counted=distances != 0)

    def _settings(self) -> tuple[object, ...]:
        return (self.border,)
