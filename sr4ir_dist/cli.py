"""What the jobs share on the command line: options, errors without tracebacks, results as JSON."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from sr4ir_dist import storage

console = Console()
notices = Console(stderr=True)

Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY.PATH=VALUE", help="Change a setting; may be repeated."),
]
Cpus = Annotated[
    int | None, typer.Option(help="CPUs of each worker; by default the cluster's, divided.")
]
Gpu = Annotated[
    bool | None, typer.Option("--gpu/--cpu", help="One GPU a worker; by default if there are.")
]
Address = Annotated[
    str | None,
    typer.Option(help="Ray cluster to join; by default RAY_ADDRESS's or this machine's."),
]
CacheDir = Annotated[str | None, typer.Option(help="Node-local folder for shards from a bucket.")]
JsonFile = Annotated[
    str | None, typer.Option("--json", help="Also write the result as JSON, to a path or URI.")
]


def make_app() -> typer.Typer:
    """A job's command line, with help in Markdown and plain tracebacks."""
    return typer.Typer(
        add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown"
    )


def say(text: str) -> None:
    """Tell people what happens, on stderr: a line as it is, however long."""
    notices.print(text, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def user_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Print an error that the user can mend as one line on stderr, and exit with code 1.

    An interruption by the keyboard ends with code 130.

    Args:
        *kinds: errors that are the user's besides ValueError.
    """
    try:
        yield
    except (ValueError, *kinds) as error:
        say(f"error: {error}")
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        notices.print("interrupted: the same command again continues or starts anew")
        raise typer.Exit(130) from None


def refuse_job_folder(*uris: str, option: str = "--storage") -> None:
    """Refuse to look for or keep something where a submitted job runs.

    That folder is on one node, without data, and Ray deletes it after the job.

    Raises:
        ValueError: this is a submitted job, and the place is a relative path.
    """
    submitted = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    for uri in uris:
        if submitted and "://" not in uri and not Path(uri).is_absolute():
            raise ValueError(
                f"{option} {uri}: a submitted job runs in a folder of its own, which Ray deletes; "
                "give an absolute path that all nodes share, or a URI"
            )


@contextmanager
def progress_bars() -> Iterator[Callable[[str, int, int], None]]:
    """Show how far several things are, on stderr; gives what to call with a name, done and all.

    These are bars on a terminal; elsewhere, as in a job's log, lines for every tenth.
    """
    if not notices.is_terminal:
        told: dict[str, int] = {}

        def tell(name: str, done: int, total: int) -> None:
            tenth = 10 * done // max(1, total)
            if told.get(name, 0) < tenth:
                say(f"{name}: {done:,} of {total:,}")
            told[name] = tenth

        yield tell
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=notices) as progress:
        bars: dict[str, TaskID] = {}

        def update(name: str, done: int, total: int) -> None:
            if name not in bars:
                bars[name] = progress.add_task(name, total=total)
            progress.update(bars[name], completed=done)

        yield update


def result_table(title: str, figures: Mapping[str, Any]) -> Table:
    """A table of an evaluation's figures, to which a job adds what else it has to say."""
    table = Table("", "", show_header=False, title=title)
    for name, value in figures.items():
        table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
    return table


def write_result(uri: str | None, value: Any) -> None:
    """Write a job's result as JSON to a path or URI, if one was asked for."""
    if uri is not None:
        storage.write_json(storage.absolute(uri), value)
