"""A real Ray cluster, a tiny drawn dataset and a tiny experiment, shared by all tests here."""

import importlib.util
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from unittest import mock

import psutil
import pytest
import ray
from typer.testing import CliRunner, Result

from sr4ir_dist import experiments, storage
from sr4ir_dist.config import Experiment
from sr4ir_dist.data.convert import CONVERTERS
from sr4ir_dist.data.convert.write import convert
from sr4ir_dist.overrides import override

REPOSITORY = Path(storage.__file__).parents[1]
NAME = "drawn_cls/edsr-x4/sr4ir"
# 2 epochs of 12 steps with the TDP loss in the second; checkpoints in the middle of epochs.
SETTINGS = (
    *("epochs=2", "warmup_epochs=1", "batch_size=4", "sr.blocks=1", "sr.features=8"),
    *("data.resize=32", "data.crop=32", "evaluation.border=2", "evaluation.batch_size=8"),
    *("evaluation.every_epochs=1", "checkpoint.every_steps=5"),
)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def cluster() -> Iterator[str]:
    """Connects this process to a local Ray cluster of 4 logical CPUs; gives its address."""
    # Of its own and with a short name: paths of unix sockets are limited to 107 bytes.
    folder = tempfile.mkdtemp(prefix="ray-")
    token = Path(folder) / "token"
    token.write_text("0123456789abcdef" * 4)
    settings = {
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        # Workers that are started before they are wanted import Ray for nothing.
        "RAY_prestart_worker_first_driver": "0",
    }
    try:
        with mock.patch.dict(os.environ, settings):
            # With the dashboard, which Ray Train asks for the state of its controller.
            ray.init(
                address="local",
                num_cpus=4,
                num_gpus=0,
                include_dashboard=True,
                dashboard_port=0,
                logging_level=logging.ERROR,
                _temp_dir=folder,
            )
            yield ray.get_runtime_context().gcs_address
            started = ray_processes(folder)
            ray.shutdown()
            psutil.wait_procs(started, timeout=20)  # they write to the folder until they end
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def ray_processes(folder: str) -> list[psutil.Process]:
    """What this process started of a cluster that lives in a folder."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            command = " ".join(process.cmdline())
            if folder in command or command.startswith("ray::"):
                found.append(process)
    return found


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A drawn dataset in several shards: 48 images of 32 x 32 to train on and 16 to judge on."""
    uri = str(tmp_path_factory.mktemp("data") / "drawn")
    converter = CONVERTERS["drawn"]
    source = converter.open(train_count=48, val_count=16, size=32, seed=0)
    convert(converter, source, uri, shard_bytes=20_000)
    return uri


@pytest.fixture(scope="session")
def experiment() -> Experiment:
    """SR4IR on the drawn dataset, as small as it gets."""
    return override(experiments.make(NAME), SETTINGS)


@pytest.fixture(scope="session")
def train_command(repository: Path) -> Callable[..., list[str]]:
    """Arguments of the same experiment on the command line, for 2 workers of 1 CPU."""

    def command(data: str, storage_uri: str, *more: str) -> list[str]:
        settings = [word for setting in SETTINGS for word in ("--set", setting)]
        places = ["--data", data, "--storage", storage_uri]
        return [NAME, *places, "--workers", "2", "--cpus", "1", "--cpu", *settings, *more]

    return command


@pytest.fixture(scope="session")
def run_job(repository: Path) -> Callable[..., Result]:
    """Runs a job, by its name, in this process with some arguments."""

    def run(name: str, *arguments: object) -> Result:
        module = sys.modules.get(f"{name}_job") or load(name)
        return CliRunner().invoke(module.app, [str(item) for item in arguments])

    def load(name: str) -> ModuleType:
        path = repository / "jobs" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(f"{name}_job", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        # Where typer looks up the names in the annotations.
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module

    return run
