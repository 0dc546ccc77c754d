"""What goes wrong with storage: the errors' names, and which of them are tried again."""

import functools
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Concatenate, ParamSpec, TypeVar

import pyarrow as pa

P = ParamSpec("P")
T = TypeVar("T")
Uri = str | os.PathLike[str]

# Refusals (no such bucket, access denied, an invalid request) are not here. Status -1 is a listing
# that is no XML, hence cut.
_PASSING = re.compile(
    r"AWS Error (NETWORK_CONNECTION|SLOW_DOWN|INTERNAL_FAILURE|SERVICE_UNAVAILABLE|THROTTLING"
    r"|REQUEST_TIMEOUT|UNKNOWN \(HTTP status (-1|408|429|5\d\d)\)) "
)


class StorageError(ValueError):
    """Storage could not do what was asked; the message names the URI and the reason."""


class MissingError(StorageError):
    """There is nothing at the URI."""


class ContentError(StorageError):
    """What is at the URI is not what is expected there: too large, or no JSON."""


class PassingError(StorageError):
    """The server or the network failed, not the request: another try may do better."""


@dataclass(frozen=True)
class Patience:
    """How long an operation on S3 is tried.

    Attributes:
        requests: how often one try sends a request that fails, within a fraction of a second.
        tries: how many tries at most.
        wait_s: the longest wait after the first try; it doubles after each.
        total_s: no try begins later than this after the first.
    """

    requests: int = 3
    tries: int = 6
    wait_s: float = 1.0
    total_s: float = 300.0


PATIENCE = Patience()
"""Outlasts about 20 seconds of refusals; of stalls, three tries of three requests."""


@contextmanager
def named(uri: Uri) -> Iterator[None]:
    """Turns the errors of a filesystem into StorageErrors that name the URI."""
    try:
        yield
    except FileNotFoundError as error:
        raise MissingError(f"{uri}: nothing there ({error})") from error
    except (OSError, pa.ArrowException) as error:
        kind = PassingError if _PASSING.search(str(error)) else StorageError
        raise kind(f"{uri}: {error}") from error


def retried(operation: Callable[Concatenate[Uri, P], T]) -> Callable[Concatenate[Uri, P], T]:
    """Makes an operation on a URI persistent; its failures are StorageErrors.

    Args:
        operation: takes the URI first; doing it again after half of it was done must do no harm.

    Returns:
        The operation, tried as `PATIENCE` says while it fails with a PassingError. The last one
        tells how often and how long it was tried.
    """

    @functools.wraps(operation)
    def persistent(uri: Uri, *args: P.args, **kwargs: P.kwargs) -> T:
        started, tries = time.monotonic(), 0
        while True:
            tries += 1
            try:
                with named(uri):
                    return operation(uri, *args, **kwargs)
            except PassingError as error:
                # Half of each wait is random, so that many workers do not come back at once.
                wait = PATIENCE.wait_s * 2 ** (tries - 1) * random.uniform(0.5, 1)
                seconds = time.monotonic() - started
                if tries >= PATIENCE.tries or seconds + wait > PATIENCE.total_s:
                    raise StorageError(
                        f"{error} (given up after {seconds:.0f} s and {tries} tries of up to "
                        f"{PATIENCE.requests} requests each)"
                    ) from error
                time.sleep(wait)

    return persistent
