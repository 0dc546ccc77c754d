"""What belongs to an image besides its pixels: read from a row, and joined to a batch's targets."""

import io
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sr4ir_dist.data.schema import VOID

Target = Literal["label", "mask", "boxes"]

TASKS: dict[Target, str] = {
    "label": "classification",
    "mask": "segmentation",
    "boxes": "detection",
}
"""The task that a dataset must be made for to have a kind of target."""

COLUMNS: dict[Target, tuple[str, ...]] = {
    "label": ("label",),
    "mask": ("mask",),
    "boxes": ("boxes", "box_labels", "crowd"),
}
"""The columns that a kind of target is read from."""


def read_target(record: Mapping[str, Any], target: Target | None, key: int) -> Any:
    """The target of a row, as transforms take it.

    Args:
        record: the row's columns.
        target: the kind; None gives None.
        key: the row's number in the split.

    Returns:
        For "label" an int; for "mask" a uint8 tensor H,W of 0 (background), 1 to K and 255
        (void); for "boxes" a dict of boxes (float32 n,4: x0, y0, x1, y1 in pixels), labels (int64
        n, from 1, since 0 is the background), crowd (bool n) and image_id (int64 of one number:
        the key).

    Raises:
        ValueError: the mask is no one-channel 8-bit image.
    """
    if target is None:
        return None
    if target == "label":
        return int(record["label"])
    if target == "mask":
        return decode_mask(record["mask"])
    return {
        "boxes": torch.tensor(record["boxes"], dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor(record["box_labels"], dtype=torch.int64) + 1,
        "crowd": torch.tensor(record["crowd"], dtype=torch.bool),
        "image_id": torch.tensor([key]),
    }


def decode_mask(data: bytes | memoryview) -> Tensor:
    """Decodes a mask's PNG to its class numbers, uint8 H,W.

    Raises:
        ValueError: it is not readable, or not of one channel of 8 bits.
    """
    try:
        with Image.open(io.BytesIO(data)) as picture:
            if picture.mode != "L":
                raise ValueError(f"has mode {picture.mode}, expected L (one channel of 8 bits)")
            return torch.from_numpy(np.array(picture))
    except (OSError, ValueError, SyntaxError) as error:
        raise ValueError(f"no readable mask: {error}") from error


def join_targets(targets: Sequence[Any], target: Target | None, height: int, width: int) -> Any:
    """The targets of a batch.

    Args:
        targets: the samples' targets, transformed; may be empty.
        target: their kind.
        height: of the canvas that the batch's images were padded to, right and bottom.
        width: of the canvas.

    Returns:
        For "label" int64 N; for "mask" uint8 N,height,width, void where images were padded; for
        "boxes" a tuple of N dicts; None without a kind.
    """
    if target is None:
        return None
    if target == "label":
        return torch.tensor(targets, dtype=torch.int64)
    if target == "boxes":
        return tuple(targets)
    joined = np.full((len(targets), height, width), VOID, np.uint8)
    for canvas, mask in zip(joined, targets, strict=True):
        canvas[: mask.shape[-2], : mask.shape[-1]] = mask.numpy()
    return torch.from_numpy(joined)
