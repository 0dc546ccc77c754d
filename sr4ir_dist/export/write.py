"""Write the networks of a checkpoint where people without this package can use them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from importlib import metadata
from typing import Any

import safetensors.torch
import torch
from torch import nn

from sr4ir_dist import __version__, checkpoint, recipes, storage
from sr4ir_dist.checkpoint import Checkpoint
from sr4ir_dist.config import Experiment, Network
from sr4ir_dist.export.describe import describe_sr, describe_task
from sr4ir_dist.export.graph import (
    ExportError,
    Graph,
    Recognition,
    check_libraries,
    join_graphs,
    make_graph,
)
from sr4ir_dist.hub.versions import resolve
from sr4ir_dist.networks.interpolation import Interpolation
from sr4ir_dist.tasks import Task
from sr4ir_dist.tasks.scored import Scored
from sr4ir_dist.training.build import build_networks, make_task
from sr4ir_dist.training.state import (
    JUDGED,
    load_class_names,
    load_experiment,
    load_networks,
    load_progress,
    load_run,
)

FORMATS = ("safetensors", "onnx")
FORMAT_VERSION = 1
_MANIFEST = "export.json"
_NO_DETECTION = (
    "no ONNX of the detector: how many boxes its proposals and non-maximum suppression keep hangs "
    "on what an image shows, which torch.export cannot trace; build it from task.json and "
    "task.safetensors"
)


def export(
    uri: str,
    out: str,
    *,
    formats: Collection[str] = FORMATS,
    data: str | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Write a checkpoint's networks as safetensors and ONNX, each with JSON that says what it is.

    `sr.json` and `task.json` say how to build a network, what goes in and comes out, its classes,
    metrics and origin; `sr.onnx` and `task.onnx` take any batch and image size, and `pipeline.onnx`
    goes from LR images to SR images and class scores. `export.json`, written last, lists them all
    with their sizes and digests: without it there is no export.

    Args:
        uri: a checkpoint, a run for its newest one, or `hub://NAME`.
        out: where to; there must be no export yet.
        formats: of `FORMATS`.
        data: dataset that names the classes; None for the one that the run was trained on, where it
            can be read.
        say: is told what is being made.

    Returns:
        What `export.json` holds: `files`, `onnx` (axes, and how far onnxruntime differed), `notes`.

    Raises:
        ExportError: an unknown format, an export that is there already, a library that is missing,
            a dataset of other classes, nothing that can be written in the formats, or an ONNX graph
            that does not compute what its network does.
        CheckpointError: there is no such checkpoint, or it is damaged.
        DatasetError: there is no such dataset.
        StorageError: the storage cannot be written.
    """
    if not formats or set(formats) - set(FORMATS):
        raise ExportError(f"formats is {list(formats)}; allowed: {', '.join(FORMATS)}")
    if "onnx" in formats:
        check_libraries()
    out = storage.absolute(out)
    if storage.exists(storage.join(out, _MANIFEST)):
        raise ExportError(f"{out}: there is an export already; delete it or name another place")
    saved = checkpoint.load(resolve(uri))
    experiment, notes = load_experiment(saved), []
    task = make_task(experiment)
    classes = None
    if task is not None:
        names, note = load_class_names(saved, task.num_classes, data)
        classes = names or None
        notes += [note] if note else []
    modules = _networks(experiment, saved, notes)
    storage.check_writable(out)
    origin = _origin(experiment, saved)
    files: dict[str, bytes] = {}
    for role, module in modules.items():
        if role == "sr":
            about = describe_sr(experiment)
        else:
            assert task is not None
            about = describe_task(experiment, task, module, classes)
        files[f"{role}.json"] = _json(about | origin)
        if "safetensors" in formats:
            weights = safetensors.torch.save(module.state_dict(), {"format": "pt"})
            files[f"{role}.safetensors"] = weights
    graphs: dict[str, Graph] = {}
    if "onnx" in formats:
        about = {"experiment": experiment.name, "run": origin["run"], "classes": classes}
        graphs = _graphs(experiment, task, modules, about, notes, say)
        files |= {name: graph.data for name, graph in graphs.items()}
    if not graphs and "safetensors" not in formats:
        raise ExportError(f"nothing to write: {'; '.join(notes)}")
    for name, content in files.items():
        storage.write_bytes(storage.join(out, name), content)
    manifest = {
        "format_version": FORMAT_VERSION,
        "files": {
            name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for name, content in files.items()
        },
        "onnx": {name: graph.about for name, graph in graphs.items()},
        "notes": notes,
    }
    storage.write_json(storage.join(out, _MANIFEST), manifest)
    return manifest


def _networks(
    experiment: Experiment, saved: Checkpoint, notes: list[str]
) -> dict[Network, nn.Module]:
    modules = build_networks(experiment, torch.device("cpu"), JUDGED)
    load_networks(modules, saved)
    if isinstance(scored := modules.get("task"), Scored):
        modules["task"] = scored.network
        notes.append("the task network's real/fake score, of use in training alone, is left out")
    return modules


def _origin(experiment: Experiment, saved: Checkpoint) -> dict[str, Any]:
    """Where a network comes from and how good it was there."""
    progress = load_progress(saved)
    judged = [record for record in progress.history if record["step"] == progress.step]
    return {
        "metrics": judged[-1] if judged else None,
        "run": load_run(saved)["run"],
        "checkpoint": {
            "uri": saved.uri,
            "step": progress.step,
            "sha256": {name: digest for name, (_, digest) in saved.files.items()},
        },
        "versions": {
            "sr4ir_dist": __version__,
            **{name: metadata.version(name) for name in ("torch", "torchvision")},
        },
        "experiment": experiment.model_dump(mode="json"),
    }


def _graphs(
    experiment: Experiment,
    task: Task | None,
    modules: Mapping[Network, nn.Module],
    about: Mapping[str, Any],
    notes: list[str],
    say: Callable[[str], None],
) -> dict[str, Graph]:
    graphs: dict[str, Graph] = {}

    def make(network: nn.Module, name: str, output: str) -> Graph:
        say(f"tracing {name} -> {output} and checking it")
        return make_graph(network, name, output, about)

    enlarge, first = modules.get("sr"), None
    if enlarge is not None:
        first = graphs["sr.onnx"] = make(enlarge, "lr", "sr")
    if task is not None and task.target == "boxes":
        notes.append(_NO_DETECTION)
    elif task is not None:
        recognise = Recognition(task, modules["task"])
        second = graphs["task.onnx"] = make(recognise, "images", "logits")
        if recipes.get(experiment.recipe).judged_on == "lr_up":
            enlarge = Interpolation(experiment.scale, mode="bilinear")
            first = make(enlarge, "lr", "sr")
        if enlarge is not None and first is not None:
            graphs["pipeline.onnx"] = join_graphs(first, second, (enlarge, recognise))
    return graphs


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()
