"""What a node of the cluster has; imports little, because every node waits for that."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

from sr4ir_dist import __version__, storage

_PACKAGES = ("ray", "torch", "torchvision", "deepspeed", "pyarrow", "numpy", "pydantic")


def report(storage_uri: str | None) -> dict[str, str]:
    """The versions here, and why the storage cannot be written from here, if so.

    Args:
        storage_uri: where runs are to be kept; None leaves it out.
    """
    told = {"python": platform.python_version(), "sr4ir_dist": __version__}
    for name in _PACKAGES:
        try:
            told[name] = version(name)
        except PackageNotFoundError:
            told[name] = "missing"
    if storage_uri is not None:
        try:
            storage.check_writable(storage.absolute(storage_uri))
        except ValueError as error:
            told["storage"] = str(error)
    return told


def differences(mine: Mapping[str, str], theirs: Mapping[str, str]) -> list[str]:
    """What a node reports that this one does not."""
    return [
        f"{name}: {told}" + (f" (here {mine[name]})" if name in mine else "")
        for name, told in theirs.items()
        if mine.get(name) != told
    ]
