"""The images of a report: the first of a split, and those that a run does worst and best on."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from PIL import Image

from sr4ir_dist.analysis.comparison import Comparison, Row, figures, rows

MOST_BYTES = 24 << 20
"""Of all images of a report; rows beyond it are left out."""
_MEASURES = {
    "top1": ("probability of the true class", "%"),
    "miou": ("mIoU of the image", "%"),
    "map": ("mAP of the image", "%"),
    None: ("PSNR", "dB"),
}


@dataclass(frozen=True)
class Tile:
    """An image of a report.

    Attributes:
        title: its column.
        uri: the image as a data URI.
        alt: what it is, for those who cannot see it.
        caption: what the task network says of it.
        right: whether that is true; None where that is no question.
        width: in pixels.
        height: in pixels.
    """

    title: str
    uri: str
    alt: str
    caption: str
    right: bool | None
    width: int
    height: int


@dataclass(frozen=True)
class Group:
    """Rows of images that were chosen for one reason.

    Attributes:
        heading: the reason.
        rows: a line of text and the tiles of each image.
    """

    heading: str
    rows: tuple[tuple[str, tuple[Tile, ...]], ...]


def choose(
    comparison: Comparison,
    *,
    count: int,
    judged: int,
    overlay: bool = True,
    told: Callable[[int], None] = lambda done: None,
) -> tuple[list[Group], str]:
    """The first images, and the worst and best of the last checkpoint, by all methods.

    Args:
        comparison: from `compare`.
        count: images of each group.
        judged: the worst and best are of the first so many images of the split.
        overlay: show what the task networks find, and what is there.
        told: is told how many are judged.

    Returns:
        The groups, and how their images were chosen, in words.
    """
    *_, label = comparison.loaded
    found = figures(comparison, label, judged, told)
    ranked = sorted(
        (number for number, value in enumerate(found) if math.isfinite(value)),
        key=lambda number: found[number],
    )
    most = min(count, len(ranked) // 2)
    task = comparison.loaded[label].setup.task
    measure, unit = _MEASURES[None if task is None else task.figure]
    wanted = {
        f"First of {comparison.split}": list(range(len(found)))[:count],
        f"Worst of {label}": ranked[:most],
        f"Best of {label}": ranked[::-1][:most],
    }
    positions = {number for numbers in wanted.values() for number in numbers}
    shown = {row.position: row for row in rows(comparison, positions, overlay=overlay)}
    tiles = {number: _tiles(comparison.titles, row) for number, row in shown.items()}
    groups, room, left_out = [], MOST_BYTES, 0
    for heading, numbers in wanted.items():
        kept = []
        for number in numbers:
            room -= sum(len(tile.uri) for tile in tiles[number])
            if room < 0:
                left_out += 1
                continue
            figure = f"{found[number]:.1f} {unit}" if math.isfinite(found[number]) else "none"
            line = f"{shown[number].id}: {measure} by {label} {figure}"
            kept.append((line, tiles[number]))
        if kept:
            groups.append(Group(heading, tuple(kept)))
    said = f"Worst and best by the {measure}, of the first {len(found)} images."
    if left_out:
        said += f" {left_out} rows are left out: a page holds {MOST_BYTES >> 20} MiB of images."
    return groups, said


def _tiles(titles: Sequence[str], row: Row) -> tuple[Tile, ...]:
    found = []
    for title, cell in zip(titles, row.cells, strict=True):
        alt = f"{title} of {row.id}" + (f": {cell.caption}" if cell.caption else "")
        found.append(
            Tile(title, data_uri(cell.image), alt, cell.caption, cell.right, *cell.image.size)
        )
    return tuple(found)


def data_uri(image: Image.Image) -> str:
    """An image as a data URI, PNG or JPEG, whichever is shorter."""
    kinds: Mapping[str, Mapping[str, int | bool]] = {
        "png": {"optimize": True},
        "jpeg": {"quality": 88, "subsampling": 0},
    }
    uris = []
    for kind, options in kinds.items():
        sink = io.BytesIO()
        image.convert("RGB").save(sink, format=kind, **options)
        uris.append(f"data:image/{kind};base64,{base64.b64encode(sink.getvalue()).decode()}")
    return min(uris, key=len)
