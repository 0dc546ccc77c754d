"""Values are drawn as the space says, by whichever searcher, and never leave their range."""

from pathlib import Path

import optuna
import pytest
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule

from sr4ir_dist import experiments
from sr4ir_dist.overrides import override
from sr4ir_dist.tuning.space import Space, SpaceError, load_space
from sr4ir_dist.tuning.strategy import (
    check_draws,
    distribution,
    make_scheduler,
    make_searcher,
    trials,
)

PARAMETERS = {
    "sr.network": {"choice": ["edsr", "swinir"]},
    "sr.depth": {"integer": [2, 6], "step": 2, "when": {"sr.network": ["swinir"]}},
    "losses.tdp": {"loguniform": [0.1, 10]},
    "losses.pixel": {"uniform": [0, 1], "step": 0.25},
    "losses.task": {"uniform": [0.5, 2]},
}


def space(**changes):
    tree = {"about": "a test", "task": "classification", "metric": "top1"}
    return Space.model_validate(tree | {"parameters": PARAMETERS} | changes)


def holds(parameter, value):
    if parameter.choice is not None:
        return value in parameter.choice
    low, high = parameter.bounds
    return low <= value <= high and (
        parameter.step is None or (value - low) / parameter.step % 1 == pytest.approx(0)
    )


@pytest.mark.parametrize("name", ["random", "optuna"])
def test_what_is_drawn_lies_in_the_space(name):
    found = space(search={"name": name, "seed": 3})
    searcher, param_space = make_searcher(found)
    assert searcher is not None
    assert param_space == {}
    seen = set()
    for number in range(60):
        values = searcher.suggest(f"trial {number}")
        assert ("sr.depth" in values) == (values["sr.network"] == "swinir")
        assert set(values) | {"sr.depth"} == set(PARAMETERS)
        assert all(holds(found.parameters[path], value) for path, value in values.items()), values
        seen.add(values["sr.network"])
        searcher.on_trial_complete(f"trial {number}", {"top1": values["losses.tdp"]})
    assert seen == {"edsr", "swinir"}


def test_a_seed_draws_the_same_values_again():
    drawn = []
    for seed in (1, 1, 2):
        searcher, _ = make_searcher(space(search={"name": "random", "seed": seed}))
        assert searcher is not None
        drawn.append([searcher.suggest(str(number)) for number in range(5)])
    assert drawn[0] == drawn[1] != drawn[2]


def test_optuna_learns_from_earlier_trials():
    searcher, _ = make_searcher(space(search={"name": "optuna"}))
    assert searcher is not None
    drawn = []
    for number in range(60):
        values = searcher.suggest(str(number))
        drawn.append(values["losses.task"])
        searcher.on_trial_complete(str(number), {"top1": -abs(values["losses.task"] - 0.6)})
    early, late = (sum(abs(x - 0.6) for x in part) for part in (drawn[:15], drawn[-15:]))
    assert late < 0.6 * early


def test_a_grid_has_every_combination_once():
    parameters = {"a": {"choice": [1, 2]}, "b": {"uniform": [0, 1], "step": 0.5}}
    found = space(search={"name": "grid"}, parameters=parameters, trials=9)
    searcher, param_space = make_searcher(found)
    assert searcher is None
    assert param_space == {"a": {"grid_search": [1, 2]}, "b": {"grid_search": [0, 0.5, 1]}}
    assert trials(found) == 1


@pytest.mark.parametrize(
    ("scheduler", "kind"),
    [
        ({"name": "none"}, FIFOScheduler),
        ({"name": "asha", "grace": 2}, ASHAScheduler),
        ({"name": "median"}, MedianStoppingRule),
    ],
)
def test_schedulers(scheduler, kind):
    assert isinstance(make_scheduler(space(scheduler=scheduler), 8), kind)


def test_what_is_drawn_without_a_searcher_are_values_of_the_space():
    rules = {
        "a": {"integer": [0, 2]},
        "b": {"integer": [1, 9], "step": 4},
        "c": {"uniform": [0.1, 0.5], "step": 0.2},
        "d": {"loguniform": [0.1, 1]},
    }
    found = space(search={"name": "random"}, scheduler={"name": "pbt"}, parameters=rules)
    _, domains = make_searcher(found)
    drawn = {path: {domain.sample() for _ in range(99)} for path, domain in domains.items()}
    assert (drawn["a"], drawn["b"], drawn["c"]) == ({0, 1, 2}, {1, 5, 9}, {0.1, 0.3, 0.5})
    assert all(0.1 <= value <= 1 for value in drawn["d"])
    for path, parameter in found.parameters.items():
        for value in drawn[path]:
            assert distribution(parameter)._contains(
                distribution(parameter).to_internal_repr(value)
            )


def test_what_pbt_changes_stays_in_the_space():
    parameters = {path: rule for path, rule in PARAMETERS.items() if path != "sr.depth"}
    found = space(search={"name": "random"}, scheduler={"name": "pbt"}, parameters=parameters)
    searcher, param_space = make_searcher(found)
    assert searcher is None
    scheduler = make_scheduler(found, 8)
    values = {path: domain.sample() for path, domain in param_space.items()}
    for _ in range(200):
        values, _ = scheduler._get_new_config(None, type("T", (), {"config": values}))
        assert all(holds(found.parameters[path], value) for path, value in values.items()), values


def test_combinations_that_cannot_be_trained_are_refused():
    parameters = {"sr.network": {"choice": ["swinir"]}, "sr.heads": {"choice": [4, 6]}}
    experiment = experiments.make("drawn_cls/edsr-x4/sr4ir")
    check_draws(space(parameters=parameters), override(experiment, ["sr.features=24"]))
    with pytest.raises(SpaceError, match=r"drawn as .*sr\.heads=6: sr\.features=64"):
        check_draws(space(parameters=parameters), override(experiment, ["sr.features=64"]))


def test_distributions_are_those_of_the_space():
    kinds = [type(distribution(parameter)) for parameter in space().parameters.values()]
    categorical = optuna.distributions.CategoricalDistribution
    integer, real = optuna.distributions.IntDistribution, optuna.distributions.FloatDistribution
    assert kinds == [categorical, integer, real, real, real]


def test_the_laptops_space_draws_a_dozen_and_stops_some():
    found = load_space(str(Path(__file__).parents[2] / "tune_spaces" / "laptop.yaml"))
    assert found.trials >= 12
    assert found.scheduler.name == "asha"
