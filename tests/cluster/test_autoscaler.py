"""Runs that Ray's own autoscaler gives nodes to, on this machine."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from heads import Head, running_head

pytestmark = pytest.mark.timeout(600)


def nodes(head: Head) -> int:
    """How many nodes beside the head run."""
    started = psutil.Process(head.pid).children(recursive=True)
    return sum(process.name() == "raylet" for process in started) - 1


@pytest.mark.slow
def test_a_run_is_given_nodes_and_lets_go_of_them(
    drawn: str, train_command: Callable[..., list[str]], repository: Path, tmp_path: Path
):
    with running_head(cpus=0, nodes=2) as head:
        words = ["--workers", "1:2", "--wait-minutes", "3", "--address", head.address]
        places = ["--json", str(tmp_path / "result.json"), "--set", "epochs=1"]
        command = train_command(drawn, str(tmp_path / "runs"), *words, *places)
        done = head.run(sys.executable, "jobs/train.py", *command, cwd=repository)
        assert done.returncode == 0, head.told(done)
        assert json.loads((tmp_path / "result.json").read_text())["steps"] == 12
        assert nodes(head) >= 1
        deadline = time.monotonic() + 120
        while nodes(head):
            assert time.monotonic() < deadline, "what was asked for is kept"
            time.sleep(1)
