"""A task network that also scores how real its images look.

SOD-MTGAN (Bai et al., ECCV 2018) makes the recognition network the discriminator: one more fully
connected output tells HR images from SR images (paper, Table 7). Where that layer attaches is not
published; here it is on the globally averaged last layer of the TDP loss.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from sr4ir_dist.tasks import Task


class Scored(nn.Module):
    """A task network with a real/fake score; its state has keys `network.*` and `score.*`."""

    def __init__(self, network: nn.Module, task: Task) -> None:
        """Adds a random score layer to a network that `task` built."""
        super().__init__()
        self.network = network
        self.score = nn.Linear(task.feature_channels, 1)
        self._task = task

    def forward(self, *args: Any) -> tuple[Any, Tensor]:
        """Runs the network once.

        Args:
            *args: What the network takes.

        Returns:
            The network's outputs, and N logits, higher for more real. Detection's are averaged
            over the whole canvas that holds the batch, margins included.
        """
        seen: list[Any] = []
        hook = self._task.backbone(self.network).register_forward_hook(
            lambda module, inputs, output: seen.append(output)
        )
        try:
            outputs = self.network(*args)
        finally:
            hook.remove()
        if seen:
            *_, layer = self._task.select(seen[0]).values()
            pooled = layer.mean(dim=(2, 3))
        else:  # a detector that was given no image
            pooled = self.score.weight.new_zeros(0, self._task.feature_channels)
        return outputs, self.score(pooled).squeeze(1)

    def parameter_groups(self) -> tuple[tuple[str, list[nn.Parameter]], ...]:
        """The task network's groups; the score layer is part of the first."""
        (name, first), *others = self._task.parameter_groups(self.network)
        return ((name, first + list(self.score.parameters())), *others)


def forward_scored(
    task: Task, network: Callable[..., tuple[Any, Tensor]], images: Any, targets: Any = None
) -> tuple[Any, Tensor]:
    """Runs a Scored network, or an engine over it, as `task.forward` runs the plain one.

    Args:
        task: The task of the network inside.
        network: The Scored module or its engine.
        images: What `task.forward` takes.
        targets: What `task.forward` takes.

    Returns:
        What `task.forward` returns, and N logits in the images' dtype.
    """
    scores: list[Tensor] = []

    def without_score(*args: Any) -> Any:
        outputs, score = network(*args)
        scores.append(score)
        return outputs

    outputs = task.forward(without_score, images, targets)
    return outputs, scores[0].to(images[0].dtype) if len(images) else scores[0]
