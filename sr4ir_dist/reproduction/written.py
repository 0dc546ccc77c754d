"""A filled table as Markdown, CSV, HTML and JSON."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Callable

from markupsafe import Markup

from sr4ir_dist import storage
from sr4ir_dist.analysis.report.document import document
from sr4ir_dist.reproduction.filled import Figure, Filled, FilledCell

_NAMES = {
    "miou": "mIoU %",
    "map": "mAP %",
    "top1": "top-1 %",
    "lpips": "LPIPS",
    "psnr": "PSNR dB",
    "ssim": "SSIM",
    "ssim_rgb": "SSIM (RGB)",
    "parameters": "parameters M",
    "gflops": "GFLOPs",
    "memory_mb": "memory MB",
    "training_hours": "training, device hours",
    "images_per_second": "images/s",
}
_DIGITS = {"lpips": 3, "psnr": 2, "ssim": 3, "ssim_rgb": 3, "training_hours": 2}


def write_table(filled: Filled, folder: str) -> dict[str, str]:
    """Write a table in four formats into a folder; gives the URI of each.

    Raises:
        StorageError: the folder cannot be written.
    """
    writers: dict[str, Callable[[Filled], str]] = {
        "md": as_markdown,
        "csv": as_csv,
        "html": as_html,
        "json": as_json,
    }
    uris = {}
    for suffix, text in writers.items():
        uris[suffix] = storage.join(folder, f"{filled.table.name}.{suffix}")
        storage.write_bytes(uris[suffix], text(filled).encode())
    return uris


def as_markdown(filled: Filled) -> str:
    """One cell a figure: ours and its spread, in brackets the paper's and the difference."""
    headings, rows, reasons = _texts(filled, lambda ours, theirs: f"{ours}{theirs}")
    lines = [f"# {filled.table.title}", "", *_explained(filled), ""]
    lines += [_line(headings), _line(["---"] * len(headings)), *map(_line, rows), ""]
    lines += [f"- [{number}] {why}" for number, why in enumerate(reasons, 1)]
    lines += [f"- {note}" for note in filled.notes]
    return "\n".join(lines).rstrip() + "\n"


def as_html(filled: Filled) -> str:
    """A page that needs nothing else."""
    headings, rows, reasons = _texts(filled, lambda ours, theirs: f"{ours}\n{theirs}")

    def line(tag: str, texts: list[str]) -> Markup:
        cells = []
        for text in texts:
            ours, _, theirs = text.partition("\n")
            small = Markup("<br><small>{}</small>").format(theirs) if theirs else ""
            cells.append(Markup("<{0}>{1}{2}</{0}>").format(Markup(tag), ours, small))
        return Markup("<tr>{}</tr>").format(Markup().join(cells))

    title = filled.table.title
    notes = [f"[{number}] {why}" for number, why in enumerate(reasons, 1)] + list(filled.notes)
    body = Markup(
        "<h1>{}</h1>{}<div class=scroll><table class=ranked><thead>{}</thead><tbody>{}</tbody>"
        "</table></div><ul>{}</ul>"
    ).format(
        title,
        Markup().join(Markup("<p>{}</p>").format(text) for text in _explained(filled)),
        line("th", headings),
        Markup().join(line("td", row) for row in rows),
        Markup().join(Markup("<li>{}</li>").format(note) for note in notes),
    )
    return document(title, body)


def as_csv(filled: Filled) -> str:
    """One line a figure."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        ["table", "method", "sr_network", "column", "experiment", "metric", "mean", "std", "runs"]
        + ["paper", "difference", "note"]
    )
    table = filled.table
    for row, cells in zip(table.rows, filled.cells, strict=True):
        for column, cell in zip(table.columns, cells, strict=True):
            for figure in cell.figures:
                values = [figure.mean, figure.std, figure.runs, figure.paper]
                writer.writerow(
                    [table.name, row.label, row.network, column.label, cell.experiment]
                    + [figure.metric, *values, figure.difference, _why(figure, cell)]
                )
    return out.getvalue()


def as_json(filled: Filled) -> str:
    """All of it."""
    return json.dumps(dataclasses.asdict(filled), indent=1) + "\n"


def summary(filled: Filled) -> tuple[list[str], list[list[str]], list[str]]:
    """Headings, rows and why cells are empty, as short texts for a terminal."""
    return _texts(filled, lambda ours, theirs: f"{ours}{theirs}")


def _texts(
    filled: Filled, both: Callable[[str, str], str]
) -> tuple[list[str], list[list[str]], list[str]]:
    columns = filled.table.columns
    headings = ["method", "SR network"] + [
        f"{column.label}: {_NAMES[metric]}" for column in columns for metric in column.figures
    ]
    reasons: dict[str, int] = {}
    rows = []
    for row, cells in zip(filled.table.rows, filled.cells, strict=True):
        texts = [row.label, row.network]
        for cell in cells:
            texts += [
                both(_ours(figure, cell, reasons, len(filled.seeds)), _theirs(figure))
                for figure in cell.figures
            ]
        rows.append(texts)
    return headings, rows, list(reasons)


def _ours(figure: Figure, cell: FilledCell, reasons: dict[str, int], seeds: int) -> str:
    why = _why(figure, cell)
    mark = f" [{reasons.setdefault(why, len(reasons) + 1)}]" if why else ""
    if figure.mean is None:
        return f"-{mark}"
    digits = _DIGITS.get(figure.metric, 1)
    spread = "" if figure.std is None else f" ± {figure.std:.{digits}f}"
    if 0 < figure.runs < seeds:
        spread += f" of {figure.runs} run{'s' if figure.runs > 1 else ''}"
    return f"{figure.mean:.{digits}f}{spread}{mark}"


def _why(figure: Figure, cell: FilledCell) -> str:
    """Why there is no figure, or not of all runs."""
    return "; ".join(why for why in (cell.why, figure.why) if why)


def _theirs(figure: Figure) -> str:
    if figure.paper is None:
        return ""
    digits = _DIGITS.get(figure.metric, 1)
    text = f"{figure.paper:.{digits}f}"
    if figure.difference is not None:
        text += f", {figure.difference:+.{digits}f}"
    return f" ({text})"


def _explained(filled: Filled) -> list[str]:
    seeds = [seed for seed in filled.seeds if seed is not None]
    runs = f"mean ± standard deviation over the seeds {', '.join(map(str, seeds))}"
    text = f"Ours: {runs if len(seeds) > 1 else 'one run a cell'}. "
    text += "In brackets: the paper's figure and, where data, scale and SR network are the paper's,"
    return [text + " ours less that."]


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"
