"""A report's page: from runs and images to HTML."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jinja2
from markupsafe import Markup

from sr4ir_dist.analysis import paper
from sr4ir_dist.analysis.report.curves import chart, key
from sr4ir_dist.analysis.report.document import document
from sr4ir_dist.analysis.report.gather import Run, differences, settings_of
from sr4ir_dist.analysis.report.images import Group

_NAMES = {
    "top1": "top-1 %",
    "miou": "mIoU %",
    "map": "mAP %",
    "psnr": "PSNR dB",
    "ssim": "SSIM",
    "lpips": "LPIPS",
    "images": "images",
    "absent_classes": "absent classes",
    "too_small": "too small",
    "bad_images": "unreadable",
    "bad_training_images": "unreadable in training",
}
_LOWER_IS_BETTER = ("lpips",)
_MOST_OTHERS = 20  # a checkpoint may come from anyone
_COUNTS = ("images", "absent_classes", "too_small", "bad_images", "bad_training_images")
_DIGITS = {"ssim": 4, "lpips": 3, "psnr": 2}
_STYLE = """
.runs{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,300px),1fr));gap:.8rem}
.run{border:1px solid var(--line);border-radius:8px;padding:.7rem .9rem}.run h3{margin:0 0 .3rem;
display:flex;gap:.5rem;align-items:center}.run p{margin:.2rem 0;font-size:14px}
.run h3 svg{flex:none}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,330px),1fr));gap:1rem}
.charts figure,.row figure{margin:0}.charts h3{margin:.2rem 0}
ul.legend{list-style:none;display:flex;flex-wrap:wrap;gap:.2rem 1.2rem;padding:0;margin:.3rem 0}
ul.legend li{display:flex;gap:.5rem;align-items:center}
svg{display:block;max-width:100%;height:auto}.charts svg{width:100%}
svg .line{fill:none;stroke-width:2}svg .grid{stroke:var(--line);fill:none}
svg text{font:12px system-ui,sans-serif;fill:var(--soft);text-anchor:end}
svg text.below{text-anchor:middle}
.row{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(30%,150px),1fr));
gap:.5rem .6rem;margin:.2rem 0 1.4rem}.row figure{max-width:280px}
.row img{display:block;width:100%;border-radius:3px;background:var(--shade)}
.row figcaption{font-size:13px;line-height:1.35}.row figcaption b{display:block;
color:var(--ink)}
.right{color:var(--good)}.wrong{color:var(--bad)}
"""


def page(
    title: str, runs: Sequence[Run], groups: Sequence[tuple[str, str, Sequence[Group]]]
) -> str:
    """The HTML of a report.

    Args:
        title: its heading.
        runs: what it is of.
        groups: images: what they are of, how they were chosen, and the images.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(__package__ or "", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    values: dict[str, Any] = {
        "title": title,
        "runs": list(enumerate(runs)),
        "key": key,
        "charts": _charts(runs),
        "table": _table(runs),
        "differences": differences(runs) if len(runs) > 1 else {},
        "settings": [(run.label, settings_of(run.experiment)) for run in runs],
        "versions": _versions(runs),
        "groups": groups,
        "labels": [run.label for run in runs],
    }
    body = environment.get_template("body.html").render(values)
    return document(title, Markup(body), _STYLE)


def _charts(runs: Sequence[Run]) -> list[tuple[str, Markup]]:
    found = []
    for name in _columns(runs):
        curves = {run.label: run.curve(name) for run in runs}
        if name not in _COUNTS and any(curves.values()):
            found.append((_heading(name), chart(_NAMES.get(name, name), curves)))
    return found


def _table(runs: Sequence[Run]) -> dict[str, Any]:
    """Headings and rows of the last figures; a row of the paper's follows where it has some."""
    columns = _columns(runs)
    best = {name: _best(name, runs) for name in columns}
    lines = []
    for run in runs:
        final = run.final
        cells = [
            (_number(name, final.get(name)), name in final and final[name] == best[name])
            for name in columns
        ]
        lines.append({"head": run.label, "paper": False, "cells": cells})
        printed = paper.figures(run.experiment.name)
        if printed:
            cells = [(_number(name, printed.get(name)), False) for name in columns]
            lines.append({"head": f"{run.label}, in the paper", "paper": True, "cells": cells})
    return {"heads": [_heading(name) for name in columns], "lines": lines}


def _columns(runs: Sequence[Run]) -> list[str]:
    """The figures that any run has, the known ones in their order first."""
    found = {name for run in runs for name in run.final}
    found |= {name for run in runs for name in paper.figures(run.experiment.name)}
    others = sorted(found - set(_NAMES))[:_MOST_OTHERS]
    return [name for name in _NAMES if name in found] + others


def _best(name: str, runs: Sequence[Run]) -> float | None:
    values = [run.final[name] for run in runs if name in run.final]
    if name in _COUNTS or len(values) < 2:
        return None
    return min(values) if name in _LOWER_IS_BETTER else max(values)


def _heading(name: str) -> str:
    return _NAMES.get(name, name) + (" (lower is better)" if name in _LOWER_IS_BETTER else "")


def _number(name: str, value: float | None) -> str:
    if value is None:
        return "–"
    if name in _COUNTS:
        return f"{value:,.0f}"
    return f"{value:.{_DIGITS.get(name, 1)}f}"


def _versions(runs: Sequence[Run]) -> dict[str, list[str]]:
    names = list(dict.fromkeys(name for run in runs for name in run.versions))
    found = {name: [run.versions.get(name, "unknown") for run in runs] for name in names}
    return found | {"ranks": [str(run.world_size or "unknown") for run in runs]}
