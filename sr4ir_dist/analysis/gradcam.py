"""Where a task network looks for the true class: Grad-CAM (section S3 of the supplement)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import matplotlib as mpl
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sr4ir_dist import storage
from sr4ir_dist.analysis.comparison import Comparison, own_size, together
from sr4ir_dist.analysis.extras import need
from sr4ir_dist.analysis.loaded import Sample
from sr4ir_dist.analysis.overlays import Overlay, drawn
from sr4ir_dist.analysis.pictures import Cell, sheet
from sr4ir_dist.config import ExperimentError
from sr4ir_dist.data.schema import VOID
from sr4ir_dist.tasks import Task
from sr4ir_dist.tasks.scored import Scored
from sr4ir_dist.training.views import Setup

_HEAT = 0.5  # how much of a pixel the heat covers
_COLOURS = "turbo"


def write_gradcam(
    comparison: Comparison,
    out: str,
    *,
    count: int = 6,
    told: Callable[[int], None] = lambda done: None,
) -> list[dict[str, Any]]:
    """Write a PNG of one row an image, a column a checkpoint: heat over the judged image.

    The last column is HR. Each map is scaled to its own maximum.

    Args:
        comparison: from `compare`.
        out: path or URI of the PNG.
        count: how many images, the first of the split.
        told: is told how many are done.

    Returns:
        Of each image its `id`, the `class` that is looked for, and for each checkpoint in
        `evidence` the map's maximum, 0 where nothing speaks for the class.

    Raises:
        ExperimentError: a checkpoint has no task network, or one for detection.
        MissingLibraryError: captum is not installed.
    """
    for label, loaded in comparison.loaded.items():
        _check(label, loaded.setup)
    need("captum.attr")
    rows, said = [], []
    for parts in together(comparison, range(count)):
        wanted = class_of(parts[0].inputs.targets, _task(comparison, 0))
        name = "background" if wanted is None else _name(comparison, wanted)
        cells, evidence = [], {}
        for (label, loaded), sample in zip(comparison.loaded.items(), parts, strict=True):
            image, heat = _seen(loaded.setup, sample, wanted)
            evidence[label] = heat.max().item()
            cells.append(Cell(drawn(_heated(image, heat), Overlay())))
        hr = own_size(parts[0], parts[0].inputs.hr)[0]
        rows.append([*cells, Cell(drawn(hr, Overlay()), f"true: {name}")])
        said.append({"id": parts[0].id, "class": name, "evidence": evidence})
        told(len(rows))
    storage.write_bytes(out, sheet([*comparison.loaded, "HR"], rows))
    return said


def heat_map(
    task: Task, network: nn.Module, images: Tensor, targets: Tensor, wanted: int
) -> Tensor:
    """What in the last feature map speaks for a class, by Grad-CAM (Selvaraju et al., ICCV 2017).

    Channels of the task network's last feature block are weighted by their mean gradient, added
    and cut at zero. The class's score is its logit; of a segmentation network the mean of its
    logits over the pixels that are of this class.

    Args:
        task: the adapter, of classification or segmentation.
        network: the task network, in eval mode.
        images: N,3,H,W in [0, 1].
        targets: N class numbers, or N,H,W masks.
        wanted: the class, as targets number it.

    Returns:
        N,1,H,W, not below 0.

    Raises:
        MissingLibraryError: captum is not installed.
    """
    plain = network.network if isinstance(network, Scored) else network

    def score(pixels: Tensor) -> Tensor:
        outputs = task.forward(plain, pixels)
        if task.target == "label":
            return outputs
        of_class = (targets == wanted)[:, None]
        sums = (outputs["out"] * of_class).sum(dim=(2, 3))
        return sums / of_class.sum(dim=(2, 3)).clamp(min=1)

    *_, last_block = task.backbone(plain).children()
    # The weights are frozen; without a gradient of the images there would be no graph.
    pixels = images.detach().clone().requires_grad_()
    with torch.enable_grad():
        cam = need("captum.attr").LayerGradCam(score, last_block)
        heat = cam.attribute(pixels, target=wanted, relu_attributions=True)
    assert isinstance(heat, Tensor)
    return F.interpolate(heat.detach(), size=images.shape[-2:], mode="bilinear")


def class_of(targets: Any, task: Task) -> int | None:
    """The true class of one image; of a mask that which most pixels are of, background aside.

    Returns:
        As targets number it; None where a mask is all background.
    """
    if task.target == "label":
        return int(targets[0])
    numbers = targets[(targets != 0) & (targets != VOID)]
    return int(numbers.mode().values) if len(numbers) else None


def _seen(setup: Setup, sample: Sample, wanted: int | None) -> tuple[Tensor, Tensor]:
    """The judged image 3,H,W and its heat 1,H,W."""
    with torch.no_grad():
        image = own_size(sample, sample.views.image(setup.recipe.judged_on))
    if wanted is None:
        return image[0], torch.zeros_like(image[0, :1])
    assert setup.task is not None
    heat = heat_map(setup.task, setup.modules["task"], image, sample.inputs.targets, wanted)
    return image[0], heat[0]


def _heated(image: Tensor, heat: Tensor) -> Tensor:
    share = (heat / heat.max().clamp(min=1e-12))[0].cpu().numpy()
    colours = torch.from_numpy(mpl.colormaps[_COLOURS](share)[..., :3]).float().permute(2, 0, 1)
    return image.cpu().clamp(0, 1) * (1 - _HEAT) + colours * _HEAT


def _check(label: str, setup: Setup) -> None:
    if setup.task is None:
        raise ExperimentError(f"{label} has no task network whose attention could be shown")
    if setup.task.target == "boxes":
        raise ExperimentError(
            f"{label} is for detection, whose boxes have no single score to explain; Grad-CAM is "
            "for classification and segmentation"
        )


def _task(comparison: Comparison, number: int) -> Task:
    task = list(comparison.loaded.values())[number].setup.task
    assert task is not None
    return task


def _name(comparison: Comparison, wanted: int) -> str:
    at = wanted if _task(comparison, 0).target == "label" else wanted - 1
    return comparison.names[at]
