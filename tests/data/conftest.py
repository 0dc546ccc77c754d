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


def numbered_mask(row: int, height: int, width: int) -> bytes:
    """A PNG of background, void in the last line, and the row's class at the top left."""
    mask = np.zeros((height, width), np.uint8)
    mask[-1] = 255
    mask[:5, :7] = row % 3 + 1
    sink = io.BytesIO()
    Image.fromarray(mask).save(sink, "PNG")
    return sink.getvalue()


def size_of(row: int) -> tuple[int, int]:
    """Height and width of a row's image: two aspect-ratio groups, from 1 to 1.5."""
    return 20 + row % 5, 30 - row % 7


def write_rows(
    uri: str,
    rows: int,
    *,
    tasks=("images", "classification"),
    image=None,
    size=size_of,
    source=None,
) -> Manifest:
    """Writes a train split of `rows` images in several shards of several record batches.

    Row i has i % 3 boxes; the k-th lies at (k, i % 9) and is 4 wide and 5 high.
    """
    with ShardWriter(
        uri,
        name="numbered",
        split="train",
        tasks=tasks,
        class_names=() if tasks == ("images",) else CLASSES,
        source=source or {},
        shard_bytes=700,
        batch_bytes=250,
        min_batches=1,
    ) as writer:
        for row in range(rows):
            height, width = size(row)
            data = (image or numbered_image)(row, height, width)
            columns = {"id": f"r{row:03d}", "image": data, "height": height, "width": width}
            if "classification" in tasks:
                columns["label"] = row % 3
            if "segmentation" in tasks:
                columns["mask"] = numbered_mask(row, height, width)
            if "detection" in tasks:
                count, y = row % 3, row % 9
                columns["boxes"] = [[k, y, k + 4, y + 5] for k in range(count)]
                columns["box_labels"] = [(row + k) % 3 for k in range(count)]
                columns["crowd"] = [k == 1 for k in range(count)]
            writer.append(columns)
    return load_manifest(uri, "train")


@pytest.fixture(scope="session")
def write() -> Callable[..., Manifest]:
    """`write_rows`, for tests."""
    return write_rows
