"""A filled table as Markdown, CSV, HTML and JSON."""

from __future__ import annotations

import csv
import dataclasses
import html
import io
import json
from collections.abc import Callable

from sr4ir_dist import storage
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
_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;margin:auto;max-width:1200px;padding:1rem;color:#222;
background:#fff}div{overflow-x:auto}table{border-collapse:collapse;font-size:14px}
td,th{padding:.3rem .6rem;text-align:right;border-bottom:1px solid #ddd;white-space:nowrap}
td:nth-child(-n+2),th:nth-child(-n+2){text-align:left}small{color:#666;display:block}
@media(prefers-color-scheme:dark){body{color:#ddd;background:#181818}td,th{border-color:#444}
small{color:#aaa}}
"""


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

    def cells(tag: str, texts: list[str]) -> str:
        parts = []
        for text in texts:
            ours, _, theirs = text.partition("\n")
            small = f"<small>{html.escape(theirs)}</small>" if theirs else ""
            parts.append(f"<{tag}>{html.escape(ours)}{small}</{tag}>")
        return f"<tr>{''.join(parts)}</tr>"

    title = html.escape(filled.table.title)
    notes = [f"[{number}] {why}" for number, why in enumerate(reasons, 1)] + list(filled.notes)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width"><title>{title}</title>'
        f"<style>{_STYLE}</style><h1>{title}</h1>"
        + "".join(f"<p>{html.escape(text)}</p>" for text in _explained(filled))
        + f"<div><table><thead>{cells('th', headings)}</thead><tbody>"
        + "".join(cells("td", row) for row in rows)
        + "</tbody></table></div><ul>"
        + "".join(f"<li>{html.escape(note)}</li>" for note in notes)
        + "</ul></html>\n"
    )


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
                values = [figure.mean, figure.std, len(filled.seeds), figure.paper]
                writer.writerow(
                    [table.name, row.label, row.network, column.label, cell.experiment]
                    + [figure.metric, *values, figure.difference, cell.why]
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
                both(_ours(figure, cell, reasons), _theirs(figure)) for figure in cell.figures
            ]
        rows.append(texts)
    return headings, rows, list(reasons)


def _ours(figure: Figure, cell: FilledCell, reasons: dict[str, int]) -> str:
    mark = f" [{reasons.setdefault(cell.why, len(reasons) + 1)}]" if cell.why else ""
    if figure.mean is None:
        return f"-{mark}"
    digits = _DIGITS.get(figure.metric, 1)
    spread = "" if figure.std is None else f" ± {figure.std:.{digits}f}"
    return f"{figure.mean:.{digits}f}{spread}{mark}"


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
    return [text + "In brackets: the paper's figure and, on the paper's data, ours less that."]


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"
