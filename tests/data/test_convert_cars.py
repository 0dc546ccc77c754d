import shutil
from pathlib import Path

import pytest

from sr4ir_dist.data.convert import CONVERTERS
from sr4ir_dist.data.schema import DatasetError


@pytest.mark.parametrize("wrapper", ["", "car_data", "car_data/car_data"])
def test_class_folders(image_folder: Path, tmp_path: Path, wrapper: str):
    (image_folder / "val").rename(image_folder / "test")
    root = tmp_path / "cars"
    shutil.copytree(image_folder, root / wrapper, dirs_exist_ok=True)
    source = CONVERTERS["cars"].open(root=str(root))
    assert source.class_names == ("auk", "bat", "cat")
    assert source.counts == {"train": 12, "val": 6}
    assert [row["label"] for row in source.rows("val")] == [0, 0, 1, 1, 2, 2]
    assert source.facts["root"] == str(root / wrapper)
    assert source.facts["layout"] == "Stanford Cars, class folders"
    assert "val is the folder test" in source.notes
    assert "3 classes; the whole set has 196" in source.notes


@pytest.mark.parametrize("name", ["cars_train_annos.mat", "devkit", "cars_train"])
def test_the_original_layout_is_refused_with_advice(tmp_path: Path, name: str):
    (tmp_path / name).mkdir()
    (tmp_path / name / "x").touch()
    with pytest.raises(DatasetError, match="MATLAB annotations; expected folders train and test"):
        CONVERTERS["cars"].open(root=str(tmp_path))


def test_another_folder(tmp_path: Path, image_folder: Path):
    with pytest.raises(DatasetError, match="or car_data with them; found nothing"):
        CONVERTERS["cars"].open(root=str(tmp_path / "nowhere"))
    shutil.rmtree(image_folder / "val")
    with pytest.raises(DatasetError, match="found train"):
        CONVERTERS["cars"].open(root=str(image_folder))
