"""The commands that share checkpoints, as people and programs use them."""

import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_runs import publish_run
from typer.testing import CliRunner, Result

from sr4ir_dist import checkpoint, storage
from sr4ir_dist.cli import console
from sr4ir_dist.hub import versions
from sr4ir_dist.hub.names import parse

JOB = Path(storage.__file__).parents[1] / "jobs" / "checkpoints.py"
NAME = "team/drawn"


@pytest.fixture(scope="module")
def app() -> Any:
    """The job's command line."""
    spec = importlib.util.spec_from_file_location("checkpoints_job", JOB)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.app


@pytest.fixture
def job(app: Any, s3: Callable[[], str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Runs a command on an empty hub in a bucket; the hub is that of the environment."""
    monkeypatch.setenv("SR4IR_HUB", f"{s3()}/hub")
    # The console may have been made by another test, for a narrow terminal.
    monkeypatch.setattr(console, "width", 200)

    def run(*words: object, fails: bool = False, answer: str | None = None) -> Result:
        result = CliRunner().invoke(app, [str(word) for word in words], input=answer)
        assert result.exit_code == int(fails), result.output
        assert result.exception is None or isinstance(result.exception, SystemExit)
        return result

    return run


@pytest.fixture
def run(tmp_path: Path) -> str:
    publish_run(tmp_path / "run", top1=91.75, psnr=19.5)
    return str(tmp_path / "run")


def published(job: Callable[..., Result], *words: object) -> str:
    """Publishes and gives the version's name, which is all that stdout says."""
    (line,) = job("publish", *words).stdout.splitlines()
    assert re.fullmatch(r"hub://[a-z/]+@\d{8}-\d{6}-[0-9a-f]{8}", line)
    return line


def test_the_life_of_a_version(job: Callable[..., Result], run: str, tmp_path: Path):
    report = tmp_path / "report.json"

    def told(*words: object) -> Any:
        job(*words, "--json", report)
        return storage.read_json(report)

    first = published(job, run, NAME, "--note", "a [bold]first[/] try", "--tag", "best")
    second = published(job, run, "team/other")
    which = first.partition("@")[2]

    table = job("list").stdout
    assert NAME in table
    assert "top1 91.75  psnr 19.5" in table
    names = told("list", "team/d")
    assert [(each["newest"]["name"], each["versions"], each["tags"]) for each in names] == [
        (NAME, 1, ["best"])
    ]
    assert "a [bold]first[/] try" in job("search").stdout
    found = told("search", "--task", "classification", "--metric", "top1>90", "--sort", "top1")
    assert {each["name"] for each in found} == {NAME, "team/other"}
    assert told("search", "team/d", "--scale", "4")[0]["version"] == which
    assert told("search", "--metric", "top1>95") == []

    shown = told("show", f"{NAME}@best")
    assert (shown["version"], shown["versions"], shown["tags"]) == (which, [which], ["best"])
    assert checkpoint.load(shown["uri"]).files
    assert "drawn_cls/edsr-x4/sr4ir" in job("show", first).stdout

    assert job("promote", second, "good").stdout.endswith(f"{second.partition('@')[2]}\n")
    assert job("verify", NAME).stdout == f"{first.removeprefix('hub://')}: sound\n"

    pulled = job("pull", f"{NAME}@best", "--to", tmp_path / "pulled")
    assert pulled.stdout == f"{tmp_path}/pulled\n"
    assert "sr.safetensors: 116 bytes" in pulled.stderr
    again = job("pull", NAME, "--to", tmp_path / "pulled")
    assert again.stderr.count("is there already") == 7

    (url,) = job("share", NAME, "--expires", "5m").stdout.splitlines()
    job("pull", url, "--to", tmp_path / "shared")
    assert checkpoint.load(str(tmp_path / "shared")).files
    assert told("share", NAME, "--expires", "1h")["seconds"] == 3600

    line = job("delete", first, "--yes", fails=True).stderr
    assert "is best: promote another version first, or use --force" in line
    assert "Delete team/drawn@" in job("delete", first, "--force", fails=True, answer="n").stderr
    job("delete", first, "--force", fails=True)  # nobody is there to answer
    assert job("verify", NAME).stdout.endswith("sound\n")
    job("delete", first, "--force", answer="y")
    assert [each["newest"]["name"] for each in told("list")] == ["team/other"]
    assert "nothing is published in s3://" in job("list", NAME).stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["publish", "nowhere", NAME], "nowhere is neither a checkpoint nor a run"),
        (["publish", "nowhere", "Team"], "'Team' is no name of a hub: expected lower case"),
        (["show", NAME], "nothing is published under this name"),
        (["pull", NAME, "--to", "there"], "nothing is published under this name"),
        (["pull", "http://127.0.0.1:1/x?y=z", "--to", "there"], "http://127.0.0.1:1/x: "),
        (["verify", NAME], "nothing is published under this name"),
        (["promote", NAME, "latest"], "'latest' is no tag"),
        (["share", NAME, "--expires", "8d"], "'8d': expected a time from 1s to 7d"),
        (["delete", NAME], "name one version by its id"),
        (["search", "--scale", "3"], "scale=3: no version has it; there are: none"),
        (["list", "--hub", "gs://bucket"], "unknown scheme 'gs'"),
    ],
)
def test_errors_are_one_line(job: Callable[..., Result], words: list[str], message: str):
    lines = job(*words, fails=True).stderr.splitlines()
    assert lines[-1].startswith("error: ")
    assert message in lines[-1]
    assert len(lines) == (2 if words[0] == "search" else 1)  # and that the hub is empty


def test_without_a_hub_the_commands_say_how_to_name_one(
    job: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("SR4IR_HUB")
    assert "set SR4IR_HUB (or give --hub)" in job("list", fails=True).stderr


def test_verify_fails_where_a_file_is_damaged_and_names_what_was_left_half_way(
    job: Callable[..., Result], run: str, tmp_path: Path
):
    hub = tmp_path / "hub"
    name = published(job, run, NAME, "--hub", hub)
    unfinished = f"{NAME}/versions/20260101-000000-00000000"
    storage.write_bytes(f"{hub}/{unfinished}/sr.safetensors", b"half")
    assert (
        "20260101-000000-00000000 is being published or" in job("verify", NAME, "--hub", hub).stderr
    )
    path = Path(versions.uri_of(parse(name), str(hub))) / "sr.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    result = job("verify", NAME, "--hub", hub, "--json", tmp_path / "report.json", fails=True)
    assert f"sr.safetensors of checkpoint {path.parent}" in result.stdout
    report = storage.read_json(tmp_path / "report.json")
    assert list(report["problems"]) == [name.removeprefix("hub://")]
    assert report["unfinished"] == [f"{NAME}@20260101-000000-00000000"]
    job("delete", report["unfinished"][0], "--yes", "--hub", hub)
    assert not (hub / unfinished).exists()


def test_help_teaches(job: Callable[..., Result]):
    text = job("--help").stdout
    assert "hub://team/voc_seg-edsr-x8@best" in text
    for command in (
        "publish",
        "list",
        "search",
        "show",
        "pull",
        "share",
        "promote",
        "verify",
        "delete",
    ):
        assert f" {command} " in text
        assert "--hub" in job(command, "--help").stdout
