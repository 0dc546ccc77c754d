"""The runs behind a table: those of its cells, and those that they start from, each once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from sr4ir_dist import experiments, recipes, storage
from sr4ir_dist.config import Experiment, Network
from sr4ir_dist.hub.names import is_name as is_published_checkpoint
from sr4ir_dist.networks import published
from sr4ir_dist.overrides import override
from sr4ir_dist.reproduction.tables import Table
from sr4ir_dist.training.plan import make_plan
from sr4ir_dist.training.run_queue import Order

_FILES = (
    *("sr.weights", "sr.start", "task.weights", "task.start"),
    *("fixed.oracle", "fixed.vgg", "evaluation.lpips"),
)


@dataclass(frozen=True)
class Orders:
    """What is to be run for a table.

    Attributes:
        runs: each after those that it needs.
        of: the place in `runs` of each cell's experiment and seed.
        reduced: why datasets, by their keys, are not those of their names in the paper.
    """

    runs: list[Order] = field(default_factory=list)
    of: dict[tuple[str, int | None], int] = field(default_factory=dict)
    reduced: dict[str, str] = field(default_factory=dict)


def make_orders(
    table: Table,
    data: Mapping[str, str],
    make: Callable[[str], Experiment],
    *,
    storage_uri: str,
    seeds: Sequence[int | None] = (None,),
    pretrain: bool = False,
) -> Orders:
    """List the runs that a table needs.

    Args:
        table: the table.
        data: URIs of the datasets, by their keys.
        make: gives the experiment of a name, at the settings that are wanted.
        storage_uri: where the runs are kept.
        seeds: each cell is run with each; None is the experiment's own.
        pretrain: SR networks start from a run of recipe `pretrain` on the same data, one for all
            seeds, in place of published weights.

    Raises:
        ExperimentError: an experiment cannot be made.
        DatasetError: a dataset is not there.
    """
    orders = Orders()
    places: dict[tuple[str, str], int] = {}

    def add(experiment: Experiment, uri: str) -> int:
        experiment = experiments.relevant(experiment)
        key = experiment.model_dump_json(), uri
        if key not in places:
            needs = []
            if pretrain and experiment.sr is not None and experiment.recipe != "pretrain":
                first = _pretraining(experiment, make)
                needs.append(add(first, uri))
            for network, origin in recipes.get(experiment.recipe).init_from.items():
                if origin != recipes.PRETRAINED and not _given(experiment, network):
                    needs.append(add(experiments.prerequisite(experiment, origin), uri))
            orders.runs.append(Order(experiment, uri, tuple(sorted(set(needs)))))
            places[key] = len(orders.runs) - 1
        return places[key]

    for row in table.rows:
        for cell in row.cells:
            uri = storage.absolute(data[cell.data])
            for seed in seeds:
                experiment = make(cell.experiment)
                # A network to start from is the one that the others start from, whatever their
                # seed: that of another seed would be trained for nothing.
                shared = pretrain and experiment.recipe == "pretrain"
                if seed is not None and not shared:
                    experiment = override(experiment, [f"seed={seed}"])
                if pretrain and experiment.sr is not None and experiment.recipe != "pretrain":
                    first = _pretraining(experiment, make)
                    plan = make_plan(first, data=uri, storage_uri=storage_uri)
                    experiment = override(experiment, [f"sr.weights={plan.run_uri}"])
                orders.of[cell.experiment, seed] = add(experiment, uri)
    return orders


def absolute_files(settings: Sequence[str]) -> list[str]:
    """`key.path=value` assignments whose files and folders other processes find too."""
    return [_absolute(text) for text in settings]


def _absolute(text: str) -> str:
    path, separator, value = text.partition("=")
    named = published.is_name(value) or is_published_checkpoint(value) or value == "null"
    if path.strip() not in _FILES or not separator or named:
        return text
    return f"{path}={storage.absolute(value)}"


def _pretraining(experiment: Experiment, make: Callable[[str], Experiment]) -> Experiment:
    data, middle, _ = experiment.name.split("/")
    return make(f"{data}/{middle.split('-blur')[0]}/pretrain")


def _given(experiment: Experiment, network: Network) -> bool:
    if network == "oracle":
        return experiment.fixed.oracle is not None
    settings = experiment.sr if network == "sr" else experiment.task
    return settings is not None and settings.start is not None
