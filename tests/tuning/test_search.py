"""What a search keeps of itself: what it is, and when it ends."""

import time

import pytest
from small_space import SPACE

from sr4ir_dist import experiments, storage
from sr4ir_dist.overrides import override
from sr4ir_dist.training.launch import Resources
from sr4ir_dist.tuning import search
from sr4ir_dist.tuning.deadline import Deadline, set_deadline
from sr4ir_dist.tuning.space import Space, SpaceError
from sr4ir_dist.tuning.trial import Trials

EXPERIMENT = experiments.make("drawn_cls/edsr-x4/sr4ir")


def request(folder, experiment=EXPERIMENT, data=("d",)):
    return Trials(experiment, data, str(folder), str(folder), Resources(), 1, None)


@pytest.mark.parametrize(
    ("changes", "settings", "data", "message"),
    [
        ({"trials": 3}, [], ("d",), r"has space\.trials=32, not 3"),
        ({"metric": "psnr"}, [], ("d",), r"has space\.metric='top1', not 'psnr'"),
        ({}, ["losses.pixel=2"], ("d",), r"has experiment\.losses\.pixel=1\.0, not 2\.0"),
        ({}, [], ("e",), r"has data=\['d'\], not \['e'\]"),
    ],
)
def test_another_search_is_not_resumed(tmp_path, changes, settings, data, message):
    space = Space.model_validate(SPACE | {"trials": 32})
    kept = search._record(space, request(tmp_path))
    storage.write_json(tmp_path / "search.json", kept)
    search._check_start(space, request(tmp_path), resume=True)
    other = Space.model_validate(SPACE | {"trials": 32} | changes)
    wanted = request(tmp_path, override(EXPERIMENT, settings), data)
    with pytest.raises(SpaceError, match=message):
        search._check_start(other, wanted, resume=True)


def test_each_start_sets_the_end_anew(tmp_path):
    uri = str(tmp_path / "deadline.json")
    set_deadline(uri, None)
    assert not Deadline(uri).stop_all()
    set_deadline(uri, 0.0)
    stopper = Deadline(uri)
    time.sleep(0.01)
    assert stopper.stop_all()
    assert not stopper("trial", {})
    set_deadline(uri, 1.0)
    assert not Deadline(uri).stop_all()
