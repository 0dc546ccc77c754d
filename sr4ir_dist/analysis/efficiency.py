"""What networks cost: parameters, operations, memory, time (Table S3)."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.flop_counter import FlopCounterMode

from sr4ir_dist import checkpoint, experiments, recipes
from sr4ir_dist.config import Experiment
from sr4ir_dist.hub.versions import resolve
from sr4ir_dist.networks.interpolation import Interpolation
from sr4ir_dist.overrides import override
from sr4ir_dist.recipes import Phase
from sr4ir_dist.training import state
from sr4ir_dist.training.build import build_networks, make_setup, make_task
from sr4ir_dist.training.views import Inputs, Setup, Views

_CLASSES = {"voc": 20, "coco": 80, "cars": 196, "cub200": 200, "drawn": 8}
_VOC_IMAGE = (375, 500)  # what most of VOC's images measure; detection takes them as they are


@dataclass(frozen=True)
class Cost:
    """What it takes to judge one image, from its LR image on.

    Attributes:
        experiment: its name.
        height: of the HR image in pixels.
        width: the same.
        parameters: of all networks that are used.
        sr_gflops: 1e9 operations of the SR network, a multiplication and an addition being two.
        task_gflops: the same of the task network.
        memory_mb: 1e6 bytes, the most that lie in memory at once: weights and activations.
        images_per_second: median of several, on this machine's device.
        training_hours: of a finished run, device hours: its time times its ranks.
    """

    experiment: str
    height: int
    width: int
    parameters: int
    sr_gflops: float
    task_gflops: float
    memory_mb: float
    images_per_second: float
    training_hours: float | None = None

    @property
    def gflops(self) -> float:
        """Of all networks together."""
        return self.sr_gflops + self.task_gflops


PAPER: dict[str, dict[str, float]] = {
    "voc_seg/x8/l2t": {
        "parameters": 11.0e6,
        "gflops": 17.5,
        "memory_mb": 456,
        "training_hours": 0.64,
        "images_per_second": 33.8,
    },
    "voc_seg_resnet50/x8/l2t": {
        "parameters": 42.0e6,
        "gflops": 305.5,
        "memory_mb": 1621,
        "training_hours": 4.25,
        "images_per_second": 15.2,
    },
    "voc_seg/edsr-x8/sr4ir": {
        "parameters": 12.7e6,
        "gflops": 49.5,
        "memory_mb": 695,
        "training_hours": 2.41,
        "images_per_second": 25.3,
    },
}
"""The paper's Table S3, on its own machine."""


def measure(
    names: Mapping[str, str],
    *,
    device: torch.device | None = None,
    timed: int = 5,
    told: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> dict[str, Cost]:
    """Count and time the networks of experiments, at the sizes of their images.

    Args:
        names: experiments' names, checkpoints or runs, by label.
        device: where they run; by default this process's.
        timed: how many images are timed, after a first one that is not.
        told: how many are done.

    Raises:
        ExperimentError: there is no such experiment.
        CheckpointError: there is no such checkpoint.
    """
    known = set(experiments.names())
    costs = {}
    for number, (label, name) in enumerate(names.items(), 1):
        hours = None
        if name in known or ("://" not in name and name.split("/")[0] in experiments.DATA):
            experiment = _with_classes(experiments.make(name))
        else:
            saved = checkpoint.load(resolve(name))
            experiment = state.load_experiment(saved)
            ranks = saved.json("progress.json").get("world_size", 1)
            hours = state.load_progress(saved).seconds * ranks / 3600
        costs[label] = _cost(experiment, device, timed, hours)
        told("networks", number, len(names))
    return costs


def parameters(module: nn.Module) -> int:
    """How many numbers a network has, learned or fixed; running statistics do not count."""
    return sum(each.numel() for each in module.parameters())


def gflops(call: Callable[[], Any]) -> float:
    """1e9 operations of matrix products and convolutions in a call, by torch's own counter."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() / 1e9


def _cost(
    experiment: Experiment, device: torch.device | None, timed: int, hours: float | None
) -> Cost:
    modules = build_networks(experiment, device, only=state.JUDGED)
    for module in modules.values():
        module.eval()
    # Counted layer by layer, as the paper does; timed as this system computes.
    setup = Setup(experiment, recipes.get(experiment.recipe), modules, {}, make_task(experiment))
    height, width = _size(experiment)
    scale = experiment.scale
    lr_size = (-(-height // scale), -(-width // scale))
    lr = torch.rand(1, 3, *lr_size, device=setup.device)
    hr = torch.rand(1, 3, lr_size[0] * scale, lr_size[1] * scale, device=setup.device)
    sizes = [(height, width)]
    sr_module = modules.get("sr")
    with torch.inference_mode():
        # The detector's proposals, and with them its work, hang on the image; the same each time.
        torch.manual_seed(0)
        sr = 0.0 if sr_module is None else gflops(lambda: sr_module(lr))
        task = 0.0
        if setup.task is not None:
            task = gflops(lambda: _views(setup, hr, None, sizes).task_outputs("hr"))
        setup = make_setup(experiment, modules, engine="none")
        _timed(setup, hr, lr, sizes)  # the first image is slow
        seconds = [_timed(setup, hr, lr, sizes) for _ in range(timed)]
    memory = _memory(setup, hr, lr, sizes)
    used = [module for module in modules.values() if not isinstance(module, Interpolation)]
    count = sum(parameters(module) for module in used)
    speed = 1 / statistics.median(seconds)
    return Cost(experiment.name, height, width, count, sr, task, memory, speed, hours)


def _views(setup: Setup, hr: Tensor, lr: Tensor | None, sizes: list[tuple[int, int]]) -> Views:
    return Views(setup, Phase(updates=(), terms=()), Inputs(hr, lr, sizes, None))


def _judge(setup: Setup, hr: Tensor, lr: Tensor, sizes: list[tuple[int, int]]) -> None:
    views = _views(setup, hr, lr, sizes)
    if setup.task is None:
        views.image(setup.recipe.judged_on)
    else:
        views.task_outputs(setup.recipe.judged_on)


def _timed(setup: Setup, hr: Tensor, lr: Tensor, sizes: list[tuple[int, int]]) -> float:
    started = time.perf_counter()
    _judge(setup, hr, lr, sizes)
    if setup.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _memory(setup: Setup, hr: Tensor, lr: Tensor, sizes: list[tuple[int, int]]) -> float:
    for module in setup.modules.values():
        module.requires_grad_(True)  # the tracker puts its hooks on parameters that learn
    tracker = MemTracker()
    tracker.track_external(*setup.modules.values(), hr, lr)
    with torch.no_grad(), tracker:
        _judge(setup, hr, lr, sizes)
    peak = tracker.get_tracker_snapshot("peak")[setup.device]
    return peak["Total"] / 1e6


def _size(experiment: Experiment) -> tuple[int, int]:
    data = experiment.data
    if data.transform != "flip":
        return data.crop, data.crop
    if data.shrink is None:
        return _VOC_IMAGE
    return data.shrink, round(data.shrink * _VOC_IMAGE[1] / _VOC_IMAGE[0])


def _with_classes(experiment: Experiment) -> Experiment:
    data = experiment.name.split("/")[0]
    count = next((n for key, n in _CLASSES.items() if data.startswith(key)), 20)
    if experiment.task is None:
        return experiment
    return override(experiment, [f"task.classes={count}"])
