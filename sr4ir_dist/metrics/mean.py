"""A mean over samples whose state adds up over batches and ranks."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Self

import torch
from torch import Tensor


@dataclass(eq=False)
class Mean:
    """The mean of one value per sample.

    Sums are float64 on the device of the first batch; nothing is read from the device before
    `compute`.
    """

    _sums: Tensor | None = field(default=None, init=False, repr=False, compare=False)

    def add(self, values: Tensor, counted: Tensor | None = None) -> None:
        """Adds one value per sample.

        Args:
            values: N numbers; N may be 0.
            counted: N bool; False drops a sample from the mean (its value may be anything) and
                counts it as dropped.
        """
        values = values.detach().to(torch.float64)
        if counted is None:
            counted = torch.ones_like(values, dtype=torch.bool)
        kept = torch.where(counted, values, torch.zeros_like(values))
        sums = torch.stack([kept.sum(), counted.sum().double(), (~counted).sum().double()])
        self._sums = sums if self._sums is None else self._sums + sums

    def state(self, device: torch.device | str | None = None) -> Tensor:
        """Returns 3 float64 numbers: sum, samples counted, samples dropped.

        States of ranks add up to the state of all their samples.

        Args:
            device: Where a collective needs it; by default where the batches were, and the CPU
                while there was none.
        """
        if self._sums is None:
            return torch.zeros(3, dtype=torch.float64, device=device)
        return self._sums.to(device=device, copy=True)

    def from_state(self, state: Tensor) -> Self:
        """Returns a metric of the same settings that holds a state.

        Raises:
            ValueError: The state is not 3 numbers.
        """
        if state.shape != (3,):
            raise ValueError(f"state is {tuple(state.shape)}; a metric's state is 3 numbers")
        other = replace(self)
        other._sums = state.to(torch.float64, copy=True)
        return other

    def merge(self, other: Self) -> Self:
        """Returns the metric of both metrics' samples; neither is changed.

        Raises:
            ValueError: The other metric is of another kind or has other settings.
        """
        if type(self) is not type(other) or self._settings() != other._settings():
            raise ValueError(f"cannot merge {self} with {other}")
        state = self.state()
        return self.from_state(state + other.state(state.device))

    def compute(self) -> float:
        """Returns the mean over the counted samples, nan when there are none."""
        total, counted, _ = self.state().tolist()
        return total / counted if counted else float("nan")

    def details(self) -> dict[str, float]:
        """Returns further figures by name; a mean has none."""
        return {}

    @property
    def count(self) -> int:
        """Samples in the mean."""
        return int(self.state()[1].item())

    @property
    def dropped(self) -> int:
        """Samples left out of the mean."""
        return int(self.state()[2].item())

    def _settings(self) -> tuple[object, ...]:
        return tuple(getattr(self, f.name) for f in fields(self) if f.init)
