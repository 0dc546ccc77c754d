"""JSON that may come from anyone: parsed within bounds, or refused."""

import json
from typing import Any

MOST_BYTES = 64 << 20
"""Size of a JSON file: the manifest of 100,000 shards has 40 MB."""
_MOST_MEMORY = 320 << 20
# What an object, a list and a further value in them take in memory, however short it is written.
_MEMORY = {"{": 256, "[": 72, ",": 64}


def parse_json(data: bytes) -> Any:
    """The value in a JSON text.

    Raises:
        ValueError: it is not JSON, longer than 64 MiB, of 5 million values or more, or nested
            deeper than Python's recursion limit.
    """
    if len(data) > MOST_BYTES:
        raise ValueError(f"{len(data)} bytes of JSON, more than the {MOST_BYTES} that are read")
    memory = sum(data.count(mark.encode()) * size for mark, size in _MEMORY.items())
    if memory > _MOST_MEMORY:
        raise ValueError(f"JSON of so many values that they may take {memory} bytes of memory")
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("JSON that is nested too deep") from None
