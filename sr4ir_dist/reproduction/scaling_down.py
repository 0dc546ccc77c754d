"""Experiments at the paper's settings, or at a part of their cost."""

from __future__ import annotations

from collections.abc import Iterable

from sr4ir_dist import experiments
from sr4ir_dist.config import Experiment, ExperimentError
from sr4ir_dist.overrides import override

_PAPER_SHORT_SIDE = 375  # of most of VOC's images, which detection takes as they are
_STEP = 8  # sides of training crops are multiples of it, so that every scale divides them


def make(
    name: str, *, budget: float = 1.0, size: int | None = None, settings: Iterable[str] = ()
) -> Experiment:
    """An experiment with a part of its epochs, on smaller images.

    Args:
        name: its name.
        budget: the part of the epochs, at least 2 of them; warm-ups and rates' periods shrink with
            it, and only the last epoch is judged.
        size: side of the training crop in HR pixels, in place of the paper's; for detection, the
            short side to which images are brought.
        settings: `key.path=value` assignments, of which those of a network that the experiment
            has not are left out.

    Raises:
        ExperimentError: a value is out of range.
    """
    if not 0 < budget <= 1:
        raise ExperimentError(f"budget={budget:g} must be more than 0 and at most 1")
    if size is not None and size < _STEP:
        raise ExperimentError(f"size={size} must be at least {_STEP}")
    experiment = experiments.make(name)
    changes = []
    if budget < 1:
        changes += _shorter(experiment, budget)
    if size is not None:
        changes += _smaller(experiment, size)
    changes += [text for text in settings if _concerns(experiment, text)]
    return experiments.relevant(override(experiment, changes))


def _shorter(experiment: Experiment, budget: float) -> list[str]:
    epochs = max(2, round(experiment.epochs * budget))
    part = experiment.warmup_epochs / experiment.epochs
    warmup = max(1, round(epochs * part)) if experiment.warmup_epochs else 0
    rising = min(experiment.lr_warmup_epochs, warmup or epochs - 1)
    return [
        f"epochs={epochs}",
        f"warmup_epochs={warmup}",
        f"lr_warmup_epochs={rising}",
        f"evaluation.every_epochs={epochs}",
    ]


def _smaller(experiment: Experiment, size: int) -> list[str]:
    data, task = experiment.data, experiment.task
    if data.transform == "flip":
        factor = size / _PAPER_SHORT_SIDE
        # What the detector makes of an image shrinks as the image does.
        plain = type(task)() if task is not None else None
        sides = (
            []
            if plain is None
            else [
                f"task.min_size={round(plain.min_size * factor)}",
                f"task.max_size={round(plain.max_size * factor)}",
            ]
        )
        return [f"data.shrink={size}", *sides]
    crop = size // _STEP * _STEP
    return [f"data.crop={crop}", f"data.resize={max(crop, round(crop * data.resize / data.crop))}"]


def _concerns(experiment: Experiment, text: str) -> bool:
    group = text.split("=")[0].split(".")[0]
    return not (group in ("sr", "task") and getattr(experiment, group) is None)


def explained(budget: float, size: int | None, settings: Iterable[str]) -> tuple[str, ...]:
    """What differs from the paper's settings, in words."""
    notes = []
    if budget < 1:
        notes.append(f"{budget:.3g} of the paper's epochs, at least 2")
    if size is not None:
        notes.append(f"images of {size} pixels")
    notes += [f"--set {text}" for text in settings]
    return (f"Not the paper's settings: {'; '.join(notes)}.",) if notes else ()
