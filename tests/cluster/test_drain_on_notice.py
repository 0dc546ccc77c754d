"""A spot notice reaches Ray: the job beside a raylet drains that node, and no other one."""

import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray
from metadata_service import Ec2Metadata
from ray._raylet import GcsClient
from ray.core.generated import gcs_pb2
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from sr4ir_dist import notices

GONE_S = 60


@pytest.fixture
def worker(cluster: str, tmp_path: Path) -> Iterator[str]:
    """A second node of the cluster, of 1 CPU and on this machine; gives its id."""
    before = living(cluster)
    command = [str(Path(sys.executable).with_name("ray")), "start", "--address", cluster]
    command += ["--num-cpus=1", "--num-gpus=0", "--block", "--disable-usage-stats"]
    command += ["--min-worker-port=0", "--max-worker-port=0"]
    with (tmp_path / "worker.log").open("wb") as log:
        node = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        wait_for(lambda: len(living(cluster)) > len(before))
        (added,) = set(living(cluster)) - set(before)
        yield added
        wait_for(lambda: set(living(cluster)) == set(before))
    finally:
        node.terminate()
        node.wait(30)


def living(address: str) -> dict[str, object]:
    """The cluster's nodes by id."""
    alive = gcs_pb2.GcsNodeInfo.ALIVE
    found = GcsClient(address=address).get_all_node_info(timeout=10, state_filter=alive)
    return {node.hex(): info for node, info in found.items()}


def is_draining(address: str, node: str) -> bool:
    return living(address)[node].state_snapshot.state == gcs_pb2.NodeSnapshot.DRAINING


def wait_for(condition: Callable[[], bool], seconds: float = GONE_S) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.1)


@pytest.fixture
def beside(repository: Path, cluster: str) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts the job beside the raylet, with some options and settings."""
    started: list[subprocess.Popen[str]] = []

    def start(*options: str, **settings: str) -> subprocess.Popen[str]:
        command = [sys.executable, "jobs/drain_on_notice.py", "--address", cluster, *options]
        environment = os.environ | settings
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        job = subprocess.Popen(command, cwd=repository, env=environment, **pipes)
        started.append(job)
        return job

    yield start
    for job in started:
        job.kill()
        job.communicate()


@ray.remote(num_cpus=1)
class Busy:
    """Something that runs on a node."""

    def where(self) -> str:
        return ray.get_runtime_context().get_node_id()


def test_a_spot_notice_drains_this_node_alone(cluster: str, worker: str, beside):
    on_worker = NodeAffinitySchedulingStrategy(worker, soft=False)
    busy = Busy.options(scheduling_strategy=on_worker).remote()
    assert ray.get(busy.where.remote()) == worker
    with Ec2Metadata() as service:
        service.silent = 1
        endpoint = {"AWS_EC2_METADATA_SERVICE_ENDPOINT": service.endpoint}
        job = beside("--every-s", "0.2", "--stay", **endpoint)
        wait_for(lambda: service.tokens_given > 0)
        time.sleep(0.5)
        assert job.poll() is None
        assert not is_draining(cluster, worker)
        service.announce("terminate", 120)
        wait_for(lambda: is_draining(cluster, worker))
        assert [is_draining(cluster, node) for node in living(cluster)].count(True) == 1
        # What runs there goes on until it ends itself; then the node leaves.
        assert ray.get(busy.where.remote()) == worker
        assert job.poll() is None
        ray.kill(busy)
        told, _ = job.communicate(timeout=GONE_S)
    assert job.returncode == 0, told
    for expected in (
        "waiting for ec2's notices and SIGTERM or SIGUSR1, to drain this node",
        "the metadata service does not answer",
        "notice: EC2 will terminate this instance at ",
        f"node {worker} is drained, ",
        "the node has left the cluster",
    ):
        assert expected in told


def test_a_signal_drains_this_node(cluster: str, worker: str, beside):
    job = beside("--metadata", "none", "--seconds", "5")
    assert "waiting for SIGTERM" in job.stdout.readline()
    job.terminate()
    told, _ = job.communicate(timeout=GONE_S)
    assert job.returncode == 0, told
    assert "notice: SIGTERM came; 5 s are left" in told
    assert f"node {worker} is drained" in told


def test_the_head_is_never_drained_by_itself(cluster: str, beside):
    job = beside("--now", "--seconds", "5")
    told, _ = job.communicate(timeout=GONE_S)
    assert job.returncode == 1
    assert re.search(r"error: only the head \(--also-head drains it\) of the cluster at ", told)
    assert not any(is_draining(cluster, node) for node in living(cluster))


def test_a_head_that_is_away_for_a_while_hears_of_it(cluster: str, worker: str):
    with socket.create_server(("127.0.0.1", 0)) as place:
        port = place.getsockname()[1]
    told: list[str] = []
    comes_back = threading.Timer(2, forward, (port, cluster))
    comes_back.start()
    notice = notices.Notice("the machine goes away", 30)
    drained = notices.drain(f"127.0.0.1:{port}", notice, node_ids=[worker], say=told.append)
    comes_back.join()
    assert drained == (worker,)
    assert "does not answer" in told[0]
    assert told[-1].startswith(f"node {worker} is drained")


def forward(port: int, target: str) -> None:
    """Passes on what comes to a port of loopback, until this process ends."""
    host, _, target_port = target.rpartition(":")
    server = socket.create_server(("127.0.0.1", port))

    def pump(source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                sink.sendall(data)
        except OSError:
            pass
        finally:
            source.close()
            sink.close()

    def accept() -> None:
        while True:
            ours, _ = server.accept()
            theirs = socket.create_connection((host, int(target_port)))
            for pair in ((ours, theirs), (theirs, ours)):
                threading.Thread(target=pump, args=pair, daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
