"""Metrics as states: update with batches, add the states of ranks, compute.

A mean over samples (`metrics.mean.Mean`) and mIoU have a small float64 tensor of sums as their
whole state, so ranks combine theirs by one all-reduce; COCO's mAP keeps every detection.
"""

from __future__ import annotations

from typing import Any, Protocol, Self

import torch


class Metric(Protocol):
    """What evaluation asks of a metric."""

    def update(self, outputs: Any, targets: Any, /) -> None:
        """Adds a batch."""
        ...

    def state(self, device: torch.device | str | None = None) -> Any:
        """Everything seen: a float64 tensor that adds up over ranks, or a value to be pickled."""
        ...

    def from_state(self, state: Any) -> Self:
        """Returns a metric of the same settings that holds a state."""
        ...

    def merge(self, other: Self) -> Self:
        """Returns the metric of what both have seen; neither is changed."""
        ...

    def compute(self) -> float:
        """Returns the figure, nan when there is nothing to judge."""
        ...

    def details(self) -> dict[str, float]:
        """Returns further figures by name."""
        ...
