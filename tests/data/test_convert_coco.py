import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle

from sr4ir_dist.data.convert import CONVERTERS
from sr4ir_dist.data.convert.source import TALLY, Row
from sr4ir_dist.data.convert.write import convert
from sr4ir_dist.data.schema import DatasetError
from sr4ir_dist.data.shards import ShardReader

HEIGHT, WIDTH = 30, 40
# Ids with gaps and out of order, as in COCO.
CATEGORIES = [{"id": 90, "name": "dog"}, {"id": 2, "name": "cat"}, {"id": 13, "name": "bus"}]


def polygon(x0: float, y0: float, x1: float, y1: float) -> list[float]:
    return [x0, y0, x1, y0, x1, y1, x0, y1]


def instance(image: int, category: int, *box: float, crowd: int = 0, **more: Any) -> dict[str, Any]:
    x, y, width, height = box
    found = {
        "id": 100 * image + category,
        "image_id": image,
        "category_id": category,
        "bbox": list(box),
        "segmentation": [polygon(x, y, x + width, y + height)],
        "area": width * height,
        "iscrowd": crowd,
    }
    return found | more


def crowd_code(rows: slice, columns: slice) -> dict[str, Any]:
    """An uncompressed run-length code, column by column."""
    covered = np.zeros((HEIGHT, WIDTH), np.uint8)
    covered[rows, columns] = 1
    flat = covered.ravel(order="F")
    edges = np.flatnonzero(np.diff(flat, prepend=0, append=-1))
    counts = np.diff(edges, prepend=0).tolist()
    return {"size": [HEIGHT, WIDTH], "counts": counts}


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """A small tree in COCO's layout: 3 train images with 4, 0 and 1 instances, 1 val image."""
    root = tmp_path / "coco"
    (root / "annotations").mkdir(parents=True)
    for split, ids in (("train", (7, 3, 5)), ("val", (9,))):
        (root / f"{split}2017").mkdir()
        images = []
        for key in ids:
            pixels = np.random.default_rng(key).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
            Image.fromarray(pixels).save(root / f"{split}2017" / f"{key:012d}.jpg")
            images.append(
                {"id": key, "file_name": f"{key:012d}.jpg", "height": HEIGHT, "width": WIDTH}
            )
        crowd = crowd_code(slice(1, 21), slice(2, 14))
        annotations = [
            instance(7, 13, 10, 10, 4, 5),
            instance(7, 2, 5, 6, 20, 15),
            instance(7, 90, 0, 0, 0, 5),
            instance(7, 2, 2, 1, 12, 20, crowd=1, segmentation=crowd),
            instance(5, 90, 30, 20, 30, 30),
        ] if split == "train" else [instance(9, 2, 1, 2, 3, 4)]  # fmt: skip
        content = {"images": images, "annotations": annotations, "categories": CATEGORIES}
        (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))
    return root


def rows(name: str, root: Path, split: str = "train") -> list[Row]:
    return list(CONVERTERS[name].open(root=str(root)).rows(split))


def edit(root: Path, change: Callable[[dict[str, Any]], Any], split: str = "train") -> None:
    path = root / "annotations" / f"instances_{split}2017.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_detection(coco: Path, tmp_path: Path):
    source = CONVERTERS["coco_det"].open(root=str(coco))
    assert source.class_names == ("cat", "bus", "dog")
    assert source.counts == {"train": 3, "val": 1}
    assert source.facts["category_ids"] == [2, 13, 90]
    result = convert(CONVERTERS["coco_det"], source, str(tmp_path / "out"))
    assert result["train"].tally == {
        "boxes": 4,
        "boxes cut to their image": 1,
        "boxes dropped (empty or outside their image)": 1,
        "images without objects": 1,
    }
    manifest = result["train"].manifest
    found = ShardReader(tmp_path / "out" / "train" / manifest.shards[0].path).rows(range(3))
    assert [row["id"] for row in found] == [f"{key:012d}.jpg" for key in (7, 3, 5)]
    assert found[0]["boxes"] == [[10, 10, 14, 15], [5, 6, 25, 21], [2, 1, 14, 21]]
    assert found[0]["box_labels"] == [1, 0, 0]
    assert found[0]["crowd"] == [False, False, True]
    assert found[1]["boxes"] == []
    assert found[2]["boxes"] == [[30, 20, 40, 30]]
    assert found[2]["box_labels"] == [2]


def numbers(row: Row) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(row["mask"])))


def test_masks_show_small_instances_on_large_ones_on_void(coco: Path):
    first, second, third = rows("coco_seg", coco)
    expected = np.zeros((HEIGHT, WIDTH), np.uint8)
    expected[1:21, 2:14] = 255
    expected[6:21, 5:25] = 1
    expected[10:15, 10:14] = 2
    assert np.array_equal(numbers(first), expected)
    assert not numbers(second).any()
    assert second[TALLY] == {"images without objects": 1}
    cut = np.zeros((HEIGHT, WIDTH), np.uint8)
    cut[20:, 30:] = 3
    assert np.array_equal(numbers(third), cut)


def test_smaller_instances_stay_in_whatever_order_they_come(coco: Path):
    before = numbers(rows("coco_seg", coco)[0])
    edit(coco, lambda content: content["annotations"].reverse())
    assert np.array_equal(numbers(rows("coco_seg", coco)[0]), before)


@pytest.mark.parametrize("density", [0.0, 0.02, 0.5, 0.98, 1.0])
def test_compressed_codes(coco: Path, density: float):
    covered = (np.random.default_rng(0).random((HEIGHT, WIDTH)) < density).astype(np.uint8)
    covered[:25, 9:30] = density > 0.4
    code: Any = rle.encode(np.asfortranarray(covered))
    code["counts"] = code["counts"].decode()
    edit(coco, lambda content: content["annotations"][4].update(segmentation=code))
    assert np.array_equal(numbers(rows("coco_seg", coco)[2]), covered * 3)


def test_places_of_ones_own(coco: Path):
    places = {
        "train_annotations": str(coco / "annotations" / "instances_train2017.json"),
        "val_annotations": str(coco / "annotations" / "instances_val2017.json"),
        "train_images": str(coco / "train2017"),
        "val_images": str(coco / "val2017"),
    }
    source = CONVERTERS["coco_det"].open(**places)
    assert list(source.rows("val")) == rows("coco_det", coco, "val")
    with pytest.raises(DatasetError, match="--val-images is missing: .* no --root"):
        CONVERTERS["coco_det"].open(**(places | {"val_images": None}))
    (coco / "val2017").rename(coco / "test")
    moved = CONVERTERS["coco_seg"].open(root=str(coco), val_images=str(coco / "test"))
    assert len(list(moved.rows("val"))) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("categories"), "not in COCO's format: KeyError: 'categories'"),
        (lambda c: c.update(images=7), "not in COCO's format: TypeError"),
        (lambda c: c.update(images=[]), "not in COCO's format: KeyError: 7"),
        (lambda c: c.update(images=[], annotations=[]), "no images"),
        (lambda c: c.update(categories=[]), "no categories"),
        (lambda c: c["categories"].append({"id": 4, "name": "cat"}), "category is there twice"),
        (lambda c: c["annotations"][0].update(image_id=8), "not in COCO's format: KeyError: 8"),
        (lambda c: c["images"][0].update(id=3), "KeyError: 7"),
        (lambda c: c["images"][0].update(file_name="000000000003.jpg"), "image is there twice"),
        (lambda c: c["images"][0].update(file_name="../x.jpg"), "'../x.jpg'. leaves the folder"),
        (lambda c: c["images"][0].pop("width"), "KeyError: 'width'"),
        (lambda c: c["categories"].pop(), r"categories differ from those of .*13, 'bus'"),
    ],
)
@pytest.mark.parametrize("name", ["coco_det", "coco_seg"])
def test_malformed_json(
    coco: Path, name: str, change: Callable[[dict[str, Any]], Any], message: str
):
    edit(coco, change)
    with pytest.raises(DatasetError, match=message) as caught:
        CONVERTERS[name].open(root=str(coco))
    assert "instances_train2017.json" in str(caught.value)


def test_no_json(coco: Path, tmp_path: Path):
    (coco / "annotations" / "instances_val2017.json").write_text("{")
    with pytest.raises(DatasetError, match="instances_val2017.json: not valid JSON"):
        CONVERTERS["coco_det"].open(root=str(coco))
    with pytest.raises(DatasetError, match="instances_train2017.json: nothing there"):
        CONVERTERS["coco_det"].open(root=str(tmp_path / "nowhere"))


def test_more_classes_than_a_mask_holds(coco: Path):
    many = [{"id": 1000 + i, "name": f"class {i}"} for i in range(251)]
    for split in ("train", "val"):
        edit(coco, lambda content: content["categories"].extend(many), split)
    assert len(CONVERTERS["coco_seg"].open(root=str(coco)).class_names) == 254
    for split in ("train", "val"):
        edit(coco, lambda c: c["categories"].append({"id": 1, "name": "more"}), split)
    assert len(CONVERTERS["coco_det"].open(root=str(coco)).class_names) == 255
    with pytest.raises(DatasetError, match="255 categories, a mask holds 254"):
        CONVERTERS["coco_seg"].open(root=str(coco))


def change_of(**values: Any) -> Callable[[dict[str, Any]], Any]:
    """A change of the third image's annotation."""
    return lambda content: content["annotations"][4].update(values)


BAD = [
    ("coco_det", change_of(category_id=3), "category_id 3 is no category"),
    ("coco_seg", change_of(category_id=None), "category_id None is no category"),
    ("coco_det", change_of(bbox=[1, 2, 3]), r"bbox is \[1, 2, 3\], expected four numbers"),
    ("coco_det", change_of(bbox=None), "bbox is None"),
    ("coco_det", change_of(bbox=[1, 2, "a", 4]), "expected four numbers"),
    ("coco_det", change_of(bbox=[1, 2, float("inf"), 4]), "not finite"),
    ("coco_seg", change_of(segmentation=None), "malformed segmentation"),
    ("coco_seg", change_of(segmentation=[]), "polygons of three points"),
    ("coco_seg", change_of(segmentation=[[1, 2, 3, 4]]), "polygons of three points"),
    ("coco_seg", change_of(segmentation=[[1, 2, 3, 4, 5, 1e12]]), "far outside the image"),
    ("coco_seg", change_of(segmentation=[[1, 2, 3, 4, 5, float("nan")]]), "far outside the image"),
    ("coco_seg", change_of(segmentation={"size": [30, 40], "counts": [5, 9]}), ", 14 pixels"),
    ("coco_seg", change_of(segmentation={"size": [30, 41], "counts": [1230]}), "size .30, 41."),
    ("coco_seg", change_of(segmentation={"size": [30, 40], "counts": "~~~~"}), "malformed seg"),
    ("coco_seg", change_of(segmentation={"size": [30, 40], "counts": ""}), "malformed seg"),
    ("coco_det", lambda c: c["images"][2].update(width=41), "30x40 pixels, but .* says 30x41"),
    ("coco_seg", lambda c: c["images"][2].update(file_name="no.jpg"), "no.jpg: nothing there"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "message"), BAD)
def test_bad_samples_are_named_or_skipped(
    coco: Path, tmp_path: Path, name: str, change: Callable[[dict[str, Any]], Any], message: str
):
    edit(coco, change)
    converter, out = CONVERTERS[name], str(tmp_path / "out")
    with pytest.raises(DatasetError, match=message) as caught:
        convert(converter, converter.open(root=str(coco)), out)
    assert "000000000005.jpg" in str(caught.value) or "no.jpg" in str(caught.value)
    result = convert(converter, converter.open(root=str(coco)), out, on_bad_row="skip")
    assert result["train"].manifest.rows == 2
    assert len(result["train"].skipped) == 1
