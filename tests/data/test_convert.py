import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sr4ir_dist import storage
from sr4ir_dist.data import synthetic
from sr4ir_dist.data.convert import CONVERTERS
from sr4ir_dist.data.convert.source import Source
from sr4ir_dist.data.convert.write import convert
from sr4ir_dist.data.schema import TASKS, DatasetError
from sr4ir_dist.data.shards import ShardReader, has_split, load_manifest


def read_rows(uri: str, split: str, folder: Path) -> Iterator[dict[str, Any]]:
    for shard in load_manifest(uri, split).shards:
        storage.download(storage.join(uri, split, shard.path), folder / shard.path)
        yield from ShardReader(folder / shard.path).rows(range(shard.rows))


def make_cub(root: Path, pictures: Path) -> Path:
    """A small tree in CUB's official layout: 2 classes of 3 images; the odd ids train."""
    files = sorted(pictures.rglob("*.jpg"))[:6]
    lists: dict[str, list[str]] = {
        name: [] for name in ("images", "image_class_labels", "train_test_split")
    }
    for i, file in enumerate(files, 1):
        label = 1 if i <= 3 else 2
        path = f"{label:03d}.Bird_{label}/bird {i}.jpg"
        (root / "images" / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, root / "images" / path)
        lists["images"].append(f"{i} {path}")
        lists["image_class_labels"].append(f"{i} {label}")
        lists["train_test_split"].append(f"{i} {i % 2}")
    lists["classes"] = ["1 001.Bird_1", "2 002.Bird_2"]
    for name, lines in lists.items():
        (root / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture
def cub(tmp_path: Path, image_folder: Path) -> Path:
    return make_cub(tmp_path / "CUB_200_2011", image_folder)


def open_source(name: str, root: Path | str, **options: Any) -> Source:
    return CONVERTERS[name].open(root=str(root), **options)


def test_the_table_of_converters():
    dense = ["voc_seg", "voc_det", "coco_seg", "coco_det"]
    assert list(CONVERTERS) == [*dense, "cub200", "cars", "image-folder", "sr-folder", "drawn"]
    for name, converter in CONVERTERS.items():
        assert converter.name == name
        assert "images" in converter.tasks
        assert set(converter.tasks) <= set(TASKS)


def test_cub_keeps_bytes_split_and_labels(cub: Path, tmp_path: Path):
    out = str(tmp_path / "out")
    result = convert(CONVERTERS["cub200"], open_source("cub200", cub), out)
    assert {split: part.manifest.rows for split, part in result.items()} == {"train": 3, "val": 3}
    manifest = load_manifest(out, "train")
    assert manifest == result["train"].manifest
    assert (manifest.name, manifest.tasks) == ("cub200", ("images", "classification"))
    assert manifest.class_names == ("001.Bird_1", "002.Bird_2")
    assert manifest.source["converter"] == "cub200"
    assert manifest.source["root"] == str(cub)
    for split, ids in (("train", (1, 3, 5)), ("val", (2, 4, 6))):
        for i, row in zip(ids, read_rows(out, split, tmp_path / split), strict=True):
            label = 0 if i <= 3 else 1
            path = f"{label + 1:03d}.Bird_{label + 1}/bird {i}.jpg"
            assert row == {
                "id": path,
                "image": (cub / "images" / path).read_bytes(),
                "height": 24,
                "width": 20,
                "label": label,
            }


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("image_class_labels.txt", "4 2", "4 3", "image 4 has class 3, expected 1 to 2"),
        ("image_class_labels.txt", "4 2", "4 two", "'two' is not a number"),
        ("image_class_labels.txt", "4 2", "7 2", r"ids \['4', '7'\] are not in both"),
        ("train_test_split.txt", "4 0\n", "", r"ids \['4'\] are not in both"),
        ("train_test_split.txt", "4 0", "4 2", "image 4 has 2, expected 0 or 1"),
        ("train_test_split.txt", " 1", " 0", "no image in the train split"),
        ("images.txt", "4 002.Bird_2/", "4 ../", "leaves the images folder"),
        ("images.txt", "4 002.Bird_2/", "4 /", "leaves the images folder"),
        ("images.txt", "4 002.Bird_2/bird 4.jpg", "4", "line 4 is '4'"),
        ("images.txt", "4 ", "3 ", "line 4 is '3 002"),
        ("classes.txt", "2 002", "3 002", "class numbers are not 1 to 2"),
    ],
)
def test_cub_lists_that_disagree(cub: Path, file: str, old: str, new: str, message: str):
    content = (cub / file).read_text()
    assert old in content
    (cub / file).write_text(content.replace(old, new))
    with pytest.raises(DatasetError, match=message) as caught:
        open_source("cub200", cub)
    assert file in str(caught.value)


def test_cub_in_another_folder(tmp_path: Path):
    with pytest.raises(DatasetError, match=r"images\.txt: not found; --root must be"):
        open_source("cub200", tmp_path)


def test_image_folder(image_folder: Path, tmp_path: Path):
    source = open_source("image-folder", image_folder)
    assert source.class_names == ("auk", "bat", "cat")
    assert source.counts == {"train": 12, "val": 6}
    assert source.splits == ("train", "val")
    assert "1 files that are no images were left out" in source.notes
    out = str(tmp_path / "out")
    convert(CONVERTERS["image-folder"], source, out, name="birds", threads=2)
    rows = list(read_rows(out, "train", tmp_path / "copies"))
    assert [row["id"] for row in rows] == [
        f"{name}/{i}.{'png' if i % 2 else 'jpg'}"
        for name in ("auk", "bat", "cat")
        for i in range(4)
    ]
    assert [row["label"] for row in rows] == [0] * 4 + [1] * 4 + [2] * 4
    assert load_manifest(out, "val").name == "birds"
    assert rows == list(source.rows("train"))


def test_image_folder_with_test_instead_of_val(image_folder: Path):
    (image_folder / "val").rename(image_folder / "test")
    source = open_source("image-folder", image_folder)
    assert source.counts == {"train": 12, "val": 6}
    assert "val is the folder test" in source.notes
    shutil.rmtree(image_folder / "test" / "auk")
    assert [row["label"] for row in open_source("image-folder", image_folder).rows("val")] == [
        1,
        1,
        2,
        2,
    ]


def test_image_folder_errors(image_folder: Path, tmp_path: Path):
    (image_folder / "val" / "dog").mkdir()
    shutil.copy(image_folder / "val" / "cat" / "0.jpg", image_folder / "val" / "dog" / "0.jpg")
    with pytest.raises(DatasetError, match=r"val: classes \['dog'\] are not in train"):
        open_source("image-folder", image_folder)
    shutil.copy(image_folder / "val" / "cat" / "0.jpg", image_folder / "val" / "0.jpg")
    with pytest.raises(DatasetError, match=r"val: 0\.jpg is in no class's folder"):
        open_source("image-folder", image_folder)
    shutil.rmtree(image_folder / "val")
    with pytest.raises(DatasetError, match="expected folders train and val .*; found train"):
        open_source("image-folder", image_folder)
    (image_folder / "val" / "auk").mkdir(parents=True)
    with pytest.raises(DatasetError, match="val: no images"):
        open_source("image-folder", image_folder)
    with pytest.raises(DatasetError, match="found nothing"):
        open_source("image-folder", tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("val_count", "held_out"),
    [(None, [6]), (1, [6]), (3, [2, 6, 10]), (11, [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11])],
)
def test_sr_folder_holds_out_evenly(sr_folder: Path, val_count: int | None, held_out: list[int]):
    source = open_source("sr-folder", sr_folder, val_count=val_count)
    assert source.class_names == ()
    ids = {split: [int(row["id"][:2]) for row in source.rows(split)] for split in source.splits}
    assert ids["val"] == held_out
    assert ids["train"] == [i for i in range(12) if i not in held_out]
    assert f"held out {len(held_out)} evenly spaced images as val" in source.notes[0]


def test_sr_folder_converts_images_of_several_sizes(sr_folder: Path, tmp_path: Path):
    out = str(tmp_path / "out")
    result = convert(CONVERTERS["sr-folder"], open_source("sr-folder", sr_folder), out)
    assert result["train"].manifest.tasks == ("images",)
    assert result["train"].manifest.class_names == ()
    for row in read_rows(out, "train", tmp_path / "copies"):
        assert row["image"] == (sr_folder / row["id"]).read_bytes()
        assert (row["height"], row["width"]) == (30 + int(row["id"][:2]), 40)


def test_sr_folder_with_its_own_split(sr_folder: Path):
    for split, names in (("train", ("00", "01", "02")), ("val", ("03",))):
        (sr_folder / split).mkdir()
        for name in names:
            (sr_folder / f"{name}.png").rename(sr_folder / split / f"{name}.png")
    source = open_source("sr-folder", sr_folder)
    assert source.counts == {"train": 3, "val": 1}
    assert [row["id"] for row in source.rows("val")] == ["val/03.png"]
    with pytest.raises(DatasetError, match="--val-count 2: .* its own val folder"):
        open_source("sr-folder", sr_folder, val_count=2)


def test_sr_folder_errors(sr_folder: Path, tmp_path: Path):
    with pytest.raises(DatasetError, match="--val-count 12: expected 1 to 11"):
        open_source("sr-folder", sr_folder, val_count=12)
    with pytest.raises(DatasetError, match="nowhere: no such folder"):
        open_source("sr-folder", tmp_path / "nowhere")
    (tmp_path / "empty" / ".hidden").mkdir(parents=True)
    for i in range(2):
        shutil.copy(sr_folder / "00.png", tmp_path / "empty" / ".hidden" / f"{i}.png")
    with pytest.raises(DatasetError, match="empty: 0 images"):
        open_source("sr-folder", tmp_path / "empty")


def test_drawn_rows_are_those_of_the_generator(tmp_path: Path):
    out = str(tmp_path / "out")
    source = CONVERTERS["drawn"].open(train_count=10, val_count=4, size=32, seed=3)
    convert(CONVERTERS["drawn"], source, out)
    manifest = load_manifest(out, "train")
    assert manifest.tasks == TASKS
    assert manifest.class_names == synthetic.CLASS_NAMES
    assert manifest.source["size"] == 32
    found = list(read_rows(out, "val", tmp_path / "copies"))
    for row, expected in zip(found, synthetic.rows("val", 4, 32, 3), strict=True):
        assert row.pop("boxes") == [[float(x) for x in box] for box in expected.pop("boxes")]
        assert row.pop("box_labels") == [int(label) for label in expected.pop("box_labels")]
        assert row == expected


@pytest.mark.parametrize(
    ("option", "value"), [("train_count", 0), ("val_count", 0), ("size", 2), ("seed", -1)]
)
def test_drawn_errors(option: str, value: int):
    with pytest.raises(DatasetError, match=f"--{option.replace('_', '-')} {value}: expected"):
        CONVERTERS["drawn"].open(**{option: value})


def spoil(root: Path) -> None:
    """Truncate two training images, and make another of something else."""
    for name in ("bat/1.png", "bat/2.jpg"):
        path = root / "train" / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    (root / "train" / "cat" / "2.jpg").write_text("not an image")


def test_a_bad_image_is_named_and_no_dataset_appears(image_folder: Path, tmp_path: Path):
    spoil(image_folder)
    out = tmp_path / "out"
    with pytest.raises(DatasetError, match=r"train/bat/1\.png: no readable image"):
        convert(
            CONVERTERS["image-folder"],
            open_source("image-folder", image_folder),
            str(out),
            shard_bytes=1000,
        )
    assert not has_split(str(out), "train")
    assert not has_split(str(out), "val")


def test_bad_images_can_be_skipped(image_folder: Path, tmp_path: Path):
    spoil(image_folder)
    out = str(tmp_path / "out")
    calls: list[tuple[str, int, int]] = []
    result = convert(
        CONVERTERS["image-folder"],
        open_source("image-folder", image_folder),
        out,
        on_bad_row="skip",
        progress=lambda *call: calls.append(call),
    )
    assert calls[:2] == [("train", 0, 12), ("val", 0, 6)]
    assert sorted(calls[2:]) == [("train", 12, 12), ("val", 6, 6)]
    assert result["val"].skipped == ()
    assert len(result["train"].skipped) == 3
    assert "bat/1.png" in result["train"].skipped[0]
    source = load_manifest(out, "train").source
    assert source["skipped"] == 3
    assert source["on_bad_row"] == "skip"
    assert source["skipped_rows"] == list(result["train"].skipped)
    ids = [row["id"] for row in read_rows(out, "train", tmp_path / "copies")]
    assert len(ids) == 9
    assert not {"bat/1.png", "bat/2.jpg", "cat/2.jpg"} & set(ids)


def test_an_image_that_vanishes_is_a_bad_row(image_folder: Path):
    source = open_source("image-folder", image_folder)
    (image_folder / "train" / "auk" / "0.jpg").unlink()
    with pytest.raises(DatasetError, match=r"auk/0\.jpg: nothing there"):
        next(source.rows("train"))


def test_overwriting_replaces_and_a_failure_keeps_the_old(image_folder: Path, tmp_path: Path):
    out = str(tmp_path / "out")
    converter = CONVERTERS["image-folder"]
    convert(converter, open_source("image-folder", image_folder), out)
    before = load_manifest(out, "train")
    shutil.copy(
        image_folder / "val" / "cat" / "0.jpg", image_folder / "train" / "auk" / "another.jpg"
    )
    with pytest.raises(DatasetError, match=r"already \(splits train, val\); pass --overwrite"):
        convert(converter, open_source("image-folder", image_folder), out)
    bad = image_folder / "val" / "cat" / "1.png"
    content = bad.read_bytes()
    bad.write_text("broken")
    source = open_source("image-folder", image_folder)
    with pytest.raises(DatasetError, match="no readable image"):
        convert(converter, source, out, overwrite=True)
    assert load_manifest(out, "train") == before
    assert len(list(read_rows(out, "train", tmp_path / "copies"))) == 12
    bad.write_bytes(content)
    result = convert(converter, source, out, overwrite=True)
    assert result["train"].manifest.rows == 13
    assert load_manifest(out, "train").digest != before.digest


def test_source_and_dataset_in_a_bucket(image_folder: Path, tmp_path: Path, s3: Callable[[], str]):
    bucket = s3()
    for path in storage.list_files(str(image_folder)):
        storage.upload(image_folder / path, f"{bucket}/raw/{path}")
    converter = CONVERTERS["image-folder"]
    remote = convert(converter, open_source("image-folder", f"{bucket}/raw"), f"{bucket}/data")
    local = convert(converter, open_source("image-folder", image_folder), str(tmp_path / "out"))
    assert {s: part.manifest.digest for s, part in remote.items()} == {
        s: part.manifest.digest for s, part in local.items()
    }
    assert storage.list_names(f"{bucket}/data") == ["train", "val"]


def test_real_cub(real_data: Path, tmp_path: Path):
    root = real_data / "CUB_200_2011"
    source = open_source("cub200", root)
    assert source.counts == {"train": 1200, "val": 1173}
    assert len(source.class_names) == 40
    kept = {split: list(source.items(split))[::40] for split in source.splits}
    small = Source(
        class_names=source.class_names,
        counts={split: len(items) for split, items in kept.items()},
        items=kept.__getitem__,
        read=source.read,
    )
    out = str(tmp_path / "out")
    convert(CONVERTERS["cub200"], small, out)
    names = load_manifest(out, "val").class_names
    for split in source.splits:
        rows = list(read_rows(out, split, tmp_path / split))
        assert len(rows) == 30
        for row in rows:
            assert row["id"].split("/")[0] == names[row["label"]]
            assert row["image"] == (root / "images" / row["id"]).read_bytes()
            with Image.open(root / "images" / row["id"]) as image:
                assert image.size == (row["width"], row["height"])
