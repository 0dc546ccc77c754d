"""Tables that are measured on runs: what they need, and what cannot be laid out."""

import csv
import io

import pytest
import torch
from random_runs import publish_random, write_drawn_image

from sr4ir_dist import experiments
from sr4ir_dist.analysis.efficiency import parameters
from sr4ir_dist.config import ExperimentError
from sr4ir_dist.data.convert.drawn import DRAWN, open_drawn
from sr4ir_dist.data.convert.write import convert
from sr4ir_dist.reproduction.filled import WAITING, fill
from sr4ir_dist.reproduction.orders import Orders
from sr4ir_dist.reproduction.run import Reproduction, plan
from sr4ir_dist.reproduction.studies import TITLES, make_study
from sr4ir_dist.reproduction.tables import reduced
from sr4ir_dist.reproduction.written import as_csv, as_markdown
from sr4ir_dist.training.capacity import Resources
from sr4ir_dist.training.run_queue import Order, Outcome

ALL = dict.fromkeys(("voc_seg", "voc_det", "cars"), "datasets/none")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    uri = str(tmp_path_factory.mktemp("drawn") / "data")
    convert(DRAWN, open_drawn(train_count=8, val_count=8, size=64), uri, threads=1)
    return uri


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


@pytest.fixture
def benchmark(tmp_path):
    folder = tmp_path / "Two"
    for number in range(2):
        write_drawn_image(folder / "HR" / f"{number}.png", 48, 40, seed=number)
    return folder


def s6(folder, data=("drawn_cls",)):
    return make_study("tableS6", data, benchmarks={"Two": str(folder)})


def outcomes_of(study, **failed):
    """Of runs that report figures of their training, but for those of a recipe that failed."""
    orders, outcomes = Orders(), {}
    for number, name in enumerate(sorted(names(study))):
        orders.of[name, None] = number
        orders.runs.append(Order(experiments.make(name), "data"))
        why = failed.get(name.rpartition("/")[2])
        metrics = {"psnr": 20.0, "ssim": 0.5, "miou": 1.0, "map": 2.0, "top1": 3.0}
        done = Outcome("done", {"metrics": metrics, "run_uri": name})
        outcomes[number] = done if why is None else Outcome("failed", why=why)
    return orders, outcomes


@pytest.mark.parametrize("study", [make_study("tableS4", ALL), s6("none")], ids=["S4", "S6"])
def test_what_runs_report_of_themselves_is_no_figure_of_a_table_that_measures_them(study):
    filled = fill(study.table, *outcomes_of(study), (None,))
    for row in filled.cells:
        for cell in row:
            assert cell.why == WAITING
            assert {figure.mean for figure in cell.figures} == {None}
    filled = fill(study.table, *outcomes_of(study, sr4ir="it broke"), (None,))
    assert filled.cells[-1][0].why == "it broke"


def test_a_measured_table_keeps_the_reason_of_a_run_that_failed(benchmark, tmp_path):
    study = s6(benchmark)
    name = "drawn_cls/edsr-x4/pretrain"
    publish_random(tmp_path / "run", name, "sr.blocks=1", "sr.features=8")
    filled = fill(study.table, *outcomes_of(study, sr4ir="it broke"), (None,))
    filled = study.finish(filled, [{name: str(tmp_path / "run")}], Resources())
    pretrained, sr4ir, bicubic = (row[0] for row in filled.cells)
    assert (pretrained.why, bicubic.why, sr4ir.why) == ("", "", "it broke")
    assert pretrained.figures[0].mean > 0
    assert sr4ir.figures[0].mean is None
    assert any("drawn_cls takes the place of cars" in note for note in filled.notes)


def test_figures_are_of_as_many_runs_as_were_measured(benchmark, tmp_path):
    study, seeds = s6(benchmark), (1, 2, 3)
    first, sr4ir = (row.cells[0].experiment for row in study.table.rows)
    small = ["sr.blocks=1", "sr.features=8", "task.classes=8"]
    publish_random(tmp_path / "first", first, *small[:2])
    for seed in seeds[:2]:
        torch.manual_seed(seed)
        publish_random(tmp_path / str(seed), sr4ir, *small)
    # All seeds share the first; the third one's run is not there.
    runs = [{first: str(tmp_path / "first"), sr4ir: str(tmp_path / str(seed))} for seed in seeds]
    del runs[2][sr4ir]
    orders = Orders(of={(name, seed): 0 for name in (first, sr4ir) for seed in seeds})
    filled = study.finish(fill(study.table, orders, {}, seeds), runs, Resources())
    figures = [row[0].figures[0] for row in filled.cells]
    assert [figure.runs for figure in figures] == [1, 2, 0]
    assert [figure.std is None for figure in figures] == [True, False, True]
    lines = list(csv.DictReader(io.StringIO(as_csv(filled))))
    assert [line["runs"] for line in lines] == ["1"] * 3 + ["2"] * 3 + ["0"] * 3
    text = as_markdown(filled)
    assert f"{figures[0].mean:.2f} of 1 run" in text
    assert f"{figures[1].mean:.2f} ± {figures[1].std:.2f} of 2 runs" in text


def differences(filled):
    figures = [figure for row in filled.cells for cell in row for figure in cell.figures]
    return [figure.difference for figure in figures if figure.paper is not None]


def test_other_networks_than_the_papers_have_no_differences_and_a_note(benchmark, tmp_path):
    notes = make_study("tableS4", ALL, scales=[4]).table.notes
    assert any("those of edsr-x8, not edsr-x4: no differences" in note for note in notes)
    (tmp_path / "Set5").symlink_to(benchmark)
    uris = {}
    for scale in (4, 2):
        for recipe, size in (("pretrain", []), ("sr4ir", ["task.classes=8"])):
            name = f"cub200/edsr-x{scale}/{recipe}"
            publish_random(tmp_path / name, name, "sr.blocks=1", "sr.features=8", *size)
            uris[name] = str(tmp_path / name)

    def finished(scale, reduced):
        folders = {"Set5": str(tmp_path / "Set5")}
        study = make_study("tableS6", ["cub200"], scales=[scale], benchmarks=folders)
        orders = Orders(of={(name, None): 0 for name in names(study)}, reduced=reduced)
        return study.finish(fill(study.table, orders, {}, (None,)), [uris], Resources())

    whole = finished(4, {})
    # PSNR and SSIM of the pre-trained network, and of SR4IR's.
    assert [each is None for each in differences(whole)] == [True, True, False, False]
    assert any("the paper's of DIV2K: no difference" in note for note in whole.notes)
    other = finished(2, {})
    assert differences(other) == [None] * 4
    assert any("those of edsr-x4: no differences" in note for note in other.notes)
    part = finished(4, {"cub200": reduced("cub200", [30, 40])})
    assert differences(part) == [None] * 4
    assert any("cub200 has 30 and 40 images" in note for note in part.notes)


def test_benchmarks_are_looked_at_before_anything_is_trained(benchmark, drawn, tmp_path):
    def planned(folder):
        study = s6(folder)
        places = {"drawn_cls": drawn}, str(tmp_path / "runs")
        return plan(Reproduction(study.table, *places, experiments.make, study=study))

    assert len(planned(benchmark).runs) == 2
    with pytest.raises(ExperimentError, match=r"none is no benchmark: .*HR"):
        planned(tmp_path / "none")
    write_drawn_image(benchmark / "LR_bicubic" / "X4" / "0x4.png", 12, 10)
    with pytest.raises(ExperimentError, match=r"lacks 1 of 2 LR images, such as 1x4\.png"):
        planned(benchmark)


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
        [{name: uri for name, (uri, _) in runs.items()}],
        Resources(),
    )
    for (cell,) in filled.cells:
        figures = {figure.metric: figure.mean for figure in cell.figures}
        assert figures["parameters"] == runs[cell.experiment][1] / 1e6
        assert figures["gflops"] > 0
        assert figures["training_hours"] == 0
    assert "parameters M" in as_markdown(filled)
