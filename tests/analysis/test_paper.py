import pytest

from sr4ir_dist import experiments
from sr4ir_dist.analysis.paper import figures


def test_every_row_of_tables_1_to_3_has_figures():
    # Recipe s is a helper that the tables do not show.
    rows = [name for name in experiments.grid() if not name.endswith("/s")]
    assert len(rows) == 76
    for name in rows:
        task = experiments.make(name).task
        assert task is not None
        metric = {"classification": "top1", "segmentation": "miou", "detection": "map"}[task.name]
        expected = {metric} if name.endswith("h2t") else {metric, "lpips"}
        assert set(figures(name)) - {"psnr"} == expected
        assert ("psnr" in figures(name)) == ("voc" in name and not name.endswith("h2t"))


def test_what_the_paper_says_of_its_tables():
    def gain(data, metric, sr, against):
        return [
            figures(f"{data}/{sr}-x{scale}/sr4ir")[metric]
            - figures(f"{data}/{against.format(scale)}")[metric]
            for scale in (4, 8)
        ]

    assert gain("voc_seg", "miou", "edsr", "x{}/l2t") == pytest.approx([2.1, 5.7])
    assert gain("voc_seg", "miou", "edsr", "edsr-x{}/s2t") == pytest.approx([0.5, 2.7])
    assert gain("voc_seg", "miou", "swinir", "x{}/l2t")[0] == pytest.approx(3.6)
    assert gain("voc_det", "map", "swinir", "x{}/l2t")[1] == pytest.approx(8.9)
    assert gain("voc_det", "map", "swinir", "swinir-x{}/s2t")[1] == pytest.approx(4.1)
    assert gain("cars", "top1", "swinir", "x{}/l2t")[1] == pytest.approx(12.9)
    assert gain("cub200", "top1", "swinir", "x{}/l2t")[1] == pytest.approx(7.1)


def test_other_experiments_have_none():
    assert figures("drawn_cls/edsr-x4/sr4ir") == {}
    assert figures("cars/edsr-x8/s") == {}
    assert figures("no such/name") == {}
