"""Counts the work of a training step: FLOPs, kernels and bytes, by running one on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from sr4ir_dist.benchmark.scaling_model import Collectives, PhaseWork
from sr4ir_dist.benchmark.watch import watch_phases
from sr4ir_dist.config import Experiment
from sr4ir_dist.networks.edsr import EDSR
from sr4ir_dist.networks.swinir import SwinIR
from sr4ir_dist.overrides import override
from sr4ir_dist.training.build import build_networks, make_setup, open_loader, settle_random_start
from sr4ir_dist.training.engines import PlainEngine
from sr4ir_dist.training.step import Rates, train_step
from sr4ir_dist.training.views import Setup, make_inputs

CLASSES = {
    "voc_seg": 20,
    "voc_det": 20,
    "voc_seg_resnet50": 20,
    "coco_seg": 80,
    "coco_det": 80,
    "cars": 196,
    "cub200": 200,
}
"""Classes of the public datasets, for networks of the right size without the data."""
VOC_SIDE = 433
"""Side of a square with as many pixels as VOC's usual 500 x 375, for detection's whole images."""
_IMAGES = 2  # DeepLabV3's pooled branch normalises one value an image, so one is too few


@dataclass
class _Counts:
    flops: float = 0.0
    launches: int = 0
    channels: list[int] | None = None


class _Launches(TorchDispatchMode):
    """Counts the operators that compute something, each of which is a kernel or more on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += not getattr(func, "is_view", False)
        return func(*args, **(kwargs or {}))


class _Standing(PlainEngine):
    """Never moves its weights: an optimizer's FLOPs are few, and its kernels are fused on GPUs."""

    def step(self, rates: Sequence[float]) -> None:
        for parameter in self.trainable:
            parameter.grad = None


def count_work(
    experiment: Experiment, data: Sequence[str], *, gathered: bool = True
) -> tuple[PhaseWork, ...]:
    """Run one step of two images and count what each phase does, SR networks layer by layer.

    Args:
        experiment: as `scaling.prepare` returns it.
        data: a dataset of images of the size to count for.
        gathered: batch norm's statistics are gathered, as torch's own layer does on GPUs; else they
            are reduced in float64, as ours does on CPUs.
    """
    experiment = override(experiment, [f"batch_size={_IMAGES}", "precision=fp32"])
    modules = build_networks(experiment, torch.device("cpu"))
    if "task" in modules:
        settle_random_start(experiment, modules["task"], data)
    setup = make_setup(experiment, modules, engine="plain")
    for module in modules.values():
        if isinstance(module, EDSR | SwinIR):
            # Made one, the layers' weights are computed once a step, not for each image.
            module.merged = False
    engines = {
        role: _Standing(engine.module, torch.optim.SGD(engine.trainable, lr=0.0))
        for role, engine in setup.engines.items()
    }
    setup = replace(setup, engines=engines)
    with open_loader(setup, data, "train") as loader:
        inputs = make_inputs(setup, next(loader.epoch(1)), epoch=1)
    counts = [_Counts() for _ in setup.recipe.phases]
    rates: Rates = {role: [0.0] * len(engine.base_rates) for role, engine in setup.engines.items()}
    counter = FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten.convolution_backward: convolution_backward}
    )
    with counter as flops, _Launches() as launches:

        def enter(phase: int) -> None:
            counts[phase] = _Counts(-flops.get_total_flops(), -launches.count, [])
            hooks.extend(_listen(setup, counts[phase]))

        def leave(phase: int) -> None:
            counts[phase].flops += flops.get_total_flops()
            counts[phase].launches += launches.count
            while hooks:
                hooks.pop().remove()

        hooks: list[Any] = []
        with watch_phases(enter, leave):
            train_step(setup, inputs, after_warmup=True, rates=rates)
    return tuple(
        PhaseWork(
            phase.updates,
            counted.flops / _IMAGES,
            counted.launches,
            sum(4 * p.numel() for role in phase.updates for p in engines[role].trainable),
            _batch_norm(counted.channels or [], gathered),
        )
        for phase, counted in zip(setup.recipe.phases, counts, strict=True)
    )


def convolution_backward(
    grad_out_shape: Any,
    x_shape: Any,
    w_shape: Any,
    _bias: Any,
    _stride: Any,
    _padding: Any,
    _dilation: Any,
    transposed: bool,
    _output_padding: Any,
    _groups: int,
    output_mask: Sequence[bool],
    **kwargs: Any,
) -> int:
    """As much as the forward for each of the two gradients.

    torch's own count takes the gradient of a depthwise convolution's weight for a dense one's.
    """
    once = conv_flop_count(x_shape, w_shape, grad_out_shape, transposed)
    return once * (output_mask[0] + output_mask[1])


def _listen(setup: Setup, counts: _Counts) -> list[Any]:
    """Note the channels of every forward of a batch norm layer that would share its statistics."""
    if "task" not in setup.engines or setup.experiment.batch_norm == "local":
        return []

    def note(layer: nn.Module, inputs: Any, output: Tensor) -> None:
        assert isinstance(layer, nn.BatchNorm2d)
        assert counts.channels is not None
        if layer.training:
            counts.channels.append(layer.num_features)

    layers = setup.modules["task"].modules()
    return [x.register_forward_hook(note) for x in layers if isinstance(x, nn.BatchNorm2d)]


def _batch_norm(channels: Sequence[int], gathered: bool) -> tuple[Collectives, ...]:
    """Mean, variance and count of each layer forward, two sums of each channel backward."""
    if not channels:
        return ()
    calls, values = len(channels), sum(2 * width + 1 for width in channels)
    forward = (
        Collectives("all_gather", calls, 4 * values)
        if gathered
        else Collectives("all_reduce", calls, 8 * values)
    )
    return forward, Collectives("all_reduce", calls, 4 * 2 * sum(channels))
