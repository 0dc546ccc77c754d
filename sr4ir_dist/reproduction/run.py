"""Run what a table needs and write the table, after each run anew."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from sr4ir_dist import storage
from sr4ir_dist.config import Experiment, ExperimentError
from sr4ir_dist.data.splits import open_split
from sr4ir_dist.reproduction.filled import Filled, fill
from sr4ir_dist.reproduction.orders import Orders, make_orders
from sr4ir_dist.reproduction.studies import Runs, Study
from sr4ir_dist.reproduction.tables import Table, reduced
from sr4ir_dist.reproduction.written import write_table
from sr4ir_dist.training.capacity import Resources
from sr4ir_dist.training.judged_again import Lacking, add_lpips
from sr4ir_dist.training.lanes import count_lanes, train_all
from sr4ir_dist.training.run_queue import Outcome


@dataclass(frozen=True)
class Reproduction:
    """A table that is wanted.

    Attributes:
        table: its layout.
        data: URIs of datasets, by their keys.
        storage_uri: where runs are kept; the table is written to `tables` in it.
        make: gives the experiment of a name, at the settings that are wanted.
        seeds: each cell is run with each; None is the experiment's own.
        pretrain: SR networks start from one trained on the same data.
        notes: what is to be known of the settings.
        study: measures the runs when they are done, for tables that need it.
    """

    table: Table
    data: Mapping[str, str]
    storage_uri: str
    make: Callable[[str], Experiment]
    seeds: tuple[int | None, ...] = (None,)
    pretrain: bool = False
    notes: tuple[str, ...] = ()
    study: Study | None = None


def plan(request: Reproduction) -> Orders:
    """Check datasets and benchmarks and list the runs, before any worker starts.

    Raises:
        ValueError: a dataset or benchmark is not there, or an experiment cannot be made.
    """
    whys = {}
    for key in {cell.data: None for row in request.table.rows for cell in row.cells}:
        splits = [open_split(request.data[key], split) for split in ("train", "val")]
        whys[key] = reduced(key, [split.manifest.rows for split in splits])
    if request.study is not None:
        request.study.check()
    storage.check_writable(storage.absolute(request.storage_uri))
    orders = make_orders(
        request.table,
        request.data,
        request.make,
        storage_uri=request.storage_uri,
        seeds=request.seeds,
        pretrain=request.pretrain,
    )
    return replace(orders, reduced={key: why for key, why in whys.items() if why})


def reproduce(
    request: Reproduction,
    orders: Orders,
    resources: Resources,
    *,
    lanes: int | None = None,
    cache_dir: str | None = None,
    say: Callable[[str], None] = print,
) -> tuple[Filled, dict[str, str], list[str]]:
    """Train on the cluster that `parallel.connect` joined, and write the table.

    Args:
        request: what is wanted.
        orders: of `plan`.
        resources: of each run.
        lanes: runs side by side; None for as many as the cluster has room for.
        cache_dir: node-local cache of shards from remote storage.
        say: is told of each run that ends.

    Returns:
        The table, the URI of each of its files by format, and the names of runs that failed for
        another reason than missing data or weights.
    """
    folder = storage.join(storage.absolute(request.storage_uri), "tables")
    outcomes: dict[int, Outcome] = {}
    count, resources = count_lanes(resources, min(lanes or len(orders.runs), len(orders.runs)))
    say(f"{len(orders.runs)} runs, {count} side by side")

    def settled(number: int, outcome: Outcome) -> None:
        outcomes[number] = outcome
        say(f"[{len(outcomes)}/{len(orders.runs)}] {_told(orders, number, outcome)}")
        write_table(fill(request.table, orders, outcomes, request.seeds, request.notes), folder)

    train_all(
        orders.runs,
        resources,
        storage_uri=request.storage_uri,
        lanes=count,
        log_every=50,
        cache_dir=cache_dir,
        say=say,
        settled=settled,
    )
    if not request.table.measured:
        outcomes |= _with_lpips(request, orders, outcomes, resources, cache_dir, say)
    filled = fill(request.table, orders, outcomes, request.seeds, request.notes)
    if request.study is not None:
        filled = request.study.finish(filled, _runs(request, orders, outcomes), resources)
    failed = [
        orders.runs[number].experiment.name
        for number, outcome in outcomes.items()
        if outcome.kind == "failed"
    ]
    return filled, write_table(filled, folder), failed


def _with_lpips(
    request: Reproduction,
    orders: Orders,
    outcomes: Mapping[int, Outcome],
    resources: Resources,
    cache_dir: str | None,
    say: Callable[[str], None],
) -> dict[int, Outcome]:
    """The outcomes of cells that were judged before the weights of LPIPS were at hand."""
    if not any("lpips" in column.figures for column in request.table.columns):
        return {}
    lacking: dict[int, Lacking] = {}
    for number in dict.fromkeys(orders.of.values()):
        done = outcomes[number]
        if done.lpips is not None and done.result is not None:
            lacking[number] = Lacking(done.result, orders.runs[number].data, done.lpips)
    if not lacking:
        return {}
    say(f"judging {len(lacking)} finished runs again, for LPIPS")
    results = add_lpips(list(lacking.values()), resources, cache_dir=cache_dir)
    return {n: Outcome("done", result) for n, result in zip(lacking, results, strict=True)}


def _runs(request: Reproduction, orders: Orders, outcomes: Mapping[int, Outcome]) -> Runs:
    """Of each seed, the URI of each experiment's run that is done."""
    runs: list[dict[str, str]] = []
    for wanted in request.seeds:
        runs.append({})
        for (name, seed), number in orders.of.items():
            result = outcomes[number].result
            if seed == wanted and result is not None:
                runs[-1][name] = result["run_uri"]
    return runs


def parse_data(texts: Sequence[str], option: str = "--data") -> dict[str, str]:
    """`NAME=URI` of each dataset or benchmark.

    Raises:
        ExperimentError: a text has not this form, or a name is given twice.
    """
    data: dict[str, str] = {}
    for text in texts:
        name, separator, uri = text.partition("=")
        if not (separator and name and uri) or name in data:
            raise ExperimentError(f"{option} {text}: expected NAME=URI, each NAME once")
        data[name] = uri
    return data


def parse_seeds(text: str | None) -> tuple[int | None, ...]:
    """The seeds of `1,2,3`; of None the experiments' own.

    Raises:
        ExperimentError: they are not different whole numbers.
    """
    if text is None:
        return (None,)
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts) or len(set(parts)) < len(parts):
        raise ExperimentError(f"--seeds {text}: expected different whole numbers such as 1,2,3")
    return tuple(int(part) for part in parts)


def _told(orders: Orders, number: int, outcome: Outcome) -> str:
    experiment = orders.runs[number].experiment
    name = f"{experiment.name} (seed {experiment.seed})"
    if outcome.result is None:
        return f"{name}: {outcome.kind}: {outcome.why}"
    figures = outcome.result["metrics"]
    shown = [
        f"{key} {figures[key]:.4g}" for key in ("top1", "miou", "map", "psnr") if key in figures
    ]
    return f"{name}: {', '.join(shown)}, {outcome.result['seconds']:.0f} s of training"
