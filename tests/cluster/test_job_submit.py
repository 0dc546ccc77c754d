"""The same job as a cluster's user runs it: submitted with a token, data and runs in a bucket."""

import json
import os
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from heads import PROGRAMS, TOKEN, Head, running_head

from sr4ir_dist import checkpoint, storage
from sr4ir_dist.data.shards import load_manifest
from sr4ir_dist.hub import listing, sharing, versions

pytestmark = pytest.mark.timeout(900)
KEY = "AWS_SECRET_ACCESS_KEY"
# On top of the settings of `train_command`.
SHORT = [
    word
    for setting in ("epochs=1", "warmup_epochs=0", "checkpoint.every_steps=null")
    for word in ("--set", setting)
]


@pytest.fixture(scope="module")
def head(s3) -> Iterator[Head]:
    """A Ray head with token authentication, in the environment of the S3 server's user."""
    with running_head(cpus=4) as made:
        yield made


@pytest.fixture(scope="module")
def submitted(
    head: Head,
    s3: Callable[[], str],
    repository: Path,
    train_command: Callable[..., list[str]],
) -> tuple[dict[str, Any], dict[str, str]]:
    """The result of a submitted job that trains from and into a bucket, and what it told."""
    bucket = s3()
    data, runs = f"{bucket}/data/drawn", f"{bucket}/runs"
    sizes = ("--train-count", "48", "--val-count", "16", "--size", "32")
    prepared = head.run(
        "python", "jobs/prepare_data.py", "drawn", "--out", data, *sizes, cwd=repository
    )
    assert prepared.returncode == 0, head.told(prepared)
    assert load_manifest(data, "val").rows == 16

    json_uri = f"{bucket}/summary.json"
    arguments = train_command(data, runs, "--json", json_uri, *SHORT)
    with watched_processes(head) as seen:
        job = head.submit("python", "jobs/train.py", *arguments, cwd=repository)
    assert job.returncode == 0, head.told(job)
    assert "succeeded" in job.stdout + job.stderr
    told = {"job": job.stdout + job.stderr, "arguments": "\n".join(seen)}
    return storage.read_json(json_uri), told


@pytest.fixture(scope="module")
def trained(submitted: tuple[dict[str, Any], dict[str, str]]) -> dict[str, Any]:
    """The result of that job."""
    return submitted[0]


def test_a_submitted_job_trains_from_and_into_a_bucket(
    head: Head, trained: dict[str, Any], repository: Path, tmp_path: Path
):
    run_uri = trained["run_uri"]
    runs, _, run = run_uri.rpartition("/")
    assert storage.list_names(runs) == [run]
    assert storage.read_json(f"{run_uri}/result.json") == trained
    assert (trained["steps"], trained["world_size"]) == (12, 2)
    saved = checkpoint.load(trained["checkpoint"])
    for name in saved.files:
        assert len(saved.read(name)) > 0
    assert saved.json("run.json")["data"] == [f"{runs.rpartition('/')[0]}/data/drawn"]

    json_file = tmp_path / "figures.json"
    judged = head.run(
        *("python", "jobs/evaluate.py", run_uri, "--storage", runs, "--json"),
        *(str(json_file), "--workers", "2", "--cpus", "1", "--cpu", "--address", head.address),
        cwd=repository,
    )
    assert judged.returncode == 0, head.told(judged)
    found = storage.read_json(str(json_file))
    assert found["checkpoint"] == trained["checkpoint"]
    assert found["metrics"].items() <= trained["metrics"].items()
    assert found["metrics"].keys() == {"psnr", "ssim", "top1", "images"}
    assert storage.list_names(runs) == [run]

    check_what_travelled(head, repository)


def test_no_secret_is_written_anywhere(
    head: Head, submitted: tuple[dict[str, Any], dict[str, str]]
):
    result, told = submitted
    bucket = result["run_uri"].partition("/runs/")[0]
    in_bucket = {
        name: storage.read_bytes(f"{bucket}/{name}") for name in storage.list_files(bucket)
    }
    check_no_secrets(head, told | in_bucket)


@contextmanager
def watched_processes(head: Head) -> Iterator[set[str]]:
    """Gives a set that fills with the arguments of all of the cluster's and our processes.

    On exit, checks that a training worker was among them and had the secrets.
    """
    seen: set[str] = set()
    trusted: set[str] = set()
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.5):
            for root in (psutil.Process(head.pid), psutil.Process()):
                for process in root.children(recursive=True):
                    with suppress(psutil.Error):
                        arguments = " ".join(process.cmdline())
                        seen.add(arguments)
                        if process.environ().get(KEY) == os.environ[KEY]:
                            trusted.add(arguments)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield seen
    finally:
        ended.set()
        watcher.join()
    assert any("RayTrainWorker" in arguments for arguments in trusted), trusted


def check_no_secrets(head: Head, written: dict[str, str | bytes]) -> None:
    """No key or token is in what was written, nor in any file of the cluster but the token's."""
    files = {path: path.read_bytes() for path in head.folder.rglob("*") if path.is_file()}
    wanted = [secret.encode() for secret in (TOKEN, os.environ[KEY])]

    def having(contents: dict) -> list:
        as_bytes = {name: x.encode() if isinstance(x, str) else x for name, x in contents.items()}
        return [name for name, x in as_bytes.items() if any(secret in x for secret in wanted)]

    assert having(files) == [head.folder / "token"]
    assert having(written) == []
    # What was looked through is what there is to look through.
    logs = {path.name.partition("-")[0] for path in files if path.parent.name == "logs"}
    assert {"worker", "job", "raylet.out", "gcs_server.out"} <= logs
    assert {"summary.json", "data/drawn/train/manifest.json"} <= written.keys()
    assert any(name.endswith(".safetensors") for name in written)


@pytest.mark.slow
def test_a_stopped_job_goes_on_by_the_same_command(
    head: Head,
    s3: Callable[[], str],
    drawn: str,
    repository: Path,
    train_command: Callable[..., list[str]],
):
    # 120 steps, of which each is told, and no checkpoints but every so many of them.
    runs, every, total = f"{s3()}/runs", 40, 120
    words = ["epochs=10", f"checkpoint.every_steps={every}", "checkpoint.every_epochs=100"]
    words = [
        word for setting in (*words, "evaluation.every_epochs=100") for word in ("--set", setting)
    ]
    _, *arguments = train_command(drawn, runs, *words, "--log-every", "1")

    def job(*words: str) -> subprocess.CompletedProcess[str]:
        verb, *others = words
        ray = (str(PROGRAMS / "ray"), "job", verb, "--address", head.dashboard)
        return head.run(*ray, *others, cwd=repository)

    def submit(name: str, *settings: str) -> subprocess.CompletedProcess[str]:
        words = ("--working-dir", ".", "--submission-id", name, *settings, "--", "python")
        return job("submit", *words, "jobs/train.py", "drawn_cls/edsr-x4/sr4ir", *arguments)

    def steps(name: str) -> list[int]:
        told = job("logs", name).stdout
        return [int(step) for step in re.findall(rf"step (\d+)/{total} .* images/s", told)]

    begun = submit("stopped", "--no-wait")
    assert begun.returncode == 0, head.told(begun)
    deadline = time.monotonic() + 300
    while not published_steps(runs):
        assert time.monotonic() < deadline, job("logs", "stopped").stdout
        time.sleep(0.2)
    stopped_at = time.monotonic()
    assert job("stop", "stopped").returncode == 0
    assert time.monotonic() - stopped_at < 30
    assert "STOPPED" in job("status", "stopped").stdout.upper()
    # Nothing of it is left that could write.
    wait_for_no_workers(head)
    last = published_steps(runs)[-1]
    assert last % every == 0
    reached = steps("stopped")[-1]

    again = submit("continued")
    assert again.returncode == 0, head.told(again)
    (found,) = re.findall(r"continuing after step (\d+)", job("logs", "continued").stdout)
    assert int(found) == last
    # Every step that is done again is of the last interval, and the rest follows.
    assert 0 <= reached - last <= every
    assert steps("continued")[0] == last + 1
    assert published_steps(runs)[-1] == total
    assert "SUCCEEDED" in job("status", "continued").stdout.upper()


def published_steps(runs: str) -> list[int]:
    """The steps that the one run in a folder has checkpoints of, if there is one."""
    steps = []
    for run in storage.list_names(runs):
        steps += [int(uri[-9:]) for uri in checkpoint.newest_first(f"{runs}/{run}")]
    return sorted(steps)


def wait_for_no_workers(head: Head) -> None:
    deadline = time.monotonic() + 60
    while any("RayTrainWorker" in title for title in titles(head)):
        assert time.monotonic() < deadline, "training workers are left"
        time.sleep(0.2)


def titles(head: Head) -> list[str]:
    found = []
    for process in psutil.Process(head.pid).children(recursive=True):
        with suppress(psutil.Error):
            found.append(" ".join(process.cmdline()))
    return found


@pytest.mark.slow
def test_settings_of_s3_reach_every_process_of_a_job(head: Head, tmp_path: Path):
    # Of an actor with an environment of its own too, as Ray Train's controller is one.
    code = """
import os, ray
from sr4ir_dist import parallel, storage

@ray.remote(num_cpus=0)
class Actor:
    def settings(self):
        return storage.worker_environment(), os.environ["MORE"]

parallel.connect(os.environ.get("RAY_ADDRESS"))
task = ray.get(ray.remote(storage.worker_environment).remote())
actor = Actor.options(runtime_env={"env_vars": {"MORE": "more"}}).remote()
print("task", task == storage.worker_environment())
print("actor", ray.get(actor.settings.remote()) == (task, "more"))
print("told", sorted(task.values()))
"""
    asked = {
        "AWS_PROFILE": "lab",
        "AWS_REGION": "eu-somewhere-7",
        "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
        "SR4IR_S3_TIMEOUT_S": "77",
    }
    (tmp_path / "settings.py").write_text(code)
    environment = json.dumps({"env_vars": asked})
    submitted = head.run(
        *(str(PROGRAMS / "ray"), "job", "submit", "--address", head.dashboard, "--working-dir"),
        *(".", "--runtime-env-json", environment, "--", "python", "settings.py"),
        cwd=tmp_path,
    )
    joined = head.run("python", "settings.py", cwd=tmp_path, RAY_ADDRESS=head.address, **asked)
    for result in (submitted, joined):
        assert result.returncode == 0, head.told(result)
        for process in ("task", "actor"):
            assert f"{process} True" in result.stdout, head.told(result)
        for value in asked.values():
            assert value in result.stdout


def check_what_travelled(head: Head, repository: Path) -> None:
    """The checkout as the node unpacked it is small, has all jobs and no environment."""
    unpacked = "session_2*/runtime_resources/working_dir_files/*/jobs/train.py"
    (job,) = (head.folder / "t").glob(unpacked)
    folder = job.parents[1]
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 10e6
    tops = {path.relative_to(folder).parts[0] for path in files}
    assert {"jobs", "sr4ir_dist", "pyproject.toml"} <= tops
    assert tops.isdisjoint({".venv", ".git", "runs", "datasets"})
    jobs = {path.name for path in (repository / "jobs").glob("*.py")}
    assert {path.name for path in (folder / "jobs").glob("*.py")} == jobs


@pytest.mark.slow
def test_another_recipe_starts_from_what_was_published(
    request: pytest.FixtureRequest,
    head: Head,
    trained: dict[str, Any],
    drawn: str,
    repository: Path,
    train_command: Callable[..., list[str]],
    tmp_path: Path,
):
    ours = str(tmp_path / "ours")
    original = sharing.pull(trained["checkpoint"], ours, say=print)
    # In a store of another kind, where there is one.
    other = "s3rver" if request.config.getoption("--s3rver") else "s3"
    bucket = request.getfixturevalue(other)()
    hub, runs = f"{bucket}/hub", f"{bucket}/runs"
    name = versions.publish(ours, "team/drawn", hub=hub, tag="best")
    (entry,), problems = listing.entries(hub)
    assert (entry.name, entry.tags, problems) == (name, ("best",), [])
    assert entry.card.metrics.items() <= trained["metrics"].items()
    assert entry.card.metrics.keys() == {"psnr", "ssim", "top1"}
    pulled = sharing.pull("hub://team/drawn", str(tmp_path / "theirs"), hub=hub, say=print)
    assert original.files.items() <= pulled.files.items()

    environment = storage.worker_environment() | {"SR4IR_HUB": hub}
    starts = ("sr.start=hub://team/drawn@best", "task.weights=hub://team/drawn")
    settings = [word for start in starts for word in ("--set", start)]
    _, *arguments = train_command(drawn, runs, *SHORT, *settings)
    job = head.submit(
        *("env", *(f"{variable}={value}" for variable, value in environment.items())),
        *("python", "jobs/train.py", "drawn_cls/edsr-x4/s2t", *arguments),
        cwd=repository,
    )
    assert job.returncode == 0, head.told(job)
    (run,) = storage.list_names(runs)
    continued = checkpoint.load(checkpoint.resolve(f"{runs}/{run}"))
    # S->T trains the task network on the images of an SR network that stays as it is.
    assert continued.read("sr.safetensors") == original.read("sr.safetensors")
    assert continued.read("task.safetensors") != original.read("task.safetensors")


@pytest.mark.slow
def test_the_doctor_finds_the_cluster_ready(
    head: Head, s3: Callable[[], str], repository: Path, tmp_path: Path
):
    json_file = tmp_path / "found.json"
    command = ("python", "jobs/doctor.py", "--storage", f"{s3()}/runs", "--address", head.address)
    command += ("--workers", "2", "--cpus", "1", "--cpu", "--json", str(json_file))
    result = head.run(*command, cwd=repository)
    assert result.returncode == 0, head.told(result)
    found = {each["name"]: each["status"] for each in storage.read_json(json_file)["findings"]}
    for name, status in found.items():
        assert status == "ok" or not name.startswith(("storage", "ray")), name
    assert {"storage checksums", "ray token", "ray nodes"} <= found.keys()
    for secret in (TOKEN, os.environ[KEY]):
        assert secret not in result.stdout + result.stderr + json_file.read_text()


def test_a_submit_without_the_token_is_refused(head: Head, tmp_path: Path):
    # Nor may a token in the caller's home folder get it in.
    without = {"RAY_AUTH_MODE": None, "RAY_AUTH_TOKEN_PATH": None, "HOME": str(tmp_path)}
    (tmp_path / "job").mkdir()
    refused = head.submit("touch", str(tmp_path / "ran"), cwd=tmp_path / "job", **without)
    assert refused.returncode != 0
    assert "authentication token" in refused.stdout + refused.stderr
    assert not (tmp_path / "ran").exists()


def test_the_package_of_the_working_directory_runs(head: Head, tmp_path: Path):
    # Not the one that is installed, which on a cluster may be older or absent.
    for path, code in {
        "sr4ir_dist/__init__.py": "",
        "jobs/where.py": "import sr4ir_dist\nprint('from', sr4ir_dist.__file__)",
    }.items():
        (tmp_path / path).parent.mkdir()
        (tmp_path / path).write_text(code)
    job = head.submit("python", "jobs/where.py", cwd=tmp_path)
    assert job.returncode == 0, head.told(job)
    assert f"from {head.folder}" in job.stdout
