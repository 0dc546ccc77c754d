"""How long a run takes to start: from the command to the end of its first training step.

`jobs/train.py` runs as a user runs it, in a process of its own, and its line `first step after ..`
is read. The parts, which follow one another:

- *imports*: the interpreter and all that the job imports;
- *plan*: data, settings and storage are checked;
- *Ray*: a cluster is joined, or started on this machine;
- *workers*: Ray Train's controller and then its workers start, import, and find one another;
- *networks*: networks and DeepSpeed's engines are made, or restored;
- *first batch* and *first step*.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sr4ir_dist.training.first_step import read

_LAST_LINES = 20


class StartError(RuntimeError):
    """The job did not come to a first step."""


@dataclass(frozen=True)
class Start:
    """One run's start.

    Attributes:
        seconds: from the command to the end of the first step.
        parts: seconds of each part.
        whole: seconds from the command to its end.
        load: the machine's load average before it.
    """

    seconds: float
    parts: dict[str, float]
    whole: float
    load: float


def measure(
    jobs: Path,
    name: str,
    settings: Sequence[str],
    *,
    runs: int,
    workers: int,
    images: int,
    size: int,
    say: Callable[[str], None],
) -> list[Start]:
    """Start runs of one epoch one after the other, each from nothing, in a temporary folder.

    Args:
        jobs: the folder of the jobs.
        name: an experiment on the drawn dataset.
        settings: of the experiment, besides those of a short run.
        runs: how many.
        workers: ranks of each.
        images: of the dataset.
        size: their side in pixels.
        say: is told what happens.

    Raises:
        StartError: a job failed, or told of no first step.
    """
    changed = ["epochs=1", "warmup_epochs=0", "batch_size=8", *settings]
    chosen = [word for setting in changed for word in ("--set", setting)]
    starts = []
    with tempfile.TemporaryDirectory() as work:
        uri = draw(jobs / "prepare_data.py", Path(work), images=images, size=size)
        for number in range(1, runs + 1):
            places = ["--data", str(uri), "--storage", str(Path(work, f"runs-{number}"))]
            arguments = [name, *places, "--workers", str(workers), *chosen]
            starts.append(run(jobs / "train.py", arguments, say=say))
            say(f"run {number} of {runs}: first step after {starts[-1].seconds:.1f} s")
    return starts


def draw(prepare: Path, folder: Path, *, images: int, size: int) -> Path:
    """Make a drawn dataset by the job `prepare`, in a folder that is returned.

    Raises:
        StartError: the job failed.
    """
    uri = folder / "data"
    counts = ["--train-count", str(images), "--val-count", "8", "--size", str(size)]
    done = subprocess.run(
        [sys.executable, str(prepare), "drawn", "--out", str(uri), *counts],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise StartError(f"{prepare.name} ended with {done.returncode}: {done.stderr[-2000:]}")
    return uri


def run(train: Path, arguments: Sequence[str], *, say: Callable[[str], None]) -> Start:
    """Run the job `train` to its end.

    Args:
        train: the job's file.
        arguments: of the job; they must name a run that has not begun.
        say: is told what the job prints before its first step.

    Raises:
        StartError: the job failed, or told of no first step.
    """
    load = os.getloadavg()[0]
    began = time.perf_counter()
    lines, parts = [], None
    command = [sys.executable, "-u", str(train), *arguments]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as job:
        assert job.stdout is not None
        for line in job.stdout:
            lines.append(line.rstrip())
            if parts is None:
                parts = read(line)
                say(lines[-1])
    whole = time.perf_counter() - began
    if job.returncode or parts is None:
        tail = "\n".join(lines[-_LAST_LINES:])
        raise StartError(f"{train.name} ended with {job.returncode}:\n{tail}")
    return Start(sum(parts.values()), parts, whole, load)
