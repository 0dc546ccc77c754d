"""Make a dataset of Arrow shards from images as they are published, and verify one."""

import inspect
import time
from collections.abc import Callable
from typing import Annotated, Any

import typer
from rich.table import Table

from sr4ir_dist import parallel, storage
from sr4ir_dist.cli import (
    Address,
    JsonFile,
    console,
    progress_bars,
    refuse_job_folder,
    say,
    user_errors,
    write_result,
)
from sr4ir_dist.data.convert import CONVERTERS
from sr4ir_dist.data.convert.parts import OnBadRow
from sr4ir_dist.data.convert.source import Converter
from sr4ir_dist.data.convert.write import ConvertedSplit, convert
from sr4ir_dist.data.verify import VerifiedSplit, verify

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help=(
        "Make a dataset of Arrow shards from images as they are published, or verify one.\n\n"
        "Images keep their bytes; each one is decoded once to see that it can be. The dataset "
        "appears at --out when everything is written, or not at all. The same command again "
        "continues a conversion that was interrupted; files of the source that were changed in "
        "place meanwhile are not noticed. Train on it with "
        "`python jobs/train.py ... --data OUT`.\n\n"
        "Places are paths or URIs: `birds/`, `file:///data/birds`, `s3://bucket/data/birds`. For "
        "S3, set AWS_REGION, for another store than AWS AWS_ENDPOINT_URL, and have credentials in "
        "the usual places.\n\n"
        "The work is done on this machine, or by all nodes of a Ray cluster where there is one: "
        "with --address, with RAY_ADDRESS set, or in a job submitted to it. Paths must then be on "
        "storage that all nodes share, under the same name."
    ),
)
# A task on a cluster has 1 CPU: some of its threads wait for files while one decodes.
_THREADS_OF_TASK = 4


Threads = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Images of a shard that are read and checked at once; two shards at a time are worked "
        "on here, on a cluster one for each CPU.",
        show_default="half the CPUs; 4 on a cluster",
    ),
]


def _convert(
    converter: Converter,
    options: dict[str, Any],
    *,
    out: Annotated[str, typer.Option(help="Where the dataset goes, a path or URI.")],
    name: Annotated[
        str | None,
        typer.Option(help="The dataset's name in its manifest.", show_default="the source's"),
    ] = None,
    on_bad_row: Annotated[
        OnBadRow,
        typer.Option(
            help="An image that cannot be read: fail, or skip it, count it and list it. Training "
            "on the dataset will do the same."
        ),
    ] = "fail",
    overwrite: Annotated[bool, typer.Option(help="Replace a dataset that is there.")] = False,
    threads: Threads = None,
    address: Address = None,
    json: JsonFile = None,
) -> None:
    """Convert a source; the keywords are the options that all converters' commands have."""
    with user_errors():
        refuse_job_folder(out, option="--out")
        places = {key: storage.absolute(v) for key, v in options.items() if isinstance(v, str)}
        source = converter.open(**{**options, **places})
        for note in source.notes:
            say(f"note: {note}")
        run, threads = _workers(address, threads)
        start = time.monotonic()
        with progress_bars() as progress:
            splits = convert(
                converter,
                source,
                storage.absolute(out),
                name=name,
                on_bad_row=on_bad_row,
                overwrite=overwrite,
                threads=threads,
                run=run,
                progress=progress,
                say=say,
            )
        summary = _summary(out, splits, time.monotonic() - start)
        write_result(json, summary)
    for split, result in splits.items():
        for message in result.skipped[:10]:
            say(f"skipped in {split}: {message}")
        for what, count in result.tally.items():
            if count:
                say(f"{split}: {what}: {count:,}")
    _print_summary(next(iter(splits.values())), summary)


def _command(converter: Converter) -> Callable[..., None]:
    """The command of a converter: its own options, then those that all have."""

    def command(**given: Any) -> None:
        options = {name: given.pop(name) for name in converter.options}
        _convert(converter, options, **given)

    opened = inspect.signature(converter.open).parameters
    own = [
        opened[name].replace(
            kind=inspect.Parameter.KEYWORD_ONLY,
            annotation=Annotated[opened[name].annotation, typer.Option(help=text)],
        )
        for name, text in converter.options.items()
    ]
    shared = inspect.signature(_convert).parameters.values()
    parameters = [*own, *(each for each in shared if each.kind is each.KEYWORD_ONLY)]
    # What cannot be left out comes first in the help.
    parameters.sort(key=lambda each: each.default is not each.empty)
    # Where typer looks for the options.
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {each.name: each.annotation for each in parameters}
    return command


for _name, _converter in CONVERTERS.items():
    app.command(_name, help=_converter.help)(_command(_converter))


@app.command("verify")
def verify_dataset(
    uri: Annotated[str, typer.Argument(help="The dataset, a path or URI.")],
    split: Annotated[
        list[str] | None,
        typer.Option(help="A split to check; may be repeated.", show_default="all"),
    ] = None,
    threads: Threads = None,
    address: Address = None,
    json: JsonFile = None,
) -> None:
    """Check every digest of a dataset, and decode every image and mask.

    What is wrong is listed with shard, row and sample; the exit code is 1 then.
    """
    with user_errors():
        run, threads = _workers(address, threads)
        start = time.monotonic()
        with progress_bars() as progress:
            found = verify(
                storage.absolute(uri), split or (), threads=threads, run=run, progress=progress
            )
        seconds = time.monotonic() - start
        write_result(json, _findings(uri, found, seconds))
    for each in found.values():
        for problem in each.problems:
            say(f"problem: {problem}")
    table = Table("split", title=f"verified in {seconds:.1f} s", caption=uri)
    for heading in ("rows", "shards", "MB", "problems"):
        table.add_column(heading, justify="right")
    for name, each in found.items():
        size = f"{each.bytes / 1e6:.1f}"
        table.add_row(name, f"{each.rows:,}", str(each.shards), size, str(len(each.problems)))
    console.print(table)
    if any(each.problems for each in found.values()):
        raise typer.Exit(1)


def _workers(address: str | None, threads: int | None) -> tuple[parallel.Run | None, int | None]:
    """Where the work is done, None for here, and how many threads each part of it has."""
    if not parallel.wants_cluster(address):
        return None, threads
    parallel.connect(address)
    return parallel.on_cluster(), threads or _THREADS_OF_TASK


def _findings(uri: str, found: dict[str, VerifiedSplit], seconds: float) -> dict[str, Any]:
    return {
        "uri": uri,
        "seconds": seconds,
        "splits": {
            name: {**vars(each), "problems": [vars(problem) for problem in each.problems]}
            for name, each in found.items()
        },
    }


def _summary(out: str, splits: dict[str, ConvertedSplit], seconds: float) -> dict[str, Any]:
    images = sum(
        result.manifest.rows + len(result.skipped) - result.resumed for result in splits.values()
    )
    return {
        "out": out,
        "seconds": seconds,
        "images_per_second": images / seconds,
        "splits": {
            split: {
                "rows": result.manifest.rows,
                "classes": len(result.manifest.class_names),
                "shards": len(result.manifest.shards),
                "record_batches": sum(len(s.batch_rows) for s in result.manifest.shards),
                "bytes": sum(s.bytes for s in result.manifest.shards),
                "skipped": list(result.skipped),
                "resumed": result.resumed,
                "tally": result.tally,
                "digest": result.manifest.digest,
            }
            for split, result in splits.items()
        },
    }


def _print_summary(first: ConvertedSplit, summary: dict[str, Any]) -> None:
    manifest = first.manifest
    table = Table(title=f"{manifest.name}: {', '.join(manifest.tasks)}", caption=summary["out"])
    headings = ("split", "rows", "skipped", "classes", "shards", "record batches", "MB")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "split" else "right")
    for split, row in summary["splits"].items():
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
    if summary["images_per_second"]:
        seconds, speed = f"{summary['seconds']:.1f} s", f"{summary['images_per_second']:,.0f}"
        console.print(f"{seconds}, {speed} images/s", highlight=False)


if __name__ == "__main__":
    app()
