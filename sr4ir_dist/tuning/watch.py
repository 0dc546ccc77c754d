"""A table of a search's trials while it runs."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import ray.tune
from ray.tune.experiment import Trial
from rich.console import Console
from rich.table import Table

from sr4ir_dist.tuning.space import Space
from sr4ir_dist.tuning.strategy import TIME

_EVERY_S = 20.0


class Watch(ray.tune.Callback):
    """Prints the trials on stderr when there is news, at most every 20 seconds.

    It is pickled with the search, which goes on with it when it is resumed.

    Args:
        space: whose trials they are.
        epochs: of a trial that is not stopped.
    """

    def __init__(self, space: Space, epochs: int) -> None:
        self._space, self._epochs = space, epochs
        self._printed = 0.0
        self._last: dict[str, dict[str, Any]] = {}

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        """Ray Tune got a trial's evaluation."""
        self._last[trial.trial_id] = result
        self._print(trials)

    def on_trial_error(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        """A trial failed."""
        self._print(trials, now=True)

    def on_experiment_end(self, trials: list[Trial], **info: Any) -> None:
        """All trials have ended."""
        self._print(trials, now=True)

    def _print(self, trials: list[Trial], *, now: bool = False) -> None:
        if not now and time.time() - self._printed < _EVERY_S:
            return
        self._printed = time.time()
        Console(stderr=True).print(table(self._space, self._epochs, trials, self._last))


def table(
    space: Space, epochs: int, trials: list[Trial], last_of: Mapping[str, dict[str, Any]]
) -> Table:
    """The trials with their values, how far they are and what they reached.

    Args:
        space: whose trials they are.
        epochs: of a trial that is not stopped.
        trials: all so far.
        last_of: the last report of each, by its id, as far as there is one.
    """
    ended = sum(trial.is_finished() for trial in trials)
    made = Table(title=f"{ended} of {len(trials)} trials ended")
    for heading in ("trial", "state", *space.parameters, "epoch", space.metric):
        side = "left" if heading in ("trial", "state") else "right"
        made.add_column(heading, justify=side, overflow="fold")
    for trial in trials:
        last = last_of.get(trial.trial_id, {})
        figure = last.get(space.metric)
        made.add_row(
            trial.trial_id,
            trial.status.lower(),
            *(shown(trial.config.get(path, "")) for path in space.parameters),
            f"{last.get(TIME, 0)}/{epochs}",
            "" if figure is None else f"{figure:.4g}",
        )
    return made


def shown(value: Any) -> str:
    """A parameter's value for people."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
