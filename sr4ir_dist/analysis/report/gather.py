"""What a report says of a run, read from its newest checkpoint and its result."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sr4ir_dist import checkpoint, experiments, recipes, storage
from sr4ir_dist.checkpoint import CheckpointError
from sr4ir_dist.config import NAMED, Experiment
from sr4ir_dist.data.splits import dataset_uris
from sr4ir_dist.hub.versions import resolve
from sr4ir_dist.training import state
from sr4ir_dist.training.plan import RESULT
from sr4ir_dist.training.state import Progress

_NO_FIGURES = ("epoch", "step")


@dataclass(frozen=True)
class Run:
    """A run as a report sees it.

    Attributes:
        label: what the report calls it.
        checkpoint: URI of the checkpoint that was read.
        name: the run's name; empty where the checkpoint does not say.
        experiment: its settings.
        progress: where it stood.
        data: URIs of the datasets that it was trained on.
        finished: whether it trained to its end; None where what was read is a lone checkpoint.
        world_size: ranks that trained it last.
        versions: of what it was trained with, by name.
        notes: what its figures lack, and why.
    """

    label: str
    checkpoint: str
    name: str
    experiment: Experiment
    progress: Progress
    data: tuple[str, ...]
    finished: bool | None
    world_size: int | None
    versions: Mapping[str, str]
    notes: tuple[str, ...]

    @property
    def about(self) -> str:
        """What is trained, in a sentence."""
        recipe = recipes.get(self.experiment.recipe)
        return f"{recipe.title}: {recipe.about}"

    @property
    def standing(self) -> str:
        """How far it is, in words."""
        epochs = self.progress.epoch - 1
        steps = f"{self.progress.step:,} steps"
        if self.finished:
            return f"finished: {steps}"
        word = "checkpoint" if self.finished is None else "unfinished"
        return f"{word} after {epochs} of {self.experiment.epochs} epochs, {steps}"

    @property
    def final(self) -> dict[str, float]:
        """The figures of the last evaluation."""
        return _figures(self.progress.history[-1]) if self.progress.history else {}

    def curve(self, figure: str) -> list[tuple[float, float]]:
        """Epoch and value of each evaluation that gave a figure."""
        found = []
        for record in self.progress.history:
            epoch, value = record.get("epoch"), _figures(record).get(figure)
            if isinstance(epoch, int | float) and math.isfinite(epoch) and value is not None:
                found.append((float(epoch), value))
        return found

    @property
    def command(self) -> str:
        """What trains the same again."""
        run = checkpoint.run_of(self.checkpoint)
        root = "runs" if run is None else run.rpartition("/")[0]
        words = ["python", "jobs/train.py", self.experiment.name]
        lines = [words, *(["--data", uri] for uri in self.data), ["--storage", root]]
        lines += [["--set", each] for each in assignments(self.experiment)]
        if self.world_size:
            lines.append(["--workers", str(self.world_size)])
        return " \\\n  ".join(shlex.join(line) for line in lines)


def gather(label: str, uri: str) -> Run:
    """Read what there is to say of a run.

    Args:
        label: what to call it.
        uri: a run for its newest checkpoint, a checkpoint, or a hub's name.

    Raises:
        CheckpointError: there is none, or it is damaged.
        StorageError: the storage does not answer.
    """
    saved = checkpoint.load(resolve(uri))
    progress, run = state.load_progress(saved), state.load_run(saved)
    record = saved.json("progress.json")
    versions = record.get("versions")
    world_size = record.get("world_size")
    finished, notes = _result(checkpoint.run_of(saved.uri), progress)
    return Run(
        label=label,
        checkpoint=saved.uri,
        name=run["run"],
        experiment=state.load_experiment(saved),
        progress=progress,
        data=dataset_uris(run["data"]),
        finished=finished,
        world_size=world_size if type(world_size) is int else None,
        versions={str(k): str(v) for k, v in versions.items()} if _is_dict(versions) else {},
        notes=notes,
    )


def assignments(experiment: Experiment) -> list[str]:
    """The `--set` values that make an experiment of its name's.

    The number of classes is left out, for it comes from the data.
    """
    plain = settings_of(experiments.relevant(experiments.make(experiment.name)))
    return [
        f"{path}={value}"
        for path, value in settings_of(experiment).items()
        if path not in (*NAMED, "task.classes") and plain.get(path) != value
    ]


def settings_of(experiment: Experiment) -> dict[str, str]:
    """Every setting by its dotted path, as `--set` takes it."""
    return dict(_flat(experiment.model_dump(mode="json")))


def differences(runs: Sequence[Run]) -> dict[str, list[str]]:
    """The settings that not all runs share, with the value of each run in turn."""
    each = [settings_of(run.experiment) for run in runs]
    paths = list(dict.fromkeys(path for settings in each for path in settings))
    found = {path: [settings.get(path, "none") for settings in each] for path in paths}
    return {path: values for path, values in found.items() if len(set(values)) > 1}


def _flat(tree: Mapping[str, Any], start: str = "") -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for name, value in tree.items():
        path = f"{start}{name}"
        if isinstance(value, dict):
            found += _flat(value, f"{path}.")
        else:
            found.append((path, value if _is_plain(value) else json.dumps(value)))
    return found


def _is_plain(value: Any) -> bool:
    """Whether `--set` takes it for the string that it is."""
    if not isinstance(value, str):
        return False
    try:
        json.loads(value)
    except ValueError:
        return True
    return False


def _figures(record: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in record.items()
        if name not in _NO_FIGURES and type(value) in (int, float) and math.isfinite(value)
    }


def _result(run_uri: str | None, progress: Progress) -> tuple[bool | None, tuple[str, ...]]:
    """Whether a run has finished, and the notes that it left."""
    if run_uri is None:
        return None, ()
    uri = storage.join(run_uri, RESULT)
    if not storage.exists(uri):
        return False, ()
    result = storage.read_json(uri)
    notes = result.get("notes", []) if _is_dict(result) else None
    if not isinstance(notes, list):
        raise CheckpointError(f"{uri} is not the result of a run")
    # An earlier checkpoint of a run that has finished is not its end.
    return result.get("steps") == progress.step, tuple(map(str, notes))


def _is_dict(value: Any) -> bool:
    return isinstance(value, dict)
