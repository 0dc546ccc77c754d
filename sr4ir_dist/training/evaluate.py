"""Evaluation across all ranks that counts every sample once (spec of the paper, section 4)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from sr4ir_dist.data.loader import Loader
from sr4ir_dist.degradation import crop_back
from sr4ir_dist.metrics.mean import Mean
from sr4ir_dist.metrics.psnr import PSNR
from sr4ir_dist.metrics.ssim import SSIM
from sr4ir_dist.recipes import Phase
from sr4ir_dist.training.step import Setup, Views, make_inputs

M = TypeVar("M", bound=Mean)

TASK_METRICS = {"classification": "top1"}
"""What a task's figure is called in results."""


def evaluate(
    setup: Setup, loader: Loader, say: Callable[[str], None] = lambda text: None
) -> dict[str, float]:
    """Judge the networks on a split, by the recipe's view.

    Every rank must call it; each reads its own share of the split and all get the same figures.
    Images of different sizes are judged without the padding that made them one batch.

    Args:
        setup: the networks, and the recipe that says which view is judged.
        loader: this rank's loader of the split.
        say: is told how far it is, about ten times.

    Returns:
        `psnr` (dB) and `ssim` against HR where the view is not HR itself, the task's figure (per
        cent) where there is a task network, and `images`, how many were judged.
    """
    view = setup.recipe.judged_on
    settings = setup.experiment.evaluation
    quality: dict[str, PSNR | SSIM] = {}
    if view != "hr":
        crop = {"border": settings.border, "channel": settings.channel}
        quality = {"psnr": PSNR(**crop), "ssim": SSIM(**crop)}
    task_metric = setup.task.metric() if setup.task else None
    seen = Mean()
    for module in setup.modules.values():
        module.eval()
    with torch.inference_mode():
        for number, batch in enumerate(loader.epoch(1), 1):
            if number % max(1, loader.steps_per_epoch // 10) == 0:
                say(f"judged {number} of {loader.steps_per_epoch} batches")
            inputs = make_inputs(setup, batch, epoch=1)
            seen.add(torch.ones(len(inputs.hr)))
            if len(inputs.hr) == 0:
                continue
            views = Views(setup, Phase(updates=(), terms=()), inputs)
            for sr, hr in _unpadded(views.image(view), inputs.hr, batch.sizes) if quality else ():
                for metric in quality.values():
                    metric.update(sr, hr)
            if task_metric is not None:
                task_metric.update(views.task_outputs(view), inputs.targets)
    figures = {name: _over_ranks(setup, metric).compute() for name, metric in quality.items()}
    if task_metric is not None:
        assert setup.experiment.task is not None
        name = TASK_METRICS[setup.experiment.task.name]
        figures[name] = _over_ranks(setup, task_metric).compute()
    return figures | {"images": _over_ranks(setup, seen).count}


def _unpadded(sr: Tensor, hr: Tensor, sizes: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    if (sizes == torch.tensor(hr.shape[-2:])).all():
        yield sr, hr
    else:
        for pair in zip(crop_back(sr, sizes), crop_back(hr, sizes), strict=True):
            yield pair[0].unsqueeze(0), pair[1].unsqueeze(0)


def _over_ranks(setup: Setup, metric: M) -> M:
    if setup.world_size == 1:
        return metric
    state = metric.state(setup.device)
    dist.all_reduce(state)
    return metric.from_state(state)
