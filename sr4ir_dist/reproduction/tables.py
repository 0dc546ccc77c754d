"""The layout of the paper's tables whose cells are runs: Tables 1 to 7, S1, S2 and S5.

A cell is the name of an experiment; what that reported in the paper is looked up by the name.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from sr4ir_dist import experiments, recipes
from sr4ir_dist.config import ExperimentError
from sr4ir_dist.suggestions import did_you_mean

NETWORKS = {"edsr": "EDSR-baseline", "swinir": "SwinIR"}
_BASELINES = (("S->T", "s2t"), ("T->S", "t2s"), ("S+T", "joint"), ("SR4IR", "sr4ir"))
_FIGURE = {"segmentation": "miou", "detection": "map", "classification": "top1"}


@dataclass(frozen=True)
class Layout:
    """What a table of the paper shows.

    Attributes:
        title: the table's number and subject.
        data: the datasets of its columns, by their keys in `experiments.DATA`.
        rows: label and recipe of each row.
        figures: shown beside the task's own figure.
        scales: of its columns.
        networks: SR networks of its rows.
        blurs: of its columns, standard deviations in HR pixels.
        note: what is to be known of it.
    """

    title: str
    data: tuple[str, ...]
    rows: tuple[tuple[str, str], ...]
    figures: tuple[str, ...] = ()
    scales: tuple[int, ...] = (8,)
    networks: tuple[str, ...] = ("edsr",)
    blurs: tuple[int, ...] = (0,)
    note: str = ""


_SCENARIOS = (("H->T (oracle)", "h2t"), ("L->T", "l2t"), *_BASELINES)
_GRID = {"scales": (4, 8), "networks": ("edsr", "swinir")}
_BOTH = ("voc_seg", "cars")

LAYOUTS: dict[str, Layout] = {
    "table1": Layout(
        "Table 1: semantic segmentation", ("voc_seg",), _SCENARIOS, ("lpips", "psnr"), **_GRID
    ),
    "table2": Layout(
        "Table 2: object detection", ("voc_det",), _SCENARIOS, ("lpips", "psnr"), **_GRID
    ),
    "table3": Layout(
        "Table 3: image classification", ("cars", "cub200"), _SCENARIOS, ("lpips",), **_GRID
    ),
    "table4": Layout(
        "Table 4: the TDP loss",
        _BOTH,
        (("SR4IR without TDP", "sr4ir-no-tdp"), ("SR4IR", "sr4ir")),
        ("lpips",),
    ),
    "table5": Layout(
        "Table 5: what the task network learns from",
        _BOTH,
        (
            ("SR", "sr4ir-only-sr"),
            ("HR", "sr4ir-only-hr"),
            ("SR + HR", "sr4ir-no-cqmix"),
            ("SR + HR + CQMix (SR4IR)", "sr4ir"),
        ),
        note="The paper's first two rows are assigned from its discussion.",
    ),
    "table6": Layout(
        "Table 6: where the perceptual features come from",
        _BOTH,
        (
            ("(A) fixed VGG", "sr4ir-vgg"),
            ("(B) fixed task network", "sr4ir-fixed-tdp"),
            ("(C) joint training", "joint-tdp"),
            ("alternating (SR4IR)", "sr4ir"),
        ),
    ),
    "table7": Layout(
        "Table 7: other methods",
        _BOTH,
        (("TDSR", "tdsr"), ("SOD-MTGAN", "sod-mtgan"), ("SR4IR", "sr4ir")),
        note="The paper's figures of TDSR and SOD-MTGAN are not at hand.",
    ),
    "tableS1": Layout(
        "Table S1: a fresh task network on fixed SR images",
        ("cars",),
        (
            ("S by the pixel loss", "s2t"),
            ("S by pixel and perceptual loss", "s-vgg2t"),
            ("S by SR4IR", "sr4ir2t"),
        ),
    ),
    "tableS2": Layout(
        "Table S2: SR images judged by the network trained on HR",
        ("cars",),
        (
            ("HR images", "h2t"),
            ("S by the pixel loss", "h2t-on-s"),
            ("S by pixel and perceptual loss", "h2t-on-s-vgg"),
            ("S by SR4IR", "h2t-on-sr4ir"),
        ),
    ),
    "tableS5": Layout(
        "Table S5: other degradations",
        ("voc_seg",),
        (("L->T", "l2t"), ("SR4IR", "sr4ir")),
        ("lpips",),
        blurs=(0, 5, 10, 15),
    ),
}
"""Tables by name."""


IMAGES: dict[str, tuple[int, ...]] = {
    "voc_seg": (1464, 1449),
    "voc_det": (5717, 5823),
    "cars": (8144, 8041),
    "cub200": (5994, 5794),
    "folder_sr": (800,),  # DIV2K
}
"""How many images the paper's datasets have to train and to judge on."""


@dataclass(frozen=True)
class Cell:
    """One experiment of a table.

    Attributes:
        experiment: its name.
        paper: its name in the paper's table, which may be of other data or another scale.
    """

    experiment: str
    paper: str

    @property
    def data(self) -> str:
        """The key of its dataset: a larger task network sees the same."""
        return self.experiment.split("/")[0].removesuffix("_resnet50")


@dataclass(frozen=True)
class Column:
    """Figures of one dataset at one degradation.

    Attributes:
        label: its heading.
        figures: names of the metrics, the task's own first.
    """

    label: str
    figures: tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """One method: its label, the SR network's, and a cell for each column."""

    label: str
    network: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Table:
    """A table to be run: the part of a layout that was asked for, on the data that is there.

    Attributes:
        name: its name.
        title: the paper's number and subject.
        columns: its columns.
        rows: its rows, with a cell for each column.
        notes: what is to be known of it.
        measured: what runs report of themselves is no figure of it; all are measured afterwards.
    """

    name: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    measured: bool = False


def make_table(
    name: str,
    data: Collection[str],
    *,
    scales: Collection[int] = (),
    networks: Collection[str] = (),
) -> Table:
    """Lay out a table for the datasets at hand.

    Args:
        name: one of `LAYOUTS`.
        data: keys of `experiments.DATA` for which there are datasets. One that the table does not
            name takes the place of one of the same task that is not at hand.
        scales: the scales to run, by default the paper's; others than those are run as well.
        networks: the SR networks to run, by default the paper's.

    Raises:
        ExperimentError: there is no such table, or nothing of it is left.
    """
    if name not in LAYOUTS:
        hint = did_you_mean(name, LAYOUTS)
        raise ExperimentError(f"unknown table {name!r}{hint} (--list shows all)")
    layout = LAYOUTS[name]
    check_choice(scales, networks)
    at, notes = placed(layout.title, layout.data, data)
    notes += [layout.note] if layout.note else []
    columns, places = [], []
    for slot, key in at.items():
        for scale in scales or layout.scales:
            for blur in layout.blurs:
                label = f"{key} x{scale}" + (f", blur {blur}" if blur else "")
                columns.append(Column(label, (figure_of(key), *layout.figures)))
                places.append((slot, key, scale, blur))
    rows = []
    chosen = [network for network in (networks or layout.networks)]
    for label, recipe in layout.rows:
        alone = "sr" not in recipes.get(recipe).init_from
        for network in chosen[:1] if alone else chosen:
            cells = tuple(
                Cell(
                    _experiment(key, network, scale, blur, recipe),
                    _experiment(slot, network, scale, blur, recipe),
                )
                for slot, key, scale, blur in places
            )
            rows.append(Row(label, "-" if alone else NETWORKS[network], cells))
    # All methods of one SR network together, as the paper has them.
    order = {"-": 0} | {NETWORKS[network]: n for n, network in enumerate(chosen, 1)}
    if len(chosen) > 1:
        rows.sort(key=lambda row: order[row.network])
    return Table(name, layout.title, tuple(columns), tuple(rows), tuple(notes))


def check_choice(scales: Collection[int], networks: Collection[str]) -> None:
    """Check scales and SR networks.

    Raises:
        ExperimentError: one of them does not exist.
    """
    for network in networks:
        if network not in NETWORKS:
            raise ExperimentError(f"sr={network!r} is none of {', '.join(NETWORKS)}")
    for scale in scales:
        if scale not in experiments.SCALES:
            allowed = ", ".join(map(str, experiments.SCALES))
            raise ExperimentError(f"scale={scale} is none of {allowed}")


def placed(
    title: str, slots: Sequence[str], data: Collection[str]
) -> tuple[dict[str, str], list[str]]:
    """Which dataset fills which of a table's, and what is to be said of it.

    Raises:
        ExperimentError: a key names no data, or no slot is filled.
    """
    for key in data:
        if key not in experiments.DATA:
            hint = did_you_mean(key, experiments.DATA)
            raise ExperimentError(
                f"data={key!r} names no data{hint}; allowed: {', '.join(experiments.DATA)}"
            )
    at: dict[str, str] = {}
    notes = []
    others = [key for key in data if key not in slots and key != "folder_sr"]
    for slot in slots:
        if slot in data:
            at[slot] = slot
            continue
        key = next((key for key in others if figure_of(key) == figure_of(slot)), None)
        if key is None:
            notes.append(f"{slot} is left out: there is no dataset for it (--data {slot}=URI)")
            continue
        others.remove(key)
        at[slot] = key
        notes.append(f"{key} takes the place of {slot}, whose figures are the paper's")
    if not at:
        wanted = " or ".join(f"--data {slot}=URI" for slot in slots)
        raise ExperimentError(f"{title} needs {wanted}, or other data of the same task")
    return at, notes


def reduced(key: str, images: Sequence[int]) -> str:
    """What is to be said of a dataset that is not as large as the paper's of its name, if so.

    Args:
        key: its key in `experiments.DATA`.
        images: how many it has to train and to judge on.
    """
    whole = IMAGES.get(key, ())
    if all(ours == theirs for ours, theirs in zip(images, whole, strict=False)):
        return ""
    ours, theirs = (" and ".join(map(str, counts)) for counts in (images[: len(whole)], whole))
    what = "images to train" + (" and to judge on" if len(whole) > 1 else " on")
    return f"{key} has {ours} {what}, the paper's {theirs}: there is no difference to its figures"


def figure_of(key: str) -> str:
    """The name of the task's figure on a kind of data."""
    task: Mapping = experiments.DATA[key].settings.get("task", {})
    return _FIGURE[task.get("name", "classification")]


def _experiment(data: str, network: str, scale: int, blur: int, recipe: str) -> str:
    found = recipes.get(recipe)
    if found.judged_on == "hr":
        return f"{data}/{recipe}"
    size = f"x{scale}" + (f"-blur{blur}" if blur else "")
    return f"{data}/{size if 'sr' not in found.init_from else f'{network}-{size}'}/{recipe}"
