"""Judge a checkpoint: `python jobs/evaluate.py --help`."""

from __future__ import annotations

from typing import Annotated

import typer

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
    result_table,
    say,
    user_errors,
    write_result,
)
from sr4ir_dist.config import Role

app = make_app()


@app.command()
def main(
    checkpoint: Annotated[
        str,
        typer.Argument(
            help="A checkpoint, or a run for its newest: a path or URI, or `hub://NAME`."
        ),
    ],
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Dataset to judge on, by default the run's own; repeat it to judge on several."
        ),
    ] = None,
    split: Annotated[str, typer.Option(help="Split of the dataset.")] = "val",
    task_network: Annotated[
        str | None,
        typer.Option(
            help="Judge the SR images by another task network: a weight file, a checkpoint or a "
            "run, such as that of recipe h2t (Table S2).",
        ),
    ] = None,
    sr_network: Annotated[
        str | None,
        typer.Option(help="Exchange the SR network for another one of its kind (Table S4)."),
    ] = None,
    view: Annotated[
        str | None,
        typer.Option(
            metavar="hr|lr_up|sr",
            help="What the task network gets: HR images, bilinear enlargements, SR images; by "
            "default what the recipe is judged on.",
        ),
    ] = None,
    storage_uri: Annotated[
        str | None,
        typer.Option(
            "--storage",
            help="Where Ray may keep files meanwhile; by default the run, or `runs` for `hub://`.",
        ),
    ] = None,
    settings: Settings = None,
    workers: Annotated[int, typer.Option(help="Ranks that share the images.")] = 1,
    cpus: Cpus = None,
    gpu: Gpu = None,
    address: Address = None,
    cache_dir: CacheDir = None,
    json_file: JsonFile = None,
) -> None:
    """Judge a checkpoint on a dataset: the task's figures, PSNR, SSIM and LPIPS, every image once.

    python jobs/evaluate.py runs/drawn_cls-edsr-x4-sr4ir-1a2b3c4d --workers 2
    """
    from sr4ir_dist.hub.names import is_name
    from sr4ir_dist.training import launch
    from sr4ir_dist.training.plan import make_request

    with user_errors(launch.TrainingError):
        refuse_job_folder(*data or (), option="--data")
        if storage_uri is None and is_name(checkpoint):
            storage_uri = "runs"  # what is published is only read
            refuse_job_folder(storage_uri)
        both: dict[Role, str | None] = {"sr": sr_network, "task": task_network}
        given: dict[Role, str] = {role: uri for role, uri in both.items() if uri is not None}
        request = make_request(
            checkpoint,
            data=data or None,
            split=split,
            settings=settings or [],
            storage_uri=storage_uri,
            networks=given,
            view=view,
            say=say,
        )
        parallel.connect(address)
        resources = launch.Resources(workers, cpus, gpu)
        (figures,) = launch.evaluate(
            [request], resources, storage_uri=storage_uri, cache_dir=cache_dir
        )
        table = result_table(request.experiment.name, figures)
        for note in request.notes:
            table.add_row("note", note)
        table.add_row("data", f"{', '.join(request.data)}, split {split}")
        table.add_row("checkpoint", request.checkpoint)
        if view is not None:
            table.add_row("view", view)
        for role, uri in given.items():
            table.add_row(f"{role} network", uri)
        console.print(table)
        write_result(
            json_file,
            {"checkpoint": request.checkpoint, "metrics": figures, "notes": list(request.notes)},
        )


if __name__ == "__main__":
    app()
