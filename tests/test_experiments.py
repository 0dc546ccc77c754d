"""Names and the experiments and prerequisites that they stand for."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sr4ir_dist import experiments, recipes
from sr4ir_dist.config import ExperimentError
from sr4ir_dist.networks import SR_NETWORKS
from sr4ir_dist.overrides import override
from sr4ir_dist.recipes import PRETRAINED, RECIPES
from sr4ir_dist.settings import TASK_NETWORKS

ROOT = Path(__file__).resolve().parents[1]
NAMES = experiments.names()
SHORT = ["epochs=3", "warmup_epochs=1", "batch_size=8", "seed=5"]


def test_names_are_unique_and_cover_data_networks_scales_and_recipes():
    assert len(set(NAMES)) == len(NAMES)
    recipes_ = {name.rpartition("/")[2] for name in NAMES}
    assert recipes_ == RECIPES.keys()
    for data in experiments.DATA:
        own = [name for name in NAMES if name.startswith(f"{data}/")]
        if data == "folder_sr":
            assert len(own) == len(experiments.SR_NETWORKS) * 3
            continue
        with_sr = [name for name, recipe in RECIPES.items() if "sr" in recipe.init_from]
        # SR4IR and L->T also at Table S5's three blurs; the oracle has one name.
        assert len(own) == (len(with_sr) + 3) * len(experiments.SR_NETWORKS) * 3 + 4 * 3 + 1
    assert {"cub200/edsr-x8/sr4ir", "drawn_cls/h2t", "folder_cls/x4/l2t"} <= set(NAMES)
    assert {"voc_seg/edsr-x8-blur10/sr4ir", "voc_seg/x8-blur15/l2t"} <= set(NAMES)


@pytest.mark.parametrize("data", experiments.DATA)
def test_every_name_builds_what_it_says(data):
    for name in (name for name in NAMES if name.startswith(f"{data}/")):
        experiment = experiments.make(name)
        _, *middle, recipe = name.split("/")
        roles = RECIPES[recipe].init_from
        assert (experiment.name, experiment.recipe) == (name, recipe)
        assert (experiment.sr is not None) == ("sr" in roles)
        assert (experiment.task is not None) == ("task" in roles)
        assert experiments.relevant(experiment) == experiment
        if middle:
            size, _, blur = middle[0].rpartition("x")[2].partition("-blur")
            assert (experiment.scale, experiment.degradation.blur) == (int(size), float(blur or 0))
        if experiment.sr is not None:
            assert experiment.sr.network in SR_NETWORKS
            assert middle[0].startswith(experiment.sr.network)
        if experiment.task is not None:
            assert experiment.task.network in TASK_NETWORKS[experiment.task.name]


def test_the_grid_is_the_92_runs_behind_tables_1_to_3():
    grid = experiments.grid()
    assert len(set(grid)) == len(grid) == 92
    assert set(grid) <= set(NAMES)
    for data in ("voc_seg", "voc_det", "cars", "cub200"):
        assert sum(name.startswith(f"{data}/") for name in grid) == 23


PAPER = {
    # epochs, warm-up, batch, seed, rate of the task network, weight decay, CQMix grid
    "voc_seg": (100, 10, 16, 200, 2e-2, 1e-6, 8),
    "voc_det": (30, 3, 16, 100, 2e-2, 1e-4, 8),
    "cars": (200, 20, 128, 200, 3e-2, 1e-4, 4),
    "cub200": (200, 20, 128, 200, 3e-2, 1e-4, 4),
}


@pytest.mark.parametrize("name", experiments.grid())
def test_the_papers_settings(name):
    experiment = experiments.make(name)
    epochs, warmup, batch, seed, rate, decay, grid = PAPER[name.partition("/")[0]]
    optimizers = experiment.optimizers
    assert (experiment.epochs, experiment.batch_size, experiment.seed) == (epochs, batch, seed)
    assert experiment.warmup_epochs == (warmup if name.endswith("sr4ir") else 0)
    assert (optimizers.task.lr, optimizers.task.weight_decay) == (rate, decay)
    assert (optimizers.task.momentum, optimizers.task.lr_floor) == (0.9, 1e-4)
    assert (optimizers.sr.lr, optimizers.sr.lr_floor) == (1e-4, 1e-6)
    assert (optimizers.sr.betas, optimizers.sr.weight_decay) == ((0.9, 0.999), 0.0)
    assert experiment.lr_warmup_epochs == (1 if "voc_det" in name else 0)
    if name.endswith("sr4ir"):
        assert experiment.cqmix.grid == grid
    assert (experiment.evaluation.border, experiment.evaluation.channel) == (8, "rgb")
    assert experiment.degradation.kind == "bicubic"
    if experiment.sr is not None:
        sizes = {"edsr": (16, 64), "swinir": (6, 180)}[experiment.sr.network]
        assert (experiment.sr.blocks, experiment.sr.features) == sizes
        assert experiment.sr.weights == "DIV2K"
    if experiment.task is not None:
        assert experiment.task.weights == "IMAGENET1K_V1"


def test_the_papers_image_sizes():
    seg, det = (experiments.make(f"{data}/h2t").data for data in ("voc_seg", "voc_det"))
    assert (seg.resize, seg.crop, seg.center_crop) == (520, 480, False)
    assert (det.transform, det.shrink) == ("flip", None)
    task = experiments.make("voc_det/h2t").task
    assert task is not None
    assert (task.min_size, task.max_size) == (800, 1333)


def test_the_papers_images_of_classification():
    data = experiments.make("cub200/edsr-x8/sr4ir").data
    assert (data.transform, data.resize, data.crop, data.center_crop) == (
        "resize_crop", 256, 224, True
    )  # fmt: skip


@pytest.mark.parametrize(
    ("network", "batch", "rate", "steps"),
    [("edsr", 16, 1e-4, 300_000), ("swinir", 32, 2e-4, 500_000)],
)
def test_pre_training_is_as_published_on_800_images(network, batch, rate, steps):
    for scale in (2, 4, 8):
        experiment = experiments.make(f"folder_sr/{network}-x{scale}/pretrain")
        assert experiment.data.crop == 48 * scale
        assert experiment.evaluation.border == scale
        assert experiment.evaluation.channel == "y"
        assert experiment.degradation.kind == "bicubic_antialias"
        assert (experiment.batch_size, experiment.optimizers.sr.lr) == (batch, rate)
        assert experiment.epochs * 800 // batch == steps
        assert experiment.sr is not None
        assert experiment.sr.weights is None


@pytest.mark.parametrize("factor", [2, 8, 64])
def test_a_large_batch_has_rates_to_match(factor):
    paper = experiments.make("voc_seg/edsr-x8/sr4ir")
    large = experiments.large_batch(paper, factor * paper.batch_size)
    assert large.batch_size == factor * paper.batch_size
    assert large.lr_warmup_epochs == 5
    for role, power in (("sr", 0.5), ("task", 1)):
        for rate in ("lr", "lr_floor"):
            before, after = (getattr(getattr(e.optimizers, role), rate) for e in (paper, large))
            assert after == pytest.approx(before * factor**power)
    same = {"batch_size": 16, "lr_warmup_epochs": 0, "optimizers": paper.optimizers}
    assert large.model_copy(update=same) == paper.model_copy(update=same)


def test_a_large_batchs_rates_have_risen_before_the_tdp_loss_sets_in():
    short = override(experiments.make("drawn_cls/edsr-x4/sr4ir"), ["epochs=9", "warmup_epochs=2"])
    large = experiments.large_batch(short, 2 * short.batch_size)
    assert large.lr_warmup_epochs == max(2, short.lr_warmup_epochs)


@pytest.mark.parametrize("images", [1, 128])
def test_a_large_batch_is_larger(images):
    paper = experiments.make("cub200/edsr-x4/sr4ir")
    with pytest.raises(ExperimentError, match=f"large_batch={images} must be more than batch_size"):
        experiments.large_batch(paper, images)


def test_settings_that_only_judge_what_is_not_judged_tell_no_runs_apart():
    plain = experiments.make("voc_seg/h2t")
    for setting in ("evaluation.lpips=a.pth", "evaluation.border=4", "evaluation.channel=y"):
        assert experiments.relevant(override(plain, [setting])) == plain
        other = override(experiments.make("voc_seg/edsr-x4/t2s"), [setting])
        assert experiments.prerequisite(other, "h2t") == plain


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("cub200/edsr-x4/sr4r", "cub200/edsr-x4/sr4ir"),
        ("cub200/edsr-x3/sr4ir", "cub200/edsr-x"),
        ("drawn_cls/edsr-x4/h2t", "drawn_cls/edsr-x4/"),
        ("cub20/h2t", "cub200/h2t"),
        ("drawn_cls/edsr-x4/sr4it", "drawn_cls/edsr-x4/sr4ir'"),
    ],
)
def test_an_unknown_name_is_answered_by_the_nearest(name, nearest):
    with pytest.raises(ExperimentError, match=re.escape(f"unknown experiment '{name}'")) as caught:
        experiments.make(name)
    offered = str(caught.value).partition("; did you mean ")[2]
    assert f"'{nearest}" in offered
    assert offered.count("'") <= 6


def test_an_unknown_recipe_is_answered_by_the_nearest():
    with pytest.raises(ExperimentError, match="unknown recipe 'sr4r'; did you mean 'sr4ir'"):
        recipes.get("sr4r")


def test_recipes_start_from_recipes_that_end():
    for recipe in RECIPES.values():
        for network, origin in recipe.init_from.items():
            if origin != PRETRAINED:
                assert {"oracle": "task"}.get(network, network) in RECIPES[origin].updates


@pytest.mark.parametrize("data", experiments.DATA)
def test_a_prerequisite_is_the_very_experiment_of_its_name(data):
    for name in (name for name in NAMES if name.startswith(f"{data}/")):
        for origin in set(RECIPES[name.rpartition("/")[2]].init_from.values()) - {PRETRAINED}:
            first = experiments.prerequisite(experiments.make(name), origin)
            assert first == experiments.make(first.name)
            assert first.recipe == origin


SHARED = [
    [],
    SHORT,
    ["epochs=1", "warmup_epochs=0"],
    ["epochs=1", "warmup_epochs=1"],
    ["data.resize=48", "data.crop=48", "evaluation.border=4", "evaluation.every_epochs=2"],
    ["batch_norm=local", "precision=bf16", "checkpoint.keep=1", "checkpoint.every_steps=5"],
]


@pytest.mark.parametrize("settings", SHARED, ids=" ".join)
def test_s2t_starts_from_the_run_of_s_with_the_same_settings(settings):
    settings = [*settings, "sr.blocks=2", "sr.weights=a.pt", "optimizers.sr.lr=2e-4", "zero.sr=1"]
    second = override(experiments.make("drawn_cls/edsr-x4/s2t"), settings)
    first = override(experiments.make("drawn_cls/edsr-x4/s"), settings)
    assert experiments.prerequisite(second, "s") == experiments.relevant(first)


@pytest.mark.parametrize("settings", SHARED, ids=" ".join)
def test_t2s_starts_from_the_run_of_h2t_with_the_same_settings(settings):
    settings = [*settings, "task.weights=a.pt", "optimizers.task.lr=1e-2", "zero.task=1"]
    second = override(experiments.make("drawn_cls/edsr-x4/t2s"), settings)
    first = override(experiments.make("drawn_cls/h2t"), settings)
    assert experiments.prerequisite(second, "h2t") == experiments.relevant(first)


def test_what_a_prerequisite_does_not_use_does_not_tell_its_runs_apart():
    plain = experiments.make("drawn_cls/edsr-x4/s2t")
    first = experiments.prerequisite(plain, "s")
    for setting in ("optimizers.task.lr=1e-2", "zero.task=2", "task.weights=a.pt", "cqmix.grid=8"):
        assert experiments.prerequisite(override(plain, [setting]), "s") == first
    scales = [experiments.make(f"drawn_cls/edsr-x{scale}/t2s") for scale in (2, 8)]
    assert len({experiments.prerequisite(e, "h2t").model_dump_json() for e in scales}) == 1
    blocks = override(scales[0], ["sr.blocks=9", "optimizers.sr.lr=1e-3"])
    assert experiments.prerequisite(blocks, "h2t") == experiments.make("drawn_cls/h2t")


def test_a_start_of_its_own_does_not_reach_the_prerequisite():
    second = override(experiments.make("drawn_cls/edsr-x4/s2t"), ["sr.start=runs/one"])
    assert experiments.prerequisite(second, "s") == experiments.make("drawn_cls/edsr-x4/s")


def test_a_name_must_fit_the_settings():
    experiment = experiments.make("drawn_cls/edsr-x4/sr4ir")
    for change in ({"scale": 8}, {"recipe": "l2t"}, {"name": "drawn_cls/edsr-x2/sr4ir"}):
        with pytest.raises(ExperimentError, match="does not fit"):
            experiments.relevant(experiment.model_copy(update=change))
    with pytest.raises(ExperimentError, match="unknown experiment 'mine'"):
        experiments.relevant(experiment.model_copy(update={"name": "mine"}))


def test_settings_that_a_recipe_does_not_read_tell_no_runs_apart():
    plain = experiments.make("drawn_cls/x4/l2t")
    assert experiments.relevant(plain) == plain
    for setting in ("cqmix.grid=8", "losses.tdp=2", "optimizers.sr.lr=1e-3", "warmup_epochs=3"):
        assert experiments.relevant(override(plain, [setting])) == plain
    for setting in ("losses.task=2", "optimizers.task.lr=1e-2", "epochs=3"):
        assert experiments.relevant(override(plain, [setting])) != plain


def test_the_job_lists_data_recipes_and_names():
    def words(*arguments):
        command = [sys.executable, "jobs/train.py", *arguments, "--list"]
        environment = os.environ | {"COLUMNS": "200"}
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, cwd=ROOT, env=environment
        )
        return set(re.findall(r"[\w/-]+", done.stdout))

    assert experiments.DATA.keys() | RECIPES.keys() | {"edsr", "swinir"} <= words()
    listed = {word for word in words("voc_det/edsr-x8") if "/" in word}
    assert listed == {name for name in NAMES if "voc_det/edsr-x8" in name}
    assert len(listed) > 15
