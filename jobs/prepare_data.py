"""Make a dataset of Arrow shards from images as they are published."""

from enum import StrEnum
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from sr4ir_dist import storage
from sr4ir_dist.cli import JsonFile, console, notices, user_errors, write_result
from sr4ir_dist.data.convert import CONVERTERS
from sr4ir_dist.data.convert.write import ConvertedSplit, convert, refuse_existing

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help=(
        "Make a dataset of Arrow shards from images as they are published.\n\n"
        "Images keep their bytes; each one is decoded once to see that it can be. The dataset "
        "appears at --out when everything is written, or not at all. Train on it with "
        "`python jobs/train.py ... --data OUT`.\n\n"
        "Places are paths or URIs: `birds/`, `file:///data/birds`, `s3://bucket/data/birds`. For "
        "S3, set AWS_REGION, for another store than AWS AWS_ENDPOINT_URL, and have credentials in "
        "the usual places."
    ),
)


class OnBadRow(StrEnum):
    """What to do with a sample that cannot be read."""

    fail = "fail"
    skip = "skip"


Root = Annotated[str, typer.Option(help="The source's folder, a path or URI.")]
Out = Annotated[str, typer.Option(help="Where the dataset goes, a path or URI.")]
Name = Annotated[
    str | None,
    typer.Option(help="The dataset's name in its manifest.", show_default="the source's"),
]
Bad = Annotated[
    OnBadRow,
    typer.Option(help="An image that cannot be read: fail, or skip it, count it and list it."),
]
Overwrite = Annotated[bool, typer.Option(help="Replace a dataset that is there.")]
Threads = Annotated[
    int | None,
    typer.Option(min=1, help="Images read and checked at once.", show_default="number of CPUs"),
]
Count = Annotated[int, typer.Option(min=1)]
CocoRoot = Annotated[
    str | None,
    typer.Option(help="The source's folder; not needed if the four places below are given."),
]
TrainJson = Annotated[
    str | None,
    typer.Option(
        help="The train split's JSON.", show_default="ROOT/annotations/instances_train2017.json"
    ),
]
ValJson = Annotated[
    str | None,
    typer.Option(
        help="The val split's JSON.", show_default="ROOT/annotations/instances_val2017.json"
    ),
]
TrainImages = Annotated[
    str | None, typer.Option(help="The train split's images.", show_default="ROOT/train2017")
]
ValImages = Annotated[
    str | None, typer.Option(help="The val split's images.", show_default="ROOT/val2017")
]

VOC_ROOT = (
    "--root is VOCdevkit, or a year's folder in it: the folder with ImageSets, JPEGImages, "
    "Annotations and SegmentationClass."
)
COCO_ROOT = (
    "--root has annotations/instances_train2017.json, annotations/instances_val2017.json, "
    "train2017/ and val2017/; any of the four may be given instead, for sets of one's own."
)
CARS_ROOT = (
    "--root is the folder with train/ and test/ (one folder a class in each), or the one with "
    "car_data/ in it. The official test split becomes val."
)


def _help(converter: str, more: str) -> str:
    return f"{CONVERTERS[converter].help}\n\n{more}"


@app.command("voc_seg", help=_help("voc_seg", VOC_ROOT))
def voc_seg(
    root: Root,
    out: Out,
    name: Name = None,
    on_bad_row: Bad = OnBadRow.fail,
    overwrite: Overwrite = False,
    threads: Threads = None,
    json: JsonFile = None,
) -> None:
    _run("voc_seg", {"root": root}, out, name, on_bad_row, overwrite, threads, json)


@app.command("voc_det", help=_help("voc_det", VOC_ROOT))
def voc_det(
    root: Root,
    out: Out,
    name: Name = None,
    on_bad_row: Bad = OnBadRow.fail,
    overwrite: Overwrite = False,
    threads: Threads = None,
    json: JsonFile = None,
) -> None:
    _run("voc_det", {"root": root}, out, name, on_bad_row, overwrite, threads, json)


@app.command("coco_seg", help=_help("coco_seg", COCO_ROOT))
def coco_seg(
    out: Out,
    root: CocoRoot = None,
    train_annotations: TrainJson = None,
    val_annotations: ValJson = None,
    train_images: TrainImages = None,
    val_images: ValImages = None,
    name: Name = None,
    on_bad_row: Bad = OnBadRow.fail,
    overwrite: Overwrite = False,
    threads: Threads = None,
    json: JsonFile = None,
) -> None:
    options = _coco_options(root, train_annotations, val_annotations, train_images, val_images)
    _run("coco_seg", options, out, name, on_bad_row, overwrite, threads, json)


@app.command("coco_det", help=_help("coco_det", COCO_ROOT))
def coco_det(
    out: Out,
    root: CocoRoot = None,
    train_annotations: TrainJson = None,
    val_annotations: ValJson = None,
    train_images: TrainImages = None,
    val_images: ValImages = None,
    name: Name = None,
    on_bad_row: Bad = OnBadRow.fail,
    overwrite: Overwrite = False,
    threads: Threads = None,
    json: JsonFile = None,
) -> None:
    options = _coco_options(root, train_annotations, val_annotations, train_images, val_images)
    _run("coco_det", options, out, name, on_bad_row, overwrite, threads, json)


@app.command(help=_help("cars", CARS_ROOT))
def cars(
    root: Root,
    out: Out,
    name: Name = None,
    on_bad_row: Bad = OnBadRow.fail,
    overwrite: Overwrite = False,
    threads: Threads = None,
    json: JsonFile = None,
) -> None:
    _run("cars", {"root": root}, out, name, on_bad_row, overwrite, threads, json)


@app.command(help=CONVERTERS["cub200"].help)
def cub200(
    root: Root,
    out: Out,
    name: Name = None,
    on_bad_row: Bad = OnBadRow.fail,
    overwrite: Overwrite = False,
    threads: Threads = None,
    json: JsonFile = None,
) -> None:
    _run("cub200", {"root": root}, out, name, on_bad_row, overwrite, threads, json)


@app.command(help=CONVERTERS["image-folder"].help)
def image_folder(
    root: Root,
    out: Out,
    name: Name = None,
    on_bad_row: Bad = OnBadRow.fail,
    overwrite: Overwrite = False,
    threads: Threads = None,
    json: JsonFile = None,
) -> None:
    _run("image-folder", {"root": root}, out, name, on_bad_row, overwrite, threads, json)


@app.command(help=CONVERTERS["sr-folder"].help)
def sr_folder(
    root: Root,
    out: Out,
    val_count: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Evenly spaced images to hold out as val, without train and val folders.",
            show_default="a tenth, at least 1",
        ),
    ] = None,
    name: Name = None,
    on_bad_row: Bad = OnBadRow.fail,
    overwrite: Overwrite = False,
    threads: Threads = None,
    json: JsonFile = None,
) -> None:
    options = {"root": root, "val_count": val_count}
    _run("sr-folder", options, out, name, on_bad_row, overwrite, threads, json)


@app.command(help=CONVERTERS["drawn"].help)
def drawn(
    out: Out,
    train_count: Count = 1024,
    val_count: Count = 256,
    size: Annotated[int, typer.Option(help="Height and width in pixels.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Another seed, other images.")] = 0,
    name: Name = None,
    overwrite: Overwrite = False,
    json: JsonFile = None,
) -> None:
    options = {"train_count": train_count, "val_count": val_count, "size": size, "seed": seed}
    _run("drawn", options, out, name, OnBadRow.fail, overwrite, None, json)


def _coco_options(
    root: str | None,
    train_annotations: str | None,
    val_annotations: str | None,
    train_images: str | None,
    val_images: str | None,
) -> dict[str, Any]:
    return {
        "root": root,
        "train_annotations": train_annotations,
        "val_annotations": val_annotations,
        "train_images": train_images,
        "val_images": val_images,
    }


def _run(
    converter_name: str,
    options: dict[str, Any],
    out: str,
    name: str | None,
    on_bad_row: OnBadRow,
    overwrite: bool,
    threads: int | None,
    json: str | None,
) -> None:
    with user_errors():
        converter = CONVERTERS[converter_name]
        source = converter.open(**options)
        refuse_existing(out, source.splits, overwrite)
        storage.check_writable(out)
        for note in source.notes:
            notices.print(f"note: {note}", markup=False)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        with Progress(*columns, TimeRemainingColumn(), console=notices) as progress:
            bars = {
                split: progress.add_task(split, total=count)
                for split, count in source.counts.items()
            }
            splits = convert(
                converter,
                source,
                out,
                name=name,
                on_bad_row=on_bad_row.value,
                overwrite=overwrite,
                threads=threads,
                progress=lambda split, done: progress.update(bars[split], completed=done),
            )
        write_result(json, _summary(out, splits))
    for split, result in splits.items():
        for message in result.skipped[:10]:
            notices.print(f"skipped in {split}: {message}", markup=False, soft_wrap=True)
        for what, count in result.tally.items():
            if count:
                notices.print(f"{split}: {what}: {count:,}", markup=False)
    _print_table(out, splits)


def _summary(out: str, splits: dict[str, ConvertedSplit]) -> dict[str, Any]:
    return {
        "out": out,
        "splits": {
            split: {
                "rows": result.manifest.rows,
                "classes": len(result.manifest.class_names),
                "shards": len(result.manifest.shards),
                "record_batches": sum(len(s.batch_rows) for s in result.manifest.shards),
                "bytes": sum(s.bytes for s in result.manifest.shards),
                "skipped": list(result.skipped),
                "tally": result.tally,
                "digest": result.manifest.digest,
            }
            for split, result in splits.items()
        },
    }


def _print_table(out: str, splits: dict[str, ConvertedSplit]) -> None:
    first = next(iter(splits.values())).manifest
    table = Table(title=f"{first.name}: {', '.join(first.tasks)}", caption=out)
    headings = ("split", "rows", "skipped", "classes", "shards", "record batches", "MB")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "split" else "right")
    for split, row in _summary(out, splits)["splits"].items():
        table.add_row(
            split,
            f"{row['rows']:,}",
            str(len(row["skipped"])),
            str(row["classes"]),
            str(row["shards"]),
            str(row["record_batches"]),
            f"{row['bytes'] / 1e6:.1f}",
        )
    console.print(table)


if __name__ == "__main__":
    app()
