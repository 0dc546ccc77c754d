"""The tables that measure finished runs: S3 (efficiency), S4 (cross-task), S6 (SR benchmarks)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from sr4ir_dist import experiments
from sr4ir_dist.analysis import efficiency, judged, sr_benchmarks
from sr4ir_dist.analysis.loaded import load
from sr4ir_dist.config import ExperimentError
from sr4ir_dist.reproduction.filled import WAITING, Filled, FilledCell, figure
from sr4ir_dist.reproduction.tables import (
    IMAGES,
    NETWORKS,
    Cell,
    Column,
    Row,
    Table,
    check_choice,
    figure_of,
    placed,
)
from sr4ir_dist.training import launch
from sr4ir_dist.training.capacity import Resources

TITLES = {
    "tableS3": "Table S3: efficiency",
    "tableS4": "Table S4: SR networks used for other tasks",
    "tableS6": "Table S6: SR benchmarks",
}
_TASKS = {"voc_seg": "seg", "voc_det": "det", "cars": "cls"}
_COSTS = ("parameters", "gflops", "memory_mb", "training_hours", "images_per_second")

Runs = Sequence[Mapping[str, str]]
"""Of each seed, the URIs of runs by the names of their experiments."""

_PAPER_S4, _PAPER_S6 = "edsr-x8", "edsr-x4"

PAPER_BENCHMARKS = {
    "pretrain": {
        "Set5": (32.10, 0.863), "Set14": (28.58, 0.743),
        "B100": (27.56, 0.711), "Urban100": (26.04, 0.763),
    },
    "sr4ir": {
        "Set5": (29.32, 0.800), "Set14": (26.76, 0.688),
        "B100": (26.39, 0.660), "Urban100": (23.77, 0.667),
    },
}  # fmt: skip
"""Table S6's PSNR and SSIM: EDSR-baseline on DIV2K, and that of SR4IR, of an unnamed task."""


@dataclass(frozen=True)
class Study:
    """A table whose cells are measured on runs.

    Attributes:
        table: its layout; a cell's experiment is the run whose task network or whole is measured.
        data: the keys of its datasets in the paper's order, with which place each takes.
        benchmarks: of Table S6, URIs by name.
    """

    table: Table
    data: Mapping[str, str]
    benchmarks: Mapping[str, str]

    def check(self) -> None:
        """See that what the runs will be measured on is there.

        Raises:
            ExperimentError: a folder is no benchmark, or lacks LR images of some of its HR images.
            StorageError: the storage did not answer.
        """
        for folder in self.benchmarks.values():
            scale = experiments.make(self.table.rows[0].cells[0].experiment).scale
            sr_benchmarks.check(folder, scale)

    def finish(self, filled: Filled, runs: Runs, resources: Resources) -> Filled:
        """Measure the runs that are done, and fill the table's cells."""
        if self.table.name == "tableS3":
            return _with_costs(filled, runs)
        if self.table.name == "tableS4":
            return _cross_task(filled, runs, self.data, resources)
        return _on_benchmarks(filled, runs, self.benchmarks)


def make_study(
    name: str,
    data: Collection[str],
    *,
    scales: Collection[int] = (),
    networks: Collection[str] = (),
    benchmarks: Mapping[str, str] | None = None,
) -> Study:
    """Lay out one of `TITLES` for the datasets at hand.

    Args:
        name: the table.
        data: keys of `experiments.DATA` for which there are datasets.
        scales: one scale, by default the paper's.
        networks: one SR network, by default EDSR.
        benchmarks: of Table S6, URIs by name.

    Raises:
        ExperimentError: there is not enough to fill it.
    """
    check_choice(scales, networks)
    if len(scales) > 1 or len(networks) > 1:
        raise ExperimentError(f"{TITLES[name]} is of one scale and one SR network")
    sr = next(iter(networks), "edsr")
    if name == "tableS6":
        return _layout_s6(data, next(iter(scales), 4), sr, benchmarks or {})
    size = f"{sr}-x{next(iter(scales), 8)}"
    return _layout_s3(data, size) if name == "tableS3" else _layout_s4(data, size)


def _layout_s3(data: Collection[str], size: str) -> Study:
    at, notes = placed(TITLES["tableS3"], ("voc_seg",), data)
    key = at["voc_seg"]
    plain = f"{size.split('-')[1]}/l2t"
    rows = [("L->T", "-", plain), ("SR4IR", NETWORKS[size.split("-")[0]], f"{size}/sr4ir")]
    cells = [Row(a, b, (Cell(f"{key}/{c}", f"voc_seg/{c}"),)) for a, b, c in rows]
    if f"{key}_resnet50" in experiments.DATA:
        larger = f"{key}_resnet50/{plain}"
        cells.insert(1, Row("L->T, DeepLabV3-ResNet50", "-", (Cell(larger, larger),)))
    notes.append("Memory, time and speed are of the machines that measured them.")
    column = Column(f"{key} {size.split('-')[1]}", (figure_of(key), *_COSTS))
    table = Table("tableS3", TITLES["tableS3"], (column,), tuple(cells), tuple(notes))
    return Study(table, at, {})


def _layout_s4(data: Collection[str], size: str) -> Study:
    at, notes = placed(TITLES["tableS4"], tuple(_TASKS), data)
    cells = tuple(Cell(f"{key}/{size}/sr4ir", f"{slot}/{size}/sr4ir") for slot, key in at.items())
    columns = tuple(Column(f"used for {key}", (figure_of(key),)) for key in at.values())
    network = NETWORKS[size.split("-")[0]]
    rows = tuple(Row(f"SR network of {key}", f"{network} of SR4IR", cells) for key in at.values())
    if size != _PAPER_S4:
        notes.append(f"The paper's figures are those of {_PAPER_S4}, not {size}: no differences.")
    notes.append("Task networks are SR4IR's; SR networks are exchanged, nothing is trained again.")
    table = Table("tableS4", TITLES["tableS4"], columns, rows, tuple(notes), measured=True)
    return Study(table, at, {})


def _layout_s6(data: Collection[str], scale: int, sr: str, benchmarks: Mapping[str, str]) -> Study:
    if not benchmarks:
        raise ExperimentError(f"{TITLES['tableS6']} needs --benchmark NAME=FOLDER, such as Set5")
    at, notes = placed(TITLES["tableS6"], (*_TASKS, "cub200"), data)
    key = next(iter(at.values()))
    first = "folder_sr" if "folder_sr" in data else key
    names = {"pretrain": f"{first}/{sr}-x{scale}/pretrain", "sr4ir": f"{key}/{sr}-x{scale}/sr4ir"}
    rows = tuple(
        Row(recipe, f"{NETWORKS[sr]}: {name}", (Cell(name, recipe),) * len(benchmarks))
        for recipe, name in names.items()
    )
    columns = tuple(Column(name, ("psnr", "ssim", "ssim_rgb")) for name in benchmarks)
    if f"{sr}-x{scale}" != _PAPER_S6:
        notes.append(f"The paper's figures are those of {_PAPER_S6}: no differences.")
    elif first != "folder_sr":
        notes.append(f"The pre-trained network is of {key}, the paper's of DIV2K: no difference.")
    notes += [
        "PSNR and SSIM on luma with as many border pixels cut as the scale, SSIM also on RGB.",
        "The paper's SSIMs seem to be on RGB; its networks: EDSR-baseline on DIV2K, and that of "
        "SR4IR for a task that it does not name.",
    ]
    table = Table("tableS6", TITLES["tableS6"], columns, rows, tuple(notes), measured=True)
    return Study(table, at, dict(benchmarks))


def _with_costs(filled: Filled, runs: Runs) -> Filled:
    """Of one run of each experiment: another seed costs the same."""
    first = {name: uri for of_seed in reversed(runs) for name, uri in of_seed.items()}
    rows = []
    for row, (cell,) in zip(filled.table.rows, filled.cells, strict=True):
        name = cell.experiment
        if name in first:
            cost = efficiency.measure({name: first[name]})[name]
            paper = efficiency.PAPER.get(row.cells[0].paper, {})
            same = name == row.cells[0].paper
            costs = []
            for metric in _COSTS:
                ours, theirs = getattr(cost, metric), paper.get(metric)
                if metric == "parameters":
                    ours, theirs = ours / 1e6, None if theirs is None else theirs / 1e6
                costs.append(
                    figure(metric, [] if ours is None else [ours], theirs, comparable=same)
                )
            cell = replace(cell, figures=(cell.figures[0], *costs))
        rows.append((cell,))
    return replace(filled, cells=tuple(rows))


def _cross_task(
    filled: Filled, runs: Runs, data: Mapping[str, str], resources: Resources
) -> Filled:
    names = [cell.experiment for cell in filled.table.rows[0].cells]
    slots = list(data)
    requests = {}
    for number, of_seed in enumerate(runs):
        done = {name: of_seed[name] for name in names if name in of_seed}
        for key, request in judged.cross_task(done).items():
            requests[number, *key] = request
    if not requests:
        return filled
    found: dict[tuple[str, str], list[dict[str, float]]] = defaultdict(list)
    figures = launch.evaluate(list(requests.values()), resources)
    for (_, sr, task), each in zip(requests, figures, strict=True):
        found[sr, task].append(each)
    theirs = {f"{slot}/{_PAPER_S4}/sr4ir" for slot in slots}
    rows = []
    for sr_slot, sr in zip(slots, names, strict=True):
        cells = []
        for column, slot, task in zip(filled.table.columns, slots, names, strict=True):
            metric = column.figures[0]
            ours = [each[metric] for each in found[sr, task]]
            same = {sr, task} <= theirs and not {data[sr_slot], data[slot]} & set(filled.reduced)
            paper = judged.PAPER_CROSS_TASK[_TASKS[sr_slot], _TASKS[slot]]
            # Of both runs, one of which may be at fault.
            why = _reasons(*(filled.cells[0][names.index(name)].why for name in (sr, task)))
            entry = figure(metric, ours, paper, comparable=same)
            cells.append(FilledCell(f"{sr} for {task}", (entry,), why))
        rows.append(tuple(cells))
    return replace(filled, cells=tuple(rows))


def _on_benchmarks(filled: Filled, runs: Runs, benchmarks: Mapping[str, str]) -> Filled:
    names = {row.cells[0].experiment: row.cells[0].paper for row in filled.table.rows}
    # A run that several seeds share is one run.
    of = {uri: name for of_seed in runs for name, uri in of_seed.items() if name in names}
    if not of:
        return filled
    networks = {uri: load(uri) for uri in of}
    found: dict[tuple[str, str], list[sr_benchmarks.Score]] = defaultdict(list)
    scores = sr_benchmarks.score(networks, benchmarks)
    for each in scores:
        found[of.get(each.network, each.network), each.benchmark].append(each)
    rows = []
    whys = {row[0].experiment: _reasons(row[0].why) for row in filled.cells}
    same = {name for name in names if _is_papers_s6(name, filled.reduced)}
    for name, recipe in [*names.items(), ("bicubic", "")]:
        cells = []
        for benchmark in benchmarks:
            psnr, ssim = PAPER_BENCHMARKS.get(recipe, {}).get(benchmark, (None, None))
            figures = [
                figure(
                    metric,
                    [getattr(each, metric) for each in found[name, benchmark]],
                    theirs,
                    comparable=name in same,
                )
                for metric, theirs in (("psnr", psnr), ("ssim", None), ("ssim_rgb", ssim))
            ]
            if name == "bicubic":
                figures = [replace(each, runs=0) for each in figures]
            cells.append(FilledCell(name, tuple(figures), whys.get(name, "")))
        rows.append(tuple(cells))
    bicubic = Row("bicubic", "-", (Cell("bicubic", ""),) * len(benchmarks))
    lr = [f"{each.benchmark}'s LR images: {each.lr}" for each in scores]
    return replace(
        filled,
        table=replace(filled.table, rows=(*filled.table.rows, bicubic)),
        cells=tuple(rows),
        notes=(*filled.notes, *dict.fromkeys(lr)),
    )


def _is_papers_s6(name: str, reduced: Collection[str]) -> bool:
    """Whether the paper may have measured this network: EDSR x4, of DIV2K or of SR4IR."""
    key, size, recipe = name.split("/")
    whole = key in IMAGES and key not in reduced
    return whole and size == _PAPER_S6 and (recipe == "pretrain") == (key == "folder_sr")


def _reasons(*whys: str) -> str:
    return "; ".join(dict.fromkeys(why for why in whys if why and why != WAITING))
