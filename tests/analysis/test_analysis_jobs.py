"""The commands as people and programs use them."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from random_runs import write_drawn_image
from typer.testing import CliRunner

from sr4ir_dist import storage
from sr4ir_dist.cli import console, notices

JOBS = Path(storage.__file__).parents[1] / "jobs"


@pytest.fixture
def job(monkeypatch):
    """Runs a job, by its name, with some arguments."""
    # The consoles may have been made by another test, for a narrow terminal.
    for each in (console, notices):
        monkeypatch.setattr(each, "width", 200)

    def run(name, *arguments):
        spec = importlib.util.spec_from_file_location(f"{name}_job", JOBS / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        return CliRunner().invoke(module.app, [str(item) for item in arguments])

    return run


@pytest.mark.parametrize(
    ("command", "key"), [("figure", "columns"), ("gradcam", "images"), ("tsne", "points")]
)
def test_pictures_of_a_checkpoint(job, published, tmp_path, command, key):
    run = published("drawn_cls/edsr-x4/sr4ir")
    out, result = tmp_path / "out.png", tmp_path / "out.json"
    words = ["analyze", command, f"SR4IR={run}", "--out", out, "--count", 3, "--json", result]
    told = job(*words)
    assert told.exit_code == 0, told.output
    assert f"picture  {out}" in told.output
    assert "images: 3 of 3" in told.output
    assert out.read_bytes().startswith(b"\x89PNG")
    assert json.loads(result.read_text())[key]


def test_a_report_of_a_run(job, published, small_data, tmp_path):
    run = published("drawn_cls/x4/l2t", history=[{"epoch": 1, "step": 1, "top1": 12.5}])
    out, result = tmp_path / "a b.html", tmp_path / "out.json"
    words = [f"L->T={run}", "--out", out, "--data", small_data, "--count", 1, "--json", result]
    told = job("report", *words)
    assert told.exit_code == 0, told.output
    assert f"report  {out}" in told.output
    assert out.read_text().startswith("<!doctype html>")
    assert json.loads(result.read_text())["runs"]["L->T"]["metrics"] == {"top1": 12.5}


def test_costs_of_a_run_and_of_a_name(job, published, tmp_path):
    run, result = published("drawn_cls/edsr-x4/sr4ir"), tmp_path / "out.json"
    told = job("analyze", "efficiency", f"ours={run}", "drawn_cls/x4/l2t", "--json", result)
    assert told.exit_code == 0, told.output
    costs = json.loads(result.read_text())
    assert costs.keys() == {"ours", "drawn_cls/x4/l2t"}
    assert costs["ours"]["gflops"] == costs["ours"]["sr_gflops"] + costs["ours"]["task_gflops"] > 0
    assert "GFLOPs" in told.output


def test_sr_networks_on_a_benchmark(job, published, tmp_path):
    run, result = published("drawn_cls/edsr-x4/sr4ir"), tmp_path / "out.json"
    write_drawn_image(tmp_path / "One" / "HR" / "a.png", 48, 40)
    words = ["analyze", "sr-benchmarks", f"ours={run}", "--benchmark", f"One={tmp_path / 'One'}"]
    told = job(*words, "--json", result)
    assert told.exit_code == 0, told.output
    assert [each["network"] for each in json.loads(result.read_text())] == ["ours", "bicubic"]
    assert "made here, antialiased bicubic" in told.output


@pytest.mark.parametrize(
    "words",
    [
        ("report", "a=none"),
        ("report", "=none"),
        ("analyze", "figure", "a=none"),
        ("analyze", "gradcam", "a=none", "a=none"),
        ("analyze", "tsne", "a=none"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(job, tmp_path, words):
    told = job(*words, "--out", tmp_path / "out")
    assert told.exit_code == 1
    assert told.output.startswith("error: ")
    assert told.output.count("\n") == 1
    assert not (tmp_path / "out").exists()
