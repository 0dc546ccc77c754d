"""What a training step costs on many GPUs: a model of a few lines, from counted work.

A step is compute, then communication, then what the loader is late by:

- compute: images of the fullest rank x FLOPs / achieved FLOP/s, but no phase is shorter than the
  launches of its kernels; and a fixed time.
- communication: the gradients of each phase once, and batch norm's statistics layer by layer. An
  all-reduce goes through the node and between nodes, each as a ring; for few bytes as a tree, whose
  latency grows with the logarithm of the nodes. torch's synchronised batch norm gathers, and there
  is no tree for that: its latency grows with the ranks.
- overlap: the engines reduce gradients when the backward has ended, so nothing overlaps (0).
- data: a loader reads ahead, so only what it cannot deliver in the time of the step counts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

_BACKWARD = 2 / 3  # of a phase's compute
_MOST_IMAGES = 1 << 16


@dataclass(frozen=True)
class Collectives:
    """Like calls of a step.

    Attributes:
        kind: which collective.
        calls: how many.
        bytes: what a rank puts into all of them together.
    """

    kind: Literal["all_reduce", "all_gather"]
    calls: int
    bytes: float


@dataclass(frozen=True)
class PhaseWork:
    """What a phase asks for.

    Attributes:
        updates: the networks that learn.
        flops: of an image, forward and backward of all networks; a multiply-add counts two.
        launches: kernels of a step.
        gradient_bytes: of the networks that learn, in float32.
        collectives: besides the gradients' all-reduce.
    """

    updates: tuple[str, ...]
    flops: float
    launches: int
    gradient_bytes: float
    collectives: tuple[Collectives, ...] = ()


@dataclass(frozen=True)
class Cluster:
    """The machines; times in seconds, bandwidths in bytes/s, each way.

    Attributes:
        flops: FLOP/s that a GPU achieves on these networks.
        launch_s: of one kernel.
        gpus_per_node: ranks of a node.
        inside_bytes_s: of a GPU to the others of its node, in collectives.
        between_bytes_s: of a node to the others.
        call_s: of any collective.
        inside_s: latency of a hop within a node.
        between_s: latency of a hop between nodes.
        images_s: what a node's loaders deliver.
        overlap: the part of a backward during which gradients are reduced already.
        fixed_s: of a step, whatever its images.
    """

    flops: float
    launch_s: float
    gpus_per_node: int
    inside_bytes_s: float
    between_bytes_s: float
    call_s: float
    inside_s: float
    between_s: float
    images_s: float
    overlap: float = 0.0
    fixed_s: float = 0.0


@dataclass(frozen=True)
class Prediction:
    """A step on so many GPUs; times in seconds.

    Attributes:
        gpus: ranks.
        batch: global batch.
        images: of the fullest rank.
        compute: seconds of compute.
        communication: seconds that no compute hides.
        data: seconds in which the loader is waited for.
        efficiency: throughput over that of as many single GPUs at the same global batch.
    """

    gpus: int
    batch: int
    images: int
    compute: float
    communication: float
    data: float
    efficiency: float = 1.0

    @property
    def seconds(self) -> float:
        """The step."""
        return self.compute + self.communication + self.data


def predict(phases: Sequence[PhaseWork], cluster: Cluster, *, gpus: int, batch: int) -> Prediction:
    """A step of a global batch on a number of GPUs.

    Raises:
        ValueError: fewer than one GPU or image.
    """
    if gpus < 1 or batch < 1:
        raise ValueError(f"gpus {gpus} and batch {batch} must be 1 or more")
    one, many = (_step(phases, cluster, count, batch) for count in (1, gpus))
    efficiency = one.seconds / (gpus * many.seconds)
    parts = (many.compute, many.communication, many.data)
    return Prediction(gpus, batch, many.images, *parts, efficiency)


def smallest_batch(
    phases: Sequence[PhaseWork], cluster: Cluster, *, gpus: int, efficiency: float
) -> int | None:
    """The smallest global batch, as many images on every GPU, that reaches an efficiency.

    None where none does, as when the loader is too slow.
    """

    def reaches(images: int) -> bool:
        step = predict(phases, cluster, gpus=gpus, batch=images * gpus)
        return step.efficiency >= efficiency

    high = 1
    while not reaches(high):
        high *= 2
        if high > _MOST_IMAGES:
            return None
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if reaches(middle) else (middle, high)
    return high * gpus


def all_reduce_seconds(cluster: Cluster, gpus: int, size: float) -> float:
    """One all-reduce of `size` bytes: by ring or by tree, whichever is faster."""
    if gpus == 1:
        return 0.0
    inside, nodes = _shape(cluster, gpus)
    within = 2 * (inside - 1) / inside * size / cluster.inside_bytes_s
    within += 2 * (inside - 1) * cluster.inside_s
    # Each GPU of a node takes its part to the other nodes, over the node's common network.
    ring = 2 * (nodes - 1) / nodes * size / cluster.between_bytes_s
    ring += 2 * (nodes - 1) * cluster.between_s
    tree = 2 * size / cluster.between_bytes_s + 2 * math.ceil(math.log2(nodes)) * cluster.between_s
    return cluster.call_s + within + (min(ring, tree) if nodes > 1 else 0.0)


def all_gather_seconds(cluster: Cluster, gpus: int, size: float) -> float:
    """One all-gather to which each rank gives `size` bytes, along a ring of all ranks."""
    if gpus == 1:
        return 0.0
    _, nodes = _shape(cluster, gpus)
    slowest = min(cluster.inside_bytes_s, cluster.between_bytes_s if nodes > 1 else math.inf)
    hops = (gpus - nodes) * cluster.inside_s + (nodes - 1) * cluster.between_s
    return cluster.call_s + (gpus - 1) * size / slowest + hops


def _step(phases: Sequence[PhaseWork], cluster: Cluster, gpus: int, batch: int) -> Prediction:
    images = math.ceil(batch / gpus)
    compute = cluster.fixed_s
    communication = 0.0
    for phase in phases:
        takes = max(images * phase.flops / cluster.flops, phase.launches * cluster.launch_s)
        reduction = all_reduce_seconds(cluster, gpus, phase.gradient_bytes)
        compute += takes
        communication += max(0.0, reduction - cluster.overlap * _BACKWARD * takes)
        communication += sum(_seconds(cluster, gpus, c) for c in phase.collectives)
    inside, _ = _shape(cluster, gpus)
    late = images * inside / cluster.images_s - compute - communication
    return Prediction(gpus, batch, images, compute, communication, max(0.0, late))


def _seconds(cluster: Cluster, gpus: int, collectives: Collectives) -> float:
    if not collectives.calls:
        return 0.0
    one = all_reduce_seconds if collectives.kind == "all_reduce" else all_gather_seconds
    return collectives.calls * one(cluster, gpus, collectives.bytes / collectives.calls)


def _shape(cluster: Cluster, gpus: int) -> tuple[int, int]:
    """Ranks of a full node, and nodes."""
    inside = min(gpus, cluster.gpus_per_node)
    return inside, math.ceil(gpus / inside)
