"""Task networks: adapters of a few functions over torchvision's own networks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from sr4ir_dist.tasks.classification import Classification


class Task(Protocol):
    """What the training step asks of a task; it knows no recipe and no engine."""

    @property
    def num_classes(self) -> int:
        """Classes that the task network tells apart."""
        ...

    @property
    def feature_weights(self) -> Mapping[str, float]:
        """The TDP loss's layers and their weights."""
        ...

    def build(self, **settings: Any) -> nn.Module:
        """Makes the task network with random weights."""
        ...

    def forward(self, network: Callable[[Tensor], Any], images: Tensor) -> Any:
        """Runs the task network, or its engine, on images in [0, 1]."""
        ...

    def features(self, network: nn.Module, images: Tensor) -> dict[str, Tensor]:
        """Runs the backbone alone and returns the layers that the TDP loss compares."""
        ...

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """Computes the task loss, a scalar."""
        ...

    def predict(self, outputs: Any) -> Any:
        """Turns outputs into what people ask for."""
        ...

    def metric(self) -> Any:
        """Makes the empty metric of the paper's tables: a Mean with update(outputs, targets)."""
        ...


TASKS: dict[str, Callable[..., Task]] = {"classification": Classification}
"""Name -> builder(num_classes)."""
