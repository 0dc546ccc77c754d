import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import ray

from sr4ir_dist import parallel


@pytest.mark.parametrize("count", [1, 2, 5])
def test_every_job_is_done_once(count: int):
    assert sorted(parallel.on_threads(count)(lambda job: job * job, range(20))) == [
        job * job for job in range(20)
    ]


def test_jobs_run_side_by_side():
    together = threading.Barrier(3, timeout=30)
    assert len(list(parallel.on_threads(3)(lambda job: together.wait(), range(3)))) == 3


def test_an_error_ends_it():
    done: list[int] = []

    def fail_at_three(job: int) -> int:
        if job == 3:
            raise ZeroDivisionError
        time.sleep(0.002)  # or all are done before the error is looked at
        done.append(job)
        return job

    with pytest.raises(ZeroDivisionError):
        list(parallel.on_threads(1)(fail_at_three, range(1000)))
    assert len(done) < 1000
    assert done[:3] == [0, 1, 2]


@pytest.mark.parametrize(
    ("address", "variable", "wanted"),
    [
        (None, None, False),
        (None, "", False),
        (None, "10.0.0.1:6379", True),
        (None, "auto", True),
        (None, "http://10.0.0.1:8265", False),
        ("10.0.0.1:6379", None, True),
    ],
)
def test_where_a_cluster_is_wanted(
    monkeypatch: pytest.MonkeyPatch, address: str | None, variable: str | None, wanted: bool
):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if variable is not None:
        monkeypatch.setenv("RAY_ADDRESS", variable)
    assert parallel.wants_cluster(address) == wanted


def test_ray_that_is_started_here_wants_a_token_and_shows_its_dashboard_to_this_machine_alone():
    # A short folder: paths of unix sockets are limited to 107 bytes.
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as home:
        environment = {name: value for name, value in os.environ.items() if "RAY_" not in name}
        environment |= {"HOME": home, "RAY_TMPDIR": home, "RAY_USAGE_STATS_ENABLED": "0"}
        code = """
import urllib.error, urllib.request
import ray
from sr4ir_dist import parallel

parallel.connect("local")
url = ray._private.worker.get_dashboard_url()
try:
    urllib.request.urlopen(f"http://{url}/api/jobs/", timeout=30)
except urllib.error.HTTPError as error:
    print("answer", url.rpartition(":")[0], error.code)
"""
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        assert "answer 127.0.0.1 401" in done.stdout
        assert len((Path(home) / ".ray" / "auth_token").read_text()) >= 32


def test_an_address_where_nothing_answers_is_told_soon(monkeypatch):
    monkeypatch.setattr(parallel, "_ANSWER_S", 0.6)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)  # by other tests
    with pytest.raises(parallel.ClusterError, match=r"no Ray cluster answers at 127\.0\.0\.1:1: "):
        parallel.connect("127.0.0.1:1")


def test_a_cluster_that_does_not_start_is_told_in_a_line(monkeypatch):
    def init(**_):
        raise Exception("The current node timed out during startup.")  # as Ray raises it

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(parallel.ClusterError, match="Ray did not start: The current node timed"):
        parallel.connect("local")
