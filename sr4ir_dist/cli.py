"""What the jobs share on the command line: errors without tracebacks, and results as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console

from sr4ir_dist import storage

console = Console()
notices = Console(stderr=True)


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
        notices.print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        notices.print("interrupted: the same command again continues or starts anew")
        raise typer.Exit(130) from None


def write_result(uri: str | None, value: Any) -> None:
    """Write a job's result as JSON to a path or URI, if one was asked for."""
    if uri is not None:
        storage.write_json(storage.absolute(uri), value)
