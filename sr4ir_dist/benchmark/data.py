"""How fast images reach a training process, next to the limits and to other libraries."""

import json
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from sr4ir_dist.benchmark.contenders import CONTENDERS, Where, Work, command
from sr4ir_dist.benchmark.formats import upload_formats, write_formats

_PERIOD_S = 0.5


@dataclass(frozen=True)
class Figures:
    """What a contender did in one run, or the medians of several.

    Attributes:
        first: images per second of the first epoch.
        later: images per second of the epochs after it.
        peak_mib: the most memory that its processes held together (proportional set sizes, so
            what they share counts once), in MiB, with all libraries that it imports.
    """

    first: float
    later: float
    peak_mib: float


@dataclass(frozen=True)
class Entry:
    """A contender's outcome: its figures in each run, or why there are none."""

    name: str
    where: Where
    runs: tuple[Figures, ...] = ()
    failure: str | None = None

    @property
    def median(self) -> Figures:
        """The median of each figure over the runs."""
        columns = zip(*((run.first, run.later, run.peak_mib) for run in self.runs), strict=True)
        return Figures(*map(statistics.median, columns))

    def as_result(self) -> dict[str, Any]:
        """The outcome as JSON has it."""
        return asdict(self) | {"median": asdict(self.median) if self.runs else None}


def measure(
    images: Sequence[str],
    work: Work,
    *,
    repeats: int,
    names: Sequence[str],
    bucket: str | None,
    say: Callable[[str], None],
) -> list[Entry]:
    """Measure contenders in turn, each in a process of its own, several times over.

    Args:
        images: URIs of JPEG files; all contenders read the same ones.
        work: what to do; its ``place`` is a folder that the formats are written to.
        repeats: how often each contender runs; they take turns, so that a slow spell of the
            machine falls on all.
        names: the contenders, of ``CONTENDERS``.
        bucket: a bucket prefix to measure from as well, or None.
        say: told what happens.

    Returns:
        One entry a contender and place, the limits first.

    Raises:
        ValueError: an unknown contender.
        DatasetError: an image cannot be read.
        StorageError: the bucket cannot be written.
    """
    unknown = sorted(set(names) - set(CONTENDERS))
    if unknown:
        raise ValueError(f"contenders {unknown}: allowed are {', '.join(CONTENDERS)}")
    formats = {CONTENDERS[name].format for name in names}
    say(f"writing {len(images):,} images as {', '.join(sorted(formats))} to {work.place}")
    write_formats(images, Path(work.place), formats)
    places: dict[Where, str] = {"disk": work.place}
    if bucket is not None:
        say(f"copying them to {bucket}")
        upload_formats(Path(work.place), bucket)
        places["s3"] = bucket
    entries = [
        Entry(name, where) for where in places for name in names if where in CONTENDERS[name].places
    ]
    for repeat in range(repeats):
        for number, entry in enumerate(entries):
            if entry.failure is not None:
                continue
            with tempfile.TemporaryDirectory(dir=work.scratch) as scratch:
                outcome = _run(
                    entry.name, replace(work, place=places[entry.where], scratch=scratch)
                )
            if isinstance(outcome, str):
                entries[number] = replace(entry, failure=outcome)
                say(f"{entry.name} from {entry.where}: {outcome}")
            else:
                entries[number] = replace(entry, runs=(*entry.runs, outcome))
                say(
                    f"run {repeat + 1} of {repeats}: {entry.name} from {entry.where}: "
                    f"{outcome.first:,.0f} then {outcome.later:,.0f} images/s, "
                    f"{outcome.peak_mib:,.0f} MiB"
                )
    return entries


def _run(name: str, work: Work) -> Figures | str:
    """A contender's figures, or the last line that it said before it failed."""
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            [sys.executable, *command(name, work)], stdout=subprocess.PIPE, stderr=errors, text=True
        ) as process,
        _peak_memory(process.pid) as peak,
    ):
        assert process.stdout is not None
        lines = [line for line in process.stdout if line.startswith("{")]
        if process.wait() != 0 or len(lines) != work.epochs:
            errors.seek(0)
            said = [line.strip() for line in errors if line.strip()]
            return said[-1] if said else f"exit code {process.returncode}"
    epochs = [json.loads(line) for line in lines]
    rates = [epoch["images"] / epoch["seconds"] for epoch in epochs]
    return Figures(rates[0], statistics.median(rates[1:]), peak[0] / 2**20)


@contextmanager
def _peak_memory(pid: int) -> Iterator[list[float]]:
    """Watches a process and its descendants; gives a list whose one number is their peak bytes."""
    peak, done = [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(_PERIOD_S):
            held = 0
            # A process may end between being listed and being looked at.
            with suppress(psutil.Error):
                parent = psutil.Process(pid)
                for process in (parent, *parent.children(recursive=True)):
                    with suppress(psutil.Error):
                        held += process.memory_full_info().pss
            peak[0] = max(peak[0], held)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()
