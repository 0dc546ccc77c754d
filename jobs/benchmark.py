"""Measure this system next to its limits and its peers: `python jobs/benchmark.py --help`."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from sr4ir_dist import storage
from sr4ir_dist.cli import JsonFile, console, make_app, say, user_errors, write_result

if TYPE_CHECKING:
    from sr4ir_dist.benchmark.data import Entry

app = make_app()


@app.callback()
def main() -> None:
    """Measure this system next to what bounds it and to what a user would pick instead."""


@app.command()
def data(
    images: Annotated[str, typer.Argument(help="Folder of JPEG files, a path or URI.")],
    copies: Annotated[
        int, typer.Option(min=1, help="Read a small folder as if it held each image so often.")
    ] = 1,
    s3: Annotated[
        str | None,
        typer.Option(
            help="Measure from a bucket too: a prefix such as `s3://bucket/benchmark`, or "
            "`loopback` for a server on this machine."
        ),
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="Only this contender; may be repeated.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each; figures are medians.")] = 3,
    epochs: Annotated[int, typer.Option(min=2, help="Epochs of each run.")] = 3,
    workers: Annotated[int, typer.Option(min=1, help="Our threads, the peers' processes.")] = 2,
    batch_size: Annotated[int, typer.Option(min=1, help="Images of a batch.")] = 32,
    resize: Annotated[int, typer.Option(min=1, help="Pixels of the short side.")] = 256,
    crop: Annotated[int, typer.Option(min=1, help="Height and width of the result.")] = 224,
    folder: Annotated[
        str | None, typer.Option(help="Local folder for the formats; a temporary one by default.")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Images per second and peak memory of the data path, from disk and from a bucket.

    This system's loader, decoding alone and raw GET requests (the limits), and the peers: a
    torchvision ImageFolder behind torch's DataLoader, mosaicml-streaming, webdataset and Ray Data.
    All read the same images, resize, crop and mirror them; each runs in processes of its own, in
    turn. Peers that are not installed are left out: `pip install -e '.[benchmark]'`, best in an
    environment of its own, since mosaicml-streaming needs an older numpy.
    """
    from sr4ir_dist.benchmark.contenders import CONTENDERS, Work
    from sr4ir_dist.benchmark.data import measure
    from sr4ir_dist.data.convert.source import list_images

    with user_errors(), _bucket(s3) as bucket, tempfile.TemporaryDirectory(dir=folder) as work:
        paths, _ = list_images(images)
        jpegs = [path for path in paths if path.lower().endswith((".jpg", ".jpeg"))]
        if not jpegs:
            raise ValueError(f"{images}: no JPEG files")
        entries = measure(
            [storage.join(storage.absolute(images), path) for path in jpegs] * copies,
            Work(work, work, batch_size, resize, crop, workers, epochs),
            repeats=repeats,
            names=only or list(CONTENDERS),
            bucket=bucket,
            say=say,
        )
        _print(entries)
        write_result(
            json_file,
            {
                "images": len(jpegs) * copies,
                "workers": workers,
                "batch_size": batch_size,
                "resize": resize,
                "crop": crop,
                "epochs": epochs,
                "entries": [
                    asdict(entry) | {"median": asdict(entry.median) if entry.runs else None}
                    for entry in entries
                ],
            },
        )


@contextmanager
def _bucket(s3: str | None) -> Iterator[str | None]:
    """The prefix to measure from; for `loopback` there is a server as long as this is open."""
    if s3 != "loopback":
        yield s3
        return
    import boto3

    from sr4ir_dist.benchmark.loopback import s3_server

    with s3_server() as environment:
        os.environ.update(environment)
        boto3.client("s3").create_bucket(Bucket="benchmark")
        yield "s3://benchmark/data"


def _print(entries: list[Entry]) -> None:
    table = Table("contender", "from")
    for heading in ("first epoch", "later epochs", "peak memory"):
        table.add_column(heading, justify="right")
    for entry in entries:
        if entry.runs:
            figures = entry.median
            cells = (
                f"{figures.first:,.0f} images/s",
                f"{figures.later:,.0f} images/s",
                f"{figures.peak_mib:,.0f} MiB",
            )
        else:
            cells = (entry.failure or "", "", "")
        table.add_row(entry.name, entry.where, *cells)
    console.print(table)


if __name__ == "__main__":
    app()
