"""Layouts of the paper's tables, and the runs that they need."""

from collections import Counter
from functools import partial

import pytest

from sr4ir_dist import experiments, recipes
from sr4ir_dist.analysis import paper
from sr4ir_dist.config import ExperimentError
from sr4ir_dist.data.convert.drawn import DRAWN, open_drawn
from sr4ir_dist.data.convert.write import convert
from sr4ir_dist.reproduction import scaling_down
from sr4ir_dist.reproduction.orders import absolute_files, make_orders
from sr4ir_dist.reproduction.studies import make_study
from sr4ir_dist.reproduction.tables import LAYOUTS, make_table

ALL = dict.fromkeys(("voc_seg", "voc_det", "cars", "cub200"), "datasets/none")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    uri = str(tmp_path_factory.mktemp("drawn") / "data")
    convert(DRAWN, open_drawn(train_count=8, val_count=8, size=32), uri, threads=1)
    return uri


def cells(table):
    return [cell for row in table.rows for cell in row.cells]


def test_the_tables_together_name_the_experiments_of_the_grid():
    names = {cell.experiment for n in (1, 2, 3) for cell in cells(make_table(f"table{n}", ALL))}
    # What is trained only to start from is no cell.
    assert names == {name for name in experiments.grid() if not name.endswith("/s")}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_cell_is_an_experiment_and_every_figure_of_the_paper_has_its_cell(name):
    table = make_table(name, ALL)
    for cell in cells(table):
        assert cell.experiment == cell.paper
        assert experiments.make(cell.experiment).name == cell.experiment
    if name != "table7":
        for row in table.rows:
            for column, cell in zip(table.columns, row.cells, strict=True):
                assert column.figures[0] in paper.figures(cell.paper)


def test_every_figure_that_is_kept_is_of_an_experiment():
    known = set(experiments.names())
    kept = [name for name in known if paper.figures(name)]
    assert len(kept) == 4 * 19 + 26
    assert paper.figures("no/such") == {}
    assert paper.figures("voc_seg/edsr-x8/sr4ir") == {"miou": 55.0, "lpips": 0.380, "psnr": 23.91}
    assert paper.figures("cub200/swinir-x4/joint") == {"top1": 72.9, "lpips": 0.212}


def test_other_data_of_the_same_task_takes_a_place_and_no_place_is_taken_twice():
    table = make_table("table3", ["drawn_cls"], scales=[4], networks=["edsr"])
    assert [column.label for column in table.columns] == ["drawn_cls x4"]
    sr4ir = table.rows[-1].cells[0]
    assert (sr4ir.experiment, sr4ir.paper) == ("drawn_cls/edsr-x4/sr4ir", "cars/edsr-x4/sr4ir")
    assert [row.label for row in table.rows] == [
        "H->T (oracle)", "L->T", "S->T", "T->S", "S+T", "SR4IR"
    ]  # fmt: skip
    assert any("cub200 is left out" in note for note in table.notes)
    both = make_table("table4", ["drawn_seg", "cars"])
    assert [cell.data for cell in both.rows[0].cells] == ["drawn_seg", "cars"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((("table9"), ["cars"]), "did you mean"),
        (("table1", ["cars"]), "needs --data voc_seg=URI"),
        (("table1", ["voc_sex"]), "voc_seg"),
    ],
)
def test_what_cannot_be_laid_out_is_named(arguments, message):
    with pytest.raises(ExperimentError, match=message):
        make_table(*arguments)


@pytest.mark.parametrize("name", ["table3", "table6", "tableS1", "tableS2"])
def test_each_run_is_listed_once_and_after_those_that_it_starts_from(name, drawn, tmp_path):
    table = make_table(name, ["drawn_cls"], scales=[4])
    orders = make_orders(
        table, {"drawn_cls": drawn}, experiments.make, storage_uri=str(tmp_path), seeds=(1, 2)
    )
    assert set(Counter(order.experiment for order in orders.runs).values()) == {1}
    for number, order in enumerate(orders.runs):
        assert all(need < number for need in order.needs)
        origins = {
            origin
            for origin in recipes.get(order.experiment.recipe).init_from.values()
            if origin != recipes.PRETRAINED
        }
        assert {orders.runs[need].experiment.recipe for need in order.needs} == origins
        assert {orders.runs[need].experiment.seed for need in order.needs} <= {
            order.experiment.seed
        }
    for (cell, seed), number in orders.of.items():
        assert (orders.runs[number].experiment.name, orders.runs[number].experiment.seed) == (
            cell,
            seed,
        )


def test_with_pretraining_all_networks_of_a_kind_start_from_one_run(drawn, tmp_path):
    table = make_table("table3", ["drawn_cls"], scales=[4, 8], networks=["edsr"])
    make = partial(scaling_down.make, budget=0.1)
    orders = make_orders(
        table,
        {"drawn_cls": drawn},
        make,
        storage_uri=str(tmp_path),
        seeds=(1, 2),
        pretrain=True,
    )
    runs = [order.experiment for order in orders.runs]
    first = {run.scale: n for n, run in enumerate(runs) if run.recipe == "pretrain"}
    assert sorted(first) == [4, 8]
    for order in orders.runs:
        if order.experiment.sr is not None and order.experiment.recipe != "pretrain":
            assert first[order.experiment.scale] in order.needs
            assert f"x{order.experiment.scale}-pretrain" in order.experiment.sr.weights


def test_table_s6_trains_no_network_that_none_starts_from(drawn, tmp_path):
    study = make_study("tableS6", ["drawn_cls"], benchmarks={"Two": "none"})
    orders = make_orders(
        study.table,
        {"drawn_cls": drawn},
        partial(scaling_down.make, budget=0.1),
        storage_uri=str(tmp_path),
        seeds=(1, 2, 3),
        pretrain=True,
    )
    recipes_run = Counter(order.experiment.recipe for order in orders.runs)
    assert recipes_run == {"pretrain": 1, "sr4ir": 3}
    firsts = {n for (name, _), n in orders.of.items() if name.endswith("pretrain")}
    assert all(set(order.needs) == firsts for n, order in enumerate(orders.runs) if n not in firsts)


def test_a_budget_shortens_everything_that_is_counted_in_epochs():
    paper_s = experiments.make("voc_det/edsr-x4/sr4ir")
    small = scaling_down.make("voc_det/edsr-x4/sr4ir", budget=0.2, size=125)
    assert (paper_s.epochs, paper_s.warmup_epochs, paper_s.lr_warmup_epochs) == (30, 3, 1)
    assert (small.epochs, small.warmup_epochs, small.lr_warmup_epochs) == (6, 1, 1)
    assert small.data.shrink == 125
    assert (small.task.min_size, small.task.max_size) == (267, 444)
    crop = scaling_down.make("cub200/edsr-x8/sr4ir", size=64).data
    assert (crop.crop, crop.resize) == (64, 73)
    tiny = scaling_down.make("cub200/h2t", budget=0.001, settings=["sr.blocks=4", "batch_size=8"])
    assert (tiny.epochs, tiny.batch_size, tiny.sr) == (2, 8, None)
    for wrong in ({"budget": 0.0}, {"budget": 1.5}, {"size": 4}):
        with pytest.raises(ExperimentError, match=next(iter(wrong))):
            scaling_down.make("cub200/h2t", **wrong)


def test_files_are_named_so_that_workers_elsewhere_find_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = ["task.weights=a.pth", "sr.weights=DIV2K", "sr.start=null", "batch_size=4"]
    assert absolute_files(settings) == [f"task.weights={tmp_path}/a.pth", *settings[1:]]
