"""Predicting on a plan's images: what is missing, here or on a cluster, and then the tables."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import torch

from sr4ir_dist import retention, storage
from sr4ir_dist.prediction.merge import merge
from sr4ir_dist.prediction.parts import MASK_FOLDER, SR_FOLDER, PartWorker
from sr4ir_dist.prediction.plan import PARTS, SUMMARY, Part, Plan

Run = Callable[[Plan, Sequence[Part]], Iterable[dict[str, Any]]]
"""Predicts parts and gives each one's record as it is done, in any order."""
_TELL_EVERY_S = 10.0
_MOST_TOLD = 10  # skipped images, by a line each
_DAYS = 30


def predict(
    plan: Plan,
    parts: Sequence[Part],
    run: Run,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Predict what is missing, and write the tables and the summary when nothing is.

    A kill leaves finished parts, which the same call uses when it is made again. What is written is
    the same then, and for any number of workers.

    Args:
        plan: from `make_plan`.
        parts: all of them.
        run: where parts are predicted: `here(...)` or `cluster.on_cluster(...)`.
        say: is told how far it is, how fast, and which images are skipped.

    Returns:
        What `summary.json` holds (see `merge`, and `prediction`, what was predicted with), and of
        this call: `done_before` images by earlier ones, `seconds` and `images_per_second`.

    Raises:
        StorageError: the storage failed.
        ClusterError: the cluster lost workers too often.
    """
    start = time.monotonic()
    total = sum(len(part.images) for part in parts)
    place = storage.join(plan.out, SUMMARY)
    if storage.exists(place):
        say(f"{plan.out} is finished: nothing is left to predict")
        _tidy(plan, parts)
        return storage.read_json(place) | {"done_before": total}
    done = set(storage.list_names(storage.join(plan.out, PARTS)))
    missing = [part for part in parts if part.record_uri("").rpartition("/")[2] not in done]
    left = sum(len(part.images) for part in missing)
    if left < total:
        say(f"continuing: {total - left:,} of {total:,} images were done before")
    if missing:
        with retention.held(plan.checkpoint, by=plan.out, days=_DAYS):
            _follow(run(plan, missing), _Progress(left, start), say)
    seconds = time.monotonic() - start
    summary = merge(plan, parts) | {"prediction": plan.identity}
    storage.write_json(place, summary)
    _tidy(plan, parts)
    speed = {"seconds": round(seconds, 3), "images_per_second": round(left / seconds, 3)}
    return summary | {"done_before": total - left, **speed}


def here(threads: int | None = None, device: torch.device | None = None) -> Run:
    """Run parts one after the other in this process.

    Args:
        threads: torch's threads; None for its own default.
        device: where the networks lie; by default this process's.
    """

    def run(plan: Plan, parts: Sequence[Part]) -> Iterator[dict[str, Any]]:
        worker = PartWorker(plan, threads=threads, device=device)
        try:
            for part in parts:
                yield worker.predict(part)
        finally:
            worker.close()

    return run


def _tidy(plan: Plan, parts: Iterable[Part]) -> None:
    """Delete what a finished prediction needs no more, and what writers that died left behind."""
    names = (image.name for part in parts for image in part.images)
    inside = {str(PurePosixPath(name).parent) for name in names}
    with suppress(storage.StorageError):
        storage.delete(storage.join(plan.out, PARTS))
        storage.delete_unfinished(plan.out)
        for folder in (SR_FOLDER, MASK_FOLDER):
            for each in inside:
                storage.delete_unfinished(storage.join(plan.out, folder, each))


@dataclass
class _Progress:
    """How far a call is."""

    left: int
    start: float
    done: int = 0
    skipped: int = 0
    told: float = 0.0

    def line(self) -> str:
        speed = self.done / (time.monotonic() - self.start)
        skipped = f", {self.skipped:,} skipped" if self.skipped else ""
        return f"{self.done:,} of {self.left:,} images, {speed:.3g} images/s{skipped}"


def _follow(
    records: Iterable[dict[str, Any]], progress: _Progress, say: Callable[[str], None]
) -> None:
    for record in records:
        for entry in record["images"]:
            progress.done += 1
            if "skipped" in entry:
                progress.skipped += 1
                if progress.skipped <= _MOST_TOLD:
                    say(f"skipped {entry['path']}: {entry['skipped']}")
        now = time.monotonic()
        if now - progress.told > _TELL_EVERY_S or progress.done == progress.left:
            say(progress.line())
            progress.told = now
