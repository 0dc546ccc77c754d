"""Curves of figures over epochs, as SVG that takes its colours from the page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from markupsafe import Markup

COLOURS = 8
"""The page's style has so many, `--s0` and on."""
_WIDTH, _HEIGHT = 440, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 12, 36
_DASHES = ("", "7 3", "2 3", "9 3 2 3")
Point = tuple[float, float]


def chart(name: str, curves: Mapping[str, Sequence[Point]]) -> Markup:
    """One figure over the epochs, a line a run.

    Args:
        name: what is drawn, for those who cannot see it.
        curves: epoch and value of each evaluation of each run; all values finite.
    """
    points = [point for curve in curves.values() for point in curve]
    across = _ticks([0.0, *(epoch for epoch, _ in points)], whole=True)
    upward = _ticks([value for _, value in points])
    parts = [*_grid(across, upward)]
    for number, (label, curve) in enumerate(curves.items()):
        if curve:
            places = [_place(point, across, upward) for point in curve]
            parts.append(_line(number, label, curve, places))
    said = Markup("; ").join(
        Markup("{}: {:.4g} at epoch {:g}").format(label, curve[-1][1], curve[-1][0])
        for label, curve in curves.items()
        if curve
    )
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        _WIDTH, _HEIGHT, Markup("{} over the epochs. {}").format(name, said), Markup("").join(parts)
    )


def key(number: int) -> Markup:
    """A short piece of a run's line, for a legend."""
    return Markup(
        '<svg viewBox="0 0 34 12" width="34" height="12" aria-hidden="true">'
        '<path class="line" style="{}" d="M1 6H33"/>{}</svg>'
    ).format(_style(number), _mark(number, 17, 6))


def _line(number: int, label: str, curve: Sequence[Point], places: Sequence[Point]) -> Markup:
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    marks = [
        Markup("<g><title>{}: {:.4g} at epoch {:g}</title>{}</g>").format(
            label, value, epoch, _mark(number, x, y)
        )
        for (epoch, value), (x, y) in zip(curve, places, strict=True)
    ]
    line = Markup('<path class="line" style="{}" d="{}"/>').format(_style(number), path)
    return line + Markup("").join(marks)


def _style(number: int) -> str:
    return f"stroke:{_colour(number)};stroke-dasharray:{_DASHES[number % len(_DASHES)] or 'none'}"


def _colour(number: int) -> str:
    return f"var(--s{number % COLOURS})"


def _mark(number: int, x: float, y: float) -> Markup:
    """Runs differ in shape as well, for those who see no colours."""
    shapes = (
        f"M{x - 3.5:.1f} {y:.1f}a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0 -7 0",
        f"M{x - 3.2:.1f} {y - 3.2:.1f}h6.4v6.4h-6.4z",
        f"M{x:.1f} {y - 4.2:.1f}l4.2 7.6h-8.4z",
        f"M{x:.1f} {y - 4.5:.1f}l4.5 4.5l-4.5 4.5l-4.5 -4.5z",
    )
    colour = _colour(number)
    return Markup('<path style="fill:{}" d="{}"/>').format(colour, shapes[number % len(shapes)])


def _grid(across: Sequence[float], upward: Sequence[float]) -> list[Markup]:
    parts = []
    for value in upward:
        _, y = _place((across[0], value), across, upward)
        parts.append(
            Markup(
                '<path class="grid" d="M{} {:.1f}H{}"/><text x="{}" y="{:.1f}">{:g}</text>'
            ).format(_LEFT, y, _WIDTH - _RIGHT, _LEFT - 6, y + 4, value)
        )
    for epoch in across:
        x, _ = _place((epoch, upward[0]), across, upward)
        parts.append(
            Markup('<text class="below" x="{:.1f}" y="{}">{:g}</text>').format(
                x, _HEIGHT - _BOTTOM + 16, epoch
            )
        )
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(
        Markup('<text class="below" x="{}" y="{}">epoch</text>').format(middle, _HEIGHT - 4)
    )
    return parts


def _place(point: Point, across: Sequence[float], upward: Sequence[float]) -> Point:
    x, y = (
        (value - ticks[0]) / (ticks[-1] - ticks[0])
        for value, ticks in zip(point, (across, upward), strict=True)
    )
    return (
        _LEFT + x * (_WIDTH - _LEFT - _RIGHT),
        _HEIGHT - _BOTTOM - y * (_HEIGHT - _TOP - _BOTTOM),
    )


def _ticks(values: Sequence[float], *, whole: bool = False) -> list[float]:
    """About five round numbers around some values, equally far apart."""
    low, high = min(values), max(values)
    if high - low < 1e-9 * max(1.0, abs(high)):
        low, high = low - max(abs(low) * 0.05, 1e-3), high + max(abs(high) * 0.05, 1e-3)
    rough = (high - low) / 5
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * each for each in (1, 2, 2.5, 5, 10) if power * each >= rough * (1 - 1e-9))
    if whole:
        step = max(1.0, float(math.ceil(step)))
    first, last = math.floor(low / step), math.ceil(high / step)
    # Of so many digits as the step has: 0.30000000000000004 is no label.
    return [round(number * step, 12) for number in range(first, last + 1)]
