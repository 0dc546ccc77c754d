"""Files of named tensors that may come from anyone: read within bounds, running no code."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

MOST_HEADER_BYTES = 4 << 20
"""Size of a safetensors header: one of 10,000 tensors has 1 MB."""


def parse_safetensors(data: bytes) -> dict[str, Tensor]:
    """The tensors in the bytes of a safetensors file, on the CPU.

    Raises:
        ValueError: they are no such file, or its header is larger than 4 MiB.
    """
    header = int.from_bytes(data[:8], "little")
    if header > MOST_HEADER_BYTES:
        raise ValueError(
            f"a safetensors header of {header} bytes, more than the {MOST_HEADER_BYTES} that are "
            "read; or it is no safetensors file"
        )
    try:
        return safetensors.torch.load(data)
    except Exception as error:  # among them bare assertions, and KeyErrors for types
        raise ValueError(f"no readable safetensors file: {_reason(error)}") from error


def parse_pickle(data: bytes) -> Any:
    """What is in the bytes of a `.pt` file, on the CPU: tensors and containers of them.

    Raises:
        ValueError: they are no such file, or hold other things, or are compressed.
    """
    try:
        if data.startswith(b"PK"):
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                # torch writes none, and what it would take in memory only its author knows.
                if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                    raise ValueError("its entries are compressed")
        # What torch allows beside tensors and their containers: it fills as much memory as it says.
        if b"builtins\nbytearray\n" in data:
            raise ValueError("it holds other things than tensors")
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises a dozen unrelated types for broken files
        raise ValueError(_reason(error)) from error


def unlike(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """How tensors differ from expected ones in names, shapes and dtypes; nothing where they fit."""
    faults = [f"{name} is missing" for name in expected if name not in found]
    faults += [f"{name} is not expected" for name in found if name not in expected]
    for name, value in found.items():
        if name in expected and _kind(value) != _kind(expected[name]):
            faults.append(f"{name} is {_kind(value)}, expected {_kind(expected[name])}")
    more = f", and {len(faults) - 4} more" if len(faults) > 4 else ""
    return "; ".join(f"{fault:.200}" for fault in faults[:4]) + more


def _kind(value: Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{lines[0]:.300}" if lines else type(error).__name__
