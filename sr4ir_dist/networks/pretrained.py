"""Published weights, from a file or a bucket, into a network."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from sr4ir_dist import storage

_WRAPPERS = ("params", "state_dict")


class WeightsError(ValueError):
    """Weights that cannot be read or do not fit the network; names the URI."""


@dataclass(frozen=True)
class LoadReport:
    """What of a file went into a network.

    Attributes:
        uri: Where the weights came from.
        loaded: Names that were filled.
        missing: Names that the network has and the file has not.
        unexpected: Names that the file has and the network has not.
        mismatched: Names in both whose shapes differ, with the file's and the network's shape.
    """

    uri: str
    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]

    @property
    def complete(self) -> bool:
        """Whether file and network hold exactly the same tensors."""
        return not (self.missing or self.unexpected or self.mismatched)

    def summary(self) -> str:
        """Says in one line what was loaded and what was not."""
        parts = [f"{self.uri}: {len(self.loaded)} tensors loaded"]
        if self.missing:
            parts.append(f"{len(self.missing)} keep their start ({_some(self.missing)})")
        if self.unexpected:
            parts.append(f"{len(self.unexpected)} not used ({_some(self.unexpected)})")
        if self.mismatched:
            shapes = [f"{n} {list(there)} -> {list(here)}" for n, there, here in self.mismatched]
            parts.append(f"{len(shapes)} of another shape, left at their start ({_some(shapes)})")
        return "; ".join(parts)


def load_weights(module: nn.Module, uri: str, *, partial: bool = False) -> LoadReport:
    """Reads weights into a network, in place; nothing is changed when they do not fit.

    A top-level `params` or `state_dict` entry is unwrapped and a `module.` prefix stripped.
    Batch norm's `num_batches_tracked` may be absent: old files lack it and a fixed momentum never
    reads it. Values are converted to the network's dtype. `.pt` and `.pth` files are read without
    executing anything (`weights_only=True`).

    Args:
        module: The plain network.
        uri: A `.pt`, `.pth` or `.safetensors` file: a path or a URI.
        partial: Load what fits and report the rest, instead of refusing. A head for another
            number of classes is one of the tensors that do not fit.

    Raises:
        WeightsError: Unreadable file, or not exactly the network's tensors; with `partial`, only
            when no tensor fits at all.
        StorageError: There is no such file.
    """
    found = _read(uri)
    own: dict[str, Tensor] = module.state_dict()
    fitting: dict[str, Tensor] = {}
    mismatched = []
    for name, value in found.items():
        if name in own and value.shape == own[name].shape:
            fitting[name] = value
        elif name in own:
            mismatched.append((name, tuple(value.shape), tuple(own[name].shape)))
    report = LoadReport(
        uri=uri,
        loaded=tuple(fitting),
        missing=tuple(
            name for name in own if name not in found and not name.endswith("num_batches_tracked")
        ),
        unexpected=tuple(name for name in found if name not in own),
        mismatched=tuple(mismatched),
    )
    if not fitting or not (partial or report.complete):
        raise WeightsError(_complaint(report, type(module).__name__))
    module.load_state_dict(fitting, strict=False)
    return report


def _complaint(report: LoadReport, network: str) -> str:
    lines = [f"weights {report.uri} do not fit {network}:"]
    if report.missing:
        lines.append(f"  missing: {', '.join(report.missing)}")
    if report.unexpected:
        lines.append(f"  unexpected: {', '.join(report.unexpected)}")
    for name, there, here in report.mismatched:
        lines.append(f"  other shape: {name} is {list(there)} there, {list(here)} here")
    if report.loaded:
        lines.append(f"  {len(report.loaded)} tensors fit: partial loading would take these")
    return "\n".join(lines)


def _some(names: tuple[str, ...] | list[str], most: int = 4) -> str:
    rest = f", and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def _read(uri: str) -> dict[str, Tensor]:
    suffix = PurePosixPath(uri).suffix
    if suffix not in (".pt", ".pth", ".safetensors"):
        raise WeightsError(
            f"weights {uri}: a name that ends in {suffix!r}; expected .pt, .pth or .safetensors"
        )
    data = storage.read_bytes(uri)
    try:
        if suffix == ".safetensors":
            content: Any = safetensors.torch.load(data)
        else:
            content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except safetensors.SafetensorError as error:
        raise WeightsError(f"weights {uri} cannot be read: {error}") from error
    except Exception as error:  # torch.load raises a dozen unrelated types for broken files
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise WeightsError(f"weights {uri} cannot be read: {reason[0]}") from error
    return _tensors(uri, content)


def _tensors(uri: str, content: Any) -> dict[str, Tensor]:
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
            break
    if not isinstance(content, Mapping) or not content:
        raise WeightsError(f"weights {uri}: holds {type(content).__name__}, not named tensors")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise WeightsError(
                f"weights {uri}: entry {name!r} is {type(value).__name__}, not a tensor"
            )
    if all(name.startswith("module.") for name in content):
        return {name.removeprefix("module."): value for name, value in content.items()}
    return dict(content)
