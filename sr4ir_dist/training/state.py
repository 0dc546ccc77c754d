"""Between a run's engines and its checkpoints: what the next step reads, all of it."""

from __future__ import annotations

import dataclasses
import json
import math
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import safetensors.torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from sr4ir_dist.checkpoint import Checkpoint, CheckpointError
from sr4ir_dist.config import Experiment, ExperimentError, Network, Role, from_json
from sr4ir_dist.data.schema import DatasetError
from sr4ir_dist.data.splits import open_split
from sr4ir_dist.settings import NonNegative, Positive
from sr4ir_dist.storage import StorageError
from sr4ir_dist.training.engines import Engine
from sr4ir_dist.training.views import Setup
from sr4ir_dist.untrusted import MOST_BYTES

JUDGED: tuple[Role, ...] = ("sr", "task")
"""The networks of a checkpoint. Those that only lend their features are read from their start."""


@dataclass(frozen=True)
class Progress:
    """Where a run stands.

    Attributes:
        epoch: the epoch of the next step, from 1.
        step_in_epoch: steps of that epoch that are done.
        step: steps of the run that are done.
        seconds: time spent in training steps, evaluation and checkpoints aside.
        history: one record of metrics for each evaluation.
        bad_rows: rows of the training split that could not be read in this epoch so far, over all
            ranks.
    """

    epoch: Positive = 1
    step_in_epoch: NonNegative = 0
    step: NonNegative = 0
    seconds: float = 0.0
    history: tuple[dict[str, Any], ...] = ()
    bad_rows: tuple[NonNegative, ...] = ()


_FILE = "progress.json"
_PROGRESS = TypeAdapter(Progress)


def snapshot(setup: Setup, progress: Progress) -> dict[str, bytes]:
    """The files of a checkpoint; every rank must call it, rank 0 gets them and others nothing.

    There is no part of a rank's own: ranks hold equal networks, optimizer states are gathered, and
    what is random is keyed by seed, epoch, sample and step.
    """
    optimizers = {role: engine.optimizer_state() for role, engine in setup.engines.items()}
    if setup.rank:
        return {}
    files = {"experiment.json": setup.experiment.model_dump_json(indent=2).encode()}
    for role in JUDGED:
        if role not in setup.modules:
            continue
        state = setup.modules[role].state_dict()
        weights = {name: value.contiguous() for name, value in state.items()}
        files[f"{role}.safetensors"] = safetensors.torch.save(weights)
    for role, state in optimizers.items():
        files[f"{role}.optimizer.safetensors"] = safetensors.torch.save(state)
    record = dataclasses.asdict(progress) | {
        "world_size": setup.world_size,
        "versions": {"python": platform.python_version()}
        | {name: metadata.version(name) for name in ("torch", "torchvision", "deepspeed", "ray")},
    }
    files[_FILE] = json.dumps(record, indent=2).encode()
    return files


def load_networks(modules: Mapping[Network, nn.Module], saved: Checkpoint) -> None:
    """Give the networks of a checkpoint their weights; do so before engines are made.

    Raises:
        CheckpointError: the checkpoint is damaged, or its tensors are not those of the networks.
    """
    for role in JUDGED:
        if role in modules:
            module = modules[role]
            module.load_state_dict(saved.tensors(f"{role}.safetensors", module.state_dict()))


def load_optimizers(engines: Mapping[Role, Engine], saved: Checkpoint) -> None:
    """Give engines their published optimizer states, from any number of ranks or ZeRO stage.

    Raises:
        CheckpointError: the checkpoint is damaged, or its tensors are not those of the optimizers.
    """
    for role, engine in engines.items():
        like = engine.optimizer_state_like()
        engine.load_optimizer_state(saved.tensors(f"{role}.optimizer.safetensors", like))


def load_progress(saved: Checkpoint) -> Progress:
    """Where the run stood when it published the checkpoint.

    Raises:
        CheckpointError: the checkpoint is damaged, or does not say so.
    """
    try:
        # Checkpoints from before a field was there tell nothing about it.
        return _PROGRESS.validate_python(saved.json(_FILE))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(
            f"{_FILE} of checkpoint {saved.uri}: {where}={first['input']!r:.200}: {first['msg']}"
        ) from error


def load_figure(saved: Checkpoint, name: str) -> float | None:
    """The figure that a checkpoint's networks reached, None where they were not judged.

    Raises:
        CheckpointError: as `load_progress`.
    """
    progress = load_progress(saved)
    last = progress.history[-1] if progress.history else {}
    value = last.get(name) if last.get("step") == progress.step else None
    return value if isinstance(value, float) and math.isfinite(value) else None


def load_experiment(saved: Checkpoint) -> Experiment:
    """The experiment whose run published the checkpoint.

    Raises:
        CheckpointError: the checkpoint is damaged.
        ExperimentError: the experiment is not one of this package's.
    """
    return from_json(saved.read("experiment.json", MOST_BYTES))


def load_run(saved: Checkpoint) -> dict[str, Any]:
    """The run that published the checkpoint: its name `run`, and `data`, its dataset or datasets.

    Raises:
        CheckpointError: the checkpoint is damaged, or does not say so.
    """
    run = saved.json("run.json")
    data = run.get("data") if isinstance(run, dict) else None
    uris = [data] if isinstance(data, str) else data
    known = isinstance(uris, list) and all(isinstance(uri, str) for uri in uris)
    if not known or not isinstance(run.get("run"), str):
        raise CheckpointError(f"run.json of checkpoint {saved.uri} names no run and dataset")
    return run


def load_class_names(
    saved: Checkpoint, classes: int, data: str | None = None
) -> tuple[tuple[str, ...], str]:
    """The names of what a checkpoint's task network tells apart, without background.

    Args:
        saved: the checkpoint.
        classes: how many there are.
        data: dataset that names them; None for what the run was trained on, where it can be read.

    Returns:
        The names, or none at all and why they are not known.

    Raises:
        CheckpointError: the checkpoint is damaged.
        ExperimentError: the dataset that was asked for has another number of classes.
        DatasetError: there is no such dataset.
        StorageError: the storage does not answer.
    """
    try:
        split = open_split(load_run(saved)["data"] if data is None else data, "train")
        names = split.manifest.class_names
        if len(names) != classes:
            raise ExperimentError(f"{split} has {len(names)} classes, not {classes}")
    except (DatasetError, StorageError, ExperimentError) as error:
        if data is not None:
            raise
        return (), f"no names of classes (name the dataset to have them): {error}"
    return tuple(names), ""
