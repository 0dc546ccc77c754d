"""A small dataset whose images tell which row they are."""

import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sr4ir_dist.data.convert.source import Converter, Source
from sr4ir_dist.data.convert.write import convert
from sr4ir_dist.data.schema import Manifest

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
    on_bad_row="fail",
) -> Manifest:
    """Writes a train split of `rows` images in several shards of several record batches.

    Row i has i % 3 boxes; the k-th lies at (k, i % 9) and is 4 wide and 5 high.
    """
    made = []
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
        made.append(columns)
    classes = () if tasks == ("images",) else CLASSES
    limits = {"shard_bytes": 700, "batch_bytes": 250, "min_batches": 1}
    settings = {"tasks": tasks, "class_names": classes, "on_bad_row": on_bad_row, **limits}
    return write_given(uri, made, name="numbered", **settings)


def write_given(
    uri: str,
    rows: Sequence[dict[str, Any]],
    *,
    tasks: tuple[str, ...],
    class_names: Sequence[str],
    name: str = "given",
    split: str = "train",
    **settings: Any,
) -> Manifest:
    """Writes rows as they are, through a source that has them; `settings` are `convert`'s."""
    source = Source(tuple(class_names), {split: len(rows)}, lambda _: rows, dict)
    converter = Converter(name, tasks, "", lambda: source)
    return convert(converter, source, uri, **settings)[split].manifest


@pytest.fixture(scope="session")
def write() -> Callable[..., Manifest]:
    """`write_rows`, for tests."""
    return write_rows


@pytest.fixture(scope="session", name="write_given")
def write_given_fixture() -> Callable[..., Manifest]:
    """`write_given`, for tests."""
    return write_given
