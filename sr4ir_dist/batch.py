"""The one thing that flows from the data to the step."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One rank's share of one step's samples.

    A share may be empty: hr is then 0,3,H,W and the rank still joins every collective.

    Attributes:
        hr: N,3,H,W RGB images; uint8 as the loader yields them, float32 in [0,1] after `to`.
            Smaller images are padded right and bottom by edge replication to the share's
            largest height and width.
        sizes: int64 N,2, each image's height and width before that padding; stays on the CPU.
        targets: what the task trains on; None where the loader was not asked for targets.
            Classification: int64 labels N. Segmentation: uint8 class numbers N,H,W with 0 for the
            background and 255 for void and for padding. Detection: a tuple of N dicts of boxes
            (float32 n,4: x0, y0, x1, y1 in pixels), labels (int64 n, from 1), crowd (bool n) and
            image_id (int64 of one number: the sample's key).
        ids: the samples' names, for people.
        keys: int64 N, the samples' row numbers in the split: what `keyed.uniform` is keyed by.
        global_size: how many samples this step has over all ranks; unreadable ones that were
            left out count too.
    """

    hr: Tensor
    sizes: Tensor
    targets: Any
    ids: tuple[str, ...]
    keys: Tensor
    global_size: int

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on a device, with hr as float32 in [0,1], channels last in memory.

        The images travel as bytes, a quarter of their size as floats. Convolutions take over the
        layout of their images, and are faster in this one.
        """
        hr = self.hr.to(device, non_blocking=True)
        if not hr.is_floating_point():
            hr = hr.to(torch.float32, memory_format=torch.channels_last) / 255
        targets = _mapped(self.targets, lambda x: x.to(device, non_blocking=True))
        return replace(self, hr=hr, targets=targets, keys=self.keys.to(device, non_blocking=True))

    def pinned(self) -> "Batch":
        """The same batch in memory from which a GPU copies without the host."""
        hr, keys = self.hr.pin_memory(), self.keys.pin_memory()
        targets = _mapped(self.targets, lambda x: x.pin_memory())
        return replace(self, hr=hr, targets=targets, keys=keys)


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A tensor, or tuples and dicts of tensors, each of them changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {name: _mapped(item, change) for name, item in value.items()}
    if isinstance(value, tuple):
        return tuple(_mapped(item, change) for item in value)
    return value
