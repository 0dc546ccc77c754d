"""A run's checkpoints, published in the background while the next steps are computed."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, Protocol

import torch.distributed as dist

from sr4ir_dist import checkpoint, retention, storage
from sr4ir_dist.training import state
from sr4ir_dist.training.plan import Plan
from sr4ir_dist.training.state import Progress
from sr4ir_dist.training.views import Setup

MOST_FAILURES = 3
"""So many saves in a row that fail end the run."""
# Ranks that hear nothing for longer give up, however well a large upload goes.
_TELL_EVERY_S = 10.0


class SavingError(ValueError):
    """Checkpoint after checkpoint could not be saved; every rank raises it."""


class Report(Protocol):
    """Tells of an evaluated checkpoint; every rank calls it."""

    def __call__(self, figures: dict[str, Any], uri: str | None) -> None:
        """Take the figures and, on rank 0 where it was published, the checkpoint's URI."""
        ...


class Saver:
    """Saves a run's state, one checkpoint at a time; a context manager.

    A save takes the time of a copy in memory; rank 0 then writes it while the steps go on, and the
    next save waits for that. One that fails costs that checkpoint alone. Leaving the context waits
    for what is being written.

    Args:
        setup: what is saved.
        plan: the run.
        say: is told what fails, and why.
        report: is told of each evaluated checkpoint, at the next save or at the end.
        awaited: an evaluated checkpoint is waited for, and reported before the steps go on.
    """

    def __init__(
        self,
        setup: Setup,
        plan: Plan,
        *,
        say: Callable[[str], None],
        report: Report,
        awaited: bool = False,
    ) -> None:
        self._setup, self._plan = setup, plan
        self._say, self._report, self._awaited = say, report, awaited
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._saving: Progress | None = None
        self._writing: Future[str] | None = None  # on rank 0
        self._failures = 0
        self._why = ""

    def __enter__(self) -> Saver:
        """The saver itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Waits for the checkpoint that is being written."""
        self._pool.shutdown()

    def save(self, progress: Progress) -> None:
        """Start to save the engines' state; every rank must call it.

        Raises:
            SavingError: the saves before this one failed, too many in a row.
        """
        self._settle()
        if self._failures == MOST_FAILURES:
            raise SavingError(
                f"{MOST_FAILURES} checkpoints in a row could not be saved: {self._why}"
            )
        files = state.snapshot(self._setup, progress)
        self._saving = progress
        if self._setup.rank == 0:
            run = {"run": self._plan.run, "data": self._plan.data}
            files["run.json"] = json.dumps(run).encode()
            self._writing = self._pool.submit(self._write, progress.step, files)
        if self._awaited and _judged(progress):
            self._settle()

    def finish(self) -> None:
        """Wait until the last checkpoint is published; every rank must call it.

        Raises:
            StorageError: it was not.
        """
        self._settle()
        if self._failures:
            raise storage.StorageError(f"the last checkpoint could not be saved: {self._why}")

    def _settle(self) -> None:
        """Wait for the save before; all ranks learn what became of it."""
        progress, self._saving = self._saving, None
        if progress is None:
            return
        while (outcome := shared(self._outcome, self._setup.rank)) is None:
            pass
        uri, why = outcome
        self._failures = self._failures + 1 if uri is None else 0
        self._why = why
        # Ray's report waits seconds for its controller, so it tells of evaluated checkpoints alone.
        if _judged(progress):
            self._report(progress.history[-1], uri)

    def _outcome(self) -> tuple[str | None, str] | None:
        assert self._writing is not None
        if not wait([self._writing], timeout=_TELL_EVERY_S).done:
            return None
        try:
            return self._writing.result(), ""
        except storage.StorageError as error:
            return None, str(error)

    def _write(self, step: int, files: dict[str, bytes]) -> str:
        run_uri, settings = self._plan.run_uri, self._setup.experiment.checkpoint
        try:
            uri = checkpoint.publish(run_uri, step, files)
        except storage.StorageError as error:
            self._say(f"the checkpoint after step {step} could not be saved: {error}")
            raise
        try:
            figure = "psnr" if self._setup.task is None else self._setup.task.figure
            retention.prune(
                run_uri,
                newest=settings.keep,
                best=settings.keep_best,
                score=lambda saved: state.load_figure(saved, figure),
            )
        except storage.StorageError as error:
            self._say(f"older checkpoints could not be deleted: {error}")
        return uri


def _judged(progress: Progress) -> bool:
    return bool(progress.history) and progress.history[-1]["step"] == progress.step


def shared(read: Callable[[], Any], rank: int) -> Any:
    """Rank 0's answer on every rank, for ranks must not see different storage."""
    box: list[Any] = [None]
    if rank == 0:
        box = [read()]
    dist.broadcast_object_list(box, src=0)
    return box[0]
