"""Searches that cannot be are told in one line, before anything starts; reports are not lost."""

from pathlib import Path

import pytest
import yaml
from small_space import SPACE

from sr4ir_dist import storage
from sr4ir_dist.tuning import trial

NAME = "drawn_cls/edsr-x4/sr4ir"


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({}, ["--workers", 5], "workers=5 with 1 CPUs each do not fit: the cluster has room for 4"),
        ({}, ["--cpus", 9], "workers=1 with 9 CPUs each do not fit"),
        ({}, ["--workers", 2, "--gpu"], "workers=2 need 2 GPUs; the cluster has 0"),
        ({}, ["--workers", 3, "--set", "batch_size=2"], "workers=3 exceed batch_size=2"),
        ({}, ["--resume"], "there is no search to resume"),
        ({}, ["--set", "losses.tpd=1"], "did you mean 'losses.tdp'"),
        ({"metric": "miou"}, [], "metric='miou'"),
        ({"parameters": {"losses.tpd": {"choice": [1]}}}, [], "did you mean 'losses.tdp'"),
        ({"parameters": {"cqmix.grid": {"choice": [4, 65]}}}, [], "cqmix.grid=65"),
    ],
)
def test_a_search_that_cannot_be(
    cluster, drawn, run_job, tmp_path: Path, changes, arguments, message
):
    space = tmp_path / "space.yaml"
    space.write_text(yaml.safe_dump(SPACE | changes))
    runs = str(tmp_path / "runs")
    result = run_job(
        *("tune", space, NAME, "--data", drawn, "--storage", runs, "--cpu"), *arguments
    )
    assert result.exit_code == 1, result.output
    line = result.stderr.splitlines()[-1]
    assert line.startswith("error: ")
    assert message in line
    assert storage.list_names(runs) == []


def test_a_search_that_was_started_before(cluster, drawn, run_job, tmp_path: Path):
    space = tmp_path / "space.yaml"
    space.write_text(yaml.safe_dump(SPACE))
    arguments = ("tune", space, NAME, "--data", drawn, "--storage", tmp_path, "--name", "mine")
    storage.write_json(tmp_path / "mine" / "search.json", {})
    result = run_job(*arguments, "--cpu")
    assert result.exit_code == 1, result.output
    assert "was started before; continue it with --resume" in result.stderr
    assert storage.list_names(tmp_path / "mine") == ["search.json"]


def test_a_report_that_fails_fails_the_trial(cluster, monkeypatch):
    told = []

    def tell(figures):
        told.append(figures)
        raise OSError("the bucket is gone")

    monkeypatch.setattr(trial, "_tell", tell)

    def train() -> bool:
        with trial._forwarding() as forwarding:
            forwarding.queue.put({"epoch": 1})
            forwarding.queue.put({"epoch": 2})
        return forwarding.any

    with pytest.raises(OSError, match="the bucket is gone"):
        train()
    assert told == [{"epoch": 1}]
