"""A published checkpoint's networks, and the images of a dataset as they are judged."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from dataclasses import dataclass
from itertools import islice

import torch

from sr4ir_dist import checkpoint
from sr4ir_dist.hub.versions import resolve
from sr4ir_dist.overrides import override
from sr4ir_dist.recipes import Phase
from sr4ir_dist.training import state
from sr4ir_dist.training.build import build_networks, make_setup, open_loader
from sr4ir_dist.training.views import Inputs, Setup, Views, make_inputs


@dataclass(frozen=True)
class Loaded:
    """A checkpoint ready to be looked at.

    Attributes:
        uri: the checkpoint.
        setup: its networks in eval mode, frozen, with its experiment, recipe and task.
        data: the datasets that its run was trained on.
    """

    uri: str
    setup: Setup
    data: tuple[str, ...]


@dataclass(frozen=True)
class Sample:
    """One image of a split.

    Attributes:
        id: its name in the dataset.
        inputs: a batch of this image alone, degraded, with its target.
        views: what the networks make of it; without gradients only inside `torch.no_grad()`.
    """

    id: str
    inputs: Inputs
    views: Views


def load(uri: str, *, settings: Iterable[str] = (), device: torch.device | None = None) -> Loaded:
    """Load a checkpoint's networks.

    Args:
        uri: a checkpoint, a run for its newest one, or a hub's name.
        settings: `key.path=value` assignments to its experiment.
        device: where the networks lie; by default this process's.

    Raises:
        CheckpointError: there is no such checkpoint, or it is damaged.
        ExperimentError: a setting is wrong.
    """
    saved = checkpoint.load(resolve(uri))
    experiment = override(state.load_experiment(saved), settings)
    modules = build_networks(experiment, device, only=state.JUDGED)
    state.load_networks(modules, saved)
    for module in modules.values():
        module.eval()
    data = state.load_run(saved)["data"]
    uris = (data,) if isinstance(data, str) else tuple(data)
    return Loaded(saved.uri, make_setup(experiment, modules, engine="none"), uris)


def samples(
    loaded: Loaded,
    data: Iterable[str] | None = None,
    split: str = "val",
    count: int | None = None,
) -> Generator[Sample]:
    """The images of a split one by one, at their own sizes, in the dataset's order.

    Args:
        loaded: whose transforms, degradation and networks they go through.
        data: URIs of the datasets; None for what the run was trained on.
        split: the split.
        count: the first so many of it; None for all.

    Raises:
        DatasetError: there is no such dataset or split.
    """
    setup = loaded.setup
    alone = setup.experiment.evaluation.model_copy(update={"batch_size": 1})
    experiment = setup.experiment.model_copy(update={"evaluation": alone})
    uris = loaded.data if data is None else tuple(data)
    at = Setup(experiment, setup.recipe, setup.modules, setup.engines, setup.task)
    with open_loader(at, uris, split) as loader:
        for batch in islice(loader.epoch(1), count):
            if not len(batch.hr):
                continue  # it could not be read, and the dataset says to leave such images out
            inputs = make_inputs(at, batch)
            yield Sample(batch.ids[0], inputs, Views(at, Phase(updates=(), terms=()), inputs))
