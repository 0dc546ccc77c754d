"""A search space: which settings a search varies and how, by what trials are judged and stopped.

A space is a YAML file; all of it is checked against an experiment before anything starts.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from sr4ir_dist import recipes, storage
from sr4ir_dist.config import NAMED, Experiment, ExperimentError, field_paths
from sr4ir_dist.overrides import override
from sr4ir_dist.settings import TaskName
from sr4ir_dist.suggestions import did_you_mean, unknown_key

FIGURES: dict[str, tuple[str, ...]] = {
    "classification": ("top1",),
    "segmentation": ("miou",),
    "detection": ("map", "map50", "map75"),
}
"""What an evaluation reports for each task."""
QUALITY = ("psnr", "ssim", "lpips")
_MIN = ("lpips",)
# They are the time by which trials are compared.
_TIME = ("epochs", "evaluation.every_epochs")
_MOST_BYTES = 1 << 20
# What may change from one checkpoint on.
_CARRIED = re.compile(r"(losses|cqmix)\..*|warmup_epochs|optimizers\..*\.(lr|weight_decay)")

Count = Annotated[int, Field(ge=1)]
Scalar = str | int | float | bool | None


class SpaceError(ValueError):
    """A search space that cannot be used; names the field, the value and what is allowed."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Parameter(_Part):
    """How one setting is drawn: one of the four rules, and when."""

    choice: Annotated[tuple[Scalar, ...], Field(min_length=1)] | None = None
    """One of these values."""
    uniform: tuple[float, float] | None = None
    """From the first to the last value, all alike; in steps of `step` if there is one."""
    loguniform: tuple[float, float] | None = None
    """The same in the logarithm."""
    integer: tuple[int, int] | None = None
    """A whole number from the first to the last one, both included; in steps of `step`."""
    step: Annotated[float, Field(gt=0)] | None = None
    when: dict[str, tuple[Scalar, ...]] = {}
    """Only where other parameters have one of these values; elsewhere the experiment's own."""

    @model_validator(mode="after")
    def _check(self) -> Parameter:
        rules = {"choice", "uniform", "loguniform", "integer"} & self.model_fields_set
        if len(rules) != 1:
            raise ValueError("expected one of choice, uniform, loguniform and integer")
        if self.choice is not None:
            if len(set(map(repr, self.choice))) < len(self.choice):
                raise ValueError(f"choice={list(self.choice)} has a value twice")
            if self.step is not None:
                raise ValueError("step is for uniform and integer")
            return self
        low, high = self.bounds
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ValueError(f"{[low, high]}: the first value must be below the last")
        if self.loguniform is not None and (low <= 0 or self.step is not None):
            raise ValueError(f"loguniform={[low, high]} must be above 0, without a step")
        if self.step is not None and self.step > high - low:
            raise ValueError(f"step={self.step:g} must not exceed {high - low:g}")
        if self.integer is not None and self.step is not None and self.step != int(self.step):
            raise ValueError(f"step={self.step:g} of whole numbers must be a whole number")
        return self

    @property
    def bounds(self) -> tuple[float, float]:
        """The first and the last value of what is no choice."""
        found = self.uniform or self.loguniform or self.integer
        assert found is not None
        return found

    def extremes(self) -> tuple[Scalar, ...]:
        """The values between which all others lie; of a choice all of them."""
        return self.bounds if self.choice is None else self.choice

    def listed(self) -> tuple[Scalar, ...] | None:
        """All values, where they can be counted."""
        if self.choice is not None:
            return self.choice
        if self.integer is not None:
            low, high = self.integer
            return tuple(range(low, high + 1, int(self.step or 1)))
        if self.step is None:
            return None
        low, high = self.bounds
        count = int((high - low) / self.step + 1e-9) + 1
        # Sums of steps miss the values that were meant in their last digits.
        return tuple(min(high, round(low + n * self.step, 12)) for n in range(count))


class Searcher(_Part):
    """Who chooses the values of the next trial."""

    name: Literal["random", "grid", "optuna"] = "optuna"
    """Independent draws; every combination; or Optuna's TPE, which learns from earlier trials."""
    seed: Annotated[int, Field(ge=0)] = 0


class Complete(_Part):
    """Every trial runs to its end."""

    name: Literal["none"] = "none"


class Asha(_Part):
    """Asynchronous successive halving: of trials that came as far, the worse ones stop."""

    name: Literal["asha"]
    grace: Count = 1
    """Epochs that every trial gets."""
    reduction: Annotated[float, Field(gt=1)] = 3.0
    """At each of its milestones one of so many goes on."""


class Median(_Part):
    """A trial stops when it is worse than the median of the others' means so far."""

    name: Literal["median"]
    grace: Count = 1
    """Epochs that every trial gets."""
    least: Count = 3
    """Trials without which none is stopped."""


class Pbt(_Part):
    """Population-based training: the worst go on from the best's weights with changed settings."""

    name: Literal["pbt"]
    interval: Count = 1
    """Epochs between two comparisons."""
    quantile: Annotated[float, Field(gt=0, le=0.5)] = 0.25
    """The part of the trials that is the worst, and that is the best."""
    resample: Annotated[float, Field(ge=0, le=1)] = 0.25
    """How often a setting is drawn anew, and not the best trial's changed by a fifth."""


class Space(_Part):
    """A search space."""

    about: str
    """What is searched, for people."""
    task: TaskName
    """The task of the experiments that it is for."""
    metric: str
    """What trials are judged by: one of `FIGURES` or `QUALITY`."""
    trials: Count = 16
    search: Searcher = Searcher()
    scheduler: Annotated[Complete | Asha | Median | Pbt, Field(discriminator="name")] = Complete()
    settings: dict[str, Any] = {}
    """Settings of all trials, by dotted path."""
    parameters: Annotated[dict[str, Parameter], Field(min_length=1)]
    """By dotted path, in the order in which they are drawn."""

    @property
    def mode(self) -> Literal["min", "max"]:
        """Whether a lower or a higher figure is better."""
        return "min" if self.metric in _MIN else "max"

    @model_validator(mode="after")
    def _check(self) -> Space:
        earlier: set[str] = set()
        for path, parameter in self.parameters.items():
            unknown = parameter.when.keys() - earlier
            if unknown:
                raise ValueError(
                    f"parameters.{path}.when names {sorted(unknown)}: only parameters before it"
                )
            earlier.add(path)
        grid, pbt = self.search.name == "grid", isinstance(self.scheduler, Pbt)
        if pbt and self.search.name != "random":
            raise ValueError(f"search.name={self.search.name}: pbt draws at random")
        for path, parameter in self.parameters.items():
            if parameter.when and (grid or pbt):
                raise ValueError(f"parameters.{path}.when: not with {'a grid' if grid else 'pbt'}")
            if grid and parameter.listed() is None:
                raise ValueError(f"parameters.{path}: a grid needs choice, integer or a step")
        return self


def load_space(uri: str) -> Space:
    """Read a search space from a YAML file.

    Raises:
        SpaceError: it is no YAML, or a field is unknown, missing or out of range.
        StorageError: there is no such file.
    """
    try:
        tree = yaml.safe_load(storage.read_bytes(uri, _MOST_BYTES))
        return Space.model_validate(tree)
    except (yaml.YAMLError, RecursionError, storage.ContentError) as error:
        raise SpaceError(f"{uri}: not a search space: {error}") from error
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, problem['loc'])) or 'the file'}={problem['input']!r:.100}: "
            f"{problem['msg'].removeprefix('Value error, ')}"
            for problem in error.errors()[:5]
        ]
        raise SpaceError(f"{uri}: {'; '.join(problems)}") from error


def overruled(space: Space, assignments: Iterable[str]) -> tuple[Space, tuple[str, ...]]:
    """A space without what a command line sets itself.

    Args:
        space: what would be searched.
        assignments: `key.path=value`, which hold for all trials.

    Returns:
        The space, and the paths that it does not search any more.

    Raises:
        SpaceError: nothing is left to search, or a parameter's `when` names one that is left out.
    """
    paths = {text.partition("=")[0].strip() for text in assignments}
    tree = space.model_dump(exclude_unset=True)
    tree["settings"] = {path: v for path, v in space.settings.items() if path not in paths}
    tree["parameters"] = {path: v for path, v in tree["parameters"].items() if path not in paths}
    taken = tuple(path for path in space.parameters if path in paths)
    try:
        return Space.model_validate(tree), taken
    except ValidationError as error:
        why = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise SpaceError(f"--set {', '.join(taken)}: the rest is no search space: {why}") from error


def check(space: Space, experiment: Experiment) -> Experiment:
    """Check a space against an experiment.

    Returns:
        The experiment with the settings of all trials.

    Raises:
        SpaceError: the experiment has another task, does not report the metric, or a path or a
            value cannot be set in it.
    """
    if experiment.task is None or experiment.task.name != space.task:
        found = "no task" if experiment.task is None else f"task {experiment.task.name}"
        raise SpaceError(f"{experiment.name} has {found}; the space is for {space.task}")
    base = _base(space, experiment)
    _check_metric(space, base)
    known = field_paths()
    _check_grid(space)
    for path, parameter in space.parameters.items():
        where = f"parameters.{path}"
        if isinstance(space.scheduler, Pbt) and not _CARRIED.fullmatch(path):
            raise SpaceError(
                f"{where}: pbt goes on from other trials' checkpoints, which leaves losses.*, "
                "cqmix.*, warmup_epochs and optimizers' lr and weight_decay to change"
            )
        if path in NAMED or path in _TIME:
            raise SpaceError(f"{where}: it is the same for all trials of a search")
        if path in space.settings:
            raise SpaceError(f"{where}: it is among the settings of all trials too")
        if path not in known:
            raise SpaceError(f"{where}: {unknown_key(path, set(known) - set(NAMED))}")
        for value in parameter.extremes():
            _set(base, {path: value}, where)
        for other, values in parameter.when.items():
            drawn = space.parameters[other].listed()
            if drawn is not None and not set(values) <= set(drawn):
                raise SpaceError(f"{where}.when.{other}={list(values)}: it is one of {list(drawn)}")
    return base


def _base(space: Space, experiment: Experiment) -> Experiment:
    """The experiment with the settings of all trials.

    Few epochs may fit no warm-up but a searched one: then with the first of what is searched too.
    """
    try:
        return _set(experiment, space.settings, "settings")
    except SpaceError:
        free = {path: each for path, each in space.parameters.items() if not each.when}
        first = {path: next(iter(each.extremes())) for path, each in free.items()}
        with suppress(SpaceError):
            return _set(experiment, first | space.settings, "settings")
        raise


def apply(experiment: Experiment, values: Mapping[str, Any]) -> Experiment:
    """The experiment with a trial's values.

    Raises:
        ExperimentError: they do not fit one another.
    """
    return override(experiment, [f"{path}={json.dumps(value)}" for path, value in values.items()])


def active(space: Space, values: Mapping[str, Any]) -> Iterator[str]:
    """The parameters that are drawn where those before them have certain values."""
    for path, parameter in space.parameters.items():
        if all(values.get(other) in allowed for other, allowed in parameter.when.items()):
            yield path


def reported(experiment: Experiment) -> tuple[str, ...]:
    """What an evaluation of the experiment reports."""
    figures: Iterable[str] = () if experiment.task is None else FIGURES[experiment.task.name]
    if recipes.get(experiment.recipe).judged_on == "hr":
        return tuple(figures)
    lpips = experiment.evaluation.lpips is not None
    return (*figures, *(name for name in QUALITY if lpips or name != "lpips"))


def _check_metric(space: Space, experiment: Experiment) -> None:
    names = reported(experiment)
    if space.metric not in names:
        raise SpaceError(
            f"metric={space.metric!r}: {experiment.name} reports {', '.join(names)}"
            f"{did_you_mean(space.metric, names)}"
        )


def _check_grid(space: Space) -> None:
    if space.search.name != "grid" or "trials" not in space.model_fields_set:
        return
    count = math.prod(len(parameter.listed() or ()) for parameter in space.parameters.values())
    if count > space.trials:
        raise SpaceError(f"trials={space.trials}: the grid has {count} combinations")


def _set(experiment: Experiment, values: Mapping[str, Any], where: str) -> Experiment:
    try:
        return apply(experiment, values)
    except ExperimentError as error:
        raise SpaceError(f"{where}: {error}") from error
