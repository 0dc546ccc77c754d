"""Predict on images with a checkpoint: `python jobs/predict.py --help`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from sr4ir_dist import parallel
from sr4ir_dist.cli import (
    Address,
    Cpus,
    Gpu,
    JsonFile,
    console,
    make_app,
    refuse_job_folder,
    result_table,
    say,
    user_errors,
    write_result,
)

app = make_app()


@app.command()
def main(
    checkpoint: Annotated[
        str,
        typer.Argument(
            help="A checkpoint, or a run for its newest: a path or URI, or `hub://NAME`."
        ),
    ],
    source: Annotated[
        str,
        typer.Argument(
            metavar="INPUT",
            help="A folder or bucket prefix, an image, or a `.txt` list of paths and URIs, one a "
            "line (relative ones from the list's folder).",
        ),
    ],
    out: Annotated[str, typer.Option(help="Where results go, a path or URI.")],
    images: Annotated[
        bool, typer.Option(help="Write SR images, where there is an SR network.")
    ] = True,
    predictions: Annotated[
        bool, typer.Option(help="Write what the task network finds, where there is one.")
    ] = True,
    tile: Annotated[
        int | None,
        typer.Option(
            help="Side in LR pixels of the tiles of images larger than one; 0 for never cutting. "
            "SwinIR's tiles and overlaps are multiples of its window.",
            show_default="1024 / scale, for SwinIR at most 256: 1 to 2 GB",
        ),
    ] = None,
    overlap: Annotated[
        int | None,
        typer.Option(
            help="LR pixels that a tile sees beyond its sides.",
            show_default="EDSR's reach, which makes tiling exact; 32 for SwinIR",
        ),
    ] = None,
    most_pixels: Annotated[
        int | None,
        typer.Option(
            help="Skip images whose SR image has more pixels.",
            show_default="2^23 with a task network, 2^28 without",
        ),
    ] = None,
    on_bad_image: Annotated[
        Literal["skip", "fail"],
        typer.Option(help="Whether images that were skipped make the exit code 1; at the end."),
    ] = "skip",
    data: Annotated[
        str | None,
        typer.Option(help="Dataset that names the classes; by default the run's own."),
    ] = None,
    workers: Annotated[int, typer.Option(help="Workers that share the images.")] = 1,
    cpus: Cpus = None,
    gpu: Gpu = None,
    address: Address = None,
    json_file: JsonFile = None,
) -> None:
    """Super-resolve images and recognise what is in them, with the networks of a checkpoint.

    python jobs/predict.py runs/voc_seg-edsr-x4-sr4ir-1a2b3c4d photos --out predicted --workers 2

    Images are LR images of any size: JPEG, PNG, WebP, BMP, TIFF or GIF; turned as their orientation
    tag says, alpha dropped, 16 bits rounded to 8. The task network gets what its recipe is judged
    on. In --out there will be

    - `sr/`: SR images, PNG, in the folders of the images;
    - `scores.csv` (classification): likeliest class and each one's probability;
    - `masks/` (segmentation): class numbers as PNG in PASCAL VOC's colours;
    - `boxes.json` (detection): COCO, in pixels of the SR image;
    - `skipped.csv`: images that were not predicted, and why;
    - `prediction.json` and `summary.json`: from what, with which options, and what came of it.

    The same command again, after a kill too, does what is missing. Other images, options or another
    checkpoint need another --out. Results do not depend on the number of workers; CPUs or GPUs of a
    worker change them by rounding.
    """
    from sr4ir_dist.prediction.plan import make_plan

    with user_errors():
        refuse_job_folder(out, option="--out")
        plan, parts = make_plan(
            checkpoint,
            source,
            out,
            images=images,
            predictions=predictions,
            tile=tile,
            overlap=overlap,
            most_pixels=most_pixels,
            data=data,
            say=say,
        )
        result = _predict(plan, parts, workers=workers, cpus=cpus, gpu=gpu, address=address)
        console.print(_table(plan.out, result))
        write_result(json_file, {"out": plan.out, **result})
    if result["skipped"] and on_bad_image == "fail":
        say(f"error: {result['skipped']} images were skipped, see {plan.out}/skipped.csv")
        raise typer.Exit(1)


def _predict(
    plan: Any,
    parts: Any,
    *,
    workers: int,
    cpus: int | None,
    gpu: bool | None,
    address: str | None,
) -> dict[str, Any]:
    """Predict here, or on a cluster where there is one or several workers are asked for."""
    import torch

    from sr4ir_dist.prediction.run import here, predict

    if workers == 1 and not parallel.wants_cluster(address):
        if gpu and not torch.cuda.is_available():
            raise ValueError("--gpu: there is no GPU here")
        device = torch.device("cpu") if gpu is False else None
        return predict(plan, parts, here(cpus, device), say)
    from sr4ir_dist.prediction.cluster import on_cluster
    from sr4ir_dist.training.capacity import Resources

    parallel.connect(address)
    return predict(plan, parts, on_cluster(Resources(workers, cpus, gpu)), say)


def _table(out: str, result: dict[str, Any]) -> Any:
    told = ("images", "predicted", "skipped", "done_before", "seconds", "images_per_second")
    table = result_table(out, {name: result[name] for name in told if name in result})
    table.add_row("tables", ", ".join(result["files"]) or "none")
    table.add_row("checkpoint", result["prediction"]["checkpoint"])
    return table


if __name__ == "__main__":
    app()
