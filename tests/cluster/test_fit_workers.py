"""Where workers find room, on clusters that are only described."""

import re
import time
from dataclasses import replace

import pytest
import ray

from sr4ir_dist.config import ExperimentError
from sr4ir_dist.training.capacity import (
    NoRoomError,
    Resources,
    check_resources,
    fit_workers,
    has_more_room,
    wait_for_room,
)

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
    assert not has_more_room(replace(asked, cpus=3), 1)  # on 4 CPUs


def test_too_large_a_request_is_refused_at_once(cluster):
    started, said = time.monotonic(), []
    with pytest.raises(NoRoomError, match=r"room for 4 .*add nodes by --wait-minutes"):
        wait_for_room(Resources(5, 1), said.append)
    assert time.monotonic() - started < 2
    assert said == []


def test_waiting_for_nodes_has_its_limit_and_says_what_is_missing(cluster):
    started, said = time.monotonic(), []
    with pytest.raises(NoRoomError, match=r"room for 4 .*waited 0.05 minutes for more nodes"):
        wait_for_room(Resources(5, 1, wait_s=3), said.append)
    assert 3 <= time.monotonic() - started < 10
    assert len(said) == 1
    assert re.search("waiting 0 more minutes for nodes: workers=5 .* room for 4", said[0])
