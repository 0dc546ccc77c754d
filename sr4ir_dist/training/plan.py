"""Everything about a run that can be wrong before a worker starts, checked and written down."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

import torch
from torch import nn

from sr4ir_dist import checkpoint, experiments, recipes, storage
from sr4ir_dist.config import Experiment, ExperimentError, Network, Role
from sr4ir_dist.data.schema import Manifest
from sr4ir_dist.data.splits import Split, dataset_uris, open_split
from sr4ir_dist.hub.names import is_name
from sr4ir_dist.hub.versions import resolve
from sr4ir_dist.metrics.lpips import load_lpips
from sr4ir_dist.networks import published
from sr4ir_dist.networks.pretrained import Backbone, WeightsError, load_weights
from sr4ir_dist.networks.vgg import VGG19
from sr4ir_dist.overrides import override
from sr4ir_dist.recipes import View
from sr4ir_dist.tasks.scored import Scored
from sr4ir_dist.training.build import build_networks, make_task
from sr4ir_dist.training.state import load_experiment, load_run

RESULT = "result.json"
VIEWS: dict[View, Role | None] = {"hr": "task", "lr_up": None, "sr": "sr"}
"""The views that can be judged, and the network without which there is nothing to judge."""
NO_LPIPS = "no LPIPS: "
"""What a note begins with that says why there is no such figure."""
_WEIGHT_FILES = (".pt", ".pth", ".safetensors")


@dataclass(frozen=True)
class Start:
    """Where a network starts.

    Attributes:
        uri: a weight file, or None for a random start.
        partial: load what fits.
        told: the same in words.
        digest: SHA-256 of the file, empty for a random start.
        backbone: how a classification network's file fills a part of this network.
    """

    uri: str | None
    partial: bool
    told: str
    digest: str = ""
    backbone: Backbone | None = None


@dataclass(frozen=True)
class EvaluationRequest:
    """A checkpoint to judge.

    Attributes:
        checkpoint: its URI.
        experiment: its experiment, with evaluation settings changed where asked for.
        data: URI of the dataset, or of each one of a mix.
        split: the split to judge on.
        lpips: VGG16's weights, where LPIPS is reported.
        notes: what the figures lack, and why.
        exchanged: networks from elsewhere, in place of the checkpoint's.
        view: what is judged, where it is not what the recipe is judged on.
    """

    checkpoint: str
    experiment: Experiment
    data: tuple[str, ...]
    split: str
    lpips: str | None = None
    notes: tuple[str, ...] = ()
    exchanged: Mapping[Role, Start] = field(default_factory=dict)
    view: View | None = None


@dataclass(frozen=True)
class Plan:
    """A run that can start: its experiment is complete and what it needs exists.

    Attributes:
        experiment: with the number of classes filled in from the data.
        data: URI of the dataset, or of each one of a mix.
        run: the run's name: its experiment's and a digest of its settings, data and starts.
        run_uri: where everything of the run is stored.
        starts: where each network starts.
        smallest_step: images of the smallest step over all ranks.
        lpips: VGG16's weights, where LPIPS is reported.
        notes: what the figures lack, and why.
    """

    experiment: Experiment
    data: tuple[str, ...]
    run: str
    run_uri: str
    starts: dict[Network, Start]
    smallest_step: int
    lpips: str | None = None
    notes: tuple[str, ...] = ()


def make_plan(
    experiment: Experiment,
    *,
    data: str | Sequence[str],
    storage_uri: str,
    folder: str | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Plan:
    """Check an experiment against its data and its storage, and name its run.

    Args:
        experiment: what to train.
        data: URI of the dataset; of several, to train on all of them as if they were one.
        storage_uri: where runs are kept, and weights that are fetched by name.
        folder: where this run is kept, if not there.
        say: is told what is fetched.

    Raises:
        ExperimentError: the data does not fit the experiment, or a network that it starts from is
            not there.
        WeightsError: weights that it starts from do not fit its network.
        DatasetError: there is no such dataset, or it is of another format version.
        StorageError: the storage cannot be written.
    """
    uris, storage_uri = dataset_uris(data), storage.absolute(storage_uri)
    training, validation = (open_split(uris, name) for name in ("train", "val"))
    manifests = [training.manifest, validation.manifest]
    experiment = _with_classes(experiments.relevant(experiment), [training, validation])
    storage.check_writable(storage_uri)
    smallest = _smallest_step(experiment, training)
    run, starts = _run(experiment, manifests, storage_uri, say)
    given: dict[Network, Start] = {n: start for n, start in starts.items() if start.uri is not None}
    if given:
        modules = build_networks(experiment, torch.device("cpu"))
        for network, start in given.items():
            load_start(modules[network], start)
    lpips, notes = _lpips(experiment, storage_uri, say)
    run_uri = storage.join(folder or storage_uri, run)
    notes += _absent(validation, "val")
    return Plan(experiment, uris, run, run_uri, starts, smallest, lpips, notes)


def load_start(module: nn.Module, start: Start) -> str:
    """Give a network the weights that it starts from; returns in words what was loaded.

    Raises:
        WeightsError: they do not fit, or are not those that the run was planned with.
    """
    assert start.uri is not None
    if _file_digest(start.uri) != start.digest:
        raise WeightsError(f"{start.uri} is not the file that the run was planned with")
    network = module.network if isinstance(module, Scored) else module
    backbone = module.backbone if isinstance(module, VGG19) else start.backbone
    return load_weights(network, start.uri, partial=start.partial, backbone=backbone).summary()


def make_request(
    uri: str,
    *,
    data: str | Sequence[str] | None,
    split: str,
    settings: Iterable[str],
    storage_uri: str | None = None,
    networks: Mapping[Role, str] | None = None,
    view: str | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> EvaluationRequest:
    """Check what an evaluation needs before a worker starts.

    Args:
        uri: a checkpoint, a run for its newest one, or a hub's name.
        data: dataset, or those of a mix; None for what the run was trained on.
        split: the split to judge on.
        settings: `key.path=value` assignments to the checkpoint's experiment.
        storage_uri: where weights that are fetched by name go; by default where the run lies.
        networks: a weight file, a checkpoint or a run for a network that takes the place of the
            checkpoint's own (Tables S2 and S4).
        view: the images to judge, of `VIEWS`; None for those that the recipe is judged on.
        say: is told what is fetched.

    Raises:
        CheckpointError: there is no such checkpoint, or it is damaged.
        WeightsError: such a network is not of the checkpoint's kind.
        ExperimentError: a setting is wrong, or the data does not fit the checkpoint.
        DatasetError: there is no such dataset or split.
    """
    uri = resolve(uri)
    saved = checkpoint.load(uri)
    experiment = override(load_experiment(saved), settings)
    judged = _view(experiment, view)
    uris = dataset_uris(load_run(saved)["data"] if data is None else data)
    opened = open_split(uris, split)
    experiment = _with_classes(experiment, [opened])
    if storage_uri is None:
        # <storage>/<run>/checkpoints/<step>
        storage_uri = uri.rsplit("/", 3)[0]
    lpips, notes = _lpips(experiment, storage.absolute(storage_uri), say, judged)
    notes += _absent(opened, split)
    exchanged: dict[Role, Start] = {
        role: _other(experiment, role, given) for role, given in (networks or {}).items()
    }
    return EvaluationRequest(uri, experiment, uris, split, lpips, notes, exchanged, judged)


def _view(experiment: Experiment, view: str | None) -> View | None:
    has = recipes.get(experiment.recipe).init_from
    allowed: list[View] = [each for each, role in VIEWS.items() if role is None or role in has]
    if view is None or view in allowed:
        return view
    lacks = " has no SR network" if view == "sr" else ""
    raise ExperimentError(f"view={view}: {experiment.name}{lacks}; allowed: {', '.join(allowed)}")


def _other(experiment: Experiment, role: Role, uri: str) -> Start:
    modules = build_networks(experiment, torch.device("cpu"), only=(role,))
    what = f"{role} network"
    if role not in modules:
        raise ExperimentError(
            f"{what} {uri}: recipe {experiment.recipe} has none to exchange"
            + ("; recipe h2t-on-s judges an SR network alone" if role == "task" else "")
        )
    where, digest = _weights(uri if is_name(uri) else storage.absolute(uri), role, what)
    start = Start(where, False, uri, digest)
    load_start(modules[role], start)
    return start


def _absent(split: Split, name: str) -> tuple[str, ...]:
    return tuple(f"{uri} has no split {name!r}" for uri in split.absent)


def _with_classes(experiment: Experiment, splits: Sequence[Split]) -> Experiment:
    recipe, task = recipes.get(experiment.recipe), experiment.task
    if task is None or "task" not in recipe.init_from:
        return experiment
    parts = [part for split in splits for part in split.parts]
    first_uri, first = parts[0]
    for uri, manifest in parts:
        if task.name not in manifest.tasks:
            raise ExperimentError(
                f"experiment {experiment.name} needs a dataset for {task.name}, but the split "
                f"{manifest.split!r} of {uri} is for {', '.join(manifest.tasks)}"
            )
        for number, (name, other) in enumerate(
            zip_longest(first.class_names, manifest.class_names)
        ):
            if name != other:
                raise ExperimentError(
                    f"class {number} is {name!r} in the split {first.split!r} of {first_uri}, but "
                    f"{other!r} in the split {manifest.split!r} of {uri}"
                )
    count = len(first.class_names)
    if task.classes not in (None, count):
        raise ExperimentError(f"task.classes={task.classes}, but {splits[0]} has {count} classes")
    return experiment.model_copy(update={"task": task.model_copy(update={"classes": count})})


def _smallest_step(experiment: Experiment, training: Split) -> int:
    task, rows, batch = make_task(experiment), training.manifest.rows, experiment.batch_size
    if task is not None and task.target == "boxes":
        if rows < batch:
            raise ExperimentError(
                f"batch_size={batch} exceeds the {rows} training images of {training}; detection "
                "leaves out steps that are not full"
            )
        return batch
    return rows % batch or min(rows, batch)


def _lpips(
    experiment: Experiment,
    storage_uri: str,
    say: Callable[[str], None],
    view: View | None = None,
) -> tuple[str | None, tuple[str, ...]]:
    """VGG16's weights for LPIPS, or why there will be no such figure."""
    weights = experiment.evaluation.lpips
    if weights is None or (view or recipes.get(experiment.recipe).judged_on) == "hr":
        return None, ()
    field = "evaluation.lpips"
    if not published.is_name(weights):
        uri = _weights(storage.absolute(weights), "vgg", field)[0]
        load_lpips(uri)
        return uri, ()
    try:
        uri = published.resolve(weights, "vgg16", storage_uri=storage_uri, field=field, say=say)
        return uri, ()
    except (WeightsError, storage.StorageError) as error:
        return None, (f"{NO_LPIPS}{error}",)


def _run(
    experiment: Experiment,
    manifests: list[Manifest],
    storage_uri: str,
    say: Callable[[str], None],
) -> tuple[str, dict[Network, Start]]:
    """A run's name and where its networks start; other settings, data or weights, another name."""
    recipe = recipes.get(experiment.recipe)
    starts: dict[Network, Start] = {}
    for network, origin in recipe.init_from.items():
        sr = experiment.sr
        if network == "sr" and sr is not None and sr.network in ("bilinear", "bicubic"):
            if "sr" in recipe.updates:
                raise ExperimentError(
                    f"sr.network={sr.network!r} has no weights, but recipe {experiment.recipe} "
                    "trains the SR network; allowed: 'edsr', 'swinir'"
                )
            starts[network] = Start(None, False, f"{sr.network} interpolation")
        elif origin == recipes.PRETRAINED:
            starts[network] = _pretrained(experiment, network, storage_uri, say)
        else:
            starts[network] = _from_recipe(experiment, network, origin, manifests, storage_uri, say)
    content = [manifest.digest for manifest in manifests] + [s.digest for s in starts.values()]
    digest = experiment.digest(data=" ".join(content))
    return f"{experiment.name.replace('/', '-')}-{digest}", starts


def _pretrained(
    experiment: Experiment, network: Network, storage_uri: str, say: Callable[[str], None]
) -> Start:
    if network == "vgg":
        weights, field, partial = experiment.fixed.vgg, "fixed.vgg", False
        kind, backbone = "vgg19", None
    else:
        settings = getattr(experiment, network)
        if settings.start is not None:
            raise ExperimentError(
                f"{network}.start={settings.start}: recipe {experiment.recipe} starts its "
                f"{network} network from pretrained weights; use {network}.weights"
            )
        weights, field, partial = settings.weights, f"{network}.weights", settings.partial
        task = make_task(experiment) if network == "task" else None
        kind, backbone = settings.network, task.published if task is not None else None
    if weights is None:
        return Start(None, False, f"a random start (give one by --set {field}=FILE)")
    uri = storage.absolute(weights)
    if published.is_name(weights):
        uri = published.resolve(
            weights, kind, scale=experiment.scale, storage_uri=storage_uri, field=field, say=say
        )
    uri, digest = _weights(uri, network, field)
    how = ", what fits of it" if partial else ""
    return Start(uri, partial, f"{weights}{how}", digest, backbone)


def _from_recipe(
    experiment: Experiment,
    network: Network,
    origin: str,
    manifests: list[Manifest],
    storage_uri: str,
    say: Callable[[str], None],
) -> Start:
    # The oracle is a task network; no network of the recipe's own starts from it.
    role: Role = "sr" if network == "sr" else "task"
    field = "fixed.oracle" if network == "oracle" else f"{role}.start"
    explicit = experiment.fixed.oracle
    if network != "oracle":
        explicit = getattr(experiment, role).start
    if explicit is not None:
        uri, digest = _weights(storage.absolute(explicit), role, field)
        return Start(uri, False, explicit, digest)
    first = experiments.prerequisite(experiment, origin)
    run, _ = _run(first, manifests, storage_uri, say)
    run_uri = storage.join(storage_uri, run)
    if not storage.exists(storage.join(run_uri, RESULT)):
        raise ExperimentError(
            f"{experiment.name} starts its {network} network from {first.name}, but {run_uri} is "
            f"not a finished run: train {first.name} first, with the same --set, --seeds, "
            f"--data and --storage options, or name another start by --set {field}=URI"
        )
    uri, digest = _weights(run_uri, role, field)
    return Start(uri, False, f"the run {run}", digest)


def _weights(uri: str, network: Network, field: str) -> tuple[str, str]:
    """A weight file's URI and SHA-256; of a run or checkpoint, the digest that it published."""
    if is_name(uri) or not uri.endswith(_WEIGHT_FILES):
        try:
            saved = checkpoint.load(resolve(uri))
        except checkpoint.CheckpointError as error:
            kind = "" if is_name(uri) else f"not a weight file ({', '.join(_WEIGHT_FILES)}), and "
            raise ExperimentError(f"{field}={uri}: {kind}{error}") from error
        name = f"{network}.safetensors"
        if name not in saved.files:
            raise ExperimentError(f"{field}={uri}: {saved.uri} has no {network} network")
        return storage.join(saved.uri, name), saved.files[name][1]
    if not storage.exists(uri):
        raise ExperimentError(f"{field}={uri}: there is no such file")
    return uri, _file_digest(uri)


def _file_digest(uri: str) -> str:
    return storage.sha256(uri)[1]
