"""Everything about a run that can be wrong before a worker starts, checked and written down."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sr4ir_dist import checkpoint, experiments, recipes, storage
from sr4ir_dist.config import Experiment, ExperimentError, Role, override
from sr4ir_dist.data.schema import Manifest
from sr4ir_dist.data.shards import load_manifest
from sr4ir_dist.training.state import load_experiment

RESULT = "result.json"
_WEIGHT_FILES = (".pt", ".pth", ".safetensors")


@dataclass(frozen=True)
class Start:
    """Where a network starts.

    Attributes:
        uri: a weight file, or None for a random start.
        partial: load what fits.
        told: the same in words.
    """

    uri: str | None
    partial: bool
    told: str


@dataclass(frozen=True)
class EvaluationRequest:
    """A checkpoint to judge.

    Attributes:
        checkpoint: its URI.
        experiment: its experiment, with evaluation settings changed where asked for.
        data: URI of the dataset.
        split: the split to judge on.
    """

    checkpoint: str
    experiment: Experiment
    data: str
    split: str


@dataclass(frozen=True)
class Plan:
    """A run that can start: its experiment is complete and what it needs exists.

    Attributes:
        experiment: with the number of classes filled in from the data.
        data: URI of the dataset.
        run: the run's name: its experiment's and a digest of its settings and data.
        run_uri: where everything of the run is stored.
        starts: where each network starts.
    """

    experiment: Experiment
    data: str
    run: str
    run_uri: str
    starts: dict[Role, Start]


def make_plan(experiment: Experiment, *, data: str, storage_uri: str) -> Plan:
    """Check an experiment against its data and its storage, and name its run.

    Raises:
        ExperimentError: the data does not fit the experiment, or a network that it starts from is
            not there.
        DatasetError: there is no such dataset, or it is of another format version.
        StorageError: the storage cannot be written.
    """
    data, storage_uri = storage.absolute(data), storage.absolute(storage_uri)
    recipe = recipes.get(experiment.recipe)
    for role in recipe.init_from:
        if getattr(experiment, role) is None:
            raise ExperimentError(
                f"experiment {experiment.name} needs a {role} network, but {role} is null"
            )
    manifests = [load_manifest(data, split) for split in ("train", "val")]
    experiment = _with_classes(experiment, manifests, data)
    storage.check_writable(storage_uri)
    run = run_name(experiment, data_digest(manifests))
    starts: dict[Role, Start] = {}
    for role, origin in recipe.init_from.items():
        if origin == recipes.PRETRAINED:
            starts[role] = _pretrained(experiment, role)
        else:
            starts[role] = _from_recipe(experiment, role, origin, manifests, storage_uri)
    return Plan(experiment, data, run, storage.join(storage_uri, run), starts)


def make_request(
    uri: str, *, data: str | None, split: str, settings: Iterable[str]
) -> EvaluationRequest:
    """Check what an evaluation needs before a worker starts.

    Args:
        uri: a checkpoint, or a run for its newest one.
        data: dataset; None for the one that the run was trained on.
        split: the split to judge on.
        settings: `key.path=value` assignments to the checkpoint's experiment.

    Raises:
        CheckpointError: there is no such checkpoint, or it is damaged.
        ExperimentError: a setting is wrong, or the data does not fit the checkpoint.
        DatasetError: there is no such dataset or split.
    """
    uri = checkpoint.resolve(storage.absolute(uri))
    saved = checkpoint.load(uri)
    experiment = override(load_experiment(saved), settings)
    data = saved.json("run.json")["data"] if data is None else storage.absolute(data)
    assert data is not None
    manifest = load_manifest(data, split)
    experiment = _with_classes(experiment, [manifest], data)
    return EvaluationRequest(uri, experiment, data, split)


def data_digest(manifests: list[Manifest]) -> str:
    """What identifies a run's data: the digests of the splits that it reads."""
    return "".join(manifest.digest for manifest in manifests)


def run_name(experiment: Experiment, data: str) -> str:
    """A run's name; other settings or other data give another name.

    Args:
        experiment: complete, with its number of classes.
        data: `data_digest` of the manifests.
    """
    return f"{experiment.name.replace('/', '-')}-{experiment.digest(data=data)}"


def _with_classes(experiment: Experiment, manifests: list[Manifest], data: str) -> Experiment:
    recipe, task = recipes.get(experiment.recipe), experiment.task
    if task is None or "task" not in recipe.init_from:
        return experiment
    for manifest in manifests:
        if task.name not in manifest.tasks:
            raise ExperimentError(
                f"experiment {experiment.name} needs a dataset for {task.name}, but the split "
                f"{manifest.split!r} of {data} is for {', '.join(manifest.tasks)}"
            )
    count = len(manifests[0].class_names)
    if any(manifest.class_names != manifests[0].class_names for manifest in manifests):
        raise ExperimentError(f"the splits of {data} name different classes")
    if task.classes not in (None, count):
        raise ExperimentError(f"task.classes={task.classes}, but {data} has {count} classes")
    return experiment.model_copy(update={"task": task.model_copy(update={"classes": count})})


def _pretrained(experiment: Experiment, role: Role) -> Start:
    settings = getattr(experiment, role)
    if settings.weights is None:
        return Start(None, False, f"a random start (give one by --set {role}.weights=FILE)")
    uri = _weights_uri(storage.absolute(settings.weights), role, f"{role}.weights")
    how = ", what fits of it" if settings.partial else ""
    return Start(uri, settings.partial, f"{settings.weights}{how}")


def _from_recipe(
    experiment: Experiment, role: Role, origin: str, manifests: list[Manifest], storage_uri: str
) -> Start:
    explicit = getattr(experiment, role).start
    if explicit is not None:
        uri = _weights_uri(storage.absolute(explicit), role, f"{role}.start")
        return Start(uri, False, explicit)
    first = experiments.prerequisite(experiment, origin)
    run = run_name(first, data_digest(manifests))
    run_uri = storage.join(storage_uri, run)
    if not storage.exists(storage.join(run_uri, RESULT)):
        raise ExperimentError(
            f"{experiment.name} starts its {role} network from {first.name}, but {run_uri} is not "
            f"a finished run: train {first.name} first, with the same --set, --data and --storage "
            f"options, or name another start by --set {role}.start=URI"
        )
    uri = storage.join(checkpoint.resolve(run_uri), f"{role}.safetensors")
    return Start(uri, False, f"the run {run}")


def _weights_uri(uri: str, role: Role, field: str) -> str:
    if not uri.endswith(_WEIGHT_FILES):
        try:
            uri = storage.join(checkpoint.resolve(uri), f"{role}.safetensors")
        except checkpoint.CheckpointError as error:
            raise ExperimentError(
                f"{field}={uri}: not a weight file ({', '.join(_WEIGHT_FILES)}), and {error}"
            ) from error
    if not storage.exists(uri):
        raise ExperimentError(f"{field}={uri}: there is no such file")
    return uri
