"""Evaluation across all ranks that counts every sample once (spec of the paper, section 4)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from sr4ir_dist.batch import Batch
from sr4ir_dist.data.loader import Loader
from sr4ir_dist.metrics import Metric
from sr4ir_dist.metrics.lpips import LPIPS
from sr4ir_dist.metrics.mean import Mean
from sr4ir_dist.metrics.psnr import PSNR
from sr4ir_dist.metrics.ssim import SSIM
from sr4ir_dist.recipes import Phase
from sr4ir_dist.training.views import Inputs, Setup, Views, make_inputs

M = TypeVar("M", bound=Metric | Mean)


def evaluate(
    setup: Setup,
    loader: Loader,
    say: Callable[[str], None] = lambda text: None,
    after_batch: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Judge the networks on a split, by the recipe's view.

    Every rank must call it; each reads its own share of the split and all get the same figures.
    Images of different sizes are judged one by one, as the published evaluation does, so that no
    figure depends on which images were loaded together.

    Args:
        setup: the networks, and the recipe that says which view is judged.
        loader: this rank's loader of the split.
        say: is told how far it is, about ten times.
        after_batch: called after each batch, on every rank equally often; may raise to end it all.

    Returns:
        `psnr` (dB), `ssim` and, where its weights are there, `lpips` against HR where the view is
        not HR itself; the task's figures (per cent) where there is a task network; `images`, how
        many were judged, `too_small`, of how many a border crop leaves too little to compare, and
        `bad_images`, how many could not be read; the last two where there are any.
    """
    quality = _quality(setup)
    task_metric = setup.task.metric() if setup.task else None
    seen, small, bad = Mean(), Mean(), Mean()
    for module in setup.modules.values():
        module.eval()
    with torch.inference_mode(), _uncompiled(setup):
        for number, batch in enumerate(loader.epoch(1), 1):
            if number % max(1, loader.steps_per_epoch // 10) == 0:
                say(f"judged {number} of {loader.steps_per_epoch} batches")
            for part in _of_one_size(batch):
                inputs = make_inputs(setup, part)
                views = Views(setup, Phase(updates=(), terms=()), inputs)
                count = torch.ones(len(inputs.hr))
                seen.add(count)
                if not _measure(setup, quality, views, inputs):
                    small.add(count)
                if task_metric is not None:
                    outputs = views.task_outputs(setup.recipe.judged_on)
                    task_metric.update(outputs, inputs.targets)
            after_batch()
    bad.add(torch.ones(len(loader.bad_rows)))
    figures: dict[str, float] = {}
    for name, metric in quality.items():
        figures[name] = _over_ranks(setup, metric).compute()
    if task_metric is not None:
        assert setup.task is not None
        merged = _over_ranks(setup, task_metric)
        figures |= {setup.task.figure: merged.compute(), **merged.details()}
    figures["images"] = _over_ranks(setup, seen).count
    rare = {"too_small": small, "bad_images": bad}
    counts = {name: _over_ranks(setup, metric).count for name, metric in rare.items()}
    return figures | {name: count for name, count in counts.items() if count}


def _quality(setup: Setup) -> dict[str, Any]:
    settings = setup.experiment.evaluation
    if setup.recipe.judged_on == "hr":
        return {}
    crop = {"border": settings.border, "channel": settings.channel}
    quality: dict[str, Any] = {"psnr": PSNR(**crop), "ssim": SSIM(**crop)}
    if setup.lpips is not None:
        quality["lpips"] = LPIPS(setup.lpips, border=settings.border)
    return quality


def _uncompiled(setup: Setup) -> AbstractContextManager[Any]:
    """Compiled networks run as they are written: they would be compiled anew for sizes of images.

    That takes longer than an evaluation saves.
    """
    if not setup.experiment.compile:
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


def _of_one_size(batch: Batch) -> Iterator[Batch]:
    """The batch where its images have one size, else its images one by one, without padding."""
    if len(batch.hr) and (batch.sizes == batch.sizes[0]).all():
        yield batch
        return
    for index, (height, width) in enumerate(batch.sizes.tolist()):
        at = slice(index, index + 1)
        targets = batch.targets
        if targets is not None:
            targets = targets[at]
        if isinstance(targets, Tensor) and targets.ndim == 3:  # masks
            targets = targets[:, :height, :width]
        yield replace(
            batch,
            hr=batch.hr[at, :, :height, :width],
            sizes=batch.sizes[at],
            targets=targets,
            ids=batch.ids[at],
            keys=batch.keys[at],
        )


def _measure(setup: Setup, quality: dict[str, Any], views: Views, inputs: Inputs) -> bool:
    """Compare the judged view with HR; False where the images are too small for that."""
    if not quality:
        return True
    sr, hr = views.image(setup.recipe.judged_on), inputs.hr
    # Detection's published figures are those of the padded canvas.
    if setup.task is None or not setup.task.quality_on_canvas:
        height, width = inputs.sizes[0]
        sr, hr = sr[..., :height, :width], hr[..., :height, :width]
    if min(hr.shape[-2:]) < setup.experiment.evaluation.smallest_side:
        return False
    for metric in quality.values():
        metric.update(sr, hr)
    return True


def _over_ranks(setup: Setup, metric: M) -> M:
    if setup.world_size == 1:
        return metric
    state = metric.state(setup.device)
    if isinstance(state, Tensor):
        dist.all_reduce(state)
        return metric.from_state(state)
    states: list[Any] = [None] * setup.world_size
    dist.all_gather_object(states, state)
    merged: Any = metric.from_state(states[0])
    for part in states[1:]:
        merged = merged.merge(metric.from_state(part))
    return merged
