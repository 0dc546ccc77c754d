"""A space's searcher and scheduler in the terms of Ray Tune and Optuna."""

from __future__ import annotations

from functools import partial
from typing import Any

import optuna
from ray import tune
from ray.tune.schedulers import (
    ASHAScheduler,
    FIFOScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from sr4ir_dist.config import Experiment, ExperimentError
from sr4ir_dist.tuning.space import (
    Asha,
    Median,
    Parameter,
    Pbt,
    Space,
    SpaceError,
    active,
    apply,
)

TIME = "epoch"
"""What trials report as their time."""
_DRAWS = 64


def make_searcher(space: Space) -> tuple[Searcher | None, dict[str, Any]]:
    """Who chooses the trials' values.

    Returns:
        A searcher, or None where Ray draws from the space itself; and that space, by path.
    """
    if space.search.name == "grid":
        grid = {path: tune.grid_search(list(p.listed() or ())) for path, p in _items(space)}
        return None, grid
    if isinstance(space.scheduler, Pbt):
        return None, {path: _domain(parameter) for path, parameter in _items(space)}
    seed = space.search.seed
    sampler: optuna.samplers.BaseSampler = optuna.samplers.RandomSampler(seed)
    if space.search.name == "optuna":
        # Several trials run at once: without the lie they would be drawn all alike.
        sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    draw = partial(_draw_all, space)
    return OptunaSearch(draw, metric=space.metric, mode=space.mode, sampler=sampler), {}


def trials(space: Space) -> int:
    """How often a search draws from the space; a grid is gone through once."""
    return 1 if space.search.name == "grid" else space.trials


def check_draws(space: Space, experiment: Experiment) -> None:
    """Check some of the combinations that a search may draw: values may not fit one another.

    Raises:
        SpaceError: one of them cannot be trained; it is named.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(space.search.seed))
    for _ in range(_DRAWS):
        trial = study.ask()
        _draw_all(space, trial)
        try:
            apply(experiment, trial.params)
        except ExperimentError as error:
            values = ", ".join(f"{path}={value}" for path, value in trial.params.items())
            raise SpaceError(f"parameters may be drawn as {values}: {error}") from error


def make_scheduler(space: Space, epochs: int) -> TrialScheduler:
    """Who stops or changes trials, by what they reported.

    Args:
        space: the space.
        epochs: of a trial that is not stopped.
    """
    scheduler = space.scheduler
    judged: dict[str, Any] = {"time_attr": TIME, "metric": space.metric, "mode": space.mode}
    if isinstance(scheduler, Asha):
        return ASHAScheduler(
            **judged,
            max_t=epochs,
            grace_period=min(scheduler.grace, epochs),
            reduction_factor=scheduler.reduction,
        )
    if isinstance(scheduler, Median):
        return MedianStoppingRule(
            **judged, grace_period=scheduler.grace, min_samples_required=scheduler.least
        )
    if isinstance(scheduler, Pbt):
        return PopulationBasedTraining(
            **judged,
            perturbation_interval=scheduler.interval,
            hyperparam_mutations={
                path: list(parameter.listed() or ()) or _domain(parameter)
                for path, parameter in _items(space)
            },
            quantile_fraction=scheduler.quantile,
            resample_probability=scheduler.resample,
            custom_explore_fn=partial(_bounded, space),
        )
    return FIFOScheduler()


def distribution(parameter: Parameter) -> optuna.distributions.BaseDistribution:
    """A parameter's rule in Optuna's terms."""
    if parameter.choice is not None:
        return optuna.distributions.CategoricalDistribution(parameter.choice)
    if parameter.integer is not None:
        low, high = parameter.integer
        return optuna.distributions.IntDistribution(low, high, step=int(parameter.step or 1))
    low, high = parameter.bounds
    log = parameter.loguniform is not None
    return optuna.distributions.FloatDistribution(low, high, log=log, step=parameter.step)


def _items(space: Space) -> list[tuple[str, Parameter]]:
    return list(space.parameters.items())


def _draw_all(space: Space, trial: optuna.Trial) -> None:
    values: dict[str, Any] = {}
    for path in active(space, values):
        parameter = space.parameters[path]
        if parameter.choice is not None:
            values[path] = trial.suggest_categorical(path, parameter.choice)
        elif parameter.integer is not None:
            low, high = parameter.integer
            values[path] = trial.suggest_int(path, low, high, step=int(parameter.step or 1))
        else:
            low, high = parameter.bounds
            log = parameter.loguniform is not None
            values[path] = trial.suggest_float(path, low, high, log=log, step=parameter.step)


def _domain(parameter: Parameter) -> Any:
    listed = parameter.listed()
    if listed is not None:
        return tune.choice(list(listed))
    low, high = parameter.bounds
    return (tune.uniform if parameter.loguniform is None else tune.loguniform)(low, high)


def _bounded(space: Space, values: dict[str, Any]) -> dict[str, Any]:
    """Values that a fifth more or less took out of their range."""
    found = dict(values)
    for path, parameter in space.parameters.items():
        if parameter.listed() is None:
            low, high = parameter.bounds
            found[path] = min(high, max(low, found[path]))
    return found
