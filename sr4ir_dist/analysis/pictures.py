"""Sheets of images in rows and columns, with titles above and words below, as PNG."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

_GAP = 6
_SIZE = 13  # of letters, in pixels
_LINE = 20
RIGHT, WRONG = "#12702a", "#b3261e"


@dataclass(frozen=True)
class Cell:
    """An image of a sheet.

    Attributes:
        image: the image.
        caption: words below it.
        right: writes them in green, or in red; None in black.
    """

    image: Image.Image
    caption: str = ""
    right: bool | None = None


def sheet(titles: Sequence[str], rows: Sequence[Sequence[Cell]]) -> bytes:
    """Draw a sheet, a row of cells below another, as PNG.

    Args:
        titles: of the columns.
        rows: as many cells each; images may differ in size.

    Raises:
        ValueError: there is no row.
    """
    if not rows:
        raise ValueError("there is no image to show")
    font = ImageFont.load_default(_SIZE)
    columns = list(zip(*rows, strict=True))
    widths = [max(cell.image.width for cell in column) for column in columns]
    heights = [max(cell.image.height for cell in row) for row in rows]
    below = [_LINE if any(cell.caption for cell in row) else 0 for row in rows]
    width = sum(widths) + _GAP * (len(widths) + 1)
    height = _LINE + sum(heights) + sum(below) + _GAP * (len(rows) + 1)
    picture = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(picture)
    lefts = [_GAP + sum(widths[:number]) + _GAP * number for number in range(len(widths))]
    for left, room, title in zip(lefts, widths, titles, strict=True):
        draw.text((left, 3), _fitted(title, room, font), fill="black", font=font)
    top = _LINE
    for row, tall, line in zip(rows, heights, below, strict=True):
        for left, room, cell in zip(lefts, widths, row, strict=True):
            picture.paste(cell.image.convert("RGB"), (left, top))
            colour = {None: "black", True: RIGHT, False: WRONG}[cell.right]
            words = _fitted(cell.caption, room, font)
            draw.text((left, top + cell.image.height + 2), words, fill=colour, font=font)
        top += tall + line + _GAP
    return png(picture)


def png(picture: Image.Image) -> bytes:
    """A picture's PNG file."""
    sink = io.BytesIO()
    picture.save(sink, format="PNG", optimize=True)
    return sink.getvalue()


def _fitted(text: str, room: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """As much of a line as fits into so many pixels."""
    if font.getlength(text) <= room:
        return text
    while text and font.getlength(f"{text}…") > room:
        text = text[:-1]
    return f"{text}…"
