"""Published weights, from a file or a bucket, into a network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any

import torch
from torch import Tensor, nn

from sr4ir_dist import storage
from sr4ir_dist.networks.tensor_files import parse_pickle, parse_safetensors

_MOST_BYTES = 1 << 30  # VGG19's published weights have half of it
_WRAPPERS = ("params", "state_dict")
_OPTIONAL = ("num_batches_tracked", "attn_mask", "relative_position_index")


class WeightsError(ValueError):
    """Weights that cannot be read or do not fit the network; names the URI."""


@dataclass(frozen=True)
class Backbone:
    """How a classification network's published file maps to a part of another network.

    Attributes:
        source: What the names of the backbone's tensors start with in the file.
        target: What they start with in the network instead.
        head: What the names of the file's other tensors start with; these are not used.
    """

    source: str
    target: str
    head: tuple[str, ...]


_WHOLE = Backbone("", "", ())


@dataclass(frozen=True)
class LoadReport:
    """What of a file went into a network.

    Attributes:
        uri: Where the weights came from.
        loaded: Names that were filled, as the network has them.
        missing: Names that the network has and the file has not.
        unexpected: Names that the file has and the network has not, as the file has them.
        mismatched: Names in both whose shapes differ, with the file's and the network's shape.
        backbone: Whether the file was read as a classification network's, for the backbone alone.
    """

    uri: str
    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    backbone: bool = False

    @property
    def complete(self) -> bool:
        """Whether file and network hold exactly the same tensors."""
        return not (self.missing or self.unexpected or self.mismatched)

    def summary(self) -> str:
        """Says in one line what was loaded and what was not."""
        where = " into the backbone" if self.backbone else ""
        parts = [f"{self.uri}: {len(self.loaded)} tensors loaded{where}"]
        if self.missing:
            parts.append(f"{len(self.missing)} keep their start ({_some(self.missing)})")
        if self.unexpected:
            parts.append(f"{len(self.unexpected)} not used ({_some(self.unexpected)})")
        if self.mismatched:
            shapes = [f"{n} {list(there)} -> {list(here)}" for n, there, here in self.mismatched]
            parts.append(f"{len(shapes)} of another shape, left at their start ({_some(shapes)})")
        return "; ".join(parts)


def load_weights(
    module: nn.Module, uri: str, *, partial: bool = False, backbone: Backbone | None = None
) -> LoadReport:
    """Reads a file of weights into a network, in place, as `load_state` does.

    Args:
        module: The plain network.
        uri: A `.pt`, `.pth` or `.safetensors` file: a path or a URI.
        partial: As in `load_state`.
        backbone: As in `load_state`.

    Raises:
        WeightsError: As `read_tensors` and `load_state`.
        StorageError: There is no such file.
    """
    return load_state(module, read_tensors(uri), what=uri, partial=partial, backbone=backbone)


def load_state(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    *,
    what: str,
    partial: bool = False,
    backbone: Backbone | None = None,
) -> LoadReport:
    """Copies named tensors into a network, in place; nothing is changed when they do not fit.

    Values are converted to the network's dtype. Three kinds of buffers may be absent on either
    side: batch norm's `num_batches_tracked`, which old files and frozen batch norm lack and a
    fixed momentum never reads, and SwinIR's `attn_mask` and `relative_position_index`, which
    follow from its settings and stay as built where their shapes differ.

    Args:
        module: The plain network.
        tensors: Name -> value.
        what: Where they come from, for messages and the report: a URI.
        partial: Load what fits and report the rest, instead of refusing. A head for another
            number of classes is one of the tensors that do not fit.
        backbone: Unless the tensors fit exactly, take them as a classification network's, and
            fill this part of the network with all of them but their head. The rest of the network
            keeps its start, and the report says so.

    Raises:
        WeightsError: Not exactly the network's tensors, nor its backbone's; with `partial`, only
            when no tensor fits at all. Every name that is missing or unexpected is given.
    """
    own: dict[str, Tensor] = module.state_dict()
    values, report, faults = _match(own, tensors, what, None)
    if backbone is not None and not report.complete:
        part = _match(own, tensors, what, backbone)
        if part[0] and len(part[0]) >= len(values):
            values, report, faults = part
    if not values or not (partial or faults.complete):
        raise WeightsError(_complaint(faults, type(module).__name__))
    module.load_state_dict(values, strict=False)
    return report


def _match(
    own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], what: str, backbone: Backbone | None
) -> tuple[dict[str, Tensor], LoadReport, LoadReport]:
    """The values that fit, the report of loading them, and the part of it that is amiss."""
    part = backbone or _WHOLE
    values: dict[str, Tensor] = {}
    unexpected, mismatched = [], []
    for name, value in tensors.items():
        inner = part.target + name.removeprefix(part.source)
        outside = not name.startswith(part.source) or name.startswith(part.head)
        if not outside and inner in own and value.shape == own[inner].shape:
            values[inner] = value
        elif _optional(name):
            continue
        elif outside or inner not in own:
            unexpected.append(name)
        else:
            mismatched.append((inner, tuple(value.shape), tuple(own[inner].shape)))
    differing = {name for name, _, _ in mismatched}
    missing = [n for n in own if n not in values and n not in differing and not _optional(n)]
    report = LoadReport(
        uri=what,
        loaded=tuple(values),
        missing=tuple(missing),
        unexpected=tuple(unexpected),
        mismatched=tuple(mismatched),
        backbone=backbone is not None,
    )
    heads = tuple(part.target + start for start in part.head)
    faults = replace(
        report,
        missing=tuple(n for n in missing if n.startswith(part.target) and not n.startswith(heads)),
        unexpected=tuple(name for name in unexpected if not name.startswith(part.head)),
    )
    return values, report, faults


def _optional(name: str) -> bool:
    return name.rpartition(".")[2] in _OPTIONAL


def _complaint(faults: LoadReport, network: str) -> str:
    where = f"fill the backbone of {network}" if faults.backbone else f"fit {network}"
    lines = [f"weights {faults.uri} do not {where}:"]
    if faults.missing:
        lines.append(f"  missing: {', '.join(faults.missing)}")
    if faults.unexpected:
        lines.append(f"  unexpected: {', '.join(faults.unexpected)}")
    for name, there, here in faults.mismatched:
        lines.append(f"  other shape: {name} is {list(there)} there, {list(here)} here")
    if faults.loaded:
        lines.append(f"  {len(faults.loaded)} tensors fit: partial loading would take these")
    return "\n".join(lines)


def _some(names: tuple[str, ...] | list[str], most: int = 4) -> str:
    rest = f", and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def read_tensors(uri: str) -> dict[str, Tensor]:
    """Reads a file of named tensors, on the CPU and without executing anything in it.

    A top-level `params` or `state_dict` entry is unwrapped and a `module.` prefix stripped. `.pt`
    and `.pth` files are read with `weights_only=True`.

    Args:
        uri: A `.pt`, `.pth` or `.safetensors` file: a path or a URI.

    Raises:
        WeightsError: Another kind of file, an unreadable one, one of more than 1 GiB, or one of
            other values than tensors.
        StorageError: There is no such file.
    """
    suffix = PurePosixPath(uri).suffix
    if suffix not in (".pt", ".pth", ".safetensors"):
        raise WeightsError(
            f"weights {uri}: a name that ends in {suffix!r}; expected .pt, .pth or .safetensors"
        )
    parse: Callable[[bytes], Any] = parse_safetensors if suffix == ".safetensors" else parse_pickle
    try:
        return _tensors(uri, parse(storage.read_bytes(uri, _MOST_BYTES)))
    except storage.ContentError as error:
        raise WeightsError(f"weights {error}") from error
    except (storage.StorageError, WeightsError):
        raise
    except ValueError as error:
        raise WeightsError(f"weights {uri} cannot be read: {error}") from error


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
                f"weights {uri}: entry {name!r:.200} is {type(value).__name__}, not a tensor"
            )
        if value.layout != torch.strided or value.is_meta or value.is_complex() or value.is_nested:
            raise WeightsError(f"weights {uri}: entry {name!r:.200} is no dense tensor of numbers")
    if all(name.startswith("module.") for name in content):
        return {name.removeprefix("module."): value for name, value in content.items()}
    return dict(content)
