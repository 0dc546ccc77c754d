"""Spaces are checked whole before anything starts; the shipped ones fit their experiments."""

from pathlib import Path

import pytest
import yaml
from small_space import SPACE

from sr4ir_dist import experiments
from sr4ir_dist.config import ExperimentError
from sr4ir_dist.tuning.space import (
    Parameter,
    Space,
    SpaceError,
    active,
    apply,
    check,
    load_space,
    overruled,
)

SHIPPED = sorted((Path(__file__).parents[2] / "tune_spaces").glob("*.yaml"))
EXPERIMENT = "drawn_cls/edsr-x4/sr4ir"

PBT = {"search": {"name": "random"}, "scheduler": {"name": "pbt"}}


def space(**changes):
    return Space.model_validate(SPACE | changes)


def written(folder, **changes):
    path = folder / "space.yaml"
    path.write_text(yaml.safe_dump(SPACE | changes))
    return str(path)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_spaces_fit_the_experiments_of_their_task(path):
    found = load_space(str(path))
    laptop = path.stem == "laptop"
    made = [experiments.make(name) for name in experiments.names() if name.endswith("/sr4ir")]
    fitting = [
        each
        for each in made
        if each.task and each.task.name == found.task and each.name.startswith("drawn") == laptop
    ]
    assert fitting
    for experiment in fitting:
        check(found, experiment)
    assert {"cqmix.grid", "losses.tdp", "warmup_epochs"} <= found.parameters.keys()
    assert {"optimizers.sr.lr", "optimizers.task.lr"} <= found.parameters.keys()


def test_there_is_a_space_for_each_task_and_one_for_a_laptop():
    stems = {path.stem for path in SHIPPED}
    assert {"classification", "segmentation", "detection", "laptop"} <= stems


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parameters": {"losses.tpd": {"choice": [1]}}}, "losses.tpd.*did you mean 'losses.tdp'"),
        ({"parameters": {"cqmix.grid": {"choice": [4, 65]}}}, "cqmix.grid=65"),
        ({"parameters": {"cqmix.grid": {"integer": [0, 4]}}}, "cqmix.grid=0"),
        ({"parameters": {"losses.tdp": {"uniform": [-1, 1]}}}, "losses.tdp=-1"),
        ({"parameters": {"cqmix.grid": {"uniform": [1.5, 4]}}}, "cqmix.grid=1.5"),
        ({"parameters": {"warmup_epochs": {"integer": [0, 21]}}}, "warmup_epochs=21.*epochs=20"),
        ({"parameters": {"scale": {"choice": [4, 8]}}}, "parameters.scale.*same for all"),
        ({"parameters": {"epochs": {"choice": [4, 8]}}}, "parameters.epochs.*same for all"),
        ({"settings": {"losses.tdp": 1}}, "parameters.losses.tdp.*settings of all trials"),
        ({"settings": {"loses.tdp": 1}}, "settings: .*did you mean"),
        ({"metric": "miou"}, "metric='miou'.*top1, psnr, ssim"),
        ({"metric": "top"}, "metric='top'.*did you mean 'top1'"),
        ({"metric": "lpips"}, "metric='lpips'.*reports"),
        ({"task": "detection"}, "task classification; the space is for detection"),
        (
            {
                "search": {"name": "grid"},
                "trials": 3,
                "parameters": {"cqmix.grid": {"integer": [1, 4]}},
            },
            "trials=3: the grid has 4 combinations",
        ),
        *(
            ({**PBT, "parameters": {path: {"choice": [1, 2]}}}, f"parameters.{path}: pbt goes on")
            for path in ("sr.blocks", "batch_size", "optimizers.sr.type")
        ),
    ],
)
def test_what_the_experiment_does_not_take_is_named(changes, message):
    with pytest.raises(SpaceError, match=message):
        check(space(**changes), experiments.make(EXPERIMENT))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parameters": {}}, "parameters"),
        ({"parameters": {"losses.tdp": {}}}, "expected one of choice, uniform"),
        ({"parameters": {"losses.tdp": {"choice": [1], "uniform": [0, 1]}}}, "expected one of"),
        ({"parameters": {"losses.tdp": {"uniform": [1, 0]}}}, "first value must be below"),
        ({"parameters": {"losses.tdp": {"loguniform": [0, 1]}}}, "above 0"),
        ({"parameters": {"losses.tdp": {"choice": [1, 1]}}}, "a value twice"),
        ({"parameters": {"losses.tdp": {"normal": [0, 1]}}}, "losses.tdp.normal.*not permitted"),
        ({"parameters": {"losses.tdp": {"uniform": [0, 1], "step": 2}}}, "must not exceed"),
        ({"parameters": {"losses.tdp": {"choice": [1], "when": {"a": [1]}}}}, "only parameters"),
        ({"search": {"name": "grid"}}, "a grid needs choice, integer or a step"),
        (
            {"search": {"name": "annealing"}},
            "search.name='annealing'.*'random', 'grid' or 'optuna'",
        ),
        ({"scheduler": {"name": "pbt"}}, "pbt draws at random"),
        ({"scheduler": {"name": "hyperband"}}, "scheduler.*'asha'"),
        ({"trials": 0}, "trials=0.*greater than or equal to 1"),
        ({"wheels": 4}, "wheels=4.*not permitted"),
    ],
)
def test_a_malformed_space_is_refused_by_field_and_value(tmp_path, changes, message):
    with pytest.raises(SpaceError, match=message):
        load_space(written(tmp_path, **changes))


@pytest.mark.parametrize("text", ["[", "3", "", "a: !!python/object/apply:os.system ['true']"])
def test_what_is_no_space_is_refused(tmp_path, text):
    path = tmp_path / "space.yaml"
    path.write_text(text)
    with pytest.raises(SpaceError, match="space.yaml"):
        load_space(str(path))


def conditional(values):
    return space(
        settings={"sr.features": 24},
        parameters={
            "sr.network": {"choice": ["edsr", "swinir"]},
            "sr.depth": {"choice": [2, 4], "when": {"sr.network": values}},
            "losses.tdp": {"uniform": [0, 1]},
        },
    )


def test_conditional_parameters_are_drawn_where_they_count():
    found = conditional(["swinir"])
    check(found, experiments.make(EXPERIMENT))
    assert list(active(found, {"sr.network": "edsr"})) == ["sr.network", "losses.tdp"]
    assert list(active(found, {"sr.network": "swinir"})) == list(found.parameters)


def test_a_condition_that_is_never_met_is_refused():
    with pytest.raises(SpaceError, match=r"sr\.depth\.when\.sr\.network=\['vdsr'\]"):
        check(conditional(["vdsr"]), experiments.make(EXPERIMENT))


def test_settings_of_all_trials_are_applied():
    base = check(space(settings={"epochs": 5, "warmup_epochs": 1}), experiments.make(EXPERIMENT))
    assert (base.epochs, base.warmup_epochs) == (5, 1)
    assert apply(base, {"losses.tdp": 0.5}).losses.tdp == 0.5
    with pytest.raises(ExperimentError, match="warmup_epochs=6"):
        apply(base, {"warmup_epochs": 6})


def test_what_a_command_line_sets_is_neither_searched_nor_set_by_the_space():
    parameters = SPACE["parameters"] | {"warmup_epochs": {"integer": [0, 2]}}
    full = space(settings={"epochs": 5, "batch_size": 8}, parameters=parameters)
    found, taken = overruled(full, ["warmup_epochs=0", "epochs=2", "sr.blocks=1"])
    assert taken == ("warmup_epochs",)
    assert list(found.parameters) == ["losses.tdp"]
    assert found.settings == {"batch_size": 8}
    assert overruled(full, []) == (full, ())
    with pytest.raises(SpaceError, match="--set losses.tdp: the rest is no search space"):
        overruled(space(), ["losses.tdp=1"])


def test_few_epochs_fit_where_the_warm_up_is_searched():
    few, experiment = {"epochs": 4}, experiments.make("cub200/edsr-x4/sr4ir")
    parameters = SPACE["parameters"] | {"warmup_epochs": {"integer": [0, 2]}}
    assert check(space(settings=few, parameters=parameters), experiment).epochs == 4
    with pytest.raises(SpaceError, match=f"warmup_epochs={experiment.warmup_epochs}"):
        check(space(settings=few), experiment)


@pytest.mark.parametrize(
    ("tree", "listed"),
    [
        ({"choice": ["a", None]}, ("a", None)),
        ({"integer": [1, 7], "step": 3}, (1, 4, 7)),
        ({"integer": [1, 3]}, (1, 2, 3)),
        ({"uniform": [0, 1], "step": 0.25}, (0, 0.25, 0.5, 0.75, 1)),
        ({"uniform": [0, 0.3], "step": 0.1}, (0, 0.1, 0.2, 0.3)),
        ({"uniform": [0.1, 0.3], "step": 0.1}, (0.1, 0.2, 0.3)),
        ({"uniform": [0, 1]}, None),
        ({"loguniform": [0.1, 1]}, None),
    ],
)
def test_the_values_that_can_be_counted(tree, listed):
    assert Parameter.model_validate(tree).listed() == listed
