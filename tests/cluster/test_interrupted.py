"""Ctrl-C in a job's terminal ends it soon, in one line, and with the code that shells expect."""

import signal
import subprocess
import sys
import time

import pytest

pytestmark = pytest.mark.timeout(600)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train", "reproduce"])
def test_ctrl_c_ends_a_job_without_a_traceback(
    name, cluster, drawn, tmp_path, repository, train_command
):
    many = ("--set", "epochs=1000", "--log-every", "1")
    words = train_command(drawn, str(tmp_path), *many)
    if name == "reproduce":
        words = ["table5", "--data", f"drawn_cls={drawn}", "--storage", str(tmp_path)]
        words += ["--scale", "4", "--sr", "edsr", "--cpus", "1", "--cpu", "--lanes", "2"]
        words += ["--pretrain", "--set", "epochs=1000", "--set", "sr.blocks=1"]
    program = [sys.executable, str(repository / "jobs" / f"{name}.py"), *words]
    log = tmp_path / "job.log"
    with log.open("wb") as into:
        job = subprocess.Popen([*program, "--address", cluster], stdout=into, stderr=into)
    try:
        deadline = time.monotonic() + 300
        while "images/s" not in log.read_text():
            assert job.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        job.send_signal(signal.SIGINT)
        assert job.wait(120) == 130, log.read_text()
    finally:
        job.kill()
        job.wait()
    told = log.read_text()
    assert "interrupted: the same command again continues" in told
    # Ray's own processes have theirs where the machine is busy, or has other Rays.
    ours = [line for line in told.splitlines() if " pid=" not in line]
    assert not any("Traceback" in line for line in ours), told
