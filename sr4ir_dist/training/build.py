"""From an experiment to networks, engines and loaders on this process's device."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from sr4ir_dist import recipes
from sr4ir_dist.config import Experiment, Role
from sr4ir_dist.data.loader import Loader
from sr4ir_dist.data.transforms import PatchCrop, ResizeCrop, Transform
from sr4ir_dist.networks import SR_NETWORKS
from sr4ir_dist.tasks import TASKS, Task
from sr4ir_dist.training.batch_norm import synchronise
from sr4ir_dist.training.engines import DeepSpeedEngine, Engine, PlainEngine, build_optimizer
from sr4ir_dist.training.step import Setup


def build_networks(
    experiment: Experiment, device: torch.device | None = None
) -> dict[Role, nn.Module]:
    """The recipe's networks with the random start that the seed gives.

    Every rank builds the same; a network's start does not depend on which others are built. They
    lie on the device, by default this process's.
    """
    device = _device() if device is None else device
    modules: dict[Role, nn.Module] = {}
    for number, role in enumerate(("sr", "task")):
        if role in recipes.get(experiment.recipe).init_from:
            torch.manual_seed(experiment.seed * 2 + number)
            modules[role] = _build(experiment, role).to(device)
    return modules


def make_setup(
    experiment: Experiment,
    modules: Mapping[Role, nn.Module],
    *,
    rank: int = 0,
    world_size: int = 1,
    engine: Literal["deepspeed", "plain", "none"] = "deepspeed",
) -> Setup:
    """Wrap the networks that learn in engines and freeze the others.

    Args:
        experiment: the experiment.
        modules: its networks; their weights must be final, for ZeRO copies them.
        rank: this process among those that train.
        world_size: how many train together.
        engine: DeepSpeed's, plain PyTorch's, or none to evaluate only.
    """
    recipe = recipes.get(experiment.recipe)
    modules = dict(modules)
    if world_size > 1 and experiment.batch_norm == "sync" and "task" in recipe.updates:
        modules["task"] = synchronise(modules["task"])
    engines: dict[Role, Engine] = {}
    for role, module in modules.items():
        if role not in recipe.updates or engine == "none":
            module.requires_grad_(False)
            continue
        optimizer = build_optimizer(experiment, role, module)
        if engine == "plain":
            engines[role] = PlainEngine(module, optimizer)
        else:
            engines[role] = DeepSpeedEngine(
                module,
                optimizer,
                stage=getattr(experiment.zero, role),
                precision=experiment.precision,
                micro_batch=-(-experiment.batch_size // world_size),
            )
    return Setup(experiment, recipe, modules, engines, make_task(experiment), rank, world_size)


def make_task(experiment: Experiment) -> Task | None:
    """The adapter of the experiment's task, if its recipe has a task network."""
    if "task" not in recipes.get(experiment.recipe).init_from or experiment.task is None:
        return None
    return TASKS[experiment.task.name](num_classes=experiment.task.classes)


def open_loader(setup: Setup, data: str, split: str, cache_dir: str | None = None) -> Loader:
    """This rank's loader of a split, with the experiment's transforms."""
    experiment = setup.experiment
    training = split == "train"
    settings = experiment.data
    transform: Transform
    if settings.transform == "patch":
        transform = PatchCrop(crop=settings.crop, scale=experiment.scale, train=training)
    else:
        transform = ResizeCrop(resize=settings.resize, crop=settings.crop, train=training)
    return Loader(
        data,
        split,
        transform=transform,
        batch_size=experiment.batch_size if training else experiment.evaluation.batch_size,
        seed=experiment.seed,
        rank=setup.rank,
        world_size=setup.world_size,
        shuffle=training,
        target="label" if setup.task is not None else None,
        cache_dir=Path(cache_dir) if cache_dir else None,
    )


def _build(experiment: Experiment, role: Role) -> nn.Module:
    if role == "sr":
        settings = experiment.sr
        assert settings is not None
        build = SR_NETWORKS[settings.network]
        if settings.network != "edsr":
            return build(experiment.scale)
        return build(experiment.scale, blocks=settings.blocks, features=settings.features)
    task = make_task(experiment)
    assert task is not None
    return task.build()


def _device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
