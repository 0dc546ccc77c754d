"""Top-k accuracy."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sr4ir_dist.metrics.mean import Mean


@dataclass(eq=False)
class TopK(Mean):
    """The share of images whose class is among the k likeliest, in per cent.

    Attributes:
        k: How many classes count.

    Raises:
        ValueError: k is below 1.
    """

    k: int = 1

    def __post_init__(self) -> None:
        """Checks the setting."""
        if self.k < 1:
            raise ValueError(f"k is {self.k}; it must be at least 1")

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Adds a batch.

        Args:
            outputs: N,C logits; N may be 0.
            targets: N int64 class numbers.

        Raises:
            ValueError: Shapes that do not belong together, or fewer than k classes.
        """
        if outputs.ndim != 2 or targets.shape != outputs.shape[:1]:
            raise ValueError(
                f"outputs is {tuple(outputs.shape)} and targets {tuple(targets.shape)}; "
                "expected (N, C) and (N,)"
            )
        if outputs.shape[1] < self.k:
            raise ValueError(f"k is {self.k} but there are {outputs.shape[1]} classes")
        likeliest = outputs.topk(self.k, dim=1).indices
        self.add((likeliest == targets.unsqueeze(1)).any(dim=1).double() * 100)
