"""What a task network finds in one image, and what is truly there, in words and drawn over it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2.functional import to_pil_image
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from sr4ir_dist.data.schema import VOID
from sr4ir_dist.degradation import quantize
from sr4ir_dist.metrics.psnr import PSNR
from sr4ir_dist.tasks import Task
from sr4ir_dist.tasks.palette import voc_palette

SCORE = 0.5
"""Boxes below this score are not drawn."""
_LEAST_SIDE, _MOST_SIDE = 192, 640  # of an image in a picture, in pixels
_ALPHA = 0.55  # of masks
_UNITS = {"top1": "", "miou": "mIoU ", "map": "mAP "}


@dataclass(frozen=True)
class Overlay:
    """What is said of an image.

    Attributes:
        caption: in words, below the image.
        right: whether the class that was found is the true one; None where that is no question.
        mask: uint8 H,W, each pixel's class, 0 background, 255 void.
        boxes: `boxes` n,4 (x0, y0, x1, y1 in pixels), and `names`, n words.
    """

    caption: str = ""
    right: bool | None = None
    mask: Tensor | None = None
    boxes: Mapping[str, Any] | None = None


def predicted(task: Task, outputs: Any, targets: Any, names: Sequence[str]) -> Overlay:
    """What a task network found in one image, next to what is there.

    Args:
        task: its adapter.
        outputs: of a batch of this image alone.
        targets: of the same.
        names: of the classes, without background.
    """
    found = task.predict(outputs)[0]
    if task.target == "label":
        right = bool(found == targets[0])
        share = outputs[0].float().softmax(dim=0)[found].item() * 100
        # First, for it must not be what a narrow column cuts off.
        wrong = "" if right else "wrong: "
        return Overlay(f"{wrong}{names[int(found)]} {share:.0f} %", right)
    figure = image_figure(task, outputs, targets)
    caption = "" if math.isnan(figure) else f"{_UNITS[task.figure]}{figure:.1f}"
    if task.target == "mask":
        return Overlay(caption, mask=found.cpu())
    kept = found["scores"] >= SCORE
    labels = found["labels"][kept].tolist()
    words = [
        f"{names[label - 1]} {score:.2f}"
        for label, score in zip(labels, found["scores"][kept].tolist(), strict=True)
    ]
    boxes = {"boxes": found["boxes"][kept].cpu(), "names": words, "labels": labels}
    return Overlay(caption, boxes=boxes)


def true(task: Task, targets: Any, names: Sequence[str]) -> Overlay:
    """What is in one image.

    Args:
        task: whose targets they are.
        targets: of a batch of this image alone.
        names: of the classes, without background.
    """
    target = targets[0]
    if task.target == "label":
        return Overlay(f"true: {names[int(target)]}")
    if task.target == "mask":
        return Overlay("true classes", mask=target.cpu())
    labels = target["labels"].tolist()
    words = [names[label - 1] for label in labels]
    boxes = {"boxes": target["boxes"].cpu(), "names": words, "labels": labels}
    return Overlay("true boxes", boxes=boxes)


def image_figure(task: Task, outputs: Any, targets: Any) -> float:
    """How well a task network does on one image, in per cent; nan where there is nothing to find.

    It is the task's figure of this image alone, and for classification, whose top-1 is all or
    nothing, the probability of the true class.
    """
    if task.target == "label":
        return outputs[0].float().softmax(dim=0)[targets[0]].item() * 100
    metric = task.metric()
    metric.update(outputs, targets)
    return metric.compute()


def image_psnr(sr: Tensor, hr: Tensor, *, border: int, channel: str) -> float:
    """PSNR in dB of one image; nan where it is too small to be compared, or equals HR.

    Args:
        sr: 1,3,H,W as the network returns it.
        hr: 1,3,H,W in [0, 1].
        border: pixels cut from every side.
        channel: `rgb` or `y`.
    """
    if min(hr.shape[-2:]) <= 2 * border:
        return math.nan
    metric = PSNR(border=border, channel=channel)
    metric.update(sr, hr)
    return metric.compute()


def drawn(image: Tensor, overlay: Overlay) -> Image.Image:
    """An image with its masks and boxes over it, enlarged to a size that can be looked at.

    Small images are enlarged by a whole factor, pixel by pixel, before anything is drawn.

    Args:
        image: 3,H,W in [0, 1]; values outside are clamped.
        overlay: what to draw.
    """
    side = max(image.shape[-2:])
    zoom = max(1, math.ceil(_LEAST_SIDE / side))
    pixels = (quantize(image.detach().float().cpu()) * 255).round().to(torch.uint8)
    pixels = _enlarged(pixels, zoom)
    if overlay.mask is not None:
        mask = _enlarged(overlay.mask[None], zoom)[0]
        classes = [int(number) for number in mask.unique() if number != 0]
        if classes:
            palette = voc_palette(VOID + 1)
            layers = torch.stack([mask == number for number in classes])
            colours: list[Any] = [palette[number] for number in classes]
            pixels = draw_segmentation_masks(pixels, layers, alpha=_ALPHA, colors=colours)
    if overlay.boxes is not None and len(overlay.boxes["boxes"]):
        pixels = _boxed(pixels, overlay.boxes, zoom)
    picture = to_pil_image(pixels)
    if side * zoom > _MOST_SIDE:
        picture.thumbnail((_MOST_SIDE, _MOST_SIDE), Image.Resampling.BICUBIC)
    return picture


def _boxed(pixels: Tensor, boxes: Mapping[str, Any], zoom: int) -> Tensor:
    # Black is the palette's background; lighter colours are read on any image.
    palette = voc_palette(VOID)
    colours: list[Any] = [palette[label % VOID or 1] for label in boxes["labels"]]
    dark: list[Any] = ["white" if sum(colour) < 384 else "black" for colour in colours]
    height, width = pixels.shape[-2:]
    limits = torch.tensor([width - 1, height - 1] * 2)
    corners = (boxes["boxes"].float() * zoom).round().clamp(min=0).minimum(limits)
    return draw_bounding_boxes(
        pixels,
        corners,
        boxes["names"],
        colors=colours,
        width=2,
        font=str(Path(mpl.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")),
        font_size=max(11, max(height, width) // 30),
        label_colors=dark,
        label_background_colors=colours,
        fill_labels=True,
    )


def _enlarged(pixels: Tensor, zoom: int) -> Tensor:
    if zoom == 1:
        return pixels
    return F.interpolate(pixels[None], scale_factor=zoom, mode="nearest")[0]
