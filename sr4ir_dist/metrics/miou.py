"""Mean intersection over union."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor


@dataclass(eq=False)
class MIoU:
    """Mean IoU over classes in per cent, from one confusion matrix over all pixels.

    A class that is neither in targets nor in predictions has no IoU and is left out of the mean;
    `details` says how many there are.

    Attributes:
        classes: Classes, the background among them.

    Raises:
        ValueError: Fewer than one class.
    """

    classes: int
    _counts: Tensor | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Checks the setting."""
        if self.classes < 1:
            raise ValueError(f"classes is {self.classes}; it must be at least 1")

    def update(self, outputs: Tensor | Mapping[str, Tensor], targets: Tensor) -> None:
        """Adds a batch.

        Args:
            outputs: N,classes,H,W logits, or a dict that has them as `out`; N may be 0.
            targets: N,H,W class numbers; pixels with numbers from `classes` on (void) are ignored.

        Raises:
            ValueError: Shapes that do not belong together.
        """
        logits = outputs if isinstance(outputs, Tensor) else outputs["out"]
        wanted = (len(targets), self.classes, *targets.shape[1:])
        if targets.ndim != 3 or logits.shape != wanted:
            raise ValueError(
                f"outputs is {tuple(logits.shape)} and targets {tuple(targets.shape)}; "
                f"expected (N, {self.classes}, H, W) and (N, H, W)"
            )
        cells = self.classes**2
        predicted = logits.detach().argmax(dim=1)
        places = targets.long() * self.classes + predicted
        places = torch.where(targets < self.classes, places, cells)
        counts = torch.bincount(places.flatten(), minlength=cells + 1)[:cells]
        self._counts = counts if self._counts is None else self._counts + counts

    def state(self, device: torch.device | str | None = None) -> Tensor:
        """Returns the confusion matrix as classes*classes float64 numbers, rows are targets.

        States of ranks add up, exactly up to 2^53 pixels a cell.

        Args:
            device: Where a collective needs it; by default where the batches were, and the CPU
                while there was none.
        """
        if self._counts is None:
            return torch.zeros(self.classes**2, dtype=torch.float64, device=device)
        return self._counts.to(device=device, dtype=torch.float64, copy=True)

    def from_state(self, state: Tensor) -> Self:
        """Returns a metric of the same classes that holds a state.

        Raises:
            ValueError: The state has not classes*classes numbers.
        """
        if state.shape != (self.classes**2,):
            raise ValueError(
                f"state is {tuple(state.shape)}; that of {self.classes} classes is "
                f"({self.classes**2},)"
            )
        other = replace(self)
        other._counts = state.to(torch.int64, copy=True)
        return other

    def merge(self, other: Self) -> Self:
        """Returns the metric of both metrics' pixels; neither is changed.

        Raises:
            ValueError: The other metric is of another kind or has other classes.
        """
        if type(self) is not type(other) or self.classes != other.classes:
            raise ValueError(f"cannot merge {self} with {other}")
        state = self.state()
        return self.from_state(state + other.state(state.device))

    def per_class(self) -> Tensor:
        """Returns each class's IoU in per cent: float64 on the CPU, nan for absent classes."""
        matrix = self.state("cpu").view(self.classes, self.classes)
        hits = matrix.diagonal()
        return hits / (matrix.sum(dim=0) + matrix.sum(dim=1) - hits) * 100

    def compute(self) -> float:
        """Returns the mean over classes that are there, nan when there is no pixel."""
        return self.per_class().nanmean().item()

    def details(self) -> dict[str, float]:
        """Returns `absent_classes`, the number of those left out of the mean."""
        return {"absent_classes": float(self.per_class().isnan().sum().item())}
