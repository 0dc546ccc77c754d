"""A small dataset whose images tell which row they are."""

import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from sr4ir_dist.data.schema import Manifest
from sr4ir_dist.data.shards import ShardWriter, load_manifest

CLASSES = ("auk", "bat", "cat")


def numbered_image(row: int, height: int, width: int) -> bytes:
    """A PNG with the row's number in its red channel and the place in the others."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = row
    pixels[..., 1] = np.arange(height)[:, None]
    pixels[..., 2] = np.arange(width)
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "PNG")
    return sink.getvalue()


def write_rows(uri: str, rows: int, *, tasks=("images", "classification"), image=None) -> Manifest:
    """Writes a train split of `rows` images in several shards of several record batches."""
    with ShardWriter(
        uri,
        name="numbered",
        split="train",
        tasks=tasks,
        class_names=CLASSES if "classification" in tasks else (),
        source={},
        shard_bytes=700,
        batch_bytes=250,
        min_batches=1,
    ) as writer:
        for row in range(rows):
            height, width = 20 + row % 5, 30 - row % 7
            data = (image or numbered_image)(row, height, width)
            columns = {"id": f"r{row:03d}", "image": data, "height": height, "width": width}
            if "classification" in tasks:
                columns["label"] = row % 3
            writer.append(columns)
    return load_manifest(uri, "train")


@pytest.fixture
def write() -> Callable[..., Manifest]:
    """`write_rows`, for tests."""
    return write_rows
