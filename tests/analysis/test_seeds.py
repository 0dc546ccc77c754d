"""Several seeds as one result."""

import statistics

import pytest

from sr4ir_dist.analysis.seeds import over_seeds


def result(**metrics):
    return {"metrics": {"epoch": 3, "step": 30} | metrics}


def test_mean_and_spread_of_what_all_runs_report():
    values = [50.0, 53.0, 47.5]
    figures = over_seeds([result(miou=v, images=9) for v in values[:2]] + [
        result(miou=values[2], images=9, lpips=0.3)
    ])  # fmt: skip
    assert figures.keys() == {"miou", "images"}
    miou = figures["miou"]
    assert miou["mean"] == pytest.approx(sum(values) / 3)
    assert miou["std"] == pytest.approx(statistics.stdev(values))
    assert (miou["min"], miou["max"]) == (47.5, 53.0)
    assert figures["images"] == {"mean": 9.0, "std": 0.0, "min": 9.0, "max": 9.0}


def test_one_seed_has_no_spread():
    assert over_seeds([result(top1=70.0)])["top1"]["std"] == 0.0
