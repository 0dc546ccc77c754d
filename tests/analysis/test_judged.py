"""Checkpoints judged with one thing exchanged, as for Tables S4 and S5, or on another view."""

import pytest
from random_runs import publish_random

from sr4ir_dist.analysis import judged
from sr4ir_dist.config import ExperimentError
from sr4ir_dist.data.convert.drawn import DRAWN, open_drawn
from sr4ir_dist.data.convert.write import convert
from sr4ir_dist.networks.pretrained import WeightsError
from sr4ir_dist.training.plan import make_request
from sr4ir_dist.training.worker import judge

SMALL = ["sr.blocks=1", "sr.features=8", "task.classes=8"]


def judged_on(uri, view=None, *settings):
    return make_request(uri, data=None, split="val", settings=settings, view=view)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    uri = str(tmp_path_factory.mktemp("drawn") / "data")
    convert(DRAWN, open_drawn(train_count=8, val_count=8, size=64), uri, threads=1)
    return uri


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    publish_random(folder / "seg", "drawn_seg/edsr-x4/sr4ir", *SMALL, "seed=1", data=data)
    publish_random(folder / "cls", "drawn_cls/edsr-x4/sr4ir", *SMALL, data=data)
    publish_random(folder / "x8", "drawn_cls/edsr-x8/sr4ir", *SMALL, data=data)
    publish_random(folder / "wide", "drawn_cls/edsr-x4/sr4ir", SMALL[0], SMALL[2], data=data)
    publish_random(folder / "h2t", "drawn_cls/h2t", SMALL[2], data=data)
    publish_random(folder / "l2t", "drawn_cls/x4/l2t", SMALL[2], data=data)
    publish_random(folder / "first", "drawn_cls/edsr-x4/pretrain", *SMALL[:2], data=data)
    return {path.name: str(path) for path in folder.iterdir()}


def test_each_task_network_gets_the_sr_network_of_each(runs):
    asked = judged.cross_task({label: runs[label] for label in ("seg", "cls")})
    assert set(asked) == {(sr, task) for sr in ("seg", "cls") for task in ("seg", "cls")}
    for (sr, task), request in asked.items():
        assert request.experiment.name == f"drawn_{task}/edsr-x4/sr4ir"
        assert bool(request.exchanged) == (sr != task)
        if sr != task:
            assert request.exchanged["sr"].uri.startswith(runs[sr])


def test_networks_that_cannot_be_exchanged_are_named(runs):
    with pytest.raises(ExperimentError, match="different kinds.*edsr x8"):
        judged.cross_task({"cls": runs["cls"], "x8": runs["x8"]})
    with pytest.raises(ExperimentError, match="not both networks"):
        judged.cross_task({"cls": runs["cls"], "oracle": runs["h2t"]})
    with pytest.raises(WeightsError):
        judged.cross_task({"cls": runs["cls"], "wide": runs["wide"]})


def test_a_sweep_changes_the_blur_alone(runs):
    asked = judged.degradations({"cls": runs["cls"]}, [0, 7.5])
    blurs = [request.experiment.degradation.blur for request in asked.values()]
    assert list(asked) == [("cls", "0"), ("cls", "7.5")]
    assert blurs == [0, 7.5]
    with pytest.raises(ExperimentError, match="judged on HR"):
        judged.degradations({"oracle": runs["h2t"]})
    with pytest.raises(ExperimentError, match=r"degradation\.blur"):
        judged.degradations({"cls": runs["cls"]}, [-1])


@pytest.mark.usefixtures("process_group")
def test_what_is_asked_is_answered(runs):
    asked = judged.cross_task({label: runs[label] for label in ("seg", "cls")})
    found = {key: judge(request) for key, request in asked.items()}
    assert "miou" in found["cls", "seg"]
    assert "top1" in found["seg", "cls"]
    assert found["cls", "cls"] == judge(judged_on(runs["cls"]))
    # The same images by another network.
    assert found["seg", "cls"]["psnr"] != found["cls", "cls"]["psnr"]
    sweep = judged.degradations({"a": runs["l2t"]}, [0, 5])
    blurred = [judge(request) for request in sweep.values()]
    assert blurred[0] == judge(judged_on(runs["l2t"]))
    assert blurred[1]["psnr"] < blurred[0]["psnr"] - 1


@pytest.mark.usefixtures("process_group")
def test_any_checkpoint_is_judged_on_any_view_that_it_has(runs):
    sr4ir, l2t, oracle = (runs[label] for label in ("cls", "l2t", "h2t"))
    assert judge(judged_on(sr4ir, "sr")) == judge(judged_on(sr4ir))
    enlarged = judge(judged_on(l2t))
    for uri in (sr4ir, oracle):
        found = judge(judged_on(uri, "lr_up"))
        assert {found["psnr"] - enlarged["psnr"], found["ssim"] - enlarged["ssim"]} == {0}
        # Of HR images there is the task's figure alone.
        assert judge(judged_on(uri, "hr")).keys() == {"top1", "images"}
    assert judge(judged_on(oracle, "hr")) == judge(judged_on(oracle))


def test_a_view_that_a_checkpoint_has_not_is_named(runs):
    for label, view, message in (
        ("h2t", "sr", r"view=sr: drawn_cls/h2t has no SR network; allowed: hr, lr_up$"),
        ("first", "hr", r"view=hr: drawn_cls/edsr-x4/pretrain; allowed: lr_up, sr$"),
        ("cls", "cqmix", r"view=cqmix: drawn_cls/edsr-x4/sr4ir; allowed: hr, lr_up, sr$"),
    ):
        with pytest.raises(ExperimentError, match=message):
            judged_on(runs[label], view)
