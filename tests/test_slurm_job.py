"""The Slurm job as it is, on a machine with one node and stand-ins for Slurm's own two commands."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# `ray symmetric-run` ends with `ray stop`, which stops every Ray that it sees: here its own alone.
APART = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "--net"]
# srun runs the command on one node after its options; scontrol writes down what it is told.
SRUN = '#!/bin/bash\nwhile [[ "$1" == --* ]]; do shift; done\nexec "$@"\n'
SCONTROL = '#!/bin/bash\necho "scontrol $*"\n'
# Stands for a training that is busy when the notice comes, and tells Slurm's batch shell of it.
BUSY = """#!/bin/bash
if [[ "$1" == jobs/train.py ]]; then
    kill -USR1 "$BATCH"
    exec sleep 60
fi
exec {python} "$@"
"""


@pytest.fixture
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[int, str, Path]]:
    """Runs the job with some arguments; gives its exit code, what it told, and its home."""
    if shutil.which("ip") is None or subprocess.run([*APART, "true"], check=False).returncode:
        pytest.skip("needs namespaces of its own (root, unshare, ip)")
    folder = tmp_path_factory.mktemp("slurm")
    programs, home, checkout = folder / "bin", folder / "home", folder / "checkout"
    for each in (programs, home, checkout):
        each.mkdir()
    for name in ("jobs", "sr4ir_dist"):  # without a .venv, whose programs would come first
        (checkout / name).symlink_to(ROOT / name)

    def write(name: str, text: str) -> None:
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)

    def run(*arguments: str, busy: bool = False) -> tuple[int, str, Path]:
        write("srun", SRUN)
        write("scontrol", SCONTROL)
        if busy:
            write("python", BUSY.format(python=sys.executable))
        others = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "SLURM_"))}
        settings = {
            "HOME": str(home),
            "PATH": os.pathsep.join(
                [str(programs), str(Path(sys.executable).parent), os.environ["PATH"]]
            ),
            "SLURM_SUBMIT_DIR": str(checkout),
            "SLURM_JOB_ID": "4711",
            "SLURM_JOB_NUM_NODES": "1",
            "SLURM_CPUS_PER_TASK": "2",
            "OMP_NUM_THREADS": "1",
        }
        script = 'ip link set lo up; export BATCH=$$; exec bash jobs/slurm.sh "$@"'
        done = subprocess.run(
            [*APART, "bash", "-c", script, "slurm", *arguments],
            cwd=ROOT,
            env=others | settings,
            capture_output=True,
            text=True,
            check=False,
            timeout=200,
        )
        shutil.rmtree("/tmp/ray-4711", ignore_errors=True)
        return done.returncode, done.stdout + done.stderr, home

    return run


def test_a_run_under_slurm_has_a_token_of_its_own_and_leaves_nothing(slurm):
    code, told, home = slurm("--list", "voc_seg/edsr-x8")
    assert code == 0, told
    assert "voc_seg/edsr-x8/sr4ir" in told
    assert "Running command on head node" in told
    assert [path for path in home.rglob("*") if path.is_file() and "ray" in str(path)] == []


@pytest.mark.slow
def test_a_failed_training_is_a_failed_job(slurm):
    code, told, _ = slurm("voc_seg/edsr-x8/sr5ir", "--data", "nowhere")
    assert code == 1, told
    assert "sr5ir" in told
    assert "requeue" not in told


@pytest.mark.slow
def test_a_notice_drains_the_nodes_and_queues_the_job_again(slurm):
    code, told, _ = slurm("voc_seg/edsr-x8/sr4ir", busy=True)
    assert code == 0, told
    assert "notice from Slurm" in told
    assert "is drained, 120 s before its end" in told
    assert "scontrol requeue 4711" in told
