"""Many short runs, side by side, without starting workers anew for each.

A lane is a group of workers that trains one run after the other, as `launch.train` would each. What
a run computes does not depend on the lane, nor on the runs before it there.
"""

from __future__ import annotations

import atexit
import gc
import os
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import ray
import torch.distributed as dist
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from sr4ir_dist import checkpoint, storage
from sr4ir_dist.config import ExperimentError
from sr4ir_dist.data.schema import DatasetError
from sr4ir_dist.networks.pretrained import WeightsError
from sr4ir_dist.training import launch
from sr4ir_dist.training.capacity import Resources, check_resources, wait_for_room
from sr4ir_dist.training.judged_again import lacking_weights
from sr4ir_dist.training.node_request import NodeRequest
from sr4ir_dist.training.plan import Plan, make_plan
from sr4ir_dist.training.run_queue import Order, Outcome, RunQueue
from sr4ir_dist.training.saving import shared
from sr4ir_dist.training.worker import LEFT, Job, RefusedError, prepare_worker, train_here

_POLL_S = 0.5
_PAUSE_S = 5.0  # before workers that ended are started again
_INTERRUPTED = 130  # the exit code after Ctrl-C


@dataclass(frozen=True)
class LaneJob:
    """What the workers of a lane are told.

    Attributes:
        lane: its number.
        orders: all that are wanted.
        queue: the actor that says which of them is next.
        storage_uri: where the runs are kept.
        resources: what each run has, with the CPUs of a worker.
        log_every: steps between two lines of progress.
        cache_dir: node-local cache of shards from remote storage; None for the default.
    """

    lane: int
    orders: tuple[Order, ...]
    queue: Any
    storage_uri: str
    resources: Resources
    log_every: int
    cache_dir: str | None


def count_lanes(resources: Resources, most: int) -> tuple[int, Resources]:
    """How many groups of workers the cluster that was joined has room for, side by side.

    Args:
        resources: of each lane.
        most: lanes that have something to do.

    Returns:
        Their number, at least 1, and the resources with the CPUs of a worker.

    Raises:
        ExperimentError: there is not room for one.
    """
    for lanes in range(max(1, most), 1, -1):
        with suppress(ExperimentError):
            given = check_resources(replace(resources, workers=lanes * resources.workers))
            return lanes, replace(resources, cpus=given.cpus, gpu=given.gpu)
    return 1, check_resources(resources)


def train_all(
    orders: Sequence[Order],
    resources: Resources,
    *,
    storage_uri: str,
    lanes: int,
    log_every: int = 10,
    cache_dir: str | None = None,
    say: Callable[[str], None] = print,
    settled: Callable[[int, Outcome], None] = lambda number, outcome: None,
) -> list[Outcome]:
    """Train runs on the cluster that `parallel.connect` joined, each after those that it needs.

    Runs that have finished are not repeated, and start no workers; those with checkpoints go on
    from them.

    Args:
        orders: the runs, each after those that it needs.
        resources: of each lane, as `count_lanes` gives them.
        storage_uri: where the runs are kept.
        lanes: groups of workers side by side.
        log_every: steps between two lines of progress.
        cache_dir: node-local cache of shards from remote storage.
        say: is told what happens to lanes.
        settled: is told what became of each order, once.

    Returns:
        What became of each order.
    """
    storage_uri = storage.absolute(storage_uri)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options: dict[str, Any] = {"num_cpus": 0, "scheduling_strategy": here}
    queue: Any = ray.remote(**options)(RunQueue).remote(tuple(orders), resources.max_failures)
    for number, outcome in _known(orders, storage_uri, resources.workers).items():
        ray.get(queue.settle.remote(number, outcome))
    folder = storage.join(storage_uri, f"lanes-{uuid.uuid4().hex[:8]}")
    job = LaneJob(
        0, tuple(orders), queue, storage_uri, resources, log_every, launch.local(cache_dir)
    )
    keepers = [
        # Their waits cannot be interrupted; they are to end with this process.
        threading.Thread(target=_keep, args=(replace(job, lane=lane), folder, say), daemon=True)
        for lane in range(lanes)
    ]
    told: set[int] = set()
    try:
        for keeper in keepers:
            keeper.start()
        while len(told) < len(orders):
            time.sleep(_POLL_S)
            # Asked before: what a lane settles last is among the outcomes then.
            at_work = any(keeper.is_alive() for keeper in keepers)
            outcomes: Any = ray.get(queue.outcomes.remote())
            for number in outcomes.keys() - told:
                settled(number, outcomes[number])
            told.update(outcomes)
            if not at_work and len(told) < len(orders):
                raise launch.TrainingError("the lanes ended before all runs were done")
        for keeper in keepers:
            keeper.join()
    except KeyboardInterrupt:
        # The lanes still write to their folder, and end with this process. Ray's own way to end it,
        # while threads wait for lanes, often makes the exit code 1.
        atexit.register(os._exit, _INTERRUPTED)
        raise
    except BaseException:
        _clear(folder, queue)
        raise
    _clear(folder, queue)
    return [outcomes[number] for number in range(len(orders))]


def _clear(folder: str, queue: Any) -> None:
    with suppress(storage.StorageError):
        storage.delete(folder)
    ray.kill(queue)


def _keep(job: LaneJob, folder: str, say: Callable[[str], None]) -> None:
    """See a lane through: start its workers again as long as there is something to do."""
    queue: Any = job.queue
    failures = done = 0
    while ray.get(queue.is_open.remote()) and failures <= job.resources.max_failures:
        counts = True
        try:
            with NodeRequest() as request:
                given = wait_for_room(job.resources, say, request)
            place = storage.join(folder, f"{job.lane}-{uuid.uuid4().hex[:4]}")
            trainer = launch.make_trainer(run_lane, job, given, folder=place)
            result = launch.fit(trainer, f"lane {job.lane}")
            why, counts = f"nodes go: {', '.join(result.get(LEFT, ()))}", False
        except (launch.TrainingError, ValueError) as error:
            why = str(error)
            counts = not getattr(error, "announced", False)
            say(f"{why}; starting again")
        ray.get(queue.lost.remote(job.lane, why, counts=counts))
        before, done = done, len(ray.get(queue.outcomes.remote()))
        failures = failures + counts if done == before else 0
        if counts:
            time.sleep(_PAUSE_S)


def run_lane(config: dict[str, LaneJob]) -> dict[str, Any]:
    """Train one run after the other on this rank; `train_all` starts it on every worker.

    Raises:
        RefusedError: a run among several ranks cannot be continued, on some rank.
    """
    job = config["job"]
    rank, world_size = dist.get_rank(), dist.get_world_size()
    prepare_worker(job.resources)
    while True:
        state, number, plan = shared(lambda: _next(job, world_size), rank)
        if state == "end":
            return {}
        if state == "wait":
            time.sleep(_POLL_S)
            continue
        try:
            run = Job(plan, job.resources, job.log_every, job.cache_dir)
            result = train_here(run, rank, world_size)
        except RefusedError as error:
            ray.get(job.queue.settle.remote(number, Outcome("failed", why=str(error))))
            if world_size > 1:
                raise  # the other ranks are somewhere in the midst of it
            continue
        finally:
            gc.collect()  # engines hold themselves by their hooks
        if LEFT in result:
            return result
        if rank == 0:
            launch.release_starts(plan)
            ray.get(job.queue.settle.remote(number, _done(plan, result)))


def _next(job: LaneJob, world_size: int) -> tuple[str, int, Plan | None]:
    """On rank 0: the next run that has to be trained. Those that cannot or need not be, settle."""
    while True:
        number: Any = ray.get(job.queue.take.remote(job.lane))
        if number is None:
            return ("wait" if ray.get(job.queue.is_open.remote()) else "end"), -1, None
        found = _planned(job.orders[number], job.storage_uri, world_size)
        if isinstance(found, Plan):
            launch.hold_starts(found)
            print(f"run {found.run}")
            return "run", number, found
        ray.get(job.queue.settle.remote(number, found))


def _planned(order: Order, storage_uri: str, workers: int) -> Plan | Outcome:
    """The plan of a run that has to be trained, or what is known without training."""
    try:
        plan = make_plan(order.experiment, data=order.data, storage_uri=storage_uri, say=print)
        launch.check_shares(plan, workers)
    except storage.StorageError:
        raise
    except (WeightsError, DatasetError) as error:
        return Outcome("missing", why=str(error))
    except (ExperimentError, checkpoint.CheckpointError) as error:
        return Outcome("failed", why=str(error))
    done = launch.finished_result(plan)
    return plan if done is None else _done(plan, done)


def _done(plan: Plan, result: dict[str, Any]) -> Outcome:
    return Outcome("done", result, lpips=lacking_weights(plan, result))


def _known(orders: Sequence[Order], storage_uri: str, workers: int) -> dict[int, Outcome]:
    """What became of orders that need no workers any more."""
    known: dict[int, Outcome] = {}
    for number, order in enumerate(orders):
        if all(need in known and known[need].kind == "done" for need in order.needs):
            found = _planned(order, storage_uri, workers)
            if isinstance(found, Outcome):
                known[number] = found
    return known
