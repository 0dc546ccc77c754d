"""Run a table of the paper again: `python jobs/reproduce.py --help`."""

from __future__ import annotations

import json
from functools import partial
from typing import Annotated

import typer
from rich.table import Table as Shown

from sr4ir_dist import parallel
from sr4ir_dist.cli import (
    Address,
    CacheDir,
    Cpus,
    Gpu,
    JsonFile,
    Settings,
    console,
    make_app,
    refuse_job_folder,
    say,
    user_errors,
    write_result,
)

app = make_app()


@app.command()
def main(
    table: Annotated[
        str | None, typer.Argument(help="`table1` to `table7`, `tableS1`, ..; see --list.")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=URI",
            help="A dataset by its name in experiments, such as `voc_seg=s3://bucket/voc`; may be "
            "repeated. Another one of the same task takes the place of one that is not given.",
        ),
    ] = None,
    storage_uri: Annotated[
        str, typer.Option("--storage", help="Where runs and tables are kept: a path or URI.")
    ] = "runs/paper",
    budget: Annotated[
        float, typer.Option(help="Part of the paper's epochs, such as 0.05; at least 2 epochs.")
    ] = 1.0,
    size: Annotated[
        int | None,
        typer.Option(help="Side of training crops in pixels, smaller than the paper's."),
    ] = None,
    scale: Annotated[
        list[int] | None, typer.Option(help="Only this scale; may be repeated.")
    ] = None,
    sr: Annotated[
        list[str] | None, typer.Option(help="Only this SR network (`edsr`, `swinir`).")
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(help="Run each cell with each seed, such as 1,2,3.")
    ] = None,
    pretrain: Annotated[
        bool,
        typer.Option(
            "--pretrain",
            help="Start SR networks from one that is first trained on the same images by the "
            "pixel loss, in place of published DIV2K weights.",
        ),
    ] = False,
    benchmark: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FOLDER", help="Table S6: a folder with HR/*.png; may be repeated."
        ),
    ] = None,
    settings: Settings = None,
    workers: Annotated[int, typer.Option(help="Ranks of each run.")] = 1,
    lanes: Annotated[
        int | None, typer.Option(min=1, help="Runs side by side; by default as many as fit.")
    ] = None,
    cpus: Cpus = None,
    gpu: Gpu = None,
    address: Address = None,
    cache_dir: CacheDir = None,
    json_file: JsonFile = None,
    list_tables: Annotated[bool, typer.Option("--list", help="List the tables.")] = False,
) -> None:
    """Train what a table of the paper needs, and write it beside the paper's figures.

    Runs that several cells need are trained once. The same command again goes on where an
    interrupted one ended. Markdown, CSV, HTML and JSON are written to the storage after each run.
    Exit code 1 where a run failed for another reason than missing data or weights.

        python jobs/reproduce.py table1 --data drawn_seg=datasets/drawn --scale 4 --sr edsr
        --pretrain --budget 0.1
    """
    from sr4ir_dist.reproduction import orders, run, scaling_down, studies, tables, written
    from sr4ir_dist.training.launch import Resources, TrainingError

    if list_tables:
        for name, layout in tables.LAYOUTS.items():
            console.print(f"{name:8} {layout.title}; data: {', '.join(layout.data)}")
        for name, title in studies.TITLES.items():
            console.print(f"{name:8} {title}, measured on runs")
        return
    if table is None:
        raise typer.BadParameter("name a table (--list shows all)")
    with user_errors(TrainingError):
        refuse_job_folder(storage_uri)
        given = run.parse_data(data or [])
        refuse_job_folder(*given.values(), option="--data")
        chosen = {"scales": scale or (), "networks": sr or ()}
        study = None
        if table in studies.TITLES:
            folders = run.parse_data(benchmark or [], "--benchmark")
            study = studies.make_study(table, given, benchmarks=folders, **chosen)
            layout = study.table
        else:
            layout = tables.make_table(table, given, **chosen)
        changes = orders.absolute_files(settings or [])
        request = run.Reproduction(
            layout,
            given,
            storage_uri,
            partial(scaling_down.make, budget=budget, size=size, settings=changes),
            run.parse_seeds(seeds),
            pretrain,
            scaling_down.explained(budget, size, changes),
            study,
        )
        wanted = run.plan(request)
        parallel.connect(address)
        resources = Resources(workers, cpus, gpu)
        filled, uris, failed = run.reproduce(
            request, wanted, resources, lanes=lanes, cache_dir=cache_dir, say=say
        )
        headings, rows, reasons = written.summary(filled)
        shown = Shown(*headings, title=layout.title)
        for row in rows:
            shown.add_row(*row)
        console.print(shown)
        for number, why in enumerate(reasons, 1):
            say(f"[{number}] {why}")
        for note in filled.notes:
            say(f"note: {note}")
        for uri in uris.values():
            console.print(uri, soft_wrap=True)
        write_result(json_file, json.loads(written.as_json(filled)))
    if failed:
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
