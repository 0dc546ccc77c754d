"""What is asked of evaluations for Tables S4 and S5; that they are answered is tested on Ray."""

import pytest
from random_runs import publish_random

from sr4ir_dist.analysis import judged
from sr4ir_dist.config import ExperimentError
from sr4ir_dist.data.convert.drawn import DRAWN, open_drawn
from sr4ir_dist.data.convert.write import convert
from sr4ir_dist.networks.pretrained import WeightsError

SMALL = ["sr.blocks=1", "sr.features=8", "task.classes=8"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    uri = str(tmp_path_factory.mktemp("drawn") / "data")
    convert(DRAWN, open_drawn(train_count=8, val_count=8, size=64), uri, threads=1)
    return uri


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    publish_random(folder / "seg", "drawn_seg/edsr-x4/sr4ir", *SMALL, data=data)
    publish_random(folder / "cls", "drawn_cls/edsr-x4/sr4ir", *SMALL, data=data)
    publish_random(folder / "x8", "drawn_cls/edsr-x8/sr4ir", *SMALL, data=data)
    publish_random(folder / "wide", "drawn_cls/edsr-x4/sr4ir", SMALL[0], SMALL[2], data=data)
    publish_random(folder / "h2t", "drawn_cls/h2t", SMALL[2], data=data)
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
