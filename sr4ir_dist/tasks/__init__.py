"""Task networks: adapters of a few functions over torchvision's own networks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

from torch import Tensor, nn

from sr4ir_dist.metrics import Metric
from sr4ir_dist.networks.pretrained import Backbone
from sr4ir_dist.settings import TaskNetwork
from sr4ir_dist.tasks.classification import Classification
from sr4ir_dist.tasks.detection import Detection
from sr4ir_dist.tasks.segmentation import Segmentation


class Task(Protocol):
    """What the training step asks of a task; it knows no recipe and no engine."""

    @property
    def num_classes(self) -> int:
        """Classes that the task tells apart, without background."""
        ...

    @property
    def target(self) -> Literal["label", "mask", "boxes"]:
        """What the loader gives as targets."""
        ...

    @property
    def figure(self) -> Literal["top1", "miou", "map"]:
        """What the task's metric is called in results."""
        ...

    @property
    def padding(self) -> Literal["replicate", "reflect"]:
        """How images of different sizes are filled up to one canvas."""
        ...

    @property
    def quality_on_canvas(self) -> bool:
        """Whether image metrics are of the padded canvas, as published, or of the image."""
        ...

    @property
    def min_images(self) -> int:
        """Images that a training step needs."""
        ...

    @property
    def feature_weights(self) -> Mapping[str, float]:
        """The TDP loss's layers and their weights."""
        ...

    @property
    def feature_channels(self) -> int:
        """Channels of the last of these layers."""
        ...

    @property
    def published(self) -> Backbone:
        """Where ImageNet weights of torchvision's classification network go in this network."""
        ...

    def build(self) -> nn.Module:
        """Makes the task network with random weights from torch's global generator."""
        ...

    def forward(self, network: Callable[..., Any], images: Any, targets: Any = None) -> Any:
        """Runs the task network, or its engine; outputs have the images' dtype.

        Images are N,3,H,W in [0, 1]; for detection N images 3,h,w that may differ in size. With
        targets, detection's outputs are its losses, which need them; the other tasks ignore
        them.
        """
        ...

    def features(self, network: nn.Module, images: Any) -> dict[str, Tensor]:
        """Runs the backbone of the plain module alone: the layers that the TDP loss compares."""
        ...

    def backbone(self, network: nn.Module) -> nn.Module:
        """The submodule from whose output `select` takes the features."""
        ...

    def select(self, output: Any) -> dict[str, Tensor]:
        """Takes the features from the output of `backbone`."""
        ...

    def blocks(self, network: nn.Module) -> tuple[nn.Module, ...]:
        """The submodules that hold nearly all of the work, each called as a whole."""
        ...

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """Computes the task loss, a scalar; an empty batch gives a zero that has a graph."""
        ...

    def loss_count(self, targets: Any) -> Tensor | None:
        """Over how many units the loss is a mean, a float64 scalar; None: over images."""
        ...

    def parameter_groups(self, network: nn.Module) -> tuple[tuple[str, list[nn.Parameter]], ...]:
        """The trainable parameters by the learning rate that they take."""
        ...

    def predict(self, outputs: Any) -> Any:
        """Turns outputs into what people ask for."""
        ...

    def metric(self) -> Metric:
        """Makes the empty metric of the paper's tables."""
        ...


TASKS: dict[str, Callable[..., Task]] = {
    "classification": Classification,
    "segmentation": Segmentation,
    "detection": Detection,
}
"""Name -> builder(num_classes, network, **settings)."""


def make_task(settings: TaskNetwork) -> Task:
    """Makes the adapter of an experiment's task.

    Raises:
        ValueError: No number of classes, or a network that the task does not have.
    """
    if settings.classes is None:
        raise ValueError(
            "task.classes is not set; it must be the number of classes without background"
        )
    sizes = {}
    if settings.name == "detection":
        sizes = {"min_size": settings.min_size, "max_size": settings.max_size}
    return TASKS[settings.name](settings.classes, settings.network, **sizes)
