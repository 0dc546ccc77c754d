"""Searches on a cluster of three nodes, with data and runs in a bucket."""

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.cluster_utils import Cluster

from sr4ir_dist import checkpoint, storage
from sr4ir_dist.config import from_json
from sr4ir_dist.hub import versions
from sr4ir_dist.hub.cards import load_card
from sr4ir_dist.tuning.space import apply

pytestmark = pytest.mark.timeout(1800)

SPACE = {
    "about": "a test",
    "task": "classification",
    "metric": "psnr",
    "trials": 3,
    "search": {"name": "random", "seed": 1},
    "settings": {"epochs": 2, "warmup_epochs": 0, "evaluation.every_epochs": 1},
    "parameters": {
        "cqmix.grid": {"choice": [1, 2, 4]},
        "losses.tdp": {"loguniform": [0.1, 10]},
        "optimizers.sr.lr": {"loguniform": [1.0e-4, 1.0e-2]},
    },
}
SMALL = (
    *("batch_size=4", "sr.blocks=1", "sr.features=8", "data.resize=32", "data.crop=32"),
    *("evaluation.border=2", "evaluation.batch_size=8"),
)


@dataclass
class Nodes:
    """Three nodes of one CPU each, and what runs jobs on them."""

    cluster: Cluster
    repository: Path
    data: str
    environment: dict[str, str]
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def start(self, job: str, *arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, f"jobs/{job}.py", *arguments, "--data", self.data]
        command += ["--address", self.cluster.address, "--cpus", "1", "--cpu"]
        command += [word for setting in SMALL for word in ("--set", setting)]
        process = subprocess.Popen(
            command,
            cwd=self.repository,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.started.append(process)
        return process

    def run(self, job: str, *arguments: str) -> str:
        process = self.start(job, *arguments)
        told, _ = process.communicate()
        assert process.returncode == 0, told
        return told


@pytest.fixture(scope="module")
def nodes(
    s3: Callable[[], str], drawn: str, repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Nodes]:
    folder = Path(tempfile.mkdtemp(prefix="ray-"))  # short: paths of unix sockets are limited
    token = folder / "token"
    token.write_text("0123456789abcdef" * 4)
    data = f"{s3()}/drawn"
    for path in storage.list_files(drawn):
        storage.upload(Path(drawn, path), storage.join(data, path))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_prestart_worker_first_driver", "0")
        patch.setenv("SR4IR_CACHE_DIR", str(folder / "cache"))
        patch.delenv("RAY_ADDRESS", raising=False)
        cluster = Cluster(
            initialize_head=True,
            head_node_args={
                **{"num_cpus": 1, "num_gpus": 0, "temp_dir": str(folder / "t")},
                "dashboard_port": 0,  # Ray leaves a socket open where its usual port is taken
            },
        )
        found = Nodes(cluster, repository, data, dict(os.environ) | {"NO_COLOR": "1"})
        try:
            for _ in range(2):
                cluster.add_node(num_cpus=1, num_gpus=0)
            yield found
        finally:
            for process in found.started:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                assert process.stdout is not None
                process.stdout.close()
            cluster.shutdown()
            shutil.rmtree(folder, ignore_errors=True)


def written(folder: Path, **changes: Any) -> str:
    path = folder / "space.yaml"
    path.write_text(yaml.safe_dump(SPACE | changes))
    return str(path)


def trials(folder: str) -> list[dict[str, Any]]:
    return storage.read_json(storage.join(folder, "trials.json"))


NAME = "drawn_cls/edsr-x4/sr4ir"


@pytest.mark.slow
def test_a_search_and_what_comes_of_it(nodes: Nodes, s3: Callable[[], str], tmp_path: Path):
    root = f"{s3()}/runs"
    space = written(tmp_path, scheduler={"name": "asha", "grace": 1, "reduction": 2})
    told = nodes.run("tune", space, NAME, "--storage", root, "--name", "first")
    assert "up to 3 trials at a time, of 1 worker(s) each" in told
    folder = f"{root}/first"
    found = trials(folder)
    assert len(found) == 3
    assert {trial["state"] for trial in found} <= {"finished", "stopped"}
    assert any(trial["state"] == "finished" for trial in found)

    best = from_json(storage.read_bytes(f"{folder}/best.json"))
    finished = [trial for trial in found if trial["state"] == "finished"]
    winner = max(finished, key=lambda trial: trial["history"][-1]["psnr"])
    assert apply(best, winner["values"]) == best
    rows = list(csv.DictReader(io.StringIO(storage.read_bytes(f"{folder}/trials.csv").decode())))
    assert {row["trial"]: row["state"] for row in rows} == {
        trial["trial"]: trial["state"] for trial in found
    }
    page = storage.read_bytes(f"{folder}/report.html").decode()
    assert page.count("data:image/png;base64,") >= 3
    assert "http" not in page.replace("http-equiv", "")
    assert {"epochs.png", "parameters.png"} <= set(storage.list_names(folder))

    hub = f"{root}/hub"
    name = versions.publish(winner["run_uri"], "team/best", hub=hub)
    card = load_card(checkpoint.load(versions.uri_of(name, hub)))
    assert card.metrics["psnr"] == winner["history"][-1]["psnr"]


@pytest.mark.proof
def test_twelve_trials_of_which_some_are_stopped(
    nodes: Nodes, s3: Callable[[], str], tmp_path: Path, record: Callable[[str, Any], None]
):
    root = f"{s3()}/runs"
    space = written(
        tmp_path,
        trials=12,
        search={"name": "optuna", "seed": 1},
        scheduler={"name": "asha", "grace": 1, "reduction": 2},
        settings=SPACE["settings"] | {"epochs": 4},
    )
    started = time.monotonic()
    nodes.run("tune", space, NAME, "--storage", root, "--name", "twelve")
    seconds = time.monotonic() - started
    found = trials(f"{root}/twelve")
    states = [trial["state"] for trial in found]
    assert len(found) == 12
    assert set(states) == {"finished", "stopped"}
    assert all(trial["epochs"] == 4 for trial in found if trial["state"] == "finished")
    # Experiment, seed, workers and threads are the same, so figures are.
    for state in ("finished", "stopped"):
        trial = max((t for t in found if t["state"] == state), key=lambda each: each["epochs"])
        plain = plain_history(nodes, trial, root, tmp_path)
        assert plain[: trial["epochs"]] == trial["history"]
        assert (len(plain) == trial["epochs"]) == (state == "finished")
    told = ("state", "values", "epochs", "seconds")
    record(
        "search_three_nodes",
        {
            "what": "a search of 12 trials on three nodes of one CPU each, data and runs in a "
            "bucket; a finished and a stopped trial's figures equal those of plain runs",
            "space": SPACE["parameters"],
            "seconds": round(seconds),
            "trials": [
                {name: trial[name] for name in told} | {"psnr": trial["history"][-1]["psnr"]}
                for trial in found
            ],
        },
    )


@pytest.mark.proof
def test_a_search_whose_driver_was_killed_goes_on(
    nodes: Nodes, s3: Callable[[], str], tmp_path: Path
):
    root = f"{s3()}/runs"
    arguments = (written(tmp_path, trials=4), NAME, "--storage", root, "--name", "killed")
    process = nodes.start("tune", *arguments, "--concurrent", "2")
    folder = f"{root}/killed/trials"
    wait_until(lambda: results(folder), process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = results(folder)
    nodes.run("tune", *arguments, "--concurrent", "2", "--resume")
    found = trials(f"{root}/killed")
    assert [trial["state"] for trial in found] == ["finished"] * 4
    after = results(folder)
    assert len(after) == 4
    assert {uri: after[uri] for uri in before} == before


@pytest.mark.proof
def test_population_based_training_goes_on_from_the_best(
    nodes: Nodes, s3: Callable[[], str], tmp_path: Path
):
    root = f"{s3()}/runs"
    settings = SPACE["settings"] | {"epochs": 6, "checkpoint.keep": 20}
    space = written(
        tmp_path,
        settings=settings,
        scheduler={"name": "pbt", "interval": 1, "quantile": 0.34, "resample": 0.5},
    )
    nodes.run("tune", space, NAME, "--storage", root, "--name", "pbt")
    folder = f"{root}/pbt/trials"
    runs = [
        storage.join(folder, trial, place, run)
        for trial in storage.list_names(folder)
        for place in storage.list_names(storage.join(folder, trial))
        for run in storage.list_names(storage.join(folder, trial, place))
    ]
    forks = [uri for uri in runs if uri.split("/")[-2] != "0"]
    assert forks, "no trial exploited another one"
    weights = {}
    for uri in runs:
        for saved in checkpoint.newest_first(uri):
            digest = checkpoint.load(saved).files["sr.safetensors"][1]
            weights.setdefault(digest, set()).add(uri.split("/")[-3])
    for fork in forks:
        first = checkpoint.load(checkpoint.newest_first(fork)[-1])
        assert len(weights[first.files["sr.safetensors"][1]]) > 1, "not another trial's weights"


@pytest.mark.proof
def test_a_trial_whose_node_dies_goes_on_elsewhere(
    nodes: Nodes, s3: Callable[[], str], tmp_path: Path
):
    root = f"{s3()}/runs"
    space = written(tmp_path, settings=SPACE["settings"] | {"epochs": 4})
    process = nodes.start("tune", space, NAME, "--storage", root, "--name", "node")
    wait_until(lambda: len(checkpoints(f"{root}/node/trials")) == 3, process)
    doomed = nodes.cluster.list_all_nodes()[-1]
    nodes.cluster.remove_node(doomed, allow_graceful=False)
    try:
        told, _ = process.communicate()
        assert process.returncode == 0, told
    finally:
        nodes.cluster.add_node(num_cpus=1, num_gpus=0)
    found = trials(f"{root}/node")
    assert [trial["state"] for trial in found] == ["finished"] * 3
    assert all(trial["epochs"] == 4 for trial in found)


def plain_history(
    nodes: Nodes, trial: dict[str, Any], root: str, folder: Path
) -> list[dict[str, Any]]:
    """The evaluations of a plain run of a trial's experiment, seed, workers and threads.

    Of each evaluation what the trial's have too.
    """
    experiment, result = folder / "experiment.json", folder / "result.json"
    saved = checkpoint.load(trial["checkpoint"])
    experiment.write_bytes(saved.read("experiment.json"))
    nodes.run("train", "--experiment", str(experiment), "--storage", root, "--json", str(result))
    told = trial["history"][0].keys()
    history = json.loads(result.read_text())["history"]
    return [{name: record[name] for name in told} for record in history]


def results(folder: str) -> dict[str, dict[str, Any]]:
    """The results of the trials' runs that have ended, by their run."""
    return {
        path: storage.read_json(storage.join(folder, path))
        for path in storage.list_files(folder)
        if path.endswith("/result.json") and "/ray/" not in path
    }


def checkpoints(folder: str) -> set[str]:
    """The trials that have a checkpoint."""
    files = storage.list_files(folder)
    return {path.split("/")[0] for path in files if path.endswith("/manifest.json")}


def wait_until(reached: Callable[[], Any], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 300
    while not reached():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.5)
