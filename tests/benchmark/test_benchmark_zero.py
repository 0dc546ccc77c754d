import json
import subprocess
import sys
from pathlib import Path

import pytest

SMALL = ["--set", "data.resize=64", "--set", "data.crop=64", "--set", "sr.blocks=1"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_stage_is_measured(tmp_path):
    """Small networks: what the stages share out is little beside what each of them adds."""
    out = tmp_path / "zero.json"
    job = Path(__file__).parents[2] / "jobs" / "benchmark.py"
    arguments = ["zero", "cub200/edsr-x4/sr4ir", *SMALL, "--images", "2", "--json", str(out)]
    subprocess.run([sys.executable, job, *arguments], check=True)
    stages = json.loads(out.read_text())["stages"]
    assert [each["stage"] for each in stages] == [0, 1, 2, 3]
    for each in stages:
        # ResNet18's weights and momentum alone are 90 MB, of which a stage may share out half.
        assert each["peak_mb"] > each["held_mb"] > 50
        assert each["seconds"] > 0
