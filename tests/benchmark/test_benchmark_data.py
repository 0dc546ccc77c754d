import os
from dataclasses import replace
from unittest import mock

import pytest
from PIL import Image

from sr4ir_dist.benchmark.contenders import CONTENDERS, Work
from sr4ir_dist.benchmark.data import Entry, Figures, measure


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for number in range(10):
        Image.new("RGB", (50 + number, 40), (number, 99, 7)).save(folder / f"{number}.jpg")
    return sorted(map(str, folder.iterdir()))


def work(folder, **more):
    return Work(str(folder), str(folder), batch_size=4, resize=32, crop=24, epochs=2, **more)


@pytest.mark.slow
def test_contenders_run_from_disk_and_from_a_bucket_and_one_may_fail(images, tmp_path, s3):
    said = []
    # Its process does not know the name, so it fails there and not here.
    with mock.patch.dict(CONTENDERS, {"broken": replace(CONTENDERS["raw GET"], places=("disk",))}):
        broken, *entries = measure(
            images,
            work(tmp_path),
            repeats=1,
            names=("broken", "raw GET", "sr4ir_dist", "ImageFolder"),
            bucket=f"{s3()}/data",
            say=said.append,
        )
    assert "invalid choice: 'broken'" in (broken.failure or "")
    assert broken.runs == ()
    assert [(entry.name, entry.where) for entry in entries] == [
        ("sr4ir_dist", "disk"),
        ("ImageFolder", "disk"),
        ("raw GET", "s3"),
        ("sr4ir_dist", "s3"),
    ]
    for entry in entries:
        assert entry.failure is None
        assert len(entry.runs) == 1
        assert min(entry.median.first, entry.median.later) > 0
        assert 50 < entry.median.peak_mib < 8000  # torch alone takes more than 50 MiB
    assert sum("run 1 of 1" in line for line in said) == len(entries)


def test_medians_are_taken_figure_by_figure():
    runs = (Figures(1, 20, 300), Figures(2, 10, 100), Figures(3, 30, 200))
    assert Entry("decode only", "disk", runs).median == Figures(2, 20, 200)


def test_unknown_contenders_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"contenders \['tape'\]: allowed are decode only"):
        measure([], work(tmp_path), repeats=1, names=["tape"], bucket=None, say=print)
    assert os.listdir(tmp_path) == []
