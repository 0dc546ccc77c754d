"""Where workers find room on a cluster, and waiting until there is some."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

import ray

from sr4ir_dist.config import ExperimentError
from sr4ir_dist.training.node_request import NodeRequest

_TELL_EVERY_S = 30.0
# How long workers that just ended may hold on to what they had.
_SETTLE_S = 10.0
# How long others may, where nothing is said of waiting: other jobs may be at their end.
_BUSY_S = 60.0


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
        wait_s: how long to wait for nodes that are not there yet, as an autoscaler adds them, and
            for what others use.
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
    resources: Resources,
    say: Callable[[str], None],
    request: NodeRequest,
    without: Collection[str] = (),
) -> Resources:
    """Wait until as many workers as are asked for find a place that nobody else uses.

    Where less is free, what just ended gets some seconds to let go of it, a run's own workers
    before a restart for one. Then the run begins with what there is, if that is enough.

    Args:
        resources: what is asked for.
        say: is told what is waited for.
        request: what an autoscaler is asked for from then on: room for all workers.
        without: ids of nodes that do not count.

    Returns:
        `resources` as there is room for them, as `check_resources` gives them.

    Raises:
        ExperimentError: there was none in `wait_s`, or, where others use what the cluster has, in
            a minute at least. What the whole cluster has not is refused at once without `wait_s`.
    """
    started = time.monotonic()
    told = -_TELL_EVERY_S
    while True:
        found, busy, error = _look(resources, without)
        waited = time.monotonic() - started
        # Until then what is in use may be what this run's own workers have not let go of.
        settled = waited >= _SETTLE_S
        if found is not None and (settled or not busy):
            if found.workers == resources.workers:
                request.withdraw()
            else:
                wanted = replace(resources, cpus=found.cpus, gpu=found.gpu)
                _ask(request, wanted, _used(wanted, without) if settled else 0)
            return found
        if error is not None and (settled or not busy):
            limit = max(resources.wait_s, _BUSY_S) if busy else resources.wait_s
            if waited >= limit:
                raise NoRoomError(f"{error}; {_waited(limit, busy=busy)}") from error
            if waited - told >= _TELL_EVERY_S:
                what = "what others use" if busy else "nodes"
                say(f"waiting {(limit - waited) / 60:.0f} more minutes for {what}: {error}")
                told = waited
            _ask(request, resources, _used(resources, without) if settled else 0)
        time.sleep(1)


def _look(
    resources: Resources, without: Collection[str]
) -> tuple[Resources | None, bool, NoRoomError | None]:
    """What is free of what is asked for, whether others use some of it, and what is missing."""
    try:
        whole = check_resources(resources, without)
    except NoRoomError as error:
        return None, False, error
    try:
        # Whether there are GPUs is a question to the cluster, not to what is free of it right now.
        found = _most(_nodes(without, free=True), replace(resources, gpu=whole.gpu), free=True)
    except NoRoomError as error:
        return None, True, error
    return found, (found.workers, found.cpus) != (whole.workers, whole.cpus), None


def _ask(request: NodeRequest, resources: Resources, others: int) -> None:
    each = {"CPU": float(resources.cpus or 1)} | ({"GPU": 1.0} if resources.gpu else {})
    request.ask(each, most=resources.workers, least=least(resources), others=others)


def _used(resources: Resources, without: Collection[str]) -> int:
    """How many such workers the nodes could hold more if nothing of them were in use."""
    whole, free = (
        _rooms(_nodes(without, free=free), resources.cpus or 1, gpu=bool(resources.gpu))
        for free in (False, True)
    )
    return max(0, whole - free)


def has_more_room(resources: Resources, workers: int) -> bool:
    """Whether so many workers, which run, could be more: as many as are asked for at most.

    Args:
        resources: what is asked for, with the CPUs of each worker and whether it has a GPU.
        workers: how many run.
    """
    if workers >= resources.workers:
        return False
    return _rooms(_nodes((), free=True), resources.cpus or 1, gpu=bool(resources.gpu)) > 0


def _nodes(without: Collection[str], *, free: bool = False) -> list[Mapping[str, float]]:
    """What each node has, or what is free of it; those that are about to go do not count."""
    # Ray's public functions tell neither which nodes drain nor what is free on each. Ray places
    # nothing on a node that is about to be taken away, and lists it among the others.
    from ray._private.state import available_resources_per_node, state

    without = {*without, *state.get_draining_nodes()}
    nodes = {
        node["NodeID"]: node["Resources"]
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] not in without
    }
    if not free:
        return list(nodes.values())
    # A node that has just joined is not among those yet.
    found = available_resources_per_node()
    return [found.get(node, {}) for node in nodes]


def least(resources: Resources) -> int:
    """With how many workers a run may start."""
    return resources.workers if resources.least is None else resources.least


def _waited(seconds: float, *, busy: bool) -> str:
    if busy:
        return f"waited {seconds / 60:g} minutes for what others use (--wait-minutes)"
    if seconds:
        return f"waited {seconds / 60:g} minutes for more nodes"
    return "an autoscaler is given time to add nodes by --wait-minutes"


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
    return _most(_nodes(without), resources)


def _most(
    nodes: Sequence[Mapping[str, float]], resources: Resources, *, free: bool = False
) -> Resources:
    """As many workers of those that are asked for as the nodes can hold."""
    counts = range(resources.workers, least(resources) - 1, -1)
    # Fewer workers with GPUs come before more without.
    ways = (True, False) if resources.gpu is None else (resources.gpu,)
    for gpu, workers in product(ways, counts):
        asked = replace(resources, workers=workers, gpu=gpu)
        try:
            return replace(asked, cpus=fit_workers(nodes, asked, free=free)[0])
        except NoRoomError:
            if (gpu, workers) == (ways[-1], counts[-1]):
                raise
    raise AssertionError("there is at least one way")


def fit_workers(
    nodes: Sequence[Mapping[str, float]], resources: Resources, *, free: bool = False
) -> tuple[int, bool]:
    """The CPUs of each worker, and whether it gets a GPU, so that all workers find a node.

    Args:
        nodes: `CPU` and `GPU` of each node; a worker lies on one node.
        resources: what is asked for.
        free: the nodes' numbers are what is free of them, which messages then say.

    Raises:
        ExperimentError: what is asked for can never be had.
        NoRoomError: the nodes have it not.
    """
    spare = " free" if free else ""
    workers = resources.workers
    has_cpus, has_gpus = (int(sum(node.get(kind, 0) for node in nodes)) for kind in ("CPU", "GPU"))
    gpu = has_gpus >= workers if resources.gpu is None else resources.gpu
    if gpu and workers > has_gpus:
        raise NoRoomError(
            f"workers={workers} need {workers} GPUs; the cluster has {has_gpus}{spare}"
        )

    def room(cpus: int) -> int:
        return _rooms(nodes, cpus, gpu=gpu)

    cpus = resources.cpus
    if cpus is None:
        cpus = next((n for n in range(has_cpus // workers, 1, -1) if room(n) >= workers), 1)
    if cpus < 1:
        raise ExperimentError(f"cpus={cpus} must be at least 1")
    if room(cpus) < workers:
        raise NoRoomError(
            f"workers={workers} with {cpus} CPUs{' and a GPU' if gpu else ''} each do not fit: the "
            f"cluster has{spare} room for {room(cpus)} of them ({has_cpus} CPUs, {has_gpus} GPUs, "
            f"on {len(nodes)} nodes)"
        )
    return cpus, gpu


def _rooms(nodes: Sequence[Mapping[str, float]], cpus: int, *, gpu: bool) -> int:
    """How many workers of so many CPUs, each on one node, the nodes can hold."""
    return sum(
        min([int(node.get("CPU", 0)) // cpus, *([int(node.get("GPU", 0))] if gpu else [])])
        for node in nodes
    )
