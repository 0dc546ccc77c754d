import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from sr4ir_dist import storage


@pytest.fixture
def doctor(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Runs `jobs/doctor.py` in this process, in an environment with secrets."""
    path = Path(storage.__file__).parents[1] / "jobs" / "doctor.py"
    spec = importlib.util.spec_from_file_location("doctor_job", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Where typer looks up the names in the annotations.
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return lambda *arguments: CliRunner().invoke(module.app, [str(item) for item in arguments])


def test_ready(doctor, s3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "conspicuous")
    json_file = tmp_path / "found.json"
    result = doctor("--storage", s3(), "--address", "local", "--json", json_file)
    assert result.exit_code == 0, result.output
    told = storage.read_json(json_file)
    assert told["ready"] is True
    names = {each["name"] for each in told["findings"]}
    assert {"python", "compiler", "storage write", "ray token", "ray resources"} <= names
    for each in told["findings"]:
        assert each.keys() == {"name", "status", "told", "mend"}
        assert each["name"] in result.output
    for secret in (os.environ["AWS_SECRET_ACCESS_KEY"], "conspicuous"):
        assert secret not in result.output + json_file.read_text()


def test_not_ready(doctor, tmp_path: Path):
    (tmp_path / "file").touch()
    json_file = tmp_path / "found.json"
    arguments = ("--storage", tmp_path / "file" / "runs", "--data", tmp_path / "none")
    result = doctor(*arguments, "--address", "127.0.0.1:1", "--json", json_file)
    assert result.exit_code == 1
    assert (
        "not ready: storage write, data train, data val, data shard, ray cluster" in result.output
    )
    assert "-> make it with jobs/prepare_data.py" in result.output
    assert storage.read_json(json_file)["ready"] is False


def test_an_address_that_is_none(doctor):
    result = doctor("--address", "nonsense")
    assert result.exit_code == 1
    assert "error: --address nonsense" in result.output
