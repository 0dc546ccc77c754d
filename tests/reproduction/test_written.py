"""Tables with our figures beside the paper's, in each of their formats."""

import csv
import io
import json

import pytest

from sr4ir_dist import experiments
from sr4ir_dist.data.convert.drawn import DRAWN, open_drawn
from sr4ir_dist.data.convert.write import convert
from sr4ir_dist.reproduction.filled import fill
from sr4ir_dist.reproduction.orders import Orders
from sr4ir_dist.reproduction.run import Reproduction, plan
from sr4ir_dist.reproduction.tables import make_table, reduced
from sr4ir_dist.reproduction.written import as_csv, as_html, as_json, as_markdown, write_table
from sr4ir_dist.training.run_queue import Order, Outcome

SEEDS = (1, 2)
TOP1 = {"sr4ir-only-sr": (60, 70), "sr4ir-only-hr": (50, 52), "sr4ir-no-cqmix": (66, 64)}


def done(top1):
    return Outcome(
        "done", {"metrics": {"epoch": 2, "step": 4, "top1": top1}, "notes": ["a <note>"]}
    )


@pytest.fixture(scope="module")
def filled():
    """Table 5 on Cars, whose last row could not be run."""
    table = make_table("table5", ["cars"])
    orders, outcomes = Orders(), {}
    for row in table.rows:
        for seed in SEEDS:
            experiment = experiments.make(row.cells[0].experiment)
            number = len(orders.runs)
            orders.runs.append(Order(experiment, "data"))
            orders.of[experiment.name, seed] = number
            values = TOP1.get(experiment.recipe)
            outcomes[number] = (
                Outcome("missing", why="no weights | here")
                if values is None
                else done(float(values[SEEDS.index(seed)]))
            )
    return fill(table, orders, outcomes, SEEDS)


def test_data_that_is_not_the_papers_has_no_differences(tmp_path):
    convert(DRAWN, open_drawn(train_count=8, val_count=4, size=32), str(tmp_path / "data"))
    table = make_table("table5", ["cars"])
    places = {"cars": str(tmp_path / "data")}, str(tmp_path / "runs")
    orders = plan(Reproduction(table, *places, experiments.make))
    assert reduced("cars", [8144, 8041]) == reduced("drawn_cls", [8, 4]) == ""
    outcomes = dict.fromkeys(range(len(orders.runs)), done(50.0))
    filled = fill(table, orders, outcomes, (None,))
    figures = [row[0].figures[0] for row in filled.cells]
    assert {figure.difference for figure in figures} == {None}
    assert all(figure.paper for figure in figures)
    assert (
        "cars has 8 and 4 images to train and to judge on, the paper's 8144 and 8041: there is no "
        "difference to its figures" in filled.notes
    )


def test_a_figure_is_the_mean_over_seeds_with_its_spread_and_what_it_differs_by(filled):
    figure = filled.cells[0][0].figures[0]
    assert (figure.mean, figure.paper) == (65.0, 66.7)
    assert figure.std == pytest.approx(50**0.5)
    assert figure.difference == pytest.approx(-1.7)


def test_the_notes_say_which_rows_are_not_in_the_papers_order(filled):
    # Ours 65, 51, 65 where the paper has 66.7, 59.3, 70.3; rows that tie are in no order.
    (note,) = (note for note in filled.notes if "order by top1" in note)
    assert note.startswith("cars x8: 2 of 3 pairs of rows")
    assert "not SR (EDSR-baseline) and SR + HR (EDSR-baseline)" in note
    assert "a <note>" in filled.notes


def test_markdown_has_a_line_a_row_and_says_why_a_cell_is_empty(filled):
    text = as_markdown(filled)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 4
    assert len({row.count("|") for row in rows}) == 1
    assert rows[2] == "| SR | EDSR-baseline | 65.0 ± 7.1 (66.7, -1.7) |"
    assert rows[-1] == "| SR + HR + CQMix (SR4IR) | EDSR-baseline | - [1] (71.4) |"
    assert "- [1] no weights | here" in text


def test_csv_and_json_hold_all_figures(filled):
    lines = list(csv.DictReader(io.StringIO(as_csv(filled))))
    assert [line["experiment"].split("/")[-1] for line in lines] == [*TOP1, "sr4ir"]
    assert float(lines[1]["difference"]) == pytest.approx(51 - 59.3)
    assert lines[-1]["mean"] == ""
    assert lines[-1]["note"] == "no weights | here"
    assert json.loads(as_json(filled))["cells"][1][0]["figures"][0]["mean"] == 51.0


@pytest.mark.parametrize(
    ("key", "why"),
    [("drawn_cls", "no LPIPS: evaluation.lpips=null here; give"), ("cars", "no LPIPS: no network")],
)
def test_a_figure_that_done_runs_lack_says_why(key, why):
    table = make_table("table3", [key], scales=[4], networks=["edsr"])
    orders, outcomes = Orders(), {}
    for number, row in enumerate(table.rows):
        experiment = experiments.make(row.cells[0].experiment)
        orders.runs.append(Order(experiment, "data"))
        orders.of[experiment.name, None] = number
        result = {"metrics": {"top1": 50.0}, "notes": ["no LPIPS: no network"]}
        outcomes[number] = Outcome("done", result)
    filled = fill(table, orders, outcomes, (None,))
    oracle, l2t = filled.cells[0][0], filled.cells[1][0]
    assert (oracle.why, l2t.why, l2t.figures[0].why) == ("", "", "")
    assert "judged on HR images" in oracle.figures[1].why
    assert l2t.figures[1].why.startswith(why)
    rows = [line for line in as_markdown(filled).splitlines() if line.startswith("| ")]
    assert "- [1]" in rows[2]
    assert "- [2] (0.304)" in rows[3]
    notes = [line["note"] for line in csv.DictReader(io.StringIO(as_csv(filled)))]
    assert notes[2:4] == ["", l2t.figures[1].why]


def test_html_needs_nothing_else_and_escapes_what_it_is_told(filled):
    page = as_html(filled)
    assert "a &lt;note&gt;" in page
    assert "<note>" not in page
    assert "src=" not in page.replace("img-src", "")
    assert "http" not in page.replace("http-equiv", "")
    assert "65.0 ± 7.1" in page


def test_a_table_is_written_in_each_format(filled, tmp_path):
    uris = write_table(filled, str(tmp_path / "tables"))
    names = sorted(path.name for path in (tmp_path / "tables").iterdir())
    assert names == [f"table5.{suffix}" for suffix in sorted(uris)]
