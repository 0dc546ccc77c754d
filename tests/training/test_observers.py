"""TensorBoard reads what was written, and observers that fail are left alone."""

import sys

import pytest
from tensorboardX.proto.event_pb2 import Event

from sr4ir_dist import experiments
from sr4ir_dist.config import ExperimentError
from sr4ir_dist.training.mirror import Mirror
from sr4ir_dist.training.observers import Observers, TensorBoard, load_callback
from sr4ir_dist.training.plan import Plan


def plan(folder):
    experiment = experiments.make("drawn_cls/edsr-x4/sr4ir")
    return Plan(experiment, ("data",), "run", str(folder), {}, smallest_step=4)


def events(content):
    """The events of a file: records of length, checksum, content, checksum."""
    while content:
        length = int.from_bytes(content[:8], "little")
        yield Event.FromString(content[12 : 12 + length])
        content = content[16 + length :]


def scalars(folder):
    found = {}
    for path in sorted((folder / "tensorboard").iterdir()):
        for event in events(path.read_bytes()):
            if event.HasField("session_log"):
                found = {key: value for key, value in found.items() if key[1] < event.step}
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    found[value.tag, event.step] = value.simple_value
    return found


def attempt(folder, done, steps):
    with Mirror(print) as mirror:
        board = TensorBoard(plan(folder), done, mirror)
        for step in steps:
            board.logged(step, {"tdp_sr": step / 2, "data_wait_rank": 1})
            board.evaluated(step, {"epoch": 1, "step": step, "psnr": float(step), "note": "text"})
        board.close()


def test_tensorboard_gets_losses_and_figures(tmp_path):
    attempt(tmp_path, 0, [10, 20])
    assert scalars(tmp_path) == {
        (f"{group}/{name}", step): value
        for step in (10, 20)
        for group, name, value in (
            ("training", "tdp_sr", step / 2),
            ("training", "data_wait_rank", 1),
            ("validation", "psnr", step),
        )
    }


def test_a_later_attempt_hides_what_an_earlier_one_wrote_of_its_steps(tmp_path):
    attempt(tmp_path, 0, [10, 20, 30])
    attempt(tmp_path, 15, [40])
    steps = sorted({step for _, step in scalars(tmp_path)})
    assert steps == [10, 40]
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2


class Noted:
    def __init__(self, fails=False):
        self.told, self.fails = [], fails

    def logged(self, step, figures):
        self.told.append((step, figures))
        if self.fails:
            raise ConnectionError("no route")

    evaluated = logged

    def close(self):
        self.told.append("closed")


def test_an_observer_that_fails_is_told_no_more_and_the_others_are():
    bad, good, said = Noted(fails=True), Noted(), []
    observers = Observers([bad, good], said.append)
    observers.logged(1, {"a": 1.0})
    observers.evaluated(2, {"b": 2.0})
    observers.close()
    assert bad.told == [(1, {"a": 1.0})]
    assert good.told == [(1, {"a": 1.0}), (2, {"b": 2.0}), "closed"]
    assert said == ["Noted is told no more: ConnectionError: no route"]


def test_a_callback_of_the_working_directory_is_found(tmp_path, monkeypatch):
    (tmp_path / "my_callback_here.py").write_text("def make(plan):\n    return plan.run\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))
    assert load_callback("my_callback_here:make")(plan(tmp_path)) == "run"


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("no_such_module:make", "No module named 'no_such_module'"),
        ("math:nothing", "no attribute 'nothing'"),
        ("math", "expected module:name"),
        ("math:pi", "cannot be called"),
        ("", "expected module:name"),
    ],
)
def test_a_callback_that_is_none_is_refused(name, why):
    with pytest.raises(ExperimentError, match=f"callback='{name}'.*{why}"):
        load_callback(name)
