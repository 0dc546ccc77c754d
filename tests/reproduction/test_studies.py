"""Tables that are measured on runs: what they need, and what cannot be laid out."""

import pytest
from random_runs import publish_random

from sr4ir_dist.analysis.efficiency import parameters
from sr4ir_dist.config import ExperimentError
from sr4ir_dist.reproduction.filled import fill
from sr4ir_dist.reproduction.orders import Orders
from sr4ir_dist.reproduction.studies import TITLES, make_study
from sr4ir_dist.reproduction.written import as_markdown
from sr4ir_dist.training.capacity import Resources

ALL = dict.fromkeys(("voc_seg", "voc_det", "cars"), "datasets/none")


def names(study):
    return {cell.experiment for row in study.table.rows for cell in row.cells}


def test_they_need_the_papers_experiments():
    assert names(make_study("tableS3", ALL)) == {
        "voc_seg/x8/l2t",
        "voc_seg_resnet50/x8/l2t",
        "voc_seg/edsr-x8/sr4ir",
    }
    assert names(make_study("tableS4", ALL)) == {f"{key}/edsr-x8/sr4ir" for key in ALL}
    s6 = make_study("tableS6", ["cub200", "folder_sr"], benchmarks={"Set5": "a", "Set14": "b"})
    assert names(s6) == {"folder_sr/edsr-x4/pretrain", "cub200/edsr-x4/sr4ir"}
    assert [column.label for column in s6.table.columns] == ["Set5", "Set14"]


def test_a_cells_dataset_is_that_of_its_task():
    cells = [row.cells[0] for row in make_study("tableS3", ALL).table.rows]
    assert {cell.data for cell in cells} == {"voc_seg"}


@pytest.mark.parametrize("name", TITLES)
def test_what_is_missing_is_asked_for(name):
    with pytest.raises(ExperimentError, match="--data|--benchmark"):
        make_study(name, [])
    with pytest.raises(ExperimentError, match="one scale"):
        make_study(name, ALL, scales=[4, 8])


def test_table_s3_measures_what_the_runs_published(tmp_path):
    study = make_study("tableS3", ["drawn_seg"], scales=[4])
    runs = {}
    for name in names(study):
        run = tmp_path / name.replace("/", "-")
        settings = [] if "edsr" not in name else ["sr.blocks=1", "sr.features=8"]
        modules = publish_random(run, name, *settings, "task.classes=8")
        runs[name] = str(run), sum(parameters(module) for module in modules.values())
    orders = Orders(of={(name, None): number for number, name in enumerate(runs)})
    filled = study.finish(
        fill(study.table, orders, {}, (None,)),
        {name: uri for name, (uri, _) in runs.items()},
        Resources(),
    )
    for (cell,) in filled.cells:
        figures = {figure.metric: figure.mean for figure in cell.figures}
        assert figures["parameters"] == runs[cell.experiment][1] / 1e6
        assert figures["gflops"] > 0
        assert figures["training_hours"] == 0
    assert "parameters M" in as_markdown(filled)
