"""Write a report of runs as one HTML page: `python jobs/report.py --help`."""

from __future__ import annotations

from typing import Annotated

import typer

from sr4ir_dist.cli import (
    JsonFile,
    Settings,
    console,
    make_app,
    progress_bars,
    user_errors,
    write_result,
)

app = make_app()


@app.command()
def main(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="[LABEL=]RUN...",
            help="Runs, finished or not, or checkpoints: paths, URIs or `hub://NAME`.",
        ),
    ],
    out: Annotated[
        str, typer.Option(metavar="HTML", help="The page to write: a path or URI.")
    ] = "report.html",
    data: Annotated[
        list[str] | None,
        typer.Option(help="Dataset of the images, by default the first run's; repeat for a mix."),
    ] = None,
    split: Annotated[str, typer.Option(help="Split of the dataset.")] = "val",
    count: Annotated[
        int,
        typer.Option(min=0, max=50, help="Images of each group: first, worst, best; 0 for none."),
    ] = 3,
    judged: Annotated[
        int, typer.Option(min=1, help="Find the worst and best among so many images.")
    ] = 100,
    overlay: Annotated[
        bool, typer.Option(help="Show masks, boxes or classes on the images.")
    ] = True,
    title: Annotated[str | None, typer.Option(help="Heading; by default the labels.")] = None,
    settings: Settings = None,
    json_file: JsonFile = None,
) -> None:
    """Write a page of runs: settings, curves, figures beside the paper's, and images.

    The page needs no other file and fetches nothing. The worst and best images are the last run's.

        python jobs/report.py "L->T=runs/A" SR4IR=runs/B --out report.html
    """
    from sr4ir_dist.analysis.labels import parse_labelled
    from sr4ir_dist.analysis.report.write import Shown, write_report

    with user_errors():
        shown = Shown(
            tuple(data) if data else None, split, count, judged, overlay, tuple(settings or ())
        )
        with progress_bars() as show:
            found = write_report(parse_labelled(runs), out, shown, title=title, told=show)
        console.print(f"report  {out}", soft_wrap=True, highlight=False)
        write_result(
            json_file,
            {
                "report": out,
                "runs": {
                    run.label: {
                        "checkpoint": run.checkpoint,
                        "experiment": run.experiment.name,
                        "finished": run.finished,
                        "metrics": run.final,
                    }
                    for run in found
                },
            },
        )


if __name__ == "__main__":
    app()
