import threading
import time

import pytest

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
