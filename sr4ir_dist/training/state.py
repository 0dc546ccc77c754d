"""Between a run's engines and its checkpoints: what the next step reads, all of it."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import safetensors.torch
from torch import nn

from sr4ir_dist.checkpoint import Checkpoint
from sr4ir_dist.config import Experiment, Network, Role, from_json
from sr4ir_dist.training.engines import Engine
from sr4ir_dist.training.views import Setup

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

    epoch: int = 1
    step_in_epoch: int = 0
    step: int = 0
    seconds: float = 0.0
    history: tuple[dict[str, Any], ...] = ()
    bad_rows: tuple[int, ...] = ()


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
    files["progress.json"] = json.dumps(record, indent=2).encode()
    return files


def load_networks(modules: Mapping[Network, nn.Module], saved: Checkpoint) -> None:
    """Give the networks of a checkpoint their weights; do so before engines are made."""
    for role in JUDGED:
        if role in modules:
            modules[role].load_state_dict(saved.tensors(f"{role}.safetensors"))


def load_optimizers(engines: Mapping[Role, Engine], saved: Checkpoint) -> None:
    """Give engines their published optimizer states, from any number of ranks or ZeRO stage."""
    for role, engine in engines.items():
        engine.load_optimizer_state(saved.tensors(f"{role}.optimizer.safetensors"))


def load_progress(saved: Checkpoint) -> Progress:
    """Where the run stood when it published the checkpoint."""
    record = saved.json("progress.json")
    # Checkpoints from before a field was there tell nothing about it.
    fields: dict[str, Any] = {
        field.name: record[field.name]
        for field in dataclasses.fields(Progress)
        if field.name in record
    }
    for name in ("history", "bad_rows"):
        fields[name] = tuple(fields.get(name, ()))
    return Progress(**fields)


def load_experiment(saved: Checkpoint) -> Experiment:
    """The experiment whose run published the checkpoint."""
    return from_json(saved.read("experiment.json"))
