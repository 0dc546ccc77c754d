"""Nodes whose network can be cut: that it is, and that nothing is left of them."""

import subprocess
import sys

import psutil
import pytest
from hosts import PORT, hosts, missing, wait_until

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

REACH = f"""
import socket, sys
socket.create_connection((sys.argv[1], {PORT}), timeout=2).close()
"""


def reaches(made, node) -> bool:
    """Whether a node can talk with the head."""
    word = ["ip", "netns", "exec", node.namespace, sys.executable, "-c", REACH, made.head.address]
    return subprocess.run(word, capture_output=True, timeout=30, check=False).returncode == 0


def runs(pid: int) -> bool:
    """Whether a process is there, and not only as a zombie that nobody has asked for."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def namespaces() -> str:
    return subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout


def test_a_node_is_cut_healed_and_killed_and_an_error_leaves_nothing():
    pids, names = [], []

    def disturb():
        with hosts(workers=2) as made:
            names.extend(node.namespace for node in made.nodes)
            pids.extend(pid for node in made.nodes for pid in made.pids(node))
            first, second = made.workers
            assert made.node_id(first) != made.node_id(second)
            assert reaches(made, first)
            made.cut(first)
            assert not reaches(made, first)
            assert reaches(made, second)
            made.heal(first)
            wait_until(lambda: reaches(made, first), seconds=20, what="the healed network")

            lost = made.pids(second)
            made.kill(second)
            assert made.workers == [first]
            assert not any(runs(pid) for pid in lost)
            assert second.namespace not in namespaces()
            assert made.add().address not in (first.address, second.address)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        disturb()
    assert len(names) == 3
    assert len(pids) > 10
    assert not any(name in namespaces() for name in names)
    assert not any(runs(pid) for pid in pids)
