"""Where workers find room on a cluster, and waiting until there is some."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

import ray

from sr4ir_dist.config import ExperimentError

_TELL_EVERY_S = 30.0


class NoRoomError(ExperimentError):
    """The cluster has not what is asked for; the message says what it has."""


@dataclass(frozen=True)
class Resources:
    """What a run takes of the cluster, and how long it waits for it.

    Results depend on the number of workers by rounding, and by what dropout, stochastic depth and
    a detector's sampling draw on each rank.

    Attributes:
        workers: ranks.
        cpus: CPUs of each; None divides the cluster's among them.
        gpu: one GPU for each worker; None uses GPUs where the cluster has enough of them.
        max_failures: how often workers that died are started again without a new checkpoint.
        least: with fewer workers than `workers`, but so many, the run starts or goes on too, and
            grows when the cluster does; None for always `workers`.
        wait_s: how long to wait for nodes that are not there yet, as an autoscaler adds them.
        rank_timeout_s: how long ranks wait for one another before the run is started again.
    """

    workers: int = 1
    cpus: int | None = None
    gpu: bool | None = None
    max_failures: int = 3
    least: int | None = None
    wait_s: float = 0.0
    rank_timeout_s: float = 600.0


def wait_for_room(
    resources: Resources, say: Callable[[str], None], without: Collection[str] = ()
) -> Resources:
    """`check_resources`, again and again until there is room or `wait_s` has passed.

    An autoscaler is asked for the nodes.

    Raises:
        ExperimentError: there was none in time.
    """
    started = time.monotonic()
    told = -_TELL_EVERY_S
    asked = False
    try:
        while True:
            try:
                return check_resources(resources, without)
            except NoRoomError as error:
                waited = time.monotonic() - started
                if waited >= resources.wait_s:
                    raise NoRoomError(f"{error}; {_waited(resources.wait_s)}") from error
                if waited - told >= _TELL_EVERY_S:
                    left = (resources.wait_s - waited) / 60
                    say(f"waiting {left:.0f} more minutes for nodes: {error}")
                    told = waited
                if not asked:
                    _ask_autoscaler(resources, least(resources))
                    asked = True
                time.sleep(1)
    finally:
        if asked:
            # What was asked for would be kept running for ever.
            _ask_autoscaler(resources, 0)


def has_more_room(resources: Resources, workers: int) -> bool:
    """Whether so many workers, which run, could be more: as many as are asked for at most."""
    if workers >= resources.workers:
        return False
    try:
        check_resources(replace(resources, least=workers + 1))
    except NoRoomError:
        return False
    # The nodes are there; others may be using them.
    free = ray.available_resources()
    wanted = {"CPU": resources.cpus or 1, "GPU": 1 if resources.gpu else 0}
    return all(free.get(kind, 0) >= count for kind, count in wanted.items())


def _draining() -> list[str]:
    """The nodes that Ray drains, by id; its public list of nodes does not tell."""
    from ray._private.state import state

    return list(state.get_draining_nodes())


def least(resources: Resources) -> int:
    """With how many workers a run may start."""
    return resources.workers if resources.least is None else resources.least


def _waited(seconds: float) -> str:
    if seconds:
        return f"waited {seconds / 60:g} minutes for more nodes"
    return "an autoscaler is given time to add nodes by --wait-minutes"


def _ask_autoscaler(resources: Resources, workers: int) -> None:
    from ray.autoscaler.sdk import request_resources

    each = {"CPU": resources.cpus or 1} | ({"GPU": 1} if resources.gpu else {})
    request_resources(bundles=[each] * workers)


def check_resources(resources: Resources, without: Collection[str] = ()) -> Resources:
    """What the cluster that was joined can give of what is asked for: the most workers it can.

    In what is returned the CPUs of each worker are decided, and whether it has a GPU.

    Args:
        resources: what is asked for.
        without: ids of nodes that do not count.

    Raises:
        ExperimentError: what is asked for can never be had.
        NoRoomError: the cluster has it not.
    """
    if resources.workers < 1:
        raise ExperimentError(f"workers={resources.workers} must be at least 1")
    if not 1 <= least(resources) <= resources.workers:
        raise ExperimentError(
            f"workers={resources.least}:{resources.workers}: expected at least 1 and at most as "
            "many as the second number"
        )
    # Ray places nothing on a node that is about to be taken away, and lists it among the others.
    without = {*without, *_draining()}
    nodes = [
        node["Resources"] for node in ray.nodes() if node["Alive"] and node["NodeID"] not in without
    ]
    counts = range(resources.workers, least(resources) - 1, -1)
    # Fewer workers with GPUs come before more without.
    ways = (True, False) if resources.gpu is None else (resources.gpu,)
    for gpu, workers in product(ways, counts):
        asked = replace(resources, workers=workers, gpu=gpu)
        try:
            return replace(asked, cpus=fit_workers(nodes, asked)[0])
        except NoRoomError:
            if (gpu, workers) == (ways[-1], counts[-1]):
                raise
    raise AssertionError("there is at least one way")


def fit_workers(nodes: Sequence[Mapping[str, float]], resources: Resources) -> tuple[int, bool]:
    """The CPUs of each worker, and whether it gets a GPU, so that all workers find a node.

    Args:
        nodes: `CPU` and `GPU` of each node; a worker lies on one node.
        resources: what is asked for.

    Raises:
        ExperimentError: what is asked for can never be had.
        NoRoomError: the nodes have it not.
    """
    workers = resources.workers
    has_cpus, has_gpus = (int(sum(node.get(kind, 0) for node in nodes)) for kind in ("CPU", "GPU"))
    gpu = has_gpus >= workers if resources.gpu is None else resources.gpu
    if gpu and workers > has_gpus:
        raise NoRoomError(f"workers={workers} need {workers} GPUs; the cluster has {has_gpus}")

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
        raise NoRoomError(
            f"workers={workers} with {cpus} CPUs{' and a GPU' if gpu else ''} each do not fit: the "
            f"cluster has room for {room(cpus)} of them ({has_cpus} CPUs, {has_gpus} GPUs, on "
            f"{len(nodes)} nodes)"
        )
    return cpus, gpu
