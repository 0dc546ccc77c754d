"""Look at networks and runs: `python jobs/analyze.py --help`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from sr4ir_dist.cli import (
    Address,
    CacheDir,
    Cpus,
    Gpu,
    JsonFile,
    Settings,
    console,
    make_app,
    progress_bars,
    result_table,
    say,
    user_errors,
    write_result,
)

if TYPE_CHECKING:
    from sr4ir_dist.analysis import judged
    from sr4ir_dist.training.plan import EvaluationRequest

app = make_app()


@app.callback()
def main() -> None:
    """Figures and measurements behind the paper's supplement, one command each."""


Labelled = Annotated[
    list[str],
    typer.Argument(
        metavar="LABEL=CHECKPOINT...",
        help="Checkpoints, or runs for their newest: paths, URIs or `hub://NAME`.",
    ),
]
Data = Annotated[
    list[str] | None,
    typer.Option(help="Dataset, by default that of the first one's run; repeat it for a mix."),
]
Split = Annotated[str, typer.Option(help="Split of the dataset.")]
Count = Annotated[int, typer.Option(min=1, help="How many images, the first of the split.")]
Workers = Annotated[int, typer.Option(help="Ranks that share the images.")]
Png = Annotated[str, typer.Option(metavar="PNG", help="The picture to write: a path or URI.")]


@app.command()
def figure(
    checkpoints: Labelled,
    out: Png,
    data: Data = None,
    split: Split = "val",
    count: Count = 6,
    overlay: Annotated[
        bool,
        typer.Option(help="Show masks, boxes or classes that were found, and the true ones on HR."),
    ] = True,
    settings: Settings = None,
    json_file: JsonFile = None,
) -> None:
    """The same images by several methods, as in Figures 4 to 6: a row an image, a column a method.

    python jobs/analyze.py figure "L->T=runs/A" SR4IR=runs/B --out figure.png
    """
    from sr4ir_dist.analysis.comparison import compare, write_figure
    from sr4ir_dist.analysis.labels import parse_labelled

    with user_errors():
        compared = compare(
            parse_labelled(checkpoints), data=data or None, split=split, settings=settings or []
        )
        with progress_bars() as show:
            names = write_figure(
                compared,
                out,
                count=count,
                overlay=overlay,
                told=lambda done: show("images", done, count),
            )
        console.print(f"picture  {out}", soft_wrap=True, highlight=False)
        write_result(json_file, {"columns": compared.titles, "images": names})


@app.command()
    result_table,
    say,


if __name__ == "__main__":
    app()
