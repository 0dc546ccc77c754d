"""Conversion and verification by the tasks of a Ray cluster."""

import os
import re
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.util.placement_group import placement_group, remove_placement_group

from sr4ir_dist import parallel
from sr4ir_dist.data.convert import CONVERTERS
from sr4ir_dist.data.convert.source import Source
from sr4ir_dist.data.convert.write import ConvertedSplit, convert
from sr4ir_dist.data.schema import DatasetError
from sr4ir_dist.data.verify import verify

pytestmark = pytest.mark.usefixtures("cluster")


@pytest.fixture
def source() -> Source:
    return CONVERTERS["drawn"].open(train_count=40, val_count=8, size=32)


def convert_drawn(source: Source, uri: Path, **settings: Any) -> dict[str, ConvertedSplit]:
    return convert(CONVERTERS["drawn"], source, str(uri), shard_bytes=9000, threads=1, **settings)


def test_tasks_give_what_threads_give_though_a_worker_dies(source: Source, tmp_path: Path):
    driver, death, read = os.getpid(), tmp_path / "death", source.read

    def deadly(item: Any) -> dict[str, Any]:
        if item == ("train", 17) and os.getpid() != driver and not death.exists():
            death.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return read(item)

    deadly_source = replace(source, read=deadly)
    on_ray = convert_drawn(deadly_source, tmp_path / "ray", run=parallel.on_cluster())
    assert death.exists()
    here = convert_drawn(source, tmp_path / "here")
    assert len(here["train"].manifest.shards) > 8
    assert {split: each.manifest for split, each in on_ray.items()} == {
        split: each.manifest for split, each in here.items()
    }
    files = {path.relative_to(tmp_path / "here") for path in (tmp_path / "here").rglob("*")}
    assert {path.relative_to(tmp_path / "ray") for path in (tmp_path / "ray").rglob("*")} == files

    shard = tmp_path / "ray" / "train" / on_ray["train"].manifest.shards[3].path
    shard.write_bytes(shard.read_bytes()[:-1])
    found = verify(str(tmp_path / "ray"), run=parallel.on_cluster())
    assert [problem.shard for problem in found["train"].problems] == [shard.name]
    assert found["val"].problems == ()


def test_a_bad_row_ends_it_with_its_own_error(source: Source, tmp_path: Path):
    driver, read = os.getpid(), source.read

    def bad(item: Any) -> dict[str, Any]:
        if item == ("train", 39) and os.getpid() != driver:
            raise DatasetError("image 39 is bad")
        return read(item)

    with pytest.raises(DatasetError) as caught:
        convert_drawn(replace(source, read=bad), tmp_path / "out", run=parallel.on_cluster())
    assert str(caught.value) == "image 39 is bad"
    told: list[str] = []
    convert_drawn(source, tmp_path / "out", run=parallel.on_cluster(), say=told.append)
    assert told[0].startswith("continuing: ")


def test_tasks_that_find_no_cpus_say_so_and_give_up(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(parallel, "_TELL_EVERY_S", 0.5)
    monkeypatch.setattr(parallel, "_GIVE_UP_S", 5.0)
    told: list[str] = []
    held = placement_group([{"CPU": 4}])
    try:
        ray.get(held.ready(), timeout=60)
        run = parallel.on_cluster(told.append)
        with pytest.raises(parallel.ClusterError, match="none of 3 tasks .* other jobs may hold"):
            list(run(abs, range(3)))
    finally:
        remove_placement_group(held)
    assert re.match(
        r"waiting: none of 3 tasks of 1 CPU has ended for \d+ s; \d of the cluster's 4 CPUs",
        told[0],
    )
    monkeypatch.undo()
    assert sorted(parallel.on_cluster()(abs, range(3))) == [0, 1, 2]
