"""A checkpoint's networks on one image: the SR image, and what the task network finds in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sr4ir_dist import checkpoint, recipes
from sr4ir_dist.config import Experiment, Role
from sr4ir_dist.degradation import enlarge_bilinear
from sr4ir_dist.prediction.inputs import PredictionError
from sr4ir_dist.prediction.tiles import Tiling, render
from sr4ir_dist.recipes import Phase
from sr4ir_dist.training import state
from sr4ir_dist.training.build import build_networks, make_setup
from sr4ir_dist.training.views import Inputs, Setup, Views


@dataclass(frozen=True)
class Prediction:
    """What an image became, on the CPU.

    Attributes:
        size: height and width of the image that the task network was given, or of the SR image.
        sr: uint8 3,H,W, where an SR image is wanted.
        scores: probability of each class, where the task is classification.
        mask: uint8 H,W, each pixel's class, 0 background, where the task is segmentation.
        boxes: `boxes` n,4 (x0, y0, x1, y1 in pixels of `size`), `labels` n from 1 and `scores` n,
            best first, where the task is detection.
    """

    size: tuple[int, int]
    sr: Tensor | None = None
    scores: Tensor | None = None
    mask: Tensor | None = None
    boxes: dict[str, Tensor] | None = None


class Predictor:
    """A checkpoint's networks, loaded once, ready for images of any size.

    Args:
        uri: the checkpoint.
        roles: the networks to load, of those that the checkpoint has.
        images: whether SR images are wanted; else they are only what the task network gets.
        tiling: how large images are cut for the SR network.
        most_pixels: of the largest result.
        device: where the networks lie; by default this process's.

    Raises:
        CheckpointError: there is no such checkpoint, or it is damaged.
    """

    def __init__(
        self,
        uri: str,
        roles: tuple[Role, ...],
        *,
        images: bool,
        tiling: Tiling,
        most_pixels: int,
        device: torch.device | None = None,
    ) -> None:
        saved = checkpoint.load(uri)
        experiment = state.load_experiment(saved)
        modules = build_networks(experiment, device, only=roles)
        state.load_networks(modules, saved)
        for module in modules.values():
            module.eval()
        self._setup = make_setup(experiment, modules, engine="none")
        self._images = images
        self._tiling = tiling
        self._most_pixels = most_pixels

    def predict(self, image: Tensor) -> Prediction:
        """Super-resolve an image and give it to the task network, as the recipe is judged.

        The task network gets the SR image, neither clamped nor quantised; or the image enlarged
        bilinearly; or the image as it is.

        Args:
            image: uint8 3,h,w.

        Raises:
            PredictionError: the result would be too large, or memory ran out.
        """
        scale = result_scale(self._setup.experiment)
        height, width = (side * scale for side in image.shape[-2:])
        if height * width > self._most_pixels:
            raise PredictionError(
                f"{image.shape[-2]}x{image.shape[-1]} pixels become {height}x{width}, more than "
                f"--most-pixels {self._most_pixels}"
            )
        try:
            with torch.inference_mode():
                return self._predict(image, (height, width))
        except torch.OutOfMemoryError as error:
            raise PredictionError(
                f"memory ran out at {image.shape[-2]}x{image.shape[-1]} pixels: {error}"
            ) from error

    def _predict(self, image: Tensor, size: tuple[int, int]) -> Prediction:
        setup = self._setup
        lr = (image[None].to(setup.device).float() / 255).contiguous()
        judged, sr = lr, None
        if "sr" in setup.modules:
            # Alone it need not be kept in more than bytes.
            finish = (lambda tile: tile) if "task" in setup.modules else to_bytes
            judged = render(self._super_resolve, lr, setup.experiment.scale, self._tiling, finish)
            sr = to_bytes(judged)[0].cpu() if self._images else None
        if "task" not in setup.modules:
            return Prediction(size, sr)
        if setup.recipe.judged_on == "lr_up":
            judged = enlarge_bilinear(lr, setup.experiment.scale)
        return _found(setup, judged, size, sr)

    def _super_resolve(self, lr: Tensor) -> Tensor:
        with self._setup.autocast():
            return self._setup.modules["sr"](lr).float()


def result_scale(experiment: Experiment) -> int:
    """How many times larger an image becomes before it is judged or written."""
    return 1 if recipes.get(experiment.recipe).judged_on == "hr" else experiment.scale


def to_bytes(images: Tensor) -> Tensor:
    """Images in [0, 1], values outside clamped, as uint8; bytes stay as they are."""
    if images.dtype == torch.uint8:
        return images
    return (images * 255).round().clamp(0, 255).to(torch.uint8)


def _found(setup: Setup, judged: Tensor, size: tuple[int, int], sr: Tensor | None) -> Prediction:
    task = setup.task
    assert task is not None
    # To the views this image is what it is, whichever way it was made.
    inputs = Inputs(judged, None, [size], None)
    outputs: Any = Views(setup, Phase(updates=(), terms=()), inputs).task_outputs("hr")
    if task.target == "label":
        return Prediction(size, sr, scores=outputs[0].softmax(dim=0).cpu())
    found = task.predict(outputs)[0]
    if task.target == "mask":
        return Prediction(size, sr, mask=found.cpu())
    return Prediction(size, sr, boxes={name: value.cpu() for name, value in found.items()})
