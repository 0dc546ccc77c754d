"""Experiments as values: overrides, JSON, digests, and messages that name what is wrong."""

import json

import pytest

from sr4ir_dist import config, experiments
from sr4ir_dist.config import Experiment, ExperimentError, field_paths, from_json
from sr4ir_dist.overrides import override

NAME = "drawn_cls/edsr-x4/sr4ir"
CHANGES = {
    "seed": 1,
    "epochs": 21,
    "warmup_epochs": 3,
    "lr_warmup_epochs": 1,
    "batch_size": 31,
    "data.transform": "patch",
    "data.resize": 80,
    "data.crop": 60,
    "data.center_crop": False,
    "data.shrink": 50,
    "degradation.kind": "bicubic_antialias",
    "degradation.blur": 5.0,
    "sr.network": "bilinear",
    "sr.blocks": 5,
    "sr.features": 33,
    "sr.depth": 2,
    "sr.heads": 3,
    "sr.window": 4,
    "sr.drop_path": 0.2,
    "sr.recompute": True,
    "sr.weights": "a.pt",
    "sr.partial": True,
    "sr.start": "runs/one",
    "task.name": None,  # no other fits the network
    "task.network": None,
    "task.classes": 7,
    "task.min_size": 100,
    "task.max_size": 900,
    "task.weights": "b.pt",
    "task.partial": True,
    "task.start": "runs/two",
    "fixed.oracle": "runs/three",
    "fixed.vgg": "c.pt",
    "fixed.vgg_layer": "conv2_2",
    "optimizers.sr.type": None,
    "optimizers.sr.lr": 2e-4,
    "optimizers.sr.lr_floor": 2e-6,
    "optimizers.sr.halve_at": [0.5, 0.75],
    "optimizers.sr.betas": [0.8, 0.99],
    "optimizers.sr.weight_decay": 0.1,
    "optimizers.task.type": None,
    "optimizers.task.lr": 0.5,
    "optimizers.task.lr_floor": 1e-3,
    "optimizers.task.aux_factor": 2.0,
    "optimizers.task.momentum": 0.8,
    "optimizers.task.weight_decay": 0.2,
    "losses.pixel": 0.5,
    "losses.tdp": 2.0,
    "losses.perceptual": 0.1,
    "losses.task": 3.0,
    "losses.adversarial": 0.2,
    "losses.real_fake": 0.3,
    "cqmix.grid": 8,
    "micro_batch": 4,
    "batch_norm": "local",
    "joined_views": True,
    "precision": "bf16",
    "gradients": "bf16",
    "compile": True,
    "zero.sr": 1,
    "zero.task": 2,
    "evaluation.every_epochs": 7,
    "evaluation.batch_size": 9,
    "evaluation.border": 4,
    "evaluation.channel": "y",
    "evaluation.lpips": "d.pt",
    "checkpoint.every_epochs": 2,
    "checkpoint.every_steps": 11,
    "checkpoint.every_minutes": 1.5,
    "checkpoint.keep": 5,
    "checkpoint.keep_best": 0,
}
# They change no weight of a run.
SAME_RUN = (
    "evaluation.lpips",
    "checkpoint.keep_best",
    "checkpoint.every_minutes",
    "sr.recompute",
)
GROUPS = {name.rpartition(".")[0] for name in CHANGES} - {"", "optimizers"} | {"optimizers"}


@pytest.fixture(scope="module")
def experiment():
    return experiments.make(NAME)


def value_at(experiment, path):
    value = experiment.model_dump(mode="json")
    for part in path.split("."):
        value = value[part]
    return value


def test_the_table_here_holds_every_setting():
    assert CHANGES.keys() | GROUPS | {"name", "recipe", "scale"} == field_paths().keys()


@pytest.mark.parametrize("path", [path for path, value in CHANGES.items() if value is not None])
def test_every_setting_can_be_overridden_and_changes_the_digest(experiment, path):
    value = CHANGES[path]
    assert value_at(experiment, path) != value
    text = value if isinstance(value, str) else json.dumps(value)
    changed = override(experiment, [f"{path}={text}"])
    assert value_at(changed, path) == value
    alike = changed.digest(data="d") == experiment.digest(data="d")
    assert alike == (path in SAME_RUN)
    back = override(changed, [f"{path}={json.dumps(value_at(experiment, path))}"])
    assert back == experiment
    assert back.digest(data="d") == experiment.digest(data="d")


def test_the_digest_is_stable_and_tells_data_apart(experiment):
    digest = experiment.digest(data="d")
    assert len(digest) == 8
    int(digest, 16)
    assert from_json(experiment.model_dump_json()).digest(data="d") == digest
    assert override(experiment, ["epochs=20"]).digest(data="d") == digest
    assert experiment.digest(data="other") != digest


def test_all_digests_of_the_changes_differ(experiment):
    digests = [
        override(experiment, [f"{p}={v if isinstance(v, str) else json.dumps(v)}"]).digest(data="d")
        for p, v in CHANGES.items()
        if v is not None and p not in SAME_RUN
    ]
    assert len(set(digests)) == len(digests) > 35


def test_assignments_apply_in_order_and_are_checked_together(experiment):
    changed = override(experiment, ["epochs=2", "epochs = 3 ", "warmup_epochs=1"])
    assert (changed.epochs, changed.warmup_epochs) == (3, 1)
    # 96 alone exceeds the resize of 64.
    assert override(experiment, ["data.crop=96", "data.resize=128"]).data.crop == 96
    assert override(experiment, []) == experiment


def test_values_are_json_and_anything_else_is_a_string(experiment):
    changed = override(
        experiment,
        ["sr.weights=s3://bucket/a=b.pt", 'task.weights="42"', "optimizers.sr.betas=[0.5, 0.75]"],
    )
    assert changed.sr is not None
    assert changed.task is not None
    assert changed.sr.weights == "s3://bucket/a=b.pt"
    assert changed.task.weights == "42"
    assert changed.optimizers.sr.betas == (0.5, 0.75)
    cleared = override(changed, ["sr.weights=null", "checkpoint.every_steps=null"])
    assert cleared.sr is not None
    assert cleared.sr.weights is None
    assert cleared.checkpoint.every_steps is None


@pytest.mark.parametrize(
    ("assignment", "messages"),
    [
        ("epoch=3", ["unknown key 'epoch'", "did you mean 'epochs' or 'warmup_epochs'?"]),
        ("optimizers.task.learning_rate=1", ["'optimizers.task.learning_rate'", "did you mean"]),
        ("optimizer.sr.lr=1", ["did you mean 'optimizers.sr.lr' or 'optimizers.task.lr'?"]),
        ("lr=1", ["did you mean 'optimizers.sr.lr' or 'optimizers.task.lr'?"]),
        ("momentum=1", ["did you mean 'optimizers.task.momentum'?"]),
        ("name=other", ["name=other", "part of the experiment's name"]),
        ("recipe=s2t", ["recipe=s2t", "part of the experiment's name"]),
        ("data=5", ["data=5", "object"]),
        ('epochs="5"', ["epochs='5'", "valid integer"]),
        ("epochs=true", ["epochs=True", "valid integer"]),
        ("epochs", ["'epochs' must have the form key.path=value"]),
        ("epochs=many", ["epochs='many'", "integer"]),
        ("epochs=1.5", ["epochs=1.5", "integer"]),
        ("epochs=0", ["epochs=0", "greater than or equal to 1"]),
        ("epochs=null", ["epochs=None", "integer"]),
        ("scale=3", ["scale=3", "part of the experiment's name"]),
        ("zero.sr=3", ["zero.sr=3", "0, 1 or 2"]),
        ("precision=fp16", ["precision='fp16'", "'fp32' or 'bf16'"]),
        ("optimizers.task.lr=-1", ["optimizers.task.lr=-1", "greater than 0"]),
        ("optimizers.task.lr=NaN", ["optimizers.task.lr=nan", "finite"]),
        ("losses.tdp=Infinity", ["losses.tdp=inf", "finite"]),
        ("optimizers.sr.betas=[0.9]", ["optimizers.sr.betas"]),
        ("sr=[]", ["sr=[]"]),
        ('sr={"width": 3}', ["unknown key 'sr.width'"]),
        ("data.crop=30", ["data.crop=30 must be a multiple of scale=4"]),
        ("data.crop=96", ["data.crop=96 must not exceed data.resize=64"]),
        ("data.crop=24", ["data.crop=24", "evaluation.border=8"]),
        ("warmup_epochs=21", ["warmup_epochs=21 must not exceed epochs=20"]),
        ("optimizers.sr.lr_floor=1", ["optimizers.sr.lr_floor=1", "optimizers.sr.lr=0.0001"]),
    ],
)
def test_refusals_name_the_field_the_value_and_what_is_allowed(experiment, assignment, messages):
    with pytest.raises(ExperimentError) as caught:
        override(experiment, [assignment])
    for message in messages:
        assert message in str(caught.value)


def test_whole_numbers_are_rates_and_weights_too(experiment):
    changed = override(experiment, ["losses.tdp=2", "optimizers.task.lr=1"])
    assert (changed.losses.tdp, changed.optimizers.task.lr) == (2.0, 1.0)


def test_a_group_that_was_set_to_a_value_has_no_keys(experiment):
    with pytest.raises(ExperimentError, match="sr was set to 3 before"):
        override(experiment, ["sr=3", "sr.blocks=3"])


def test_a_network_that_the_experiment_lacks_cannot_be_set():
    with pytest.raises(ExperimentError, match="this experiment has no sr network"):
        override(experiments.make("drawn_cls/h2t"), ["sr.blocks=3"])


def test_json_round_trip():
    def comes_back(name):
        experiment = experiments.make(name)
        same = from_json(experiment.model_dump_json(indent=2)) == experiment
        return same and experiment.name == name

    # In one test: a case of pytest takes longer than the round trip of a name.
    assert [name for name in experiments.names() if not comes_back(name)] == []


def test_files_that_are_no_experiment_are_refused(experiment):
    tree = experiment.model_dump(mode="json")
    for text, message in (
        ("{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        ("[]", "should be an object"),
        ("{}", "recipe"),
        (
            json.dumps(tree | {"epochz": 3}),
            "unknown key 'epochz'; did you mean 'epochs' or 'warmup_epochs'?",
        ),
        (json.dumps(tree | {"zero": {"sr": 9}}), "zero.sr=9"),
        (json.dumps(tree | {"scale": 3}), "scale=3: .*2, 4 or 8"),
    ):
        with pytest.raises(ExperimentError, match=message.replace("?", r"\?")):
            from_json(text)


def test_experiments_cannot_be_changed_in_place(experiment):
    with pytest.raises(config.ValidationError, match="frozen"):
        experiment.epochs = 3
    with pytest.raises(config.ValidationError, match="frozen"):
        experiment.sr.blocks = 3
    assert isinstance(experiment, Experiment)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        (NAME, ["task.network=resnet50"], "task.network='resnet50' is none for classification"),
        (NAME, ["task.name=detection"], "is none for detection; allowed: fasterrcnn_"),
        ("drawn_det/h2t", ["task.min_size=900"], "task.min_size=900 must not exceed task.max_size"),
        (
            "drawn_det/h2t",
            ["data.transform=patch"],
            "does not fit task.name='detection'; allowed: f",
        ),
        ("drawn_seg/h2t", ["data.transform=flip"], "allowed: resize_crop"),
        (
            "drawn_seg/swinir-x4/s",
            ["sr.heads=5"],
            "sr.features=24 must be a multiple of sr.heads=5",
        ),
        (NAME, ["lr_warmup_epochs=30"], "lr_warmup_epochs=30 must not exceed epochs=20"),
        (NAME, ["degradation.blur=-1"], "degradation.blur=-1: Input should be greater"),
        (NAME, ["sr.window=3"], "sr.window=3: Input should be a multiple of 2"),
    ],
)
def test_settings_that_do_not_fit_each_other_are_refused(name, settings, message):
    with pytest.raises(ExperimentError) as caught:
        override(experiments.make(name), settings)
    assert message in str(caught.value)
