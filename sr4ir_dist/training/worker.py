"""What one Ray Train worker does: build, restore, train, publish."""

from __future__ import annotations

import json
import logging
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray.train
import ray.util
import torch
import torch.distributed as dist

from sr4ir_dist import checkpoint, storage
from sr4ir_dist.metrics.lpips import load_lpips
from sr4ir_dist.training import state
from sr4ir_dist.training.agreement import Agreement, Wish
from sr4ir_dist.training.build import (
    build_networks,
    make_setup,
    open_loader,
    settle_random_start,
)
from sr4ir_dist.training.capacity import Resources, has_more_room
from sr4ir_dist.training.evaluate import evaluate
from sr4ir_dist.training.first_step import FirstStep, Marks
from sr4ir_dist.training.loop import Hooks, NonFiniteLossError, train
from sr4ir_dist.training.mirror import Mirror, own_output
from sr4ir_dist.training.observers import Observers, RayMetrics, TensorBoard, load_callback
from sr4ir_dist.training.plan import RESULT, EvaluationRequest, Plan, load_start
from sr4ir_dist.training.saving import Saver, SavingError, shared
from sr4ir_dist.training.state import Progress
from sr4ir_dist.training.views import Setup
from sr4ir_dist.training.watchdog import LostRankError, Watchdog

CHECKPOINT = "checkpoint"
"""The key of a report that names the evaluated checkpoint."""
_POINTER = "pointer.json"
LEFT = "left"
"""The key of a result that only names nodes that the workers had to leave."""


class RefusedError(ValueError):
    """A run that a retry would end in the same way; the message says why."""


@dataclass(frozen=True)
class Job:
    """A plan and how to run it; of all this only threads change a result, by rounding.

    Attributes:
        plan: the run.
        resources: with the CPUs of a worker, which are the threads of its networks.
        log_every: steps between two lines of progress.
        cache_dir: node-local cache of shards from remote storage; None for the default.
        awaited: someone decides by each evaluation whether the run goes on, so it is reported at
            once and not when the next checkpoint is saved.
        observers: `module:name` of what else is told of the run, on rank 0.
        marks: what the start was made of until the workers were asked for; None to tell nothing.
    """

    plan: Plan
    resources: Resources
    log_every: int
    cache_dir: str | None
    awaited: bool = False
    observers: tuple[str, ...] = ()
    marks: Marks | None = None


@dataclass(frozen=True)
class EvaluationJob:
    """Requests and how to run them.

    Attributes:
        requests: what to judge, one after the other.
        resources: with the CPUs of a worker, which are the threads of its networks.
        cache_dir: node-local cache of shards from remote storage; None for the default.
    """

    requests: tuple[EvaluationRequest, ...]
    resources: Resources
    cache_dir: str | None


def run_worker(config: dict[str, Job]) -> dict[str, Any]:
    """Train on this rank until the run is finished; `launch.train` starts it on every worker.

    Args:
        config: the job, under the key `job`.

    Returns:
        The run's result, or `{"left": [node, ..]}` where the workers have to go on elsewhere.

    Raises:
        RefusedError: no retry can help.
    """
    job = config["job"]
    prepare_worker(job.resources)
    return train_here(job, dist.get_rank(), dist.get_world_size())


def prepare_worker(resources: Resources) -> None:
    """Settle what holds for all runs of this process: threads, and who may write lines."""
    _quieten()
    torch.set_num_threads(resources.cpus or 1)


def train_here(job: Job, rank: int, world_size: int) -> dict[str, Any]:
    """Train a run on this rank until it is finished, as `run_worker` does.

    Raises:
        RefusedError: no retry can help.
    """
    try:
        with _watched(job, rank, world_size) as (watchdog, mirror):
            return _run(job, rank, world_size, watchdog, mirror)
    except (NonFiniteLossError, SavingError) as error:
        raise RefusedError(str(error)) from error
    except ValueError as error:
        # Torch and Ray raise ValueErrors too, of a process group that was taken away for one.
        if _storage_failed(error) or not type(error).__module__.startswith("sr4ir_dist."):
            raise
        # One of ours names a setting or a file that is wrong, and will be wrong again.
        raise RefusedError(f"{type(error).__name__}: {error}") from error


def evaluate_worker(config: dict[str, EvaluationJob]) -> dict[str, Any]:
    """Judge checkpoints on this rank's share; `launch.evaluate` starts it on every worker."""
    job = config["job"]
    prepare_worker(job.resources)
    return {"figures": [judge(request, job.cache_dir) for request in job.requests]}


def judge(request: EvaluationRequest, cache_dir: str | None = None) -> dict[str, float]:
    """Judge a checkpoint on this rank's share; every rank of the process group must call it.

    Args:
        request: from `make_request`.
        cache_dir: node-local cache of shards from remote storage.
    """
    modules = build_networks(request.experiment, only=state.JUDGED)
    state.load_networks(modules, checkpoint.load(request.checkpoint))
    for role, start in request.exchanged.items():
        load_start(modules[role], start)
    setup = make_setup(
        request.experiment,
        modules,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        engine="none",
        lpips=load_lpips(request.lpips) if request.lpips else None,
    )
    if request.view is not None:
        setup = replace(setup, recipe=replace(setup.recipe, judged_on=request.view))
    say: Callable[[str], None] = print if setup.rank == 0 else lambda text: None
    with open_loader(setup, request.data, request.split, cache_dir) as loader:
        return evaluate(setup, loader, say)


@contextmanager
def _watched(job: Job, rank: int, world_size: int) -> Iterator[tuple[Watchdog, Mirror]]:
    """What goes on beside training: this rank's output is copied to the run, ranks are watched."""
    address = ray.util.get_node_ip_address()
    begun = shared(lambda: time.strftime("%Y%m%dT%H%M%SZ", time.gmtime()), rank)
    watchdog = Watchdog(
        rank, world_size, address=address, limit_s=job.resources.rank_timeout_s, say=print
    )
    with Mirror(print) as mirror:
        for name, path in own_output().items():
            mirror.add(path, storage.join(job.plan.run_uri, "logs", begun, f"rank-{rank}.{name}"))
        try:
            with watchdog:
                yield watchdog, mirror
        except (NonFiniteLossError, SavingError):
            raise
        except LostRankError as error:
            print(error)
            raise
        except Exception:
            # Ray tells of it too, but not where a whole node is lost in the same moment.
            traceback.print_exc()
            raise
        finally:
            sys.stdout.flush()
            sys.stderr.flush()


def _build(
    job: Job, rank: int, world_size: int, say: Callable[[str], None]
) -> tuple[Setup, Progress]:
    """Networks and engines as the newest checkpoint has them, or as the run starts."""
    plan = job.plan
    saved = shared(lambda: _newest_sound(plan.run_uri, say), rank)
    modules = build_networks(plan.experiment)
    for network, module in modules.items():
        start = plan.starts[network]
        if saved is None or network not in state.JUDGED:
            say(f"{network} network: from {start.told}")
            if start.uri is not None:
                say(load_start(module, start))
            elif network == "task":
                settle_random_start(plan.experiment, module, plan.data, job.cache_dir)
    if saved is not None:
        state.load_networks(modules, saved)
    lpips = load_lpips(plan.lpips) if plan.lpips else None
    setup = make_setup(plan.experiment, modules, rank=rank, world_size=world_size, lpips=lpips)
    if saved is None:
        return setup, Progress()
    state.load_optimizers(setup.engines, saved)
    progress = state.load_progress(saved)
    say(f"continuing after step {progress.step} from {saved.uri}")
    return setup, progress


def _run(
    job: Job, rank: int, world_size: int, watchdog: Watchdog, mirror: Mirror
) -> dict[str, Any]:
    plan = job.plan
    say: Callable[[str], None] = print if rank == 0 else lambda text: None
    first = FirstStep(job.marks, say)
    first.after("workers")
    setup, progress = _build(job, rank, world_size, say)
    first.after("networks")
    agreement = Agreement(
        world_size,
        every_minutes=plan.experiment.checkpoint.every_minutes,
        notice=notice,
        grow=lambda: has_more_room(job.resources, world_size),
        patience_s=job.resources.rank_timeout_s,
    )
    with (
        agreement,
        Saver(setup, plan, say=say, report=_report, awaited=job.awaited) as saver,
        open_loader(setup, plan.data, "train", job.cache_dir) as training,
        open_loader(setup, plan.data, "val", job.cache_dir) as validation,
        closing(_observers(job, rank, progress, mirror)) as observers,
    ):
        total = training.steps_per_epoch * plan.experiment.epochs

        def publish(progress: Progress) -> None:
            agreement.saved()
            saver.save(progress)

        def logged(progress: Progress, losses: dict[str, float], speed: dict[str, float]) -> None:
            say(_line(progress, losses, speed, total))
            observers.logged(progress.step, losses | speed)

        def evaluated(progress: Progress) -> None:
            say(f"evaluated: {progress.history[-1]}")
            observers.evaluated(progress.step, progress.history[-1])

        def entered(doing: str, step: int) -> None:
            first.entered(doing)
            watchdog.entered(doing, step)

        def wish() -> Wish:
            first.ended()
            return agreement.after_step()

        hooks = Hooks(
            publish=publish,
            entered=entered,
            logged=logged,
            judging=say,
            evaluated=evaluated,
            wish=wish,
        )
        progress = train(setup, training, validation, progress, hooks, log_every=job.log_every)
        watchdog.entered("saving", progress.step)
        saver.finish()
        if agreement.left is not None:
            say(f"saved after step {progress.step}, to go on with other workers")
            return {LEFT: list(agreement.left)}
    return _finish(setup, plan, progress)


def notice() -> list[str] | None:
    """The nodes that are about to be taken away; every rank must call it, and all get the same."""
    info = ray.train.get_preemption_info()
    return None if info is None else list(info.preempted_node_ids)


def _observers(job: Job, rank: int, progress: Progress, mirror: Mirror) -> Observers:
    if rank != 0:
        return Observers([], print)
    own = [TensorBoard(job.plan, progress.step, mirror), RayMetrics(job.plan)]
    added = [load_callback(name)(job.plan) for name in job.observers]
    return Observers([*own, *added], print)


def _quieten() -> None:
    # Ray logs each report and DeepSpeed each engine; the loop's own lines say it better.
    for name, logger in logging.root.manager.loggerDict.items():
        if isinstance(logger, logging.Logger) and "ray/train/v2" in name:
            logger.setLevel(logging.WARNING)
    for name in ("DeepSpeed", "torch.utils.cpp_extension"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _newest_sound(run_uri: str, say: Callable[[str], None]) -> checkpoint.Checkpoint | None:
    published = checkpoint.newest_first(run_uri)
    for uri in published:
        try:
            return checkpoint.verify(uri)
        except checkpoint.CheckpointError as error:
            say(f"going back to the checkpoint before: {error}")
    if published:
        raise checkpoint.CheckpointError(
            f"none of the {len(published)} checkpoints of {run_uri} can be read; delete them to "
            "train anew"
        )
    return None


def _storage_failed(error: BaseException | None) -> bool:
    """Whether an error comes from storage that did not answer, and may answer a retry."""
    while error is not None:
        if isinstance(error, storage.StorageError):
            return not isinstance(error, storage.MissingError | storage.ContentError)
        error = error.__cause__
    return False


def _report(figures: dict[str, Any], uri: str | None) -> None:
    figures = {**figures, CHECKPOINT: uri}
    if uri is None:
        ray.train.report(figures)
        return
    with pointer_to(uri) as folder:
        ray.train.report(figures, checkpoint=ray.train.Checkpoint.from_directory(folder))


@contextmanager
def pointer_to(uri: str) -> Iterator[str]:
    """A folder for Ray that only names a checkpoint, whose manifest is the one truth."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, _POINTER).write_text(json.dumps({CHECKPOINT: uri}))
        yield folder


def pointed_to(folder: str) -> str:
    """The checkpoint that a folder of `pointer_to` names."""
    return json.loads(Path(folder, _POINTER).read_text())[CHECKPOINT]


def _finish(setup: Setup, plan: Plan, progress: Progress) -> dict[str, Any]:
    result = {
        "run": plan.run,
        "run_uri": plan.run_uri,
        "checkpoint": shared(lambda: checkpoint.resolve(plan.run_uri), setup.rank),
        "experiment": plan.experiment.name,
        "steps": progress.step,
        "seconds": round(progress.seconds, 3),
        "world_size": setup.world_size,
        "metrics": progress.history[-1],
        "history": list(progress.history),
        "notes": list(plan.notes),
    }
    if setup.rank == 0:
        storage.write_json(storage.join(plan.run_uri, RESULT), result)
    return result


def _line(
    progress: Progress, losses: Mapping[str, float], speed: Mapping[str, float], total: int
) -> str:
    rest = (total - progress.step) * progress.seconds / progress.step
    terms = "  ".join(f"{name} {value:.4g}" for name, value in losses.items())
    where = f"epoch {progress.epoch}  step {progress.step}/{total}"
    parts = " + ".join(
        f"{speed[part]:.3g} s {name}"
        for part, name in (("data_wait", "data"), ("phase_1", "phase 1"), ("phase_2", "phase 2"))
        if speed[part] or part == "data_wait"
    )
    pace = (
        f"{speed['images_per_second']:.4g} images/s ({parts}; most data wait: rank "
        f"{speed['data_wait_rank']:.0f})  {speed['memory_gib']:.2g} GiB"
    )
    return f"{where}  {terms}  {pace}  {progress.seconds:.0f} s, {rest:.0f} s to go"
