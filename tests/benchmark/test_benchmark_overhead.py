import pytest

from sr4ir_dist.benchmark.overhead import Request, measure_plainly, tiny
from sr4ir_dist.benchmark.step import make_experiment

SETTINGS = ["batch_size=2", "sr.blocks=1", "sr.features=8"]


@pytest.mark.usefixtures("process_group")
def test_each_adds_what_a_round_says():
    experiment = tiny(make_experiment("drawn_cls/edsr-x4/sr4ir", SETTINGS), 32)
    found = measure_plainly(Request(experiment, images=2, steps=3, warm_up=1, threads=1))
    assert len(found.rounds) == 3
    assert all(set(each) == {"plain", "deepspeed", "loop"} for each in found.rounds)
    assert min(found.plain, found.deepspeed, found.loop) > 0
    differences = sorted(each["loop"] - each["plain"] for each in found.rounds)
    assert found.both == differences[1]


def test_one_that_trains_nothing_is_refused():
    with pytest.raises(ValueError, match="trains nothing"):
        tiny(make_experiment("drawn_cls/edsr-x4/h2t-on-sr4ir", []), 32)
