"""Start a planned run on Ray Train workers, and see it to its end."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
import ray.train
import ray.train.torch

from sr4ir_dist import recipes, retention, storage
from sr4ir_dist.config import ExperimentError
from sr4ir_dist.training.build import make_task
from sr4ir_dist.training.plan import RESULT, EvaluationRequest, Plan
from sr4ir_dist.training.worker import EvaluationJob, Job, evaluate_worker, run_worker

_RAY_FOLDER = "ray"  # what Ray keeps for itself, beside our checkpoints
# How long a checkpoint in use is kept from being pruned where nobody says that the use has ended.
# Each launch of a run begins the time anew.
_RUN_DAYS, _EVALUATION_DAYS = 30, 3


class TrainingError(RuntimeError):
    """A run that ended without a result; its checkpoints stay usable."""


@dataclass(frozen=True)
class Resources:
    """What a run takes of the cluster.

    Results depend on the number of workers by rounding, and by what dropout, stochastic depth and
    a detector's sampling draw on each rank.

    Attributes:
        workers: ranks.
        cpus: CPUs of each; None divides the cluster's among them.
        gpu: one GPU for each worker; None uses GPUs where the cluster has enough of them.
        max_failures: how often workers that died are started again.
    """

    workers: int = 1
    cpus: int | None = None
    gpu: bool | None = None
    max_failures: int = 3


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
) -> dict[str, Any]:
    """Train a planned run to its end, continuing it where it has checkpoints.

    Args:
        plan: from `make_plan`.
        resources: what to ask of the cluster that `parallel.connect` joined.
        log_every: steps between two lines of progress.
        cache_dir: node-local cache of shards from remote storage.
        callback: hears of each evaluation as soon as its checkpoint is published.

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
    check_shares(plan, resources.workers)
    cpus, gpu = check_resources(resources)
    job = Job(
        plan,
        cpus,
        log_every,
        _local(cache_dir),
        started=uuid.uuid4().hex,
        awaited=callback is not None,
    )
    # Our checkpoints say where the run stands. What Ray kept of an earlier launch can only harm: it
    # may be half-written, and another version of Ray refuses it.
    storage.delete(storage.join(plan.run_uri, _RAY_FOLDER))
    callbacks = [] if callback is None else [callback]
    trainer = _trainer(
        run_worker, job, resources, cpus, gpu, folder=plan.run_uri, callbacks=callbacks
    )
    starts = [start.uri.rpartition("/")[0] for start in plan.starts.values() if start.uri]
    until = storage.join(plan.run_uri, RESULT)
    for uri in starts:
        retention.hold(uri, by=plan.run_uri, days=_RUN_DAYS, until=until)
    result = _fit(trainer, f"run {plan.run}")
    for uri in starts:
        retention.release(uri, by=plan.run_uri)
    return result


def evaluate(
    request: EvaluationRequest,
    resources: Resources,
    *,
    storage_uri: str | None = None,
    cache_dir: str | None = None,
) -> dict[str, float]:
    """Judge a checkpoint on a dataset, each worker on its share.

    Args:
        request: from `make_request`.
        resources: what to ask of the cluster that `parallel.connect` joined.
        storage_uri: where Ray may keep its own files meanwhile, by default beside the checkpoints
            of the run; nothing is left there.
        cache_dir: node-local cache of shards from remote storage.

    Raises:
        ExperimentError: the cluster has not what the evaluation asks for.
        StorageError: the storage cannot be written.
        TrainingError: a worker failed.
    """
    if storage_uri is None:
        storage_uri = request.checkpoint.rpartition("/")[0]
    storage_uri = storage.absolute(storage_uri)
    storage.check_writable(storage_uri)
    cpus, gpu = check_resources(resources)
    folder = storage.join(storage_uri, f"evaluation-{uuid.uuid4().hex[:8]}")
    job = EvaluationJob(request, cpus, _local(cache_dir))
    # It is short, and what fails once in it fails again.
    resources = replace(resources, max_failures=0)
    trainer = _trainer(evaluate_worker, job, resources, cpus, gpu, folder=folder)
    try:
        with retention.held(request.checkpoint, by=folder, days=_EVALUATION_DAYS):
            return _fit(trainer, f"evaluation of {request.checkpoint}")
    finally:
        storage.delete(folder)


def _trainer(
    worker: Callable[[dict[str, Any]], Any],
    job: Any,
    resources: Resources,
    cpus: int,
    gpu: bool,
    *,
    folder: str,
    callbacks: Sequence[ray.train.UserCallback] = (),
) -> ray.train.torch.TorchTrainer:
    filesystem, path = storage.filesystem(folder)
    return ray.train.torch.TorchTrainer(
        worker,
        train_loop_config={"job": job},
        torch_config=ray.train.torch.TorchConfig(backend="nccl" if gpu else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=resources.workers,
            use_gpu=gpu,
            resources_per_worker={"CPU": cpus, "GPU": 1} if gpu else {"CPU": cpus},
        ),
        run_config=ray.train.RunConfig(
            name=_RAY_FOLDER,
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=ray.train.FailureConfig(
                max_failures=resources.max_failures, controller_failure_limit=3
            ),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1),
            callbacks=list(callbacks),
            worker_runtime_env={"env_vars": _worker_environment(gpu)},
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),
        ),
    )


def _fit(trainer: ray.train.torch.TorchTrainer, what: str) -> dict[str, Any]:
    try:
        result = trainer.fit().return_value
    except Exception as error:
        raise TrainingError(f"{what} failed: {_cause(error)}") from error
    if not isinstance(result, dict):
        raise TrainingError(f"{what} ended without a result; start it again to continue")
    if "refused" in result:
        raise TrainingError(f"{what} was stopped: {result['refused']}")
    return result


def check_shares(plan: Plan, workers: int) -> None:
    """Check that each worker has images of its own, and batch norm enough of them.

    Raises:
        ExperimentError: it is not so, which else would show in the middle of an epoch.
    """
    if workers > plan.experiment.batch_size:
        raise ExperimentError(
            f"workers={workers} exceed batch_size={plan.experiment.batch_size}: a worker "
            "needs at least one image of each step; use fewer workers or a larger batch_size"
        )
    experiment, task = plan.experiment, make_task(plan.experiment)
    if task is None or "task" not in recipes.get(experiment.recipe).updates:
        return
    local = experiment.batch_norm == "local"
    # A rank without images takes part with none; one with a single image is what fails.
    images = max(1, plan.smallest_step // workers) if local else plan.smallest_step
    if images < task.min_images:
        raise ExperimentError(
            f"batch_size={experiment.batch_size} leaves a step of {plan.smallest_step} images"
            f"{f' on {workers} workers' if local else ''}; {experiment.name} needs "
            f"{task.min_images}{' on each' if local else ''}, for its batch norm: choose another "
            "batch_size"
        )


def check_resources(resources: Resources) -> tuple[int, bool]:
    """The CPUs of each worker and whether it gets a GPU, on the cluster that was joined.

    Raises:
        ExperimentError: the cluster has not what is asked for.
    """
    if resources.workers < 1:
        raise ExperimentError(f"workers={resources.workers} must be at least 1")
    return fit_workers([node["Resources"] for node in ray.nodes() if node["Alive"]], resources)


def fit_workers(nodes: Sequence[Mapping[str, float]], resources: Resources) -> tuple[int, bool]:
    """The CPUs of each worker, and whether it gets a GPU, so that all workers find a node.

    Args:
        nodes: `CPU` and `GPU` of each node; a worker lies on one node.
        resources: what is asked for.

    Raises:
        ExperimentError: the nodes have not what is asked for.
    """
    workers = resources.workers
    has_cpus, has_gpus = (int(sum(node.get(kind, 0) for node in nodes)) for kind in ("CPU", "GPU"))
    gpu = has_gpus >= workers if resources.gpu is None else resources.gpu
    if gpu and workers > has_gpus:
        raise ExperimentError(f"workers={workers} need {workers} GPUs; the cluster has {has_gpus}")

    def room(cpus: int) -> int:
        """How many workers of so many CPUs the nodes can hold."""
        return sum(
            min(int(node.get("CPU", 0)) // cpus, int(node.get("GPU", 0)) if gpu else workers)
            for node in nodes
        )

    cpus = resources.cpus
    if cpus is None:
        cpus = next((n for n in range(has_cpus // workers, 1, -1) if room(n) >= workers), 1)
    if cpus < 1:
        raise ExperimentError(f"cpus={cpus} must be at least 1")
    if room(cpus) < workers:
        raise ExperimentError(
            f"workers={workers} with {cpus} CPUs{' and a GPU' if gpu else ''} each do not fit: the "
            f"cluster has room for {room(cpus)} of them ({has_cpus} CPUs, {has_gpus} GPUs, on "
            f"{len(nodes)} nodes)"
        )
    return cpus, gpu


def _local(folder: str | None) -> str | None:
    # Ray changes its workers' current directory.
    return None if folder is None else str(storage.local_path(storage.absolute(folder)))


def _worker_environment(gpu: bool) -> dict[str, str]:
    # Ray would print every line twice, once as its own log record.
    environment = {"RAY_TRAIN_ENABLE_PRINT_PATCH": "0"}
    if not gpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return environment


def _cause(error: BaseException) -> str:
    failures = getattr(error, "worker_failures", None)
    if failures:
        rank, first = min(failures.items())
        return f"worker {rank}: {first}"
    return str(error)
