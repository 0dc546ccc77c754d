"""Start a planned run on Ray Train workers, and see it to its end."""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import Any

import ray.train
import ray.train.torch
from ray.exceptions import RayActorError

from sr4ir_dist import checkpoint, recipes, retention, storage
from sr4ir_dist.config import ExperimentError
from sr4ir_dist.training.build import make_task
from sr4ir_dist.training.capacity import Resources, least, wait_for_room
from sr4ir_dist.training.first_step import Marks
from sr4ir_dist.training.network import SettledTorchConfig
from sr4ir_dist.training.node_request import NodeRequest
from sr4ir_dist.training.observers import load_callback
from sr4ir_dist.training.plan import RESULT, EvaluationRequest, Plan
from sr4ir_dist.training.views import cut
from sr4ir_dist.training.watchdog import from_collective
from sr4ir_dist.training.worker import (
    LEFT,
    EvaluationJob,
    Job,
    RefusedError,
    evaluate_worker,
    run_worker,
)

_ENVIRONMENT = frozenset(os.environ)  # what the user set is left as it is
_RAY_FOLDER = "ray"  # what Ray keeps for itself, beside our checkpoints
# How long a checkpoint in use is kept from being pruned where nobody says that the use has ended.
# Each launch of a run begins the time anew.
_RUN_DAYS, _EVALUATION_DAYS = 30, 3


class TrainingError(RuntimeError):
    """A run that ended without a result; its checkpoints stay usable."""


class WorkersLostError(TrainingError):
    """Workers died or did not start; they may do better the next time.

    Attributes:
        announced: they died with a node that was announced to go.
    """

    def __init__(self, message: str, *, announced: bool) -> None:
        super().__init__(message)
        self.announced = announced


def finished_result(plan: Plan) -> dict[str, Any] | None:
    """The result of a run that has finished, else None."""
    uri = storage.join(plan.run_uri, RESULT)
    return storage.read_json(uri) if storage.exists(uri) else None


def train(
    plan: Plan,
    resources: Resources,
    *,
    log_every: int = 10,
    cache_dir: str | None = None,
    callback: ray.train.UserCallback | None = None,
    observers: Sequence[str] = (),
    marks: Marks | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Train a planned run to its end, continuing it where it has checkpoints.

    Workers leave a node that is about to be taken away, having saved, and go on elsewhere. Where
    they die, they are started again from the newest checkpoint, as long as the run comes further.

    Args:
        plan: from `make_plan`.
        resources: what to ask of the cluster that `parallel.connect` joined.
        log_every: steps between two lines of progress.
        cache_dir: node-local cache of shards from remote storage.
        callback: hears of each evaluation as soon as its checkpoint is published.
        observers: what else is told of the run on its rank 0, each `module:name` of something that
            takes the plan and returns an `Observer`.
        marks: what the start was made of so far, to be told with the rest after the first step.
        say: is told what the run waits for.

    Returns:
        The run's result: `run`, `run_uri`, `checkpoint`, `experiment`, `steps`, `seconds`,
        `world_size`, `metrics` (the last evaluation) and `history` (all of them).

    Raises:
        ExperimentError: the cluster has not what the run asks for.
        TrainingError: the run was refused by its workers, or they died too often.
    """
    done = finished_result(plan)
    if done is not None:
        return done
    check_shares(plan, resources.workers, least(resources))
    for name in observers:
        load_callback(name)
    job = Job(
        plan,
        resources,
        log_every=log_every,
        cache_dir=local(cache_dir),
        awaited=callback is not None,
        observers=tuple(observers),
        marks=marks,
    )
    with NodeRequest() as request:
        result = _see_through(job, [] if callback is None else [callback], request, say)
    release_starts(plan)
    return result


def _see_through(
    job: Job,
    callbacks: Sequence[ray.train.UserCallback],
    request: NodeRequest,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Start workers again and again, until the run has a result or does not come further."""
    plan, resources = job.plan, job.resources
    left: set[str] = set()
    failures = 0
    newest = checkpoint.newest_first(plan.run_uri)[:1]
    while True:
        given = wait_for_room(resources, say, request, left)
        # Later rounds go on as this one does, and a node that was lost gets time to come back.
        wait_s = max(resources.wait_s, resources.rank_timeout_s)
        resources = replace(resources, cpus=given.cpus, gpu=given.gpu, wait_s=wait_s)
        job = replace(job, resources=resources)
        try:
            hold_starts(plan)
            # Our checkpoints say where the run stands. What Ray kept of an earlier launch can only
            # harm: it may be half-written, and another version of Ray refuses it.
            storage.delete(storage.join(plan.run_uri, _RAY_FOLDER))
            trainer = make_trainer(run_worker, job, given, folder=plan.run_uri, callbacks=callbacks)
            result = fit(trainer, f"run {plan.run}")
        except (WorkersLostError, storage.StorageError) as error:
            with suppress(storage.StorageError):
                before, newest = newest, checkpoint.newest_first(plan.run_uri)[:1]
                failures = failures if newest == before else 0
            failures += not (isinstance(error, WorkersLostError) and error.announced)
            if failures > resources.max_failures:
                raise
            say(f"{error}; starting again ({failures} of {resources.max_failures} times)")
            job = replace(job, marks=None)
            continue
        if LEFT not in result:
            return result
        job = replace(job, marks=None)  # they were told, and of the first start alone
        left.update(result[LEFT])
        nodes = ", ".join(result[LEFT])
        say(f"node {nodes} goes: going on elsewhere" if nodes else "going on with more workers")


def hold_starts(plan: Plan) -> None:
    """Keep what a run starts from from being pruned until the run has its result.

    Raises:
        StorageError: the storage cannot be written.
    """
    for uri in _start_uris(plan):
        until = storage.join(plan.run_uri, RESULT)
        retention.hold(uri, by=plan.run_uri, days=_RUN_DAYS, until=until)


def release_starts(plan: Plan) -> None:
    """End `hold_starts` at once; it would end by itself too."""
    with suppress(storage.StorageError):
        for uri in _start_uris(plan):
            retention.release(uri, by=plan.run_uri)


def _start_uris(plan: Plan) -> list[str]:
    return [start.uri.rpartition("/")[0] for start in plan.starts.values() if start.uri]


def evaluate(
    requests: Sequence[EvaluationRequest],
    resources: Resources,
    *,
    storage_uri: str | None = None,
    cache_dir: str | None = None,
) -> list[dict[str, float]]:
    """Judge checkpoints on datasets one after the other, each worker on its share.

    Args:
        requests: from `make_request`.
        resources: what to ask of the cluster that `parallel.connect` joined.
        storage_uri: where Ray may keep its own files meanwhile, by default beside the checkpoints
            of the first one's run; nothing is left there.
        cache_dir: node-local cache of shards from remote storage.

    Returns:
        The figures of each.

    Raises:
        ExperimentError: the cluster has not what the evaluation asks for.
        StorageError: the storage cannot be written.
        TrainingError: a worker failed.
    """
    checkpoints = [request.checkpoint for request in requests]
    if storage_uri is None:
        storage_uri = checkpoints[0].rpartition("/")[0]
    storage_uri = storage.absolute(storage_uri)
    storage.check_writable(storage_uri)
    with NodeRequest() as request:
        given = wait_for_room(resources, print, request)
    folder = storage.join(storage_uri, f"evaluation-{uuid.uuid4().hex[:8]}")
    job = EvaluationJob(tuple(requests), given, local(cache_dir))
    trainer = make_trainer(evaluate_worker, job, given, folder=folder)
    with ExitStack() as stack:
        stack.callback(storage.delete, folder)
        for uri in dict.fromkeys(checkpoints):
            stack.enter_context(retention.held(uri, by=folder, days=_EVALUATION_DAYS))
        what = ", ".join(dict.fromkeys(checkpoints))
        return fit(trainer, f"evaluation of {what}")["figures"]


def make_trainer(
    worker: Callable[[dict[str, Any]], Any],
    job: Any,
    given: Resources,
    *,
    folder: str,
    callbacks: Sequence[ray.train.UserCallback] = (),
) -> ray.train.torch.TorchTrainer:
    """Workers that each call a function with a job.

    Args:
        worker: the function, given the job under the key `job`.
        job: what it is told.
        given: as `check_resources` gives them.
        folder: where Ray may keep its own files.
        callbacks: hear of what workers report.
    """
    filesystem, path = storage.filesystem(folder)
    _limit_waits(given)
    each = {"CPU": given.cpus or 1} | ({"GPU": 1} if given.gpu else {})
    return ray.train.torch.TorchTrainer(
        worker,
        train_loop_config={"job": job},
        torch_config=SettledTorchConfig(
            backend="nccl" if given.gpu else "gloo", timeout_s=round(given.rank_timeout_s)
        ),
        scaling_config=ray.train.ScalingConfig(
            # Ray's own way with a range would wait for ever in silence, try the size before a loss
            # again, lose the steps since the last checkpoint to grow, and keep a dead job's nodes.
            num_workers=given.workers,
            use_gpu=bool(given.gpu),
            resources_per_worker=each,
        ),
        run_config=ray.train.RunConfig(
            name=_RAY_FOLDER,
            storage_path=path,
            storage_filesystem=filesystem,
            # `train` starts again by itself, as long as the run comes further.
            failure_config=ray.train.FailureConfig(
                max_failures=0, controller_failure_limit=0, max_preemption_failures=0
            ),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1),
            callbacks=list(callbacks),
            worker_runtime_env={"env_vars": _worker_environment(gpu=bool(given.gpu))},
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),
        ),
    )


def fit(trainer: ray.train.torch.TorchTrainer, what: str) -> dict[str, Any]:
    """Start workers and wait for what rank 0 returns.

    Raises:
        WorkersLostError: they died, or one of them failed.
        TrainingError: they refused, or ended without a result.
        KeyboardInterrupt: so it was; the workers are ended.
    """
    try:
        result = trainer.fit().return_value
    except SystemExit:
        # Of Ray Train's own handler of Ctrl-C, once it has ended the workers; in other threads than
        # the main one, of a process that ends.
        if threading.current_thread() is not threading.main_thread():
            raise
        raise KeyboardInterrupt from None
    except ray.train.TrainingFailedError as error:
        failures = getattr(error, "worker_failures", None) or {}
        for refused in map(_plain, failures.values()):
            if isinstance(refused, RefusedError):
                raise TrainingError(f"{what} was stopped: {refused}") from error
        announced = isinstance(error, ray.train.PreemptionError)
        raise WorkersLostError(
            f"{what} failed: {cause(failures) or error}", announced=announced
        ) from error
    except Exception as error:
        raise TrainingError(f"{what} failed: {error}") from error
    if not isinstance(result, dict):
        raise TrainingError(f"{what} ended without a result; start it again to continue")
    return result


def check_shares(plan: Plan, workers: int, fewest: int | None = None) -> None:
    """Check that each worker has images of its own, and batch norm enough of them.

    Args:
        plan: the run.
        workers: ranks.
        fewest: ranks that the run may shrink to; passes of `micro_batch` hold fewer images then.

    Raises:
        ExperimentError: it is not so, which else would show in the middle of an epoch.
    """
    if workers > plan.experiment.batch_size:
        raise ExperimentError(
            f"workers={workers} exceed batch_size={plan.experiment.batch_size}: a worker "
            "needs at least one image of each step; use fewer workers, or train on a larger batch "
            "with learning rates to match (--large-batch)"
        )
    experiment, task = plan.experiment, make_task(plan.experiment)
    if task is None or "task" not in recipes.get(experiment.recipe).updates:
        return
    local, micro_batch = experiment.batch_norm == "local", experiment.micro_batch
    for count in range(workers, max(1, fewest or workers) - 1, -1):
        if _smallest_pass(plan, count, local=local) >= task.min_images:
            continue
        raise ExperimentError(
            f"batch_size={experiment.batch_size} leaves a step of {plan.smallest_step} images"
            f"{f' on {count} workers' if local or micro_batch else ''}{_in_passes(micro_batch)}; "
            f"{experiment.name} needs {task.min_images}{' on each' if local else ''}, for its "
            f"batch norm: choose another batch_size{' or micro_batch' if micro_batch else ''}"
        )


def _smallest_pass(plan: Plan, workers: int, *, local: bool) -> int:
    """How many images batch norm sees at least: of all ranks, or of one."""
    step, micro_batch = plan.smallest_step, plan.experiment.micro_batch
    most = -(-step // workers)
    shares = [step * (rank + 1) // workers - step * rank // workers for rank in range(workers)]
    cuts = [[at.stop - at.start for at in cut(share, most, micro_batch)] for share in shares]
    if local:
        # A rank without images takes part with none; one with a single image is what fails.
        return min((images for sizes in cuts for images in sizes if images), default=1)
    return min(sum(sizes) for sizes in zip(*cuts, strict=True))


def _in_passes(micro_batch: int | None) -> str:
    return "" if micro_batch is None else f" in passes of micro_batch={micro_batch}"


def local(folder: str | None) -> str | None:
    """A local folder as workers find it too: Ray changes their current directory."""
    return None if folder is None else str(storage.local_path(storage.absolute(folder)))


def _worker_environment(*, gpu: bool) -> dict[str, str]:
    # Ray would print every line twice, once as its own log record.
    environment = {"RAY_TRAIN_ENABLE_PRINT_PATCH": "0"}
    if not gpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return environment


def _limit_waits(resources: Resources) -> None:
    """Ray Train waits long or for ever in places; its controller reads these when it starts."""
    limits = {
        "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": 2,
        "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": resources.rank_timeout_s,
        "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": resources.rank_timeout_s,
    }
    for name, seconds in limits.items():
        if name not in _ENVIRONMENT:
            os.environ[name] = str(seconds)


def cause(failures: Mapping[int, BaseException]) -> str:
    """The failure that was not just another rank's, in words; empty where there is none."""

    def collateral(item: tuple[int, BaseException]) -> tuple[bool, bool, int]:
        rank, error = item
        error = _plain(error)
        return from_collective(error), isinstance(error, RayActorError), rank

    if not failures:
        return ""
    rank, error = min(failures.items(), key=collateral)
    return f"worker {rank}: {_plain(error)}"


def _plain(error: BaseException) -> BaseException:
    """The error that a worker raised, without what Ray wraps around it."""
    for name in ("_base_exc", "health_check_failure"):
        error = getattr(error, name, error)
    return error
