from pathlib import Path

import pytest

from sr4ir_dist.benchmark.start import StartError, measure, run
from sr4ir_dist.benchmark.tables import of_starts

JOBS = Path(__file__).parents[2] / "jobs"


def test_a_job_that_fails_is_told_of(tmp_path):
    arguments = ["drawn_cls/edsr-x4/sr4ir", "--set", "epoch=1", "--data", str(tmp_path)]
    with pytest.raises(StartError, match=r"train\.py ended with 1"):
        run(JOBS / "train.py", arguments, say=lambda text: None)


@pytest.mark.slow
def test_a_run_says_what_its_start_is_made_of():
    small = ["data.resize=32", "data.crop=32", "sr.blocks=1", "sr.features=8"]
    said = []
    (found,) = measure(
        JOBS,
        "drawn_cls/edsr-x4/sr4ir",
        small,
        runs=1,
        workers=1,
        images=16,
        size=32,
        say=said.append,
    )
    parts = ["imports", "plan", "Ray", "workers", "networks", "first batch", "first step"]
    assert list(found.parts) == parts
    assert min(found.parts.values()) >= 0
    assert 0 < found.seconds < found.whole
    assert sum("first step after" in text for text in said) == 2
    assert of_starts([found]).row_count == len(parts) + 2
