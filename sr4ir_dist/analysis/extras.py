"""Libraries of the extra `analysis`, which only a few commands need."""

from __future__ import annotations

import importlib
from types import ModuleType


class MissingLibraryError(ValueError):
    """A library of an optional extra is not installed; the message names the extra."""


def need(module: str) -> ModuleType:
    """Import a module of the extra.

    Raises:
        MissingLibraryError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise MissingLibraryError(
            f"this needs {error.name}: pip install -e '.[analysis]'"
        ) from error
