"""From an experiment to networks, engines and loaders on this process's device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from sr4ir_dist import recipes, tasks
from sr4ir_dist.batch import Batch
from sr4ir_dist.config import Experiment, Network, Role
from sr4ir_dist.data.loader import Loader
from sr4ir_dist.data.splits import open_split
from sr4ir_dist.data.transforms import Flip, PatchCrop, ResizeCrop, Transform
from sr4ir_dist.degradation import crop_back
from sr4ir_dist.networks import SR_NETWORKS
from sr4ir_dist.networks.kernels import speed_up
from sr4ir_dist.networks.vgg import VGG19
from sr4ir_dist.tasks import Task
from sr4ir_dist.tasks.detection import Detector, settle
from sr4ir_dist.tasks.scored import Scored
from sr4ir_dist.training.batch_norm import synchronise
from sr4ir_dist.training.engines import DeepSpeedEngine, Engine, PlainEngine, build_optimizer
from sr4ir_dist.training.views import Setup

_SETTLING_IMAGES = 16


def build_networks(
    experiment: Experiment,
    device: torch.device | None = None,
    only: Sequence[Network] = ("sr", "task", "oracle", "vgg"),
) -> dict[Network, nn.Module]:
    """The recipe's networks with the random start that the seed gives.

    Every rank builds the same; a network's start does not depend on which others are built.

    Args:
        experiment: the experiment.
        device: where they lie; by default this process's.
        only: leaves out all others.
    """
    device = _device() if device is None else device
    modules: dict[Network, nn.Module] = {}
    networks: tuple[Network, ...] = ("sr", "task", "oracle", "vgg")
    for number, network in enumerate(networks):
        if network in recipes.get(experiment.recipe).init_from and network in only:
            torch.manual_seed(experiment.seed * 2 + number)
            modules[network] = _build(experiment, network).to(device)
    return modules


def make_setup(
    experiment: Experiment,
    modules: Mapping[Network, nn.Module],
    *,
    rank: int = 0,
    world_size: int = 1,
    engine: Literal["deepspeed", "plain", "none"] = "deepspeed",
    lpips: nn.Module | None = None,
) -> Setup:
    """Wrap the networks that learn in engines and freeze the others.

    Args:
        experiment: the experiment.
        modules: its networks; their weights must be final, for ZeRO copies them.
        rank: this process among those that train.
        world_size: how many train together.
        engine: DeepSpeed's, plain PyTorch's, or none to evaluate only.
        lpips: the network of the LPIPS metric, to report it.
    """
    recipe, task = recipes.get(experiment.recipe), make_task(experiment)
    modules = dict(modules)
    if world_size > 1 and experiment.batch_norm == "sync" and "task" in recipe.updates:
        modules["task"] = synchronise(modules["task"])
    engines: dict[Role, Engine] = {}
    if lpips is not None:
        lpips = lpips.to(next(p.device for m in modules.values() for p in m.parameters()))
    learning = recipe.updates if engine != "none" else ()
    for network, module in modules.items():
        speed_up(module, precision=experiment.precision)
        if experiment.compile and engine != "none":
            for block in _blocks(network, module, task):
                block.compile()
        if network not in learning:
            module.requires_grad_(False)
    for role in learning:
        module = modules[role]
        optimizer = build_optimizer(
            getattr(experiment.optimizers, role), _groups(role, module, task)
        )
        if engine == "plain":
            engines[role] = PlainEngine(module, optimizer)
        else:
            engines[role] = DeepSpeedEngine(
                module,
                optimizer,
                stage=getattr(experiment.zero, role),
                precision=experiment.precision,
                micro_batch=-(-experiment.batch_size // world_size),
                gradients=experiment.gradients,
                # A rank without images has no more of a detector's graph than its weights.
                overlap=task is None or task.target != "boxes",
            )
    return Setup(experiment, recipe, modules, engines, task, rank, world_size, lpips)


def settle_random_start(
    experiment: Experiment,
    module: nn.Module,
    data: Sequence[str],
    cache_dir: str | None = None,
) -> None:
    """Make a random start of the task network one that can learn: a detector needs images for it.

    Every rank reads the same ones, the first of the training split.
    """

    def first() -> Batch:
        with Loader(
            open_split(data, "train"),
            transform=Flip(shrink=experiment.data.shrink),
            batch_size=_SETTLING_IMAGES,
            seed=experiment.seed,
            rank=0,
            world_size=1,
            shuffle=False,
            cache_dir=Path(cache_dir) if cache_dir else None,
        ) as loader:
            return next(loader.epoch(1))

    settle_on(experiment, module, first)


def settle_on(experiment: Experiment, module: nn.Module, images: Callable[[], Batch]) -> None:
    """The same on a batch, which is asked for only where the task network is a detector."""
    detector = module.network if isinstance(module, Scored) else module
    if isinstance(detector, Detector):
        batch = images().to(next(module.parameters()).device)
        torch.manual_seed(experiment.seed)
        settle(detector, crop_back(batch.hr, batch.sizes))


def make_task(experiment: Experiment) -> Task | None:
    """The adapter of the experiment's task, if its recipe has a task network."""
    if "task" not in recipes.get(experiment.recipe).init_from or experiment.task is None:
        return None
    return tasks.make_task(experiment.task)


def open_loader(
    setup: Setup, data: Sequence[str], split: str, cache_dir: str | None = None
) -> Loader:
    """This rank's loader of a split of one or more datasets, with the experiment's transforms."""
    experiment = setup.experiment
    training = split == "train"
    settings = experiment.data
    transform: Transform
    if settings.transform == "patch":
        transform = PatchCrop(crop=settings.crop, scale=experiment.scale, train=training)
    elif settings.transform == "flip":
        transform = Flip(train=training, shrink=settings.shrink)
    else:
        transform = ResizeCrop(
            resize=settings.resize,
            crop=settings.crop,
            train=training,
            center_crop=settings.center_crop,
        )
    target = None if setup.task is None else setup.task.target
    return Loader(
        open_split(data, split),
        transform=transform,
        batch_size=experiment.batch_size if training else experiment.evaluation.batch_size,
        seed=experiment.seed,
        rank=setup.rank,
        world_size=setup.world_size,
        shuffle=training,
        target=target,
        # Detection's batches hold images of about the same shape, and only whole ones.
        grouped=training and target == "boxes",
        cache_dir=Path(cache_dir) if cache_dir else None,
    )


def _build(experiment: Experiment, network: Network) -> nn.Module:
    if network == "vgg":
        return VGG19(experiment.fixed.vgg_layer)
    if network == "sr":
        return _build_sr(experiment)
    task = make_task(experiment)
    assert task is not None
    module = task.build()
    if network == "task" and recipes.get(experiment.recipe).scored:
        return Scored(module, task)
    return module


def _build_sr(experiment: Experiment) -> nn.Module:
    settings = experiment.sr
    assert settings is not None
    sizes: dict[str, tuple[str, ...]] = {
        "edsr": ("blocks", "features"),
        "swinir": ("blocks", "features", "depth", "heads", "window", "drop_path", "recompute"),
    }
    given = {name: getattr(settings, name) for name in sizes.get(settings.network, ())}
    return SR_NETWORKS[settings.network](experiment.scale, **given)


def _blocks(network: Network, module: nn.Module, task: Task | None) -> Sequence[nn.Module]:
    """The submodules that are compiled: those whose insides nobody else calls or listens to."""
    if network in ("sr", "vgg"):
        return [module]
    assert task is not None
    return task.blocks(module.network if isinstance(module, Scored) else module)


def _groups(
    role: Role, module: nn.Module, task: Task | None
) -> list[tuple[str, list[nn.Parameter]]]:
    """The groups of a network's trainable parameters that have learning rates of their own."""
    if role == "sr" or task is None:
        return [("main", [p for p in module.parameters() if p.requires_grad])]
    if isinstance(module, Scored):
        return list(module.parameter_groups())
    return list(task.parameter_groups(module))


def _device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
