"""Rows of LR, bilinear, SR and HR images, as the paper's figures 4 to 6 lay them out."""

from __future__ import annotations

import io

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional as F
from torchvision.utils import make_grid

from sr4ir_dist import checkpoint, storage
from sr4ir_dist.degradation import enlarge_bilinear, quantize
from sr4ir_dist.recipes import Phase
from sr4ir_dist.training import state
from sr4ir_dist.training.build import build_networks, make_setup, open_loader
from sr4ir_dist.training.views import Views, make_inputs

COLUMNS = ("LR", "bilinear", "SR", "HR")
_CELL = 192  # smallest side of an image in the picture, in pixels
_HEADER = 20


def write_comparison(
    checkpoint_uri: str, out: str, *, data: str, split: str = "val", count: int = 6
) -> None:
    """Write a PNG of one row an image: LR, bilinear enlargement, SR and HR.

    Args:
        checkpoint_uri: a checkpoint whose recipe has an SR network.
        out: path or URI of the PNG.
        data: the dataset's URI.
        split: its split; the first images of it are shown.
        count: how many images.

    Raises:
        CheckpointError: there is no such checkpoint.
        ValueError: it has no SR network.
    """
    saved = checkpoint.load(checkpoint_uri)
    experiment = state.load_experiment(saved)
    # Evaluation's batch size is what a loader of this split yields.
    settings = experiment.evaluation.model_copy(update={"batch_size": count})
    experiment = experiment.model_copy(update={"evaluation": settings})
    modules = build_networks(experiment, only=state.JUDGED)
    if "sr" not in modules:
        raise ValueError(f"{experiment.name} has no SR network to show images of")
    state.load_networks(modules, saved)
    setup = make_setup(experiment, modules, engine="none")
    for module in modules.values():
        module.eval()
    with open_loader(setup, data, split) as loader, torch.inference_mode():
        inputs = make_inputs(setup, next(iter(loader.epoch(1))))
        sr = Views(setup, Phase(updates=(), terms=()), inputs).image("sr")
    scale = experiment.scale
    assert inputs.lr is not None
    rows = [
        F.interpolate(inputs.lr, scale_factor=scale, mode="nearest"),
        enlarge_bilinear(inputs.lr, scale),
        sr,
        inputs.hr,
    ]
    storage.write_bytes(out, _png(torch.stack(rows, dim=1).flatten(0, 1)))


def _png(images: Tensor) -> bytes:
    zoom = max(1, _CELL // images.shape[-1])
    large = F.interpolate(quantize(images.cpu()), scale_factor=zoom, mode="nearest")
    grid = make_grid(large, nrow=len(COLUMNS), padding=4, pad_value=1.0)
    pixels = (grid * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    height, width = pixels.shape[:2]
    picture = Image.new("RGB", (width, height + _HEADER), "white")
    picture.paste(Image.fromarray(pixels), (0, _HEADER))
    draw = ImageDraw.Draw(picture)
    for number, title in enumerate(COLUMNS):
        draw.text((8 + number * (large.shape[-1] + 4), 4), title, fill="black")
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()
