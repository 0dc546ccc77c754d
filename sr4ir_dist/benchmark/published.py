"""SR4IR's step as it was published: plain, eager PyTorch, the baseline of `step.py`.

Written from the method's description and its counts of forwards and backwards, not from its code:
the TDP loss runs the whole task network on both images, the SR images of phase 2 are rendered with
a graph that nobody uses, the detector's fixed first blocks are made to take gradients, and every
figure that is logged is read from the device in every step.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from sr4ir_dist.config import Experiment
from sr4ir_dist.cqmix import cqmix
from sr4ir_dist.degradation import crop_back
from sr4ir_dist.losses.pixel import l1
from sr4ir_dist.losses.tdp import tdp
from sr4ir_dist.metrics.psnr import PSNR
from sr4ir_dist.recipes import get
from sr4ir_dist.tasks import Task
from sr4ir_dist.training.engines import build_optimizer
from sr4ir_dist.training.views import Inputs

Timed = Callable[[str], AbstractContextManager[Any]]


class PublishedStep:
    """The published step of recipe `sr4ir` over the same networks, images and CQMix cells.

    Args:
        experiment: its settings; learning rates stay at their highest.
        task: the task's adapter.
        sr: the SR network.
        network: the task network.

    Raises:
        ValueError: another recipe, or another precision than fp32: neither was published.
    """

    def __init__(self, experiment: Experiment, task: Task, sr: nn.Module, network: nn.Module):
        if experiment.recipe != "sr4ir" or experiment.precision != "fp32":
            raise ValueError(
                f"recipe={experiment.recipe!r} and precision={experiment.precision!r} have no "
                "published step; expected 'sr4ir' and 'fp32'"
            )
        self._task, self._sr, self._network = task, sr, network
        self._tdp, *others = (term for phase in get("sr4ir").phases for term in phase.terms[1:])
        self._weight = others[0].weight
        members = [p for p in sr.parameters() if p.requires_grad]
        self._adam = build_optimizer(experiment.optimizers.sr, [("main", members)])
        groups = task.parameter_groups(network)
        self._sgd = build_optimizer(experiment.optimizers.task, groups)

    def __call__(self, inputs: Inputs, *, timed: Timed = nullcontext) -> dict[str, Tensor]:
        """Run both phases after the warm-up.

        Args:
            inputs: a single process's images.
            timed: is entered for `phase 1`, `phase 2`, and in them `backward` and `optimizer`.

        Returns:
            Each term's weighted loss, detached, by the recipe's names.
        """
        with timed("phase 1"):
            losses, sr = self._first(inputs, timed)
        with timed("phase 2"):
            losses |= self._second(inputs, timed)
        self.read = (losses, sr)
        return losses

    def log(self, inputs: Inputs) -> None:
        """Read what the last step logs: every loss twice, and the PSNR of its SR images."""
        losses, sr = self.read
        for loss in losses.values():
            loss.item()
            loss.item()
        psnr = PSNR()
        psnr.update(sr, inputs.hr)
        psnr.compute()

    def _first(self, inputs: Inputs, timed: Timed) -> tuple[dict[str, Tensor], Tensor]:
        assert inputs.lr is not None
        self._network.requires_grad_(False)
        self._sr.train()
        sr = self._sr(inputs.lr)
        losses = {"pixel_sr": l1(sr, inputs.hr)}
        self._network.eval()
        pair = self._whole_network(sr, inputs), self._whole_network(inputs.hr, inputs)
        losses["tdp_sr"] = self._tdp.weight * tdp(*pair, self._task.feature_weights)
        self._network.train()
        self._update(losses, self._adam, timed)
        return {name: loss.detach() for name, loss in losses.items()}, sr.detach()

    def _second(self, inputs: Inputs, timed: Timed) -> dict[str, Tensor]:
        assert inputs.lr is not None
        assert inputs.cells is not None
        # The first blocks of a detector, which its optimizer does not hold, too.
        self._network.requires_grad_(True)
        with_graph = self._sr(inputs.lr)
        sr = with_graph.detach()
        views = {"sr": sr, "hr": inputs.hr, "cqmix": cqmix(sr, inputs.hr, inputs.cells)}
        losses = {}
        for view, canvas in views.items():
            outputs = self._task.forward(self._network, self._own(canvas, inputs), inputs.targets)
            losses[f"task_{view}"] = self._weight * self._task.loss(outputs, inputs.targets)
        self._update(losses, self._sgd, timed)
        return {name: loss.detach() for name, loss in losses.items()}

    def _whole_network(self, canvas: Tensor, inputs: Inputs) -> dict[str, Tensor]:
        seen: list[Any] = []
        hook = self._task.backbone(self._network).register_forward_hook(
            lambda module, args, output: seen.append(output)
        )
        # Without targets, so that a detector goes on to its detections.
        self._task.forward(self._network, self._own(canvas, inputs))
        hook.remove()
        return self._task.select(seen[0])

    def _own(self, canvas: Tensor, inputs: Inputs) -> Tensor | list[Tensor]:
        """What the task network gets of a canvas: a detector each image at its own size."""
        return crop_back(canvas, inputs.sizes) if self._task.target == "boxes" else canvas

    def _update(
        self, losses: dict[str, Tensor], optimizer: torch.optim.Optimizer, timed: Timed
    ) -> None:
        with timed("optimizer"):
            optimizer.zero_grad(set_to_none=True)
        with timed("backward"):
            torch.stack(list(losses.values())).sum().backward()
        with timed("optimizer"):
            optimizer.step()
