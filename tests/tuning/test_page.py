"""The page of a search, also of one that left some parameters undrawn."""

from pathlib import Path

import pytest

from sr4ir_dist import storage
from sr4ir_dist.tuning.outcome import Outcome
from sr4ir_dist.tuning.page import study_of, write_page
from sr4ir_dist.tuning.space import Space

PARAMETERS = {
    "cqmix.grid": {"choice": [1, 2, 4]},
    "warmup_epochs": {"integer": [0, 2], "when": {"cqmix.grid": [4]}},
    "losses.pixel": {"uniform": [0.1, 0.3], "step": 0.1},
}


def space(**changes):
    tree = {"about": "a test", "task": "classification", "metric": "top1"}
    return Space.model_validate(tree | {"parameters": PARAMETERS} | changes)


def trial(number, top1, **values):
    history = tuple({"epoch": epoch, "top1": top1 * epoch} for epoch in (1, 2))
    known = {"cqmix.grid": 1, "losses.pixel": 0.3} | values
    return Outcome(f"t{number}", "finished", known, history, None, 12.0)


@pytest.mark.parametrize("drawn", [{}, {"cqmix.grid": 4, "warmup_epochs": 2}])
def test_a_page_has_plots_of_what_was_drawn(tmp_path: Path, drawn):
    found = [trial(0, 10.0), trial(1, 20.0, **{"losses.pixel": 0.1}), trial(2, 15.0, **drawn)]
    uri = write_page(str(tmp_path), "a <search>", space(), found)
    page = storage.read_bytes(uri).decode()
    assert page.count("data:image/png;base64,") >= 3
    assert "a &lt;search&gt;" in page
    assert page.index("t1") < page.index("t2") < page.index("t0")
    assert {"epochs.png", "parameters.png", "coordinates.png"} <= set(storage.list_names(tmp_path))


def test_steps_of_a_grid_are_values_that_optuna_knows():
    found = space(search={"name": "grid"}, parameters={"losses.pixel": PARAMETERS["losses.pixel"]})
    values = found.parameters["losses.pixel"].listed()
    assert values is not None
    trials = [trial(n, 10.0, **{"losses.pixel": value}) for n, value in enumerate(values)]
    assert [each.params["losses.pixel"] for each in study_of(found, trials).trials] == [
        0.1,
        0.2,
        0.3,
    ]


def test_a_search_of_which_no_trial_was_evaluated_has_a_page(tmp_path: Path):
    lost = Outcome("t0", "failed", {"cqmix.grid": 1}, (), None, 1.0, "<b>no</b>")
    page = storage.read_bytes(write_page(str(tmp_path), "x", space(), [lost])).decode()
    assert "&lt;b&gt;no&lt;/b&gt;" in page
