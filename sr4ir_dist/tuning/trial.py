"""One trial: a run on Ray Train like any other, whose evaluations Ray Tune gets to hear."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray.train
import ray.tune
from ray.train import UserCallback
from ray.util.queue import Queue

from sr4ir_dist import checkpoint, storage
from sr4ir_dist.config import Experiment
from sr4ir_dist.training import launch
from sr4ir_dist.training.plan import Plan, make_plan
from sr4ir_dist.training.state import load_progress
from sr4ir_dist.training.worker import CHECKPOINT, pointed_to, pointer_to
from sr4ir_dist.tuning.space import apply


@dataclass(frozen=True)
class Trials:
    """What all trials of a search have in common.

    Attributes:
        experiment: with the settings of all trials.
        data: URI of the dataset, or of each one of a mix.
        storage_uri: where the runs are that trials start from, and weights that go by names.
        folder: where the search is kept.
        resources: what each trial takes of the cluster.
        log_every: steps between two lines of a trial's progress.
        cache_dir: node-local cache of shards from remote storage.
    """

    experiment: Experiment
    data: tuple[str, ...]
    storage_uri: str
    folder: str
    resources: launch.Resources
    log_every: int
    cache_dir: str | None


def run_trial(values: dict[str, Any], trials: Trials) -> None:
    """Train one trial, or what remains of it; Ray Tune calls it, on any node.

    A trial that is begun again goes on from its newest checkpoint. One that Ray Tune gave another
    trial's checkpoint (population-based training) goes on from that, as a new run.

    Args:
        values: the trial's, by dotted path.
        trials: what all trials have in common.

    Raises:
        ValueError: the values cannot be trained.
        TrainingError: the run failed.
    """
    # Ray logs each report; the search's table says it better.
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    home = storage.join(trials.folder, "trials", ray.tune.get_context().get_trial_id())
    start = _pointed()
    plan = make_plan(
        apply(trials.experiment, values),
        data=trials.data,
        storage_uri=trials.storage_uri,
        folder=storage.join(home, _place(home, start)),
    )
    if start is not None and not checkpoint.newest_first(plan.run_uri):
        _fork(start, plan)
    with _forwarding() as told:
        result = launch.train(
            plan,
            trials.resources,
            log_every=trials.log_every,
            cache_dir=trials.cache_dir,
            callback=_Forward(told.queue),
        )
    if not told.any:
        # It had finished before Ray Tune heard of it.
        _tell({**result["history"][-1], CHECKPOINT: result["checkpoint"]})


class _Forward(UserCallback):
    """Runs in Ray Train's controller, and hands rank 0's reports to the trial."""

    def __init__(self, queue: Queue) -> None:
        self._queue = queue

    def after_report(
        self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any
    ) -> None:
        self._queue.put(metrics[0])


@dataclass
class _Told:
    queue: Queue
    any: bool = False
    error: BaseException | None = None


@contextmanager
def _forwarding() -> Iterator[_Told]:
    """Ray's own callback between Train and Tune gives Tune no checkpoints to exploit."""
    told = _Told(Queue(actor_options={"num_cpus": 0}))

    def forward() -> None:
        try:
            while (figures := told.queue.get()) is not None:
                _tell(figures)
                told.any = True
        except BaseException as error:
            told.error = error

    thread = threading.Thread(target=forward, name="reports", daemon=True)
    thread.start()
    try:
        yield told
    finally:
        told.queue.put(None)
        thread.join()
        told.queue.shutdown()
    if told.error is not None:
        # Begun again, the trial tells of its run's end.
        raise told.error


def _tell(figures: dict[str, Any]) -> None:
    if figures.get(CHECKPOINT) is None:
        ray.tune.report(figures)
        return
    with pointer_to(figures[CHECKPOINT]) as folder:
        ray.tune.report(figures, checkpoint=ray.tune.Checkpoint.from_directory(folder))


def _pointed() -> str | None:
    """The checkpoint that Ray Tune wants the trial to go on from."""
    given = ray.tune.get_checkpoint()
    if given is None:
        return None
    with given.as_directory() as folder:
        return pointed_to(folder)


def _place(home: str, start: str | None) -> str:
    """The folder, below the trial's own, of the run that begins or goes on at a checkpoint."""
    if start is None:
        return "0"
    if start.startswith(f"{home}/"):
        return start[len(home) + 1 :].partition("/")[0]
    return hashlib.sha256(start.encode()).hexdigest()[:8]


def _fork(uri: str, plan: Plan) -> None:
    """Give a run the checkpoint of another one to go on from, under its own settings."""
    try:
        saved = checkpoint.load(uri)
    except checkpoint.CheckpointError:
        # Pruned meanwhile: the other one has come further.
        saved = checkpoint.load(checkpoint.resolve(checkpoint.run_of(uri) or uri))
    files = {name: saved.read(name) for name in saved.files}
    files["experiment.json"] = plan.experiment.model_dump_json(indent=2).encode()
    checkpoint.publish(plan.run_uri, load_progress(saved).step, files)
