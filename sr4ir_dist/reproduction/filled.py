"""A table with our figures beside the paper's."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from sr4ir_dist import recipes
from sr4ir_dist.analysis import paper
from sr4ir_dist.config import Experiment
from sr4ir_dist.reproduction.orders import Orders
from sr4ir_dist.reproduction.tables import Cell, Table
from sr4ir_dist.training.plan import NO_LPIPS
from sr4ir_dist.training.run_queue import Outcome

WAITING = "measured when all runs are done"
"""Why there is no figure yet of a run that is done."""


@dataclass(frozen=True)
class Figure:
    """One figure of a cell.

    Attributes:
        metric: its name.
        mean: ours, over the seeds; None where there is none.
        std: its spread over the seeds (n - 1 in the denominator); None for a single run.
        paper: the paper's, where it reports one.
        difference: ours less the paper's; None where data, scale or network are not the paper's.
        runs: how many runs ours is of, which may be fewer than there are seeds.
        why: why runs that are done have no such figure.
    """

    metric: str
    mean: float | None
    std: float | None
    paper: float | None
    difference: float | None
    runs: int = 0
    why: str = ""


@dataclass(frozen=True)
class FilledCell:
    """The figures of a cell, in the order of its column, and why there are none."""

    experiment: str
    figures: tuple[Figure, ...]
    why: str = ""


@dataclass(frozen=True)
class Filled:
    """A table as far as its runs are done.

    Attributes:
        table: its layout.
        seeds: of the runs.
        cells: of each row, for each column.
        notes: what is to be known of the figures.
        reduced: keys of datasets that are not those of their names in the paper.
    """

    table: Table
    seeds: tuple[int | None, ...]
    cells: tuple[tuple[FilledCell, ...], ...]
    notes: tuple[str, ...]
    reduced: tuple[str, ...] = ()


def fill(
    table: Table,
    orders: Orders,
    outcomes: Mapping[int, Outcome],
    seeds: Sequence[int | None],
    notes: Sequence[str] = (),
) -> Filled:
    """Put what the runs reported into a table's cells."""
    rows = []
    told = [*table.notes, *orders.reduced.values(), *notes]
    for row in table.rows:
        cells = []
        for column, cell in zip(table.columns, row.cells, strict=True):
            found = [outcomes.get(orders.of[cell.experiment, seed]) for seed in seeds]
            filled_cell = _cell(
                cell,
                column.figures,
                found,
                measured=table.measured,
                comparable=cell.experiment == cell.paper and cell.data not in orders.reduced,
            )
            some = any(outcome is not None and outcome.kind == "done" for outcome in found)
            if some and not table.measured:
                experiment = orders.runs[orders.of[cell.experiment, seeds[0]]].experiment
                filled_cell = _explained(filled_cell, experiment, found)
            cells.append(filled_cell)
            for outcome in found:
                if outcome is not None and outcome.result is not None:
                    told += outcome.result.get("notes", ())
        rows.append(tuple(cells))
    filled = Filled(table, tuple(seeds), tuple(rows), (), tuple(orders.reduced))
    return replace(filled, notes=(*dict.fromkeys(told), *_orders_of_rows(filled)))


def _cell(
    cell: Cell,
    metrics: Sequence[str],
    outcomes: Sequence[Outcome | None],
    *,
    measured: bool,
    comparable: bool,
) -> FilledCell:
    reported = {} if measured else paper.figures(cell.paper)
    whys = dict.fromkeys(
        outcome.why if outcome is not None else "not run yet"
        for outcome in outcomes
        if outcome is None or outcome.kind != "done"
    )
    results = [o.result for o in outcomes if o is not None and o.result is not None]
    if measured:
        results, whys = [], whys or {WAITING: WAITING}
    figures = []
    for metric in metrics:
        ours = [r["metrics"][metric] for r in results if metric in r["metrics"]]
        figures.append(figure(metric, ours, reported.get(metric), comparable=comparable))
    return FilledCell(cell.experiment, tuple(figures), "; ".join(whys))


def _explained(
    cell: FilledCell, experiment: Experiment, outcomes: Sequence[Outcome | None]
) -> FilledCell:
    """The cell, which runs are done of, with why they have not all of its figures."""
    notes = [
        note
        for outcome in outcomes
        if outcome is not None and outcome.result is not None
        for note in outcome.result.get("notes", ())
        if note.startswith(NO_LPIPS)
    ]

    def why(metric: str) -> str:
        if recipes.get(experiment.recipe).judged_on == "hr":
            return "judged on HR images, of which there is nothing to compare"
        if metric != "lpips":
            return WAITING
        if experiment.evaluation.lpips is None:
            return (
                f"{NO_LPIPS}evaluation.lpips=null here; give VGG16's ImageNet weights by "
                "--set evaluation.lpips=FILE"
            )
        return "; ".join(dict.fromkeys(notes))

    figures = [
        each if each.mean is not None else replace(each, why=why(each.metric))
        for each in cell.figures
    ]
    return replace(cell, figures=tuple(figures))


def figure(
    metric: str, ours: Sequence[float], paper: float | None, *, comparable: bool = True
) -> Figure:
    """A figure of some runs beside the paper's.

    Args:
        metric: its name.
        ours: of each run.
        paper: the paper's, where it reports one.
        comparable: the setting is the paper's, so that a difference says something.
    """
    mean = statistics.fmean(ours) if ours else None
    std = statistics.stdev(ours) if len(ours) > 1 else None
    difference = None if mean is None or paper is None or not comparable else mean - paper
    return Figure(metric, mean, std, paper, difference, len(ours))


def _orders_of_rows(filled: Filled) -> list[str]:
    """Of each column: how far our rows are in the paper's order by the task's figure."""
    notes = []
    for number, column in enumerate(filled.table.columns):
        both = [
            (f"{row.label} ({row.network})", figure.mean, figure.paper)
            for row, cells in zip(filled.table.rows, filled.cells, strict=True)
            for figure in cells[number].figures[:1]
            if figure.mean is not None and figure.paper is not None
        ]
        pairs = [(one, other) for one, other in combinations(both, 2) if one[2] != other[2]]
        wrong = [
            f"{one[0]} and {other[0]}"
            for one, other in pairs
            if (one[1] - other[1]) * (one[2] - other[2]) <= 0
        ]
        if pairs:
            text = f"{column.label}: {len(pairs) - len(wrong)} of {len(pairs)} pairs of rows are in"
            text += f" the paper's order by {column.figures[0]}"
            notes.append(text + (f"; not {', '.join(wrong)}" if wrong else ""))
    return notes
