"""Look at networks and runs: `python jobs/analyze.py --help`."""

from __future__ import annotations

from typing import Annotated

import typer

from sr4ir_dist.cli import (
    JsonFile,
    Settings,
    console,
    make_app,
    progress_bars,
    result_table,
    user_errors,
    write_result,
)

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
def gradcam(
    checkpoints: Labelled,
    out: Png,
    data: Data = None,
    split: Split = "val",
    count: Count = 6,
    settings: Settings = None,
    json_file: JsonFile = None,
) -> None:
    """Where task networks look for the true class: Grad-CAM, a column a checkpoint (section S3).

    For classification and segmentation; needs the extra `analysis`.

        python jobs/analyze.py gradcam CQMix=runs/A "no CQMix=runs/B" --out gradcam.png
    """
    from sr4ir_dist.analysis.comparison import compare
    from sr4ir_dist.analysis.gradcam import write_gradcam
    from sr4ir_dist.analysis.labels import parse_labelled

    with user_errors():
        compared = compare(
            parse_labelled(checkpoints), data=data or None, split=split, settings=settings or []
        )
        with progress_bars() as show:
            said = write_gradcam(
                compared, out, count=count, told=lambda done: show("images", done, count)
            )
        console.print(f"picture  {out}", soft_wrap=True, highlight=False)
        write_result(json_file, {"images": said})


@app.command()
def tsne(
    checkpoints: Labelled,
    out: Png,
    oracle: Annotated[
        str | None,
        typer.Option(
            metavar="CHECKPOINT",
            help="Whose task network sees all images, as one of h2t; by default the first one's.",
        ),
    ] = None,
    data: Data = None,
    split: Split = "val",
    count: Count = 200,
    seed: Annotated[int, typer.Option(help="Another seed, another plane.")] = 0,
    settings: Settings = None,
    json_file: JsonFile = None,
) -> None:
    """How far SR images are from HR in a task network's features: t-SNE, a plot each (section S1).

    The distance from HR is a share of that between two HR images. `--json` has all points. Needs
    the extra `analysis`.

        python jobs/analyze.py tsne S=runs/A SR4IR=runs/B --oracle runs/C --out tsne.png
    """
    from sr4ir_dist.analysis.comparison import compare
    from sr4ir_dist.analysis.labels import parse_labelled
    from sr4ir_dist.analysis.loaded import load
    from sr4ir_dist.analysis.tsne import collect, embed, write_scatter

    with user_errors():
        compared = compare(
            parse_labelled(checkpoints), data=data or None, split=split, settings=settings or []
        )
        judge = None if oracle is None else load(oracle)
        with progress_bars() as show:
            features = collect(
                compared, judge, count=count, told=lambda done: show("images", done, count)
            )
        result = write_scatter(features, embed(features, seed=seed), out)
        console.print(result_table("distance from HR", result["gap"]))
        console.print(f"picture  {out}", soft_wrap=True, highlight=False)
        write_result(json_file, result)


if __name__ == "__main__":
    app()
