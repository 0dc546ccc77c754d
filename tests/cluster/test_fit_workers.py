"""Where workers find room, on clusters that are only described."""

import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import ray
from ray._private.ray_constants import AUTOSCALER_RESOURCE_REQUEST_CHANNEL
from ray.experimental.internal_kv import _internal_kv_get
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from sr4ir_dist.config import ExperimentError
from sr4ir_dist.training import capacity
from sr4ir_dist.training.capacity import (
    NoRoomError,
    Resources,
    check_resources,
    fit_workers,
    has_more_room,
    wait_for_room,
)
from sr4ir_dist.training.node_request import NodeRequest, sizes

HEAD = {"CPU": 16.0, "memory": 1e9}
GPU_NODE = {"CPU": 64.0, "GPU": 8.0}


@pytest.mark.parametrize(
    ("nodes", "asked", "expected"),
    [
        ([{"CPU": 4.0}], Resources(2), (2, False)),
        ([{"CPU": 4.0}], Resources(3), (1, False)),
        ([{"CPU": 4.0}], Resources(4, 1), (1, False)),
        # 12 CPUs for 2 workers are 6 each, which the smaller node has not.
        ([{"CPU": 4.0}, {"CPU": 8.0}], Resources(2), (4, False)),
        ([{"CPU": 3.0}, {"CPU": 5.0}], Resources(4), (1, False)),
        # The head's CPUs are no use to workers that need a GPU.
        ([HEAD, GPU_NODE], Resources(8), (8, True)),
        ([HEAD, GPU_NODE, GPU_NODE], Resources(16), (8, True)),
        # 80 CPUs for 8 workers are 10 each, but the nodes hold 1 and 6 such workers.
        ([HEAD, GPU_NODE], Resources(8, gpu=False), (9, False)),
        # One more than there are GPUs: on CPUs, unless GPUs are insisted on.
        ([HEAD, GPU_NODE], Resources(9), (8, False)),
    ],
)
def test_workers_get_what_their_nodes_have(nodes, asked, expected):
    assert fit_workers(nodes, asked) == expected


@pytest.mark.parametrize(
    ("nodes", "asked", "message"),
    [
        ([{"CPU": 4.0}], Resources(5), "5 with 1 CPUs each do not fit: .* room for 4 .*4 CPUs, 0"),
        ([{"CPU": 3.0}, {"CPU": 5.0}], Resources(2, 4), "room for 1 of them .*8 CPUs.* 2 nodes"),
        ([HEAD, GPU_NODE], Resources(8, 9), "9 CPUs and a GPU each do not fit: .* room for 7 of"),
        ([HEAD, GPU_NODE], Resources(9, gpu=True), "workers=9 need 9 GPUs; the cluster has 8"),
        ([HEAD], Resources(1, 0), "cpus=0 must be at least 1"),
        ([{}], Resources(1), "room for 0 of them"),
    ],
)
def test_what_does_not_fit_is_refused(nodes, asked, message):
    with pytest.raises(ExperimentError) as refused:
        fit_workers(nodes, asked)
    assert re.search(message, str(refused.value))


def test_a_range_takes_what_there_is(cluster):
    for asked in (Resources(4, 1, least=2), Resources(100, 1, least=2), Resources(100, least=1)):
        assert check_resources(asked) == replace(asked, workers=4, cpus=1, gpu=False)
    assert check_resources(Resources(2)) == Resources(2, 2, gpu=False)
    with pytest.raises(NoRoomError, match="workers=5 with 1 CPUs each do not fit"):
        check_resources(Resources(100, 1, least=5))


@pytest.mark.parametrize(("least", "most"), [(0, 2), (3, 2), (-1, 1)])
def test_a_range_that_is_none_is_refused(cluster, least, most):
    with pytest.raises(ExperimentError, match=f"workers={least}:{most}: expected at least 1"):
        check_resources(Resources(most, least=least))


def test_nodes_that_are_about_to_go_have_no_room(cluster):
    with pytest.raises(NoRoomError, match="room for 0"):
        check_resources(Resources(1), without=[node["NodeID"] for node in ray.nodes()])


def test_there_is_room_for_more_workers_up_to_what_was_asked_for(cluster):
    asked = Resources(4, 1, gpu=False, least=1)
    assert [has_more_room(asked, running) for running in (1, 3, 4)] == [True, True, False]
    with others(2):
        more = [has_more_room(replace(asked, cpus=cpus), 1) for cpus in (1, 2, 3)]
    assert more == [True, True, False]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """What others use is waited for as long as it takes to see it."""
    monkeypatch.setattr(capacity, "_SETTLE_S", 2.0)
    monkeypatch.setattr(capacity, "_BUSY_S", 4.0)


@contextmanager
def others(cpus: int) -> Iterator[PlacementGroup]:
    """Another job that uses some of the cluster's 4 CPUs."""
    held = placement_group([{"CPU": cpus}])
    ray.get(held.ready(), timeout=60)
    # Nodes tell of what is free on them every now and then.
    _eventually(lambda: ray.available_resources().get("CPU", 0) == 4 - cpus)
    try:
        yield held
    finally:
        remove_placement_group(held)
        _eventually(lambda: ray.available_resources().get("CPU", 0) == 4)


def _eventually(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def _room(resources: Resources, say: Callable[[str], None] = pytest.fail) -> Resources:
    with NodeRequest() as request:
        return wait_for_room(resources, say, request)


def test_a_range_begins_with_what_others_leave(cluster, quick):
    with others(3):
        assert _room(Resources(2, 1, least=1)) == Resources(1, 1, gpu=False, least=1)
        # The CPUs of each are divided among those that are free.
        assert _room(Resources(1)) == Resources(1, 1, gpu=False)
    assert _room(Resources(2, 1, least=1)).workers == 2


def test_what_others_use_is_waited_for(cluster, quick):
    said: list[str] = []
    with others(3) as held:
        timer = threading.Timer(5, remove_placement_group, [held])
        timer.start()
        assert _room(Resources(2, 1, wait_s=60), said.append).workers == 2
        timer.join()
    (line,) = said
    assert re.search(
        r"waiting \d more minutes for what others use: workers=2 .* the cluster has free room for 1"
        r" of them \(1 CPUs, 0 GPUs, on 1 nodes\)",
        line,
    )


def test_what_a_run_just_had_counts_as_free_soon(cluster):
    with others(4) as held:
        timer = threading.Timer(1, remove_placement_group, [held])
        timer.start()
        assert _room(Resources(4, 1, least=1)).workers == 4
        timer.join()


def test_what_others_keep_is_told(cluster, quick):
    said: list[str] = []
    with (
        others(3),
        pytest.raises(NoRoomError, match=r"free room for 1 .*for what others use \(--wait-min"),
    ):
        _room(Resources(2, 1), said.append)
    assert len(said) == 1


@pytest.mark.slow
def test_free_cpus_of_several_nodes_are_no_room_for_a_worker():
    code = """
import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group
from sr4ir_dist.training.capacity import Resources, has_more_room

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
cluster.add_node(num_cpus=2)
ray.init(address=cluster.address, logging_level="ERROR")
cluster.wait_for_nodes()
asked = Resources(3, 2, gpu=False, least=1)
before = has_more_room(asked, 1)
ray.get(placement_group([{"CPU": 1}] * 2, strategy="STRICT_SPREAD").ready())
while ray.available_resources().get("CPU") != 2:
    pass
print(before, has_more_room(asked, 1), has_more_room(Resources(3, 1, least=1), 1))
ray.shutdown()
cluster.shutdown()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1:] == ["True False True"], done.stderr


def asked() -> list[dict[str, float]]:
    """What the autoscaler is asked for."""
    return json.loads(_internal_kv_get(AUTOSCALER_RESOURCE_REQUEST_CHANNEL) or "[]")


def test_an_autoscaler_is_asked_for_all_workers_until_the_run_ends(cluster, quick):
    each = {"CPU": 2.0}
    with NodeRequest() as request:
        given = wait_for_room(Resources(8, 2, least=1), pytest.fail, request)
        assert given.workers == 2
        _eventually(lambda: asked() == 8 * [each])
    assert asked() == []
    # What others use is no room for this run: there has to be as much beside it.
    with others(3), NodeRequest() as request:
        assert wait_for_room(Resources(8, 1, least=1), pytest.fail, request).workers == 1
        _eventually(lambda: asked() == 11 * [{"CPU": 1.0}])
        request.withdraw()
        assert asked() == []


def test_a_stopped_command_asks_for_nothing_any_more(cluster):
    # `ray job stop` sends SIGTERM, and three seconds later kills.
    code = """
import sys, ray
from sr4ir_dist.training.capacity import Resources, wait_for_room
from sr4ir_dist.training.node_request import NodeRequest

ray.init(address=sys.argv[1], logging_level="ERROR")
with NodeRequest() as request:
    wait_for_room(Resources(8, 2, least=1), print, request)
    print("begun", flush=True)
    ray.get(ray.remote(num_cpus=5)(lambda: None).remote())  # for which there is never room
"""
    command = [sys.executable, "-c", code, cluster]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout is not None
        assert driver.stdout.readline() == "begun\n"
        _eventually(lambda: asked() == 8 * [{"CPU": 2.0}])
        driver.terminate()
        _eventually(lambda: asked() == [])
        driver.kill()


def test_an_autoscaler_is_asked_for_fewer_where_all_are_too_many():
    assert sizes(8, 2) == [8, 4, 2]
    assert sizes(64, 3) == [64, 32, 16, 8, 4, 3]
    assert sizes(2, 1) == [2, 1]
    assert sizes(3, 3) == [3]


def test_too_large_a_request_is_refused_at_once(cluster):
    started, said = time.monotonic(), []
    with pytest.raises(NoRoomError, match=r"room for 4 .*add nodes by --wait-minutes"):
        _room(Resources(5, 1), said.append)
    assert time.monotonic() - started < 2
    assert said == []


def test_waiting_for_nodes_has_its_limit_and_says_what_is_missing(cluster):
    started, said = time.monotonic(), []
    with pytest.raises(NoRoomError, match=r"room for 4 .*waited 0.05 minutes for more nodes"):
        _room(Resources(5, 1, wait_s=3), said.append)
    assert 3 <= time.monotonic() - started < 10
    assert len(said) == 1
    assert re.search("waiting 0 more minutes for nodes: workers=5 .* room for 4", said[0])
