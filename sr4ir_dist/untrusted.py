"""JSON that may come from anyone: parsed within bounds, or refused."""

import json
from typing import Any

MOST_BYTES = 64 << 20
"""Size of a JSON file: the manifest of 100,000 shards has 40 MB."""
_MOST_VALUES = 5_000_000  # of 100 bytes of memory at most, however short they are written


def parse_json(data: bytes | str) -> Any:
    """The value in a JSON text.

    Raises:
        ValueError: it is not JSON, longer than 64 MiB, of more than 5 million values, or nested
            deeper than Python's recursion limit.
    """
    if len(data) > MOST_BYTES:
        raise ValueError(f"{len(data)} bytes of JSON, more than the {MOST_BYTES} that are read")
    marks = (b",", b"[", b"{") if isinstance(data, bytes) else (",", "[", "{")
    values = sum(data.count(mark) for mark in marks)  # pyright: ignore[reportArgumentType]
    if values > _MOST_VALUES:
        raise ValueError(f"about {values} values of JSON, more than {_MOST_VALUES}")
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("JSON that is nested too deep") from None
