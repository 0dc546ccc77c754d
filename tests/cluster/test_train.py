"""Runs that are disturbed: killed, interrupted, given bad data, asked for the impossible."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ray.util.state
import safetensors.torch
import torch

from sr4ir_dist import checkpoint, storage
from sr4ir_dist.data.convert import CONVERTERS
from sr4ir_dist.data.convert.write import convert
from sr4ir_dist.data.shards import load_manifest
from sr4ir_dist.overrides import override
from sr4ir_dist.training import launch, loop, worker
from sr4ir_dist.training.plan import Plan, make_plan, make_request
from sr4ir_dist.training.watchdog import LostRankError

pytestmark = [
    pytest.mark.timeout(600),
    # Ray Train sets Ray Data's defaults, and Ray Data warns of them.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.*"),
]
WORKERS = launch.Resources(workers=2, cpus=1, gpu=False)
STEPS_PER_EPOCH = 12
# A cluster is never here, so whoever tries to join it fails.
NOWHERE = "127.0.0.1:1"
NAME = "drawn_cls/edsr-x4/sr4ir"


def workers(*, alive: bool = False) -> dict[str, int]:
    """Actor ids and process ids of all training workers that the cluster ever had."""
    filters: list[Any] = [("class_name", "=", "RayTrainWorker")]
    if alive:
        filters.append(("state", "=", "ALIVE"))
    address = ray.get_runtime_context().gcs_address
    found: list[Any] = ray.util.state.list_actors(address, filters=filters, limit=1000)
    return {actor.actor_id: actor.pid for actor in found}


def wait_for_checkpoint(run_uri: str, running: Callable[[], bool]) -> None:
    """Returns as soon as a run has published its first checkpoint."""
    deadline = time.monotonic() + 300
    while not checkpoint.newest_first(run_uri):
        assert running(), "the run ended before its first checkpoint"
        assert time.monotonic() < deadline, "no checkpoint in time"
        time.sleep(0.01)


def while_training(plan: Plan, disturb: Callable[[], Any]) -> tuple[dict[str, Any], Any]:
    """Trains, and disturbs the run once it has published its first checkpoint."""
    training = True

    def later() -> Any:
        wait_for_checkpoint(plan.run_uri, lambda: training)
        return disturb()

    with ThreadPoolExecutor(1) as pool:
        disturbance = pool.submit(later)
        try:
            result = launch.train(plan, WORKERS)
        finally:
            training = False
    return result, disturbance.result()


def state(run_uri: str) -> dict[str, torch.Tensor]:
    """All tensors of a run's newest checkpoint: networks and optimizers."""
    saved = checkpoint.load(checkpoint.resolve(run_uri))
    names = [name for name in saved.files if name.endswith(".safetensors")]
    assert len(names) == 4
    return {f"{name}:{key}": t for name in names for key, t in saved.tensors(name).items()}


def assert_same_run(result: dict[str, Any], expected: dict[str, Any]) -> None:
    assert result["steps"] == expected["steps"] == 2 * STEPS_PER_EPOCH
    assert result["history"] == expected["history"]
    assert result["metrics"] == expected["history"][-1]
    found, wanted = state(result["run_uri"]), state(expected["run_uri"])
    assert found.keys() == wanted.keys()
    assert [key for key in wanted if not torch.equal(found[key], wanted[key])] == []


@pytest.fixture(scope="module")
def undisturbed(cluster, experiment, drawn, tmp_path_factory) -> dict[str, Any]:
    """The result of a run that nothing happened to."""
    folder = str(tmp_path_factory.mktemp("undisturbed"))
    result = launch.train(make_plan(experiment, data=drawn, storage_uri=folder), WORKERS)
    assert result["world_size"] == 2
    assert [record["epoch"] for record in result["history"]] == [1, 2]
    assert all(record["images"] == 16 for record in result["history"])
    return result


def test_a_run_keeps_what_every_rank_said(undisturbed):
    attempt = max(Path(undisturbed["run_uri"], "logs").iterdir())
    found = {path.name: path.read_text() for path in attempt.iterdir()}
    assert {"rank-0.out", "rank-1.out"} <= found.keys()
    line = (
        r"epoch 1  step 10/24 .* images/s \(\S+ s data \+ \S+ s phase 1 \+ \S+ s phase 2; "
        r"most data wait: rank [01]\) .* GiB .* s to go"
    )
    assert re.search(line, found["rank-0.out"])
    assert "step 10/24" not in found["rank-1.out"]


def test_a_run_can_be_looked_at_in_tensorboard_and_by_prometheus(undisturbed):
    # One for each start of the workers, which on a busy machine may be two.
    files = Path(undisturbed["run_uri"], "tensorboard").glob("events.*")
    content = b"".join(path.read_bytes() for path in files)
    for name in (b"training/pixel_sr", b"training/images_per_second", b"validation/top1"):
        assert name in content
    # Tests before this one may have had more nodes, which have gone.
    here = ray.get_runtime_context().get_node_id()
    (node,) = (node for node in ray.nodes() if node["NodeID"] == here)
    port = node["MetricsExportPort"]
    metrics = f"http://{node['NodeManagerAddress']}:{port}/metrics"
    deadline = time.monotonic() + 60
    while True:
        with urllib.request.urlopen(metrics, timeout=30) as answer:
            text = answer.read().decode()
        gauges = [each for each in text.splitlines() if each.startswith("ray_sr4ir_data_wait{")]
        if gauges or time.monotonic() > deadline:
            break
        time.sleep(1)
    assert any(f'run="{undisturbed["run"]}"' in gauge for gauge in gauges)


def test_an_evaluation_holds_its_checkpoint_while_it_runs(undisturbed, monkeypatch):
    references, seen = f"{undisturbed['run_uri']}/references", []

    def fit(trainer: Any, what: str) -> dict[str, Any]:
        seen.extend(storage.list_names(references))
        raise launch.TrainingError(what)

    monkeypatch.setattr(launch, "fit", fit)
    request = make_request(undisturbed["run_uri"], data=None, split="val", settings=())
    with pytest.raises(launch.TrainingError, match="evaluation of"):
        launch.evaluate([request], WORKERS)
    (reference,) = seen
    assert reference.startswith(f"{Path(undisturbed['checkpoint']).name}.")
    assert storage.list_names(references) == []


@pytest.mark.slow
def test_a_killed_worker_changes_nothing(undisturbed, experiment, drawn, tmp_path):
    plan = make_plan(experiment, data=drawn, storage_uri=str(tmp_path))
    before = workers()

    def kill() -> int:
        os.kill(max(workers(alive=True).values()), signal.SIGKILL)
        newest = checkpoint.load(checkpoint.newest_first(plan.run_uri)[0])
        return newest.json("progress.json")["step_in_epoch"]

    result, step_in_epoch = while_training(plan, kill)
    assert step_in_epoch in (5, 10)  # in the middle of an epoch
    assert len(workers().keys() - before.keys()) == 4  # two, and the two that took over
    assert_same_run(result, undisturbed)


@pytest.mark.slow
def test_a_rank_that_fails_is_told_by_its_own_error_and_the_run_goes_on(
    undisturbed, experiment, drawn, tmp_path, monkeypatch
):
    # Inside the test, so that it travels to the workers, which cannot import this file.
    def failing_once(config: dict[str, Any]) -> dict[str, Any]:
        here = Path(config["job"].plan.run_uri, "failed")
        train_step, calls = loop.train_step, []

        def step(setup: Any, *inputs: Any, **settings: Any) -> Any:
            calls.append(1)
            if setup.rank == 1 and len(calls) == 8 and not here.exists():
                here.touch()
                raise RuntimeError("only this rank's")
            return train_step(setup, *inputs, **settings)

        loop.train_step = step
        return worker.run_worker(config)

    monkeypatch.setattr(launch, "run_worker", failing_once)
    plan = make_plan(experiment, data=drawn, storage_uri=str(tmp_path))
    result = launch.train(plan, WORKERS)
    assert_same_run(result, undisturbed)
    first, second = sorted(Path(plan.run_uri, "logs").iterdir())
    traceback = (first / "rank-1.err").read_text()
    assert "Traceback" in traceback
    assert "RuntimeError: only this rank's" in traceback
    assert "continuing after step 5" in (second / "rank-0.out").read_text()
    assert launch.cause({0: LostRankError("rank 1 is missing"), 1: RuntimeError("own")}) == (
        "worker 1: own"
    )


@pytest.mark.slow
def test_the_same_command_continues_and_then_is_finished(
    undisturbed, experiment, drawn, tmp_path, cluster, repository, train_command
):
    plan = make_plan(experiment, data=drawn, storage_uri=str(tmp_path))
    json_file = tmp_path / "result.json"
    program = [sys.executable, str(repository / "jobs" / "train.py")]
    command = program + train_command(drawn, str(tmp_path), "--json", str(json_file), "--address")

    with (tmp_path / "first.log").open("wb") as log:
        first = subprocess.Popen([*command, cluster], stdout=log, stderr=subprocess.STDOUT)
        try:
            wait_for_checkpoint(plan.run_uri, lambda: first.poll() is None)
        finally:
            first.kill()
            first.wait()
    assert launch.finished_result(plan) is None
    # As if the kill had hit Ray in the middle of writing what it keeps for itself.
    snapshot = Path("ray", "checkpoint_manager_snapshot.json")
    assert (Path(undisturbed["run_uri"]) / snapshot).exists()
    (Path(plan.run_uri) / snapshot).write_text('{"checkpoint_results": [')

    second = subprocess.run([*command, cluster], capture_output=True, text=True, check=False)
    assert second.returncode == 0, second.stdout + second.stderr
    assert re.search(r"continuing after step (5|10|12|15|20)\b", second.stdout)
    assert_same_run(json.loads(json_file.read_text()), undisturbed)

    json_file.unlink()
    third = subprocess.run([*command, NOWHERE], capture_output=True, text=True, check=False)
    assert third.returncode == 0, third.stdout + third.stderr
    assert f"run {plan.run} is finished already" in third.stdout
    assert_same_run(json.loads(json_file.read_text()), undisturbed)


@pytest.mark.slow
def test_an_altered_shard_is_named_and_ends_the_run(cluster, experiment, drawn, tmp_path):
    data = str(tmp_path / "drawn")
    shutil.copytree(drawn, data)
    shards = load_manifest(data, "train").shards
    assert len(shards) > 2
    plan = make_plan(experiment, data=data, storage_uri=str(tmp_path / "runs"))
    before = workers()

    def alter() -> None:
        path = Path(data) / "train" / shards[1].path
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 0xFF
        path.write_bytes(content)

    first, last = shards[0].rows, shards[0].rows + shards[1].rows - 1
    place = f"{re.escape(shards[1].path)} .rows {first} to {last} of the split"
    with pytest.raises(launch.TrainingError, match=place):
        while_training(plan, alter)
    # Started once more, to tell everyone why, but not until the retries are used up.
    assert len(workers().keys() - before.keys()) <= 4
    assert launch.finished_result(plan) is None


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_the_run(
    undisturbed, cluster, drawn, tmp_path, run_job, train_command
):
    saved = checkpoint.load(undisturbed["checkpoint"])
    weights = saved.tensors("sr.safetensors")
    next(iter(weights.values())).view(-1)[0] = torch.inf
    safetensors.torch.save_file(weights, tmp_path / "inf.safetensors")
    before = workers()

    infinite = f"sr.weights={tmp_path}/inf.safetensors"
    result = run_job("train", *train_command(drawn, str(tmp_path), "--set", infinite))
    assert result.exit_code == 1, result.output
    message = result.stderr.splitlines()[-1]
    assert re.search(r"^error: run .* the loss pixel_sr is (nan|inf) at step 1 on samples", message)
    assert len(workers().keys() - before.keys()) == 2
    (run,) = [name for name in storage.list_names(tmp_path) if name.startswith("drawn_cls")]
    assert checkpoint.newest_first(str(tmp_path / run)) == []


@pytest.mark.slow
def test_saves_that_fail_again_and_again_end_the_run(undisturbed, experiment, drawn, tmp_path):
    start = undisturbed["checkpoint"]
    plan = make_plan(
        override(experiment, [f"sr.weights={start}"]), data=drawn, storage_uri=str(tmp_path)
    )
    folder, before = Path(plan.run_uri, "checkpoints"), workers()

    def spoil() -> None:
        folder.rename(tmp_path / "aside")
        folder.write_text("in the way")

    why = f"was stopped: 3 checkpoints in a row could not be saved: {folder}"
    with pytest.raises(launch.TrainingError, match=why):
        while_training(plan, spoil)
    assert len(workers().keys() - before.keys()) == 2  # no others took over
    assert launch.finished_result(plan) is None
    # The run may go on some day, so what it started from must stay.
    (reference,) = storage.list_names(f"{undisturbed['run_uri']}/references")
    assert reference.startswith(f"{Path(start).name}.")

    folder.unlink()
    (tmp_path / "aside").rename(folder)
    assert [checkpoint.verify(uri) for uri in checkpoint.newest_first(plan.run_uri)] != []
    assert launch.train(plan, WORKERS)["steps"] == 2 * STEPS_PER_EPOCH
    assert storage.list_names(f"{undisturbed['run_uri']}/references") == []


@pytest.fixture
def refused(cluster, drawn, tmp_path, run_job) -> Callable[..., str]:
    """Gives the one line that a command answers; no worker may start and no run may appear."""

    def run(name: str = NAME, *more: str, data: str = drawn, to: str = "runs") -> str:
        before = workers()
        result = run_job("train", name, "--data", data, "--storage", tmp_path / to, "--cpu", *more)
        assert result.exit_code == 1, result.output
        assert isinstance(result.exception, SystemExit)
        assert workers() == before
        assert storage.list_names(tmp_path / "runs") == []
        (line,) = result.stderr.splitlines()
        assert line.startswith("error: ")
        return line

    return run


@pytest.mark.parametrize(
    ("name", "setting", "message"),
    [
        ("drawn_cls/edsr-x4/sr4it", None, "unknown experiment .*'drawn_cls/edsr-x4/sr4ir'"),
        (None, "task.classez=3", "unknown key 'task.classez'; did you mean 'task.classes'"),
        (None, "epochs=many", "epochs='many': Input should be a valid integer"),
        (None, "batch_size=0", "batch_size=0: Input should be greater than or equal to 1"),
        (None, "data.crop=30", "data.crop=30 must be a multiple of scale=4"),
        (None, "sr.weights=nowhere.pt", r"sr.weights=\S+nowhere.pt: there is no such file"),
        (
            "drawn_cls/edsr-x4/s2t",
            None,
            "sr network from drawn_cls/edsr-x4/s, but .* train .*first",
        ),
    ],
)
def test_bad_experiments(refused, name, setting, message):
    more = [] if setting is None else ["--set", setting]
    assert re.search(message, refused(name or NAME, *more))


def test_bad_data(refused, drawn, tmp_path, sr_folder):
    assert "nothing/train/manifest.json: no manifest" in refused(data=str(tmp_path / "nothing"))

    images = str(tmp_path / "images")
    converter = CONVERTERS["sr-folder"]
    convert(converter, converter.open(root=str(sr_folder), val_count=3), images)
    line = refused(data=images)
    assert "needs a dataset for classification" in line
    assert f"the split 'train' of {images} is for images" in line
    assert refused(NAME, "--data", images) == line  # as one of a mix

    later = tmp_path / "later"
    shutil.copytree(drawn, later)
    manifest = later / "val" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format_version": 3}))
    line = refused(data=str(later))
    assert str(manifest) in line
    assert "format_version is 3" in line


def test_bad_storage(refused, tmp_path):
    (tmp_path / "file").touch()
    assert "file/runs: cannot be written" in refused(to="file/runs")


def test_more_workers_than_the_cluster_has(refused):
    line = refused(NAME, "--workers", "5")
    assert "workers=5 with 1 CPUs each do not fit: the cluster has room for 4 of them" in line
    line = refused(NAME, "--workers", "3", "--cpus", "2")
    assert "workers=3 with 2 CPUs each do not fit: the cluster has room for 2 of them" in line
    assert "workers=40 exceed batch_size=32" in refused(NAME, "--workers", "40")


def test_the_command_itself_prints_one_line(drawn, tmp_path, repository):
    result = subprocess.run(
        [
            *(sys.executable, str(repository / "jobs" / "train.py"), NAME, "--data", "nothing"),
            *("--storage", "runs", "--address", NOWHERE),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stdout) == (1, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: {tmp_path}/nothing/train/manifest.json: no manifest")
