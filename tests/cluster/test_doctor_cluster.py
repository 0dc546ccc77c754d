"""The doctor's checks of a cluster, on a real one of 4 logical CPUs."""

from pathlib import Path

import pytest
import ray

from sr4ir_dist.doctor import cluster as checks
from sr4ir_dist.training.launch import Resources


@pytest.fixture
def alive(cluster: str) -> list[dict]:
    """The cluster's nodes."""
    return [node for node in ray.nodes() if node["Alive"]]


def test_a_cluster_that_is_ready(cluster: str, tmp_path: Path):
    _, *found = checks.findings(cluster, Resources(workers=4, cpus=1, gpu=False), str(tmp_path))
    assert [each.name for each in found] == ["ray cluster", "ray resources", "ray nodes"]
    assert [each.status for each in found] == ["ok"] * 3, found
    assert "1 node(s)" in found[0].told


@pytest.mark.parametrize(
    "asked", [Resources(5, cpus=1), Resources(1, cpus=5), Resources(1, gpu=True)]
)
def test_more_than_the_cluster_has(alive: list[dict], asked: Resources):
    found = checks.room([node["Resources"] for node in alive], asked)
    assert found.status == "fail"
    assert "workers=" in found.told


def test_nodes_that_cannot_write_the_storage(alive: list[dict], tmp_path: Path):
    (tmp_path / "file").touch()
    found = checks.nodes(alive, str(tmp_path / "file" / "runs"))
    assert found.status == "fail"
    assert "storage: " in found.told
    assert "cannot be written" in found.told
