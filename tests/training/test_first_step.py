import time

import pytest

from sr4ir_dist.training.first_step import FirstStep, Marks, process_began, read


def test_the_line_says_the_parts_that_were_marked():
    marks = Marks(10.0, (("imports", 14.1), ("workers", 20.0)))
    assert marks.told() == "first step after 10.00 s: imports 4.10, workers 5.90"
    assert read(f"(RayTrainWorker pid=1) {marks.told()}\n") == {"imports": 4.1, "workers": 5.9}
    assert read("epoch 1  step 1/8") is None


def test_a_first_step_is_told_once_and_in_order():
    said = []
    first = FirstStep(Marks(time.time() - 5).after("workers"), said.append)
    first.after("networks")
    for _ in range(2):
        for doing in ("data", "phase 1", "phase 2"):
            first.entered(doing)
        first.ended()
    (line,) = said
    found = read(line)
    assert found is not None
    assert list(found) == ["workers", "networks", "first batch", "first step"]
    assert found["workers"] == pytest.approx(5, abs=0.1)


@pytest.mark.parametrize("marks", [None, Marks(0.0)])
def test_nothing_is_told_without_marks_or_where_nothing_trains(marks):
    said = []
    first = FirstStep(marks, said.append)
    first.entered("evaluating")
    first.ended()
    assert said == []


def test_a_process_began_before_it_asks():
    assert 0 < time.time() - process_began() < 36_000
