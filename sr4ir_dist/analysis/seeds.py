"""Several runs of one experiment that differ in their seed alone, as one result."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any


def over_seeds(results: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean and spread of each figure that all runs report.

    Args:
        results: of `launch.train`, one a seed.

    Returns:
        For each figure `mean`, `std` (of a sample: n - 1 in the denominator; 0 for one run), `min`
        and `max`.
    """
    metrics = [result["metrics"] for result in results]
    names = [
        name
        for name in metrics[0]
        if name not in ("epoch", "step") and all(name in other for other in metrics)
    ]
    figures = {}
    for name in names:
        values = [float(other[name]) for other in metrics]
        figures[name] = {
            "mean": statistics.fmean(values),
            "std": statistics.stdev(values) if len(values) > 1 else 0.0,
            "min": min(values),
            "max": max(values),
        }
    return figures
