"""The drawn dataset: small images made by the project itself, for a first run and for the tests.

Each image shows one object, sometimes two of the same class, on a shaded background. A class is a
coarse shape with the direction of a fine texture; the colours tell nothing. The shapes survive a
degradation by four. The texture's stripes have a period of about three pixels, beyond what such a
low-resolution image can hold, and come back at most as an alias. So low resolution costs a
classifier the texture but little of the shape. The stripes keep their period in pixels at every
image size; everything else grows with the image.

One generator gives labels, masks and boxes, and each row depends on (seed, split, index) alone.
"""

import io
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sr4ir_dist.data.schema import VOID

SHAPES = ("disc", "ring", "triangle", "cross")
TEXTURES = ("level", "upright")  # the direction of the stripes
CLASS_NAMES: tuple[str, ...] = tuple(f"{t}-striped {s}" for s in SHAPES for t in TEXTURES)
SPLITS = ("train", "val", "test")
MIN_SIZE = 32

Array = NDArray[np.floating[Any]]


def rows(split: str, count: int, size: int, seed: int) -> Iterator[dict[str, Any]]:
    """Draws the rows of a split, in order.

    A row does not depend on how many are drawn: fewer rows are a prefix of more. Each run of
    `len(CLASS_NAMES)` rows from the start holds every class once.

    Args:
        split: one of `SPLITS`. Splits share no image.
        count: number of rows.
        size: height and width of the images in pixels, at least `MIN_SIZE`.
        seed: non-negative.

    Yields:
        id: such as `"train-000017"`.
        image: PNG bytes, RGB.
        height, width: `size`.
        label: position in `CLASS_NAMES`.
        mask: PNG bytes, one channel: 0 on the background, label + 1 on an object, `schema.VOID`
            on its edge of about one pixel, which belongs to object and background alike.
        boxes: per object float32 x0, y0, x1, y1 in pixels: the smallest box around the mask's
            pixels that are not 0, its far side exclusive.
        box_labels: per box, position in `CLASS_NAMES`.
        crowd: per box False.

    Raises:
        ValueError: an argument is out of range.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}, but must be one of {', '.join(SPLITS)}")
    if count < 0:
        raise ValueError(f"count is {count}, but must be at least 0")
    if size < MIN_SIZE:
        raise ValueError(f"size is {size}, but must be at least {MIN_SIZE} pixels")
    if seed < 0:
        raise ValueError(f"seed is {seed}, but must be at least 0")
    # Not a generator itself, so that a wrong argument is reported here and not at the first row.
    return (row(split, index, size, seed) for index in range(count))


def row(split: str, index: int, size: int, seed: int) -> dict[str, Any]:
    """Draws one row, of the columns that `rows` tells.

    Args:
        split: one of `SPLITS`.
        index: its place in the split, from 0.
        size: height and width in pixels, at least `MIN_SIZE`.
        seed: non-negative.
    """
    name = zlib.crc32(split.encode())
    block, place = divmod(index, len(CLASS_NAMES))
    label = int(np.random.default_rng([seed, name, 0, block]).permutation(len(CLASS_NAMES))[place])
    rng = np.random.default_rng([seed, name, 1, index])
    image, distances = _draw(rng, label, size)

    mask = np.zeros((size, size), np.uint8)
    boxes = []
    for distance in distances:
        covered = distance < 0.5
        mask[covered] = VOID
        mask[distance <= -0.5] = label + 1
        (columns,) = np.nonzero(covered.any(axis=0))
        (lines,) = np.nonzero(covered.any(axis=1))
        box = columns[0], lines[0], columns[-1] + 1, lines[-1] + 1
        boxes.append([float(edge) for edge in box])
    return {
        "id": f"{split}-{index:06d}",
        "image": _png(image),
        "height": size,
        "width": size,
        "label": label,
        "mask": _png(mask),
        "boxes": boxes,
        "box_labels": [label] * len(boxes),
        "crowd": [False] * len(boxes),
    }


def _draw(rng: np.random.Generator, label: int, size: int) -> tuple[NDArray[np.uint8], list[Array]]:
    """Draws one image; returns it (H,W,3) and each object's signed distance map (H,W) in pixels."""
    shape, texture = divmod(label, len(TEXTURES))
    y, x = np.mgrid[:size, :size].astype(np.float32) + 0.5
    backdrop = rng.uniform(0.25, 0.75) + rng.uniform(-0.1, 0.1, 3)
    image = _background(rng, x, y, size, backdrop)

    # Towards the middle of the range and past it: always far enough to be seen.
    tone = backdrop + rng.uniform(0.25, 0.45, 3) * np.where(backdrop > 0.5, -1, 1)
    swing = rng.uniform(0.16, 0.22)
    distances = []
    for cx, cy, radius in _places(rng, size):
        angle = rng.uniform(-0.3, 0.3)
        dx, dy = x - np.float32(cx), y - np.float32(cy)
        distance = _distance(SHAPES[shape], *_turn(dx, dy, angle), radius)
        light = 1 + (dx * np.cos(angle) + dy * np.sin(angle)) * (rng.uniform(0, 0.25) / radius)
        value = swing * _texture(rng, TEXTURES[texture], dx, dy)
        inside = np.clip(0.5 - distance, 0, 1)[..., None]
        surface = (tone + value[..., None]) * light[..., None]
        image = image + inside * (surface - image)
        distances.append(distance)
    image = image + rng.normal(0, 0.008, image.shape)
    return (image.clip(0, 1) * 255 + 0.5).astype(np.uint8), distances


def _background(
    rng: np.random.Generator, x: Array, y: Array, size: int, backdrop: NDArray[np.float64]
) -> NDArray[np.float64]:
    """A colour with a gradient and soft waves, H,W,3."""
    image = np.broadcast_to(backdrop, (*x.shape, 3))
    for period, strength in ((2.0, 0.16), (0.8, 0.06), (0.35, 0.04)):
        angle, phase = rng.uniform(0, 2 * np.pi, 2)
        along = (x * np.cos(angle) + y * np.sin(angle)) / (period * size)
        wave = np.sin(2 * np.pi * along + phase)
        image = image + wave[..., None] * rng.uniform(-strength, strength, 3)
    return image


def _places(rng: np.random.Generator, size: int) -> list[tuple[float, float, float]]:
    """Centres and radii in pixels: one object, or two that do not touch."""
    radius = rng.uniform(0.32, 0.42) * size
    margin = radius + 1
    cx, cy = rng.uniform(margin, size - margin, 2)
    places = [(cx, cy, radius)]
    if rng.uniform() < 0.25:
        second = rng.uniform(0.15, 0.2) * size
        # Into the corner that is farthest from the first one.
        ox, oy = (second + 1 if c > size / 2 else size - second - 1 for c in (cx, cy))
        if np.hypot(ox - cx, oy - cy) > radius + second + 1:
            places.append((ox, oy, second))
    return places


def _turn(dx: Array, dy: Array, angle: float) -> tuple[Array, Array]:
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return dx * cos + dy * sin, dy * cos - dx * sin


def _distance(shape: str, u: Array, v: Array, radius: float) -> Array:
    """Signed distance in pixels to a shape's edge, negative inside; it fits in a disc of `radius`.

    Args:
        shape: one of `SHAPES`.
        u: coordinates along the shape's own first axis, from its centre.
        v: the same for its second axis.
        radius: in pixels.
    """
    if shape == "disc":
        return np.hypot(u, v) - np.float32(0.85 * radius)
    if shape == "ring":
        return np.abs(np.hypot(u, v) - np.float32(0.72 * radius)) - np.float32(0.26 * radius)
    if shape == "triangle":
        sides = [u * np.cos(a) + v * np.sin(a) for a in np.pi / 3 * np.array([1, 3, 5])]
        return (np.maximum.reduce(sides) - 0.5 * radius).astype(np.float32)
    u, v = np.abs(u), np.abs(v)
    long, thin = np.float32(0.95 * radius), np.float32(0.3 * radius)
    return np.minimum(np.maximum(u - long, v - thin), np.maximum(u - thin, v - long))


def _texture(rng: np.random.Generator, texture: str, dx: Array, dy: Array) -> Array:
    """Values in [-1, 1]: stripes level or upright to within six degrees."""
    period = rng.uniform(2.5, 3.1)
    along, across = _turn(dx, dy, rng.uniform(-0.1, 0.1))
    place = across if texture == "level" else along
    return np.sin(np.float32(2 * np.pi / period) * place + np.float32(rng.uniform(0, 2 * np.pi)))


def _png(pixels: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    # Level 1 is three times as fast as the default and costs a few per cent in size here.
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
