"""Learning rates as pure functions of the number of completed steps.

A run that resumes computes its learning rate from its step; there is no schedule state to save.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate


def cosine(step: int, *, base_lr: float, floor: float, periods_in_steps: Sequence[int]) -> float:
    """Returns the learning rate of a cosine schedule with restarts.

    A boundary belongs to the period that it ends: the first step after a restart still runs at
    `floor`, and the rate jumps back to just below `base_lr` one step later. After the last period
    the rate stays at `floor`.

    Args:
        step: Completed steps: 0 for the first update.
        base_lr: The rate at the start.
        floor: The rate at the end of each period.
        periods_in_steps: The length of each period, in steps.

    Raises:
        ValueError: A negative step, no period, or a period shorter than one step.
    """
    _check_step(step)
    if not periods_in_steps or min(periods_in_steps) < 1:
        raise ValueError(
            f"periods_in_steps is {list(periods_in_steps)}; it needs at least one period, each of "
            "at least 1 step"
        )
    start = 0
    for period, end in zip(periods_in_steps, accumulate(periods_in_steps), strict=True):
        if step <= end:
            angle = math.pi * ((step - start) / period)
            return floor + 0.5 * (base_lr - floor) * (1 + math.cos(angle))
        start = end
    return floor


def halving(step: int, *, base_lr: float, steps: int, at: Sequence[float]) -> float:
    """Returns the learning rate of a schedule that halves it at parts of the run.

    Args:
        step: Completed steps.
        base_lr: The rate at the start.
        steps: Length of the run.
        at: Parts of the run, such as 2/3, after which the rate is halved.

    Raises:
        ValueError: A negative step.
    """
    _check_step(step)
    return base_lr * 0.5 ** sum(step >= part * steps for part in at)


def warmup(step: int, *, base_lr: float, steps: int) -> float:
    """Returns the learning rate of detection's linear warm-up, from base_lr / steps upwards.

    Args:
        step: Completed steps, less than `steps`.
        base_lr: The rate that the warm-up leads to.
        steps: Length of the warm-up; one epoch in the paper's detection recipes.

    Raises:
        ValueError: A step outside the warm-up.
    """
    _check_step(step)
    if step >= steps:
        raise ValueError(f"step is {step}; the warm-up has {steps} steps")
    return base_lr * (1 / steps + (1 - 1 / steps) * step / steps)


def learning_rate(
    step: int,
    *,
    base_lr: float,
    floor: float,
    periods_in_steps: Sequence[int],
    warmup_steps: int = 0,
) -> float:
    """Returns the learning rate of a cosine schedule that follows an optional linear warm-up.

    The cosine schedule does not advance during the warm-up.

    Args:
        step: Completed steps, those of the warm-up included.
        base_lr: The highest rate.
        floor: The rate at the end of each period.
        periods_in_steps: The length of each cosine period, in steps.
        warmup_steps: The length of the warm-up, in steps; 0 for none.

    Raises:
        ValueError: As `cosine`, or a negative warm-up.
    """
    if warmup_steps < 0:
        raise ValueError(f"warmup_steps is {warmup_steps}; it must be at least 0")
    if step < warmup_steps:
        return warmup(step, base_lr=base_lr, steps=warmup_steps)
    return cosine(
        step - warmup_steps, base_lr=base_lr, floor=floor, periods_in_steps=periods_in_steps
    )


def _check_step(step: int) -> None:
    if step < 0:
        raise ValueError(f"step is {step}; it must be at least 0")
