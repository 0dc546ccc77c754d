"""Plans: a run's name, where its networks start, and what is refused before a worker starts."""

import dataclasses
import re
import shutil
from pathlib import Path

import pytest
import torch
from random_runs import publish_random
from small_runs import publish_run
from torchvision.models import mobilenet_v3_large

from sr4ir_dist import experiments
from sr4ir_dist.config import ExperimentError
from sr4ir_dist.data.convert.drawn import DRAWN, open_drawn
from sr4ir_dist.data.convert.write import convert
from sr4ir_dist.data.schema import DatasetError
from sr4ir_dist.data.shards import load_manifest
from sr4ir_dist.hub import versions
from sr4ir_dist.networks.edsr import EDSR
from sr4ir_dist.networks.pretrained import WeightsError
from sr4ir_dist.networks.vgg import VGG19
from sr4ir_dist.overrides import override
from sr4ir_dist.training import launch
from sr4ir_dist.training.build import build_networks
from sr4ir_dist.training.plan import load_start, make_plan, make_request

SHORT = ["epochs=3", "warmup_epochs=1", "batch_size=8", "seed=5"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    uri = str(tmp_path_factory.mktemp("drawn") / "data")
    convert(DRAWN, open_drawn(train_count=8, val_count=8, size=32), uri, threads=1)
    return uri


@pytest.mark.parametrize(
    ("second", "first"),
    [("drawn_cls/edsr-x4/s2t", "drawn_cls/edsr-x4/s"), ("drawn_cls/edsr-x4/t2s", "drawn_cls/h2t")],
)
@pytest.mark.parametrize(
    "settings",
    [
        ["data.resize=32", "data.crop=32", *SHORT],
        ["optimizers.sr.lr=2e-4", "zero.sr=1", "optimizers.task.lr=1e-2", "zero.task=2"],
        ["losses.pixel=2", "losses.task=0.5", "losses.tdp=3", "cqmix.grid=8", "warmup_epochs=1"],
    ],
    ids=" ".join,
)
def test_a_plan_asks_for_the_very_run_that_the_same_settings_name(
    data, tmp_path, second, first, settings
):
    storage = str(tmp_path / "runs")
    run = make_plan(override(experiments.make(first), settings), data=data, storage_uri=storage).run
    with pytest.raises(ExperimentError) as caught:
        make_plan(override(experiments.make(second), settings), data=data, storage_uri=storage)
    assert f"{storage}/{run} is not a finished run: train {first} first" in str(caught.value)


def test_a_runs_name_changes_with_settings_data_and_starting_weights(data, tmp_path):
    other = str(tmp_path / "other")
    convert(DRAWN, open_drawn(train_count=8, val_count=8, size=32, seed=1), other, threads=1)
    weights = tmp_path / "sr.pth"

    def run(*settings, data=data):
        experiment = override(experiments.make("drawn_cls/edsr-x4/sr4ir"), settings)
        return make_plan(experiment, data=data, storage_uri=str(tmp_path / "runs")).run

    def write(seed):
        torch.manual_seed(seed)
        torch.save(EDSR(4, blocks=4, features=32).state_dict(), weights)
        return f"sr.weights={weights}"

    name = run()
    assert re.fullmatch(r"drawn_cls-edsr-x4-sr4ir-[0-9a-f]{8}", name)
    assert run() == name
    names = {name, run("seed=1"), run(data=other), run(write(0)), run(write(1))}
    assert len(names) == 5
    assert run(write(1)) in names
    torch.save({"other.weight": torch.zeros(1)}, weights)
    with pytest.raises(WeightsError, match=r"sr\.pth"):
        run(f"sr.weights={weights}")


def test_fixed_networks_start_from_their_run_or_file(data, tmp_path):
    def plan(recipe, *settings):
        experiment = override(experiments.make(f"drawn_cls/edsr-x4/{recipe}"), settings)
        return make_plan(experiment, data=data, storage_uri=str(tmp_path))

    with pytest.raises(ExperimentError, match="starts its oracle network from drawn_cls/h2t"):
        plan("sr4ir-fixed-tdp")
    with pytest.raises(ExperimentError, match=r"fixed\.oracle=.*nowhere"):
        plan("sr4ir-fixed-tdp", f"fixed.oracle={tmp_path}/nowhere")
    with pytest.raises(ExperimentError, match=r"fixed\.vgg=.*vgg\.pth: there is no such file"):
        plan("sr4ir-vgg", f"fixed.vgg={tmp_path}/vgg.pth")
    with pytest.raises(WeightsError, match="fixed.vgg=NO_SUCH"):
        plan("sr4ir-vgg", "fixed.vgg=NO_SUCH")
    (tmp_path / "odd.pth").write_bytes(b"no weights")
    with pytest.raises(WeightsError, match=r"odd\.pth cannot be read"):
        plan("sr4ir", f"evaluation.lpips={tmp_path}/odd.pth")
    with pytest.raises(ExperimentError, match=r"evaluation\.lpips=.*: there is no such file"):
        plan("sr4ir", f"evaluation.lpips={tmp_path}/vgg16.pth")
    vgg = VGG19("conv2_2")
    weights = {name.replace("network", "features"): v for name, v in vgg.state_dict().items()}
    torch.save(weights, tmp_path / "vgg.pth")
    start = plan("sr4ir-vgg", f"fixed.vgg={tmp_path}/vgg.pth", "fixed.vgg_layer=conv2_2").starts
    assert start["vgg"].uri == str(tmp_path / "vgg.pth")


def test_weights_that_are_known_but_cannot_be_had_leave_out_a_figure_or_refuse(data, tmp_path):
    def plan(*settings):
        experiment = override(experiments.make("drawn_cls/edsr-x4/sr4ir"), settings)
        return make_plan(experiment, data=data, storage_uri=str(tmp_path))

    found = plan("evaluation.lpips=NO_SUCH")
    assert found.lpips is None
    assert len(found.notes) == 1
    assert found.notes[0].startswith("no LPIPS: evaluation.lpips=NO_SUCH")
    assert plan().notes == ()
    for field in ("sr.weights", "task.weights"):
        with pytest.raises(WeightsError, match=f"{field}=NO_SUCH"):
            plan(f"{field}=NO_SUCH")
    experiment = override(experiments.make("drawn_cls/edsr-x8/sr4ir"), ["sr.weights=DIV2K"])
    with pytest.raises(WeightsError, match=r"x8 are not public.*folder_sr/edsr-x8/pretrain"):
        make_plan(experiment, data=data, storage_uri=str(tmp_path))


def test_names_of_a_hub_are_taken_where_checkpoints_are(data, tmp_path, monkeypatch):
    storage, hub, name = str(tmp_path / "runs"), str(tmp_path / "hub"), "team/net.pt"
    monkeypatch.setenv("SR4IR_HUB", hub)
    publish_run(tmp_path / "run", data=data)
    first = versions.publish(str(tmp_path / "run"), name, hub=hub, tag="best")
    weights = f"{versions.uri_of(first, hub)}/task.safetensors"

    request = make_request(f"hub://{name}@best", data=None, split="val", settings=[])
    assert request.checkpoint == versions.uri_of(first, hub)
    assert request.data == (data,)

    def plan(*settings):
        experiment = override(experiments.make("drawn_cls/edsr-x4/t2s"), settings)
        return make_plan(experiment, data=data, storage_uri=storage)

    # What was published has a tensor that is not of this network, and its name says so.
    for setting in (f"task.start=hub://{name}", f"task.start=hub://{first}"):
        with pytest.raises(WeightsError, match=re.escape(weights)):
            plan(setting)
    with pytest.raises(ExperimentError, match=r"task\.start=hub://nobody: hub://nobody: nothing"):
        plan("task.start=hub://nobody")
    with pytest.raises(ExperimentError, match=r"task\.start=hub://Any.*no name of a hub"):
        plan("task.start=hub://Any")
    monkeypatch.delenv("SR4IR_HUB")
    with pytest.raises(ExperimentError, match=r"task\.start=hub://.*: no hub: set SR4IR_HUB"):
        plan(f"task.start=hub://{name}")


def test_a_backbones_file_starts_segmentation(data, tmp_path):
    path = tmp_path / "mobilenet_v3_large.pth"
    torch.save(mobilenet_v3_large(weights=None).state_dict(), path)
    settings = ["data.resize=32", "data.crop=32", f"task.weights={path}"]
    experiment = override(experiments.make("drawn_seg/h2t"), settings)
    plan = make_plan(experiment, data=data, storage_uri=str(tmp_path / "runs"))
    module = build_networks(plan.experiment)["task"]
    told = load_start(module, plan.starts["task"])
    assert str(path) in told
    expected = torch.load(path, weights_only=True)["features.16.0.weight"]
    assert torch.equal(module.state_dict()["backbone.16.0.weight"], expected)


def test_steps_that_batch_norm_cannot_take_are_refused_before_a_worker_starts(data, tmp_path):
    def train(*settings, workers=1, least=None):
        small = ["data.resize=32", "data.crop=32", *settings]
        experiment = override(experiments.make("drawn_seg/h2t"), small)
        plan = make_plan(experiment, data=data, storage_uri=str(tmp_path))
        launch.train(plan, launch.Resources(workers=workers, least=least))

    with pytest.raises(ExperimentError, match="batch_size=7 leaves a step of 1 images; .* needs 2"):
        train("batch_size=7")
    with pytest.raises(ExperimentError, match="4 images on 4 workers; .* 2 on each"):
        train("batch_size=4", "batch_norm=local", workers=4)
    with pytest.raises(ExperimentError, match="a step of 3 images on 4 workers"):
        train("batch_size=5", "batch_norm=local", workers=4)
    # Two workers' passes hold two images together; the one that may be left has one in each.
    with pytest.raises(ExperimentError, match="4 images on 1 workers in passes of micro_batch=1;"):
        train("batch_size=4", "micro_batch=1", workers=2, least=1)
    experiment = override(experiments.make("drawn_det/h2t"), ["batch_size=9"])
    with pytest.raises(ExperimentError, match="batch_size=9 exceeds the 8 training images"):
        make_plan(experiment, data=data, storage_uri=str(tmp_path))


def test_a_plan_fills_in_the_number_of_classes(data, tmp_path):
    settings = ["data.resize=32", "data.crop=32"]
    experiment = override(experiments.make("drawn_cls/h2t"), settings)
    plan = make_plan(experiment, data=data, storage_uri=str(tmp_path))
    assert plan.experiment.task is not None
    assert plan.experiment.task.classes == 8
    with pytest.raises(ExperimentError, match=r"task\.classes=7, but .* has 8 classes"):
        make_plan(override(experiment, ["task.classes=7"]), data=data, storage_uri=str(tmp_path))


def test_a_network_that_the_recipe_needs_cannot_be_left_out(data, tmp_path):
    for setting, role in (("sr=null", "sr"), ("task=null", "task")):
        experiment = override(experiments.make("drawn_cls/edsr-x4/sr4ir"), [setting])
        with pytest.raises(ExperimentError, match=f"needs a {role} network, but {role} is null"):
            make_plan(experiment, data=data, storage_uri=str(tmp_path))


def test_a_mix_is_planned_as_one_dataset(data, tmp_path):
    more = str(tmp_path / "more")
    convert(DRAWN, open_drawn(train_count=8, val_count=8, size=32, seed=1), more, threads=1)
    h2t = override(experiments.make("drawn_cls/h2t"), ["data.resize=32", "data.crop=32", *SHORT])

    def plan(*uris):
        return make_plan(h2t, data=uris, storage_uri=str(tmp_path / "runs"))

    names = {plan(*uris).run for uris in ((data,), (more,), (data, more), (more, data))}
    assert len(names) == 4
    assert plan(data) == make_plan(h2t, data=data, storage_uri=str(tmp_path / "runs"))
    mix = plan(data, more)
    assert mix.data == (data, more)
    assert mix.experiment.task.classes == 8

    shutil.rmtree(f"{more}/val")
    partly = plan(data, more)
    assert partly.notes == (*mix.notes, f"{more} has no split 'val'")
    assert partly.run != mix.run
    with pytest.raises(DatasetError, match=f"{more}/val/"):
        plan(more)


def test_parts_of_a_mix_must_name_the_same_classes_where_a_task_needs_them(data, tmp_path):
    other = str(tmp_path / "other")
    shutil.copytree(data, other)
    for split in ("train", "val"):
        manifest = load_manifest(other, split)
        renamed = (*manifest.class_names[:5], "else", *manifest.class_names[6:])
        manifest = dataclasses.replace(manifest, class_names=renamed)
        (Path(other) / split / "manifest.json").write_bytes(manifest.to_bytes())

    def plan(name):
        experiment = override(experiments.make(name), ["batch_size=8"])
        return make_plan(experiment, data=[data, other], storage_uri=str(tmp_path / "runs"))

    name = load_manifest(data, "train").class_names[5]
    message = f"class 5 is '{name}' in the split 'train' of {data}, but 'else' in the split 'train'"
    with pytest.raises(ExperimentError, match=f"{message} of {other}"):
        plan("drawn_cls/h2t")
    assert plan("folder_sr/edsr-x4/pretrain").data == (data, other)


def test_another_task_network_must_fit_and_the_checkpoint_must_have_one(data, tmp_path):
    settings = ["sr.blocks=1", "sr.features=8", "task.classes=8"]
    modules = publish_random(tmp_path / "sr4ir", "drawn_cls/edsr-x4/sr4ir", *settings)
    publish_random(tmp_path / "s", "drawn_cls/edsr-x4/s", *settings[:2])
    weights = modules["task"].state_dict()
    torch.save(weights, tmp_path / "fits.pth")
    torch.save({k: v for k, v in weights.items() if "fc" not in k}, tmp_path / "part.pth")

    def request(run, network):
        return make_request(
            str(tmp_path / run),
            data=data,
            split="val",
            settings=[],
            storage_uri=str(tmp_path),
            networks={"task": str(tmp_path / network)},
        )

    assert request("sr4ir", "fits.pth").exchanged["task"].uri == str(tmp_path / "fits.pth")
    assert request("sr4ir", "sr4ir").exchanged["task"].uri.endswith("task.safetensors")
    with pytest.raises(WeightsError, match=r"fc\.weight"):
        request("sr4ir", "part.pth")
    with pytest.raises(ExperimentError, match="has none to exchange"):
        request("s", "fits.pth")
    with pytest.raises(ExperimentError, match="there is no such file"):
        request("sr4ir", "none.pth")
