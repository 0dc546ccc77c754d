"""What became of a search's trials, as values, files and the best trial's experiment."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import ray.tune

from sr4ir_dist import checkpoint, storage
from sr4ir_dist.config import Experiment
from sr4ir_dist.training.worker import CHECKPOINT
from sr4ir_dist.tuning.space import Space, SpaceError, apply, reported
from sr4ir_dist.tuning.strategy import TIME
from sr4ir_dist.tuning.trial import Trials
from sr4ir_dist.tuning.watch import shown

State = Literal["finished", "stopped", "failed"]


@dataclass(frozen=True)
class Outcome:
    """One trial.

    Attributes:
        trial: its id.
        state: trained to its end, stopped before (by the scheduler or the budget), or failed.
        values: what was drawn for it, by dotted path; after population-based training, the last.
        history: its evaluations: `epoch`, `step` and the figures.
        checkpoint: URI of the last evaluated checkpoint, None where there is none.
        seconds: how long it took.
        error: why it failed.
    """

    trial: str
    state: State
    values: dict[str, Any]
    history: tuple[dict[str, Any], ...]
    checkpoint: str | None
    seconds: float
    error: str | None = None

    @property
    def epochs(self) -> int:
        """How many epochs it was trained."""
        return self.history[-1][TIME] if self.history else 0

    @property
    def run_uri(self) -> str | None:
        """Its run."""
        return None if self.checkpoint is None else checkpoint.run_of(self.checkpoint)

    def figure(self, metric: str) -> float | None:
        """What it reached at its last evaluation."""
        return self.history[-1].get(metric) if self.history else None


def outcomes(results: ray.tune.ResultGrid, request: Trials) -> list[Outcome]:
    """The trials of a search that has ended."""
    found = []
    for result in results:
        frame = result.metrics_dataframe
        figures = ("step", *reported(request.experiment))
        history = []
        for row in [] if frame is None else frame.to_dict("records"):
            record = {name: row[name] for name in figures if name in row}
            history.append({TIME: int(row[TIME]), **record})
        last = result.metrics or {}
        ended = bool(history) and history[-1][TIME] >= request.experiment.epochs
        state: State = "failed" if result.error else "finished" if ended else "stopped"
        found.append(
            Outcome(
                trial=result.path.rpartition("/")[2],
                state=state,
                values=dict(result.config or {}),
                history=tuple(history),
                checkpoint=last.get(CHECKPOINT),
                seconds=round(float(last.get("time_total_s", 0.0)), 1),
                error=None if result.error is None else str(result.error).strip().splitlines()[-1],
            )
        )
    return found


def ranked(space: Space, trials: Sequence[Outcome]) -> list[Outcome]:
    """The trials, the best first: those trained to their end, others, those never evaluated."""
    sign = 1.0 if space.mode == "min" else -1.0

    def key(trial: Outcome) -> tuple[bool, bool, float]:
        figure = trial.figure(space.metric)
        return figure is None, trial.state != "finished", sign * (figure or 0.0)

    return sorted(trials, key=key)


def headings(space: Space) -> list[str]:
    """What a table of trials tells; words in the first two columns, then numbers."""
    return ["trial", "state", *space.parameters, "epochs", space.metric, "seconds"]


def cells(space: Space, trial: Outcome) -> list[str]:
    """A trial's row of such a table."""
    figure = trial.figure(space.metric)
    return [
        trial.trial,
        trial.state if trial.error is None else f"{trial.state}: {trial.error}",
        *(shown(trial.values.get(path, "")) for path in space.parameters),
        str(trial.epochs),
        "" if figure is None else f"{figure:.4g}",
        f"{trial.seconds:.0f}",
    ]


def best_experiment(space: Space, experiment: Experiment, trials: Sequence[Outcome]) -> Experiment:
    """The experiment of the best trial.

    Raises:
        SpaceError: no trial was evaluated.
    """
    best = ranked(space, trials)
    if not best or best[0].figure(space.metric) is None:
        reasons = {trial.error for trial in trials if trial.error}
        raise SpaceError(
            f"no trial was evaluated{': ' if reasons else ''}{'; '.join(sorted(reasons))}"
        )
    return apply(experiment, best[0].values)


def write_outcomes(
    folder: str, space: Space, experiment: Experiment, trials: Sequence[Outcome]
) -> str:
    """Write `trials.json` (of `records`), `trials.csv` and `best.json` into a search's folder.

    Returns:
        The URI of `best.json`, which `jobs/train.py --experiment` takes.

    Raises:
        SpaceError: no trial was evaluated.
        StorageError: the storage cannot be written.
    """
    storage.write_json(storage.join(folder, "trials.json"), records(trials))
    storage.write_bytes(storage.join(folder, "trials.csv"), _csv(space, experiment, trials))
    best = storage.join(folder, "best.json")
    found = best_experiment(space, experiment, trials)
    storage.write_bytes(best, found.model_dump_json(indent=2).encode())
    return best


def records(trials: Sequence[Outcome]) -> list[dict[str, Any]]:
    """The trials as JSON values."""
    return [asdict(t) | {"epochs": t.epochs, "run_uri": t.run_uri} for t in trials]


def _csv(space: Space, experiment: Experiment, trials: Sequence[Outcome]) -> bytes:
    sink = io.StringIO()
    figures = reported(experiment)
    writer = csv.writer(sink)
    writer.writerow(["trial", "state", *space.parameters, "epochs", *figures, "seconds", "run_uri"])
    for trial in trials:
        values = [trial.values.get(path) for path in space.parameters]
        reached = [trial.figure(name) for name in figures]
        row = [trial.trial, trial.state, *values, trial.epochs, *reached]
        writer.writerow([*row, trial.seconds, trial.run_uri])
    return sink.getvalue().encode()
