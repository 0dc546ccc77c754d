import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sr4ir_dist.data.convert import CONVERTERS
from sr4ir_dist.data.convert.source import TALLY, Row, Source
from sr4ir_dist.data.convert.voc import CLASS_NAMES
from sr4ir_dist.data.convert.write import convert
from sr4ir_dist.data.groups import aspect_group
from sr4ir_dist.data.schema import DatasetError
from sr4ir_dist.data.shards import ShardReader, load_manifest

TRAIN, VAL = ("2007_000001", "2007_000002", "2007_000003"), ("2007_000009",)
DOG = """<object><name>dog</name><difficult>1</difficult>
    <bndbox><ymin>3</ymin><xmin>2</xmin><xmax>20.7</xmax><ymax>25</ymax></bndbox></object>"""
PERSON = """<object><name> person </name>
    <part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>4</xmax><ymax>4</ymax></bndbox>
    </part><bndbox><xmin>5</xmin><ymin>6</ymin><xmax>40</xmax><ymax>30</ymax></bndbox></object>"""


def box(x0: float, y0: float, x1: float, y1: float, name: str = "cat") -> str:
    corners = f"<xmin>{x0}</xmin><ymin>{y0}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax>"
    return f"<object><name>{name}</name><bndbox>{corners}</bndbox></object>"


def write_xml(year: Path, name: str, *objects: str) -> None:
    text = "<annotation><size><width>0</width></size>" + "".join(objects) + "</annotation>"
    (year / "Annotations" / f"{name}.xml").write_text(text)


def write_mask(year: Path, name: str, mask: np.ndarray) -> None:
    picture = Image.fromarray(mask).convert("P")
    picture.putdata(mask.ravel().tolist())
    picture.putpalette(np.random.default_rng(0).bytes(768))
    picture.save(year / "SegmentationClass" / f"{name}.png")


def make_mask() -> np.ndarray:
    mask = np.zeros((30, 40), np.uint8)
    mask[5:20, 8:30] = 12
    mask[20:25, 3:6] = 20
    mask[4, 8:30] = 255
    return mask


@pytest.fixture
def year(tmp_path: Path) -> Path:
    """A small tree in VOC's official layout: 3 train images, 1 val image, of 30x40."""
    folder = tmp_path / "VOCdevkit" / "VOC2012"
    for kind in ("JPEGImages", "Annotations", "SegmentationClass", "ImageSets/Main",
                 "ImageSets/Segmentation"):  # fmt: skip
        (folder / kind).mkdir(parents=True)
    for i, name in enumerate(TRAIN + VAL):
        pixels = np.random.default_rng(i).integers(0, 256, (30, 40, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "JPEGImages" / f"{name}.jpg")
        write_mask(folder, name, make_mask())
        write_xml(folder, name, DOG, PERSON)
    for lists in ("Main", "Segmentation"):
        for split, names in (("train", TRAIN), ("val", VAL)):
            (folder / "ImageSets" / lists / f"{split}.txt").write_text("\n".join(names) + "\n\n")
    return folder


def rows(name: str, root: Path, split: str = "train") -> list[Row]:
    return list(CONVERTERS[name].open(root=str(root)).rows(split))


def test_segmentation_keeps_class_numbers(year: Path, tmp_path: Path):
    source = CONVERTERS["voc_seg"].open(root=str(year.parent))
    assert source.counts == {"train": 3, "val": 1}
    assert source.class_names == CLASS_NAMES
    assert source.notes == ("the year is VOC2012",)
    assert CLASS_NAMES == tuple(sorted(CLASS_NAMES))
    assert (len(CLASS_NAMES), CLASS_NAMES[0], CLASS_NAMES[19]) == (20, "aeroplane", "tvmonitor")
    result = convert(CONVERTERS["voc_seg"], source, str(tmp_path / "out"))
    manifest = result["train"].manifest
    assert manifest.tasks == ("images", "segmentation")
    reader = ShardReader(tmp_path / "out" / "train" / manifest.shards[0].path)
    found = reader.rows(range(3))
    assert tuple(row["id"] for row in found) == TRAIN
    for row in found:
        assert row["image"] == (year / "JPEGImages" / f"{row['id']}.jpg").read_bytes()
        with Image.open(io.BytesIO(row["mask"])) as picture:
            assert picture.mode == "L"
            assert np.array_equal(np.array(picture), make_mask())


def test_detection_reads_boxes_of_objects_not_of_parts(year: Path, tmp_path: Path):
    source = CONVERTERS["voc_det"].open(root=str(year))
    assert source.notes == ()
    result = convert(CONVERTERS["voc_det"], source, str(tmp_path / "out"))
    assert result["train"].tally == {
        "boxes": 6,
        "boxes cut to their image": 0,
        "boxes dropped (empty or outside their image)": 0,
        "images without objects": 0,
        "difficult objects, kept": 3,
    }
    manifest = load_manifest(str(tmp_path / "out"), "train")
    assert manifest.source["tally"] == result["train"].tally
    assert set(manifest.shards[0].batch_groups) == {aspect_group(30, 40)}
    reader = ShardReader(tmp_path / "out" / "train" / manifest.shards[0].path)
    for row in reader.rows(range(3)):
        assert np.allclose(row["boxes"], [[1, 2, 20.7, 25], [4, 5, 40, 30]])
        assert [CLASS_NAMES[label] for label in row["box_labels"]] == ["dog", "person"]
        assert row["crowd"] == [False, False]


def test_boxes_are_cut_to_the_image_and_empty_ones_dropped(year: Path):
    write_xml(
        year, TRAIN[0],
        box(-5, 3, 12, 9), box(30, 20, 60, 50), box(41, 3, 60, 9), box(-9, -9, 0, 0),
        box(9, 9, 8, 20), box(20, 5, 10, 9), box(7, 7, 7, 7),
    )  # fmt: skip
    write_xml(year, TRAIN[1], box(50, 3, 60, 9))
    write_xml(year, TRAIN[2])
    first, second, third = rows("voc_det", year)
    assert first["boxes"] == [[0, 2, 12, 9], [29, 19, 40, 30], [6, 6, 7, 7]]
    assert first["box_labels"] == [7, 7, 7]
    assert first[TALLY]["boxes dropped (empty or outside their image)"] == 4
    assert first[TALLY]["boxes cut to their image"] == 2
    for row, dropped in ((second, 1), (third, 0)):
        assert row["boxes"] == row["box_labels"] == row["crowd"] == []
        assert row[TALLY]["boxes dropped (empty or outside their image)"] == dropped
        assert row[TALLY]["images without objects"] == 1


def spoil_image(year: Path, data: bytes | None) -> None:
    path = year / "JPEGImages" / f"{TRAIN[1]}.jpg"
    path.unlink()
    if data is not None:
        path.write_bytes(data)


def tiny(height: int, width: int) -> bytes:
    sink = io.BytesIO()
    Image.new("RGB", (width, height)).save(sink, "JPEG")
    return sink.getvalue()


BAD: list[tuple[str, str, Callable[[Path], object], str]] = [
    ("both", "image", lambda year: spoil_image(year, None), "000002.jpg: nothing there"),
    ("both", "text", lambda year: spoil_image(year, b"text"), "000002.jpg: no readable image"),
    ("both", "small", lambda year: spoil_image(year, tiny(7, 40)),
     "000002.jpg: image of 7x40 pixels, expected 8 or more"),
    ("voc_seg", "size", lambda year: write_mask(year, TRAIN[1], np.zeros((30, 39), np.uint8)),
     "000002.png: mask of 30x39 pixels, its image has 30x40"),
    ("voc_seg", "ids", lambda year: write_mask(year, TRAIN[1], make_mask() * 2),
     r"000002.png: class numbers \[24, 40, 254\], expected 0 to 20 and 255"),
    ("voc_seg", "mode", lambda year: Image.new("RGB", (40, 30)).save(
        year / "SegmentationClass" / f"{TRAIN[1]}.png"),
     "000002.png: mask of mode RGB, expected class numbers of 8 bits"),
    ("voc_seg", "no mask", lambda year: (year / "SegmentationClass" / f"{TRAIN[1]}.png").unlink(),
     "000002.png: nothing there"),
    ("voc_seg", "bytes", lambda year: (year / "SegmentationClass" / f"{TRAIN[1]}.png").write_bytes(
        b"no image"), "000002.png: no readable mask"),
    ("voc_det", "xml", lambda year: (year / "Annotations" / f"{TRAIN[1]}.xml").write_text(
        "<annotation><object>"), "000002.xml: malformed XML"),
    ("voc_det", "no xml", lambda year: (year / "Annotations" / f"{TRAIN[1]}.xml").unlink(),
     "000002.xml: nothing there"),
    ("voc_det", "class", lambda year: write_xml(year, TRAIN[1], DOG, box(1, 1, 9, 9, "unicorn")),
     "000002.xml: object 2 is 'unicorn', expected one of aeroplane"),
    ("voc_det", "no box", lambda year: write_xml(
        year, TRAIN[1], "<object><name>cat</name></object>"),
     "000002.xml: object 1 has bndbox {'xmin': None"),
    ("voc_det", "number", lambda year: write_xml(year, TRAIN[1], DOG, box("one", 1, 9, 9)),  # type: ignore[arg-type]
     "000002.xml: object 2 has bndbox {'xmin': 'one'"),
    ("voc_det", "nan", lambda year: write_xml(year, TRAIN[1], box(float("nan"), 1, 9, 9)),
     "000002.xml: a box has coordinates that are not finite"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        pytest.param(name, spoil, message, id=f"{name} {what}")
        for which, what, spoil, message in BAD
        for name in (("voc_seg", "voc_det") if which == "both" else (which,))
    ],
)
def test_bad_samples_are_named_or_skipped(
    year: Path, tmp_path: Path, name: str, spoil: Callable[[Path], object], message: str
):
    spoil(year)
    converter, out = CONVERTERS[name], str(tmp_path / "out")
    with pytest.raises(DatasetError, match=message):
        convert(converter, converter.open(root=str(year)), out)
    assert not (tmp_path / "out" / "train").exists()
    result = convert(converter, converter.open(root=str(year)), out, on_bad_row="skip")
    assert result["train"].manifest.rows == 2
    assert len(result["train"].skipped) == 1
    assert TRAIN[1] in result["train"].skipped[0]


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "LA", "I;16"])
def test_images_of_any_mode(year: Path, mode: str):
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    picture = Image.fromarray(pixels)
    picture = (
        Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
        if mode == "I;16"
        else picture.convert(mode)
    )
    sink = io.BytesIO()
    picture.save(sink, "JPEG" if mode in ("L", "CMYK") else "PNG")
    spoil_image(year, sink.getvalue())
    for name in ("voc_seg", "voc_det"):
        row = rows(name, year)[1]
        assert row["image"] == sink.getvalue()
        assert (row["height"], row["width"]) == (30, 40)


def test_lists(year: Path):
    path = year / "ImageSets" / "Main" / "train.txt"
    path.write_text(f"{TRAIN[0]}  1\n{TRAIN[2]} -1\n")
    assert [row["id"] for row in rows("voc_det", year)] == [TRAIN[0], TRAIN[2]]
    for content, message in (
        ("", "train.txt: no image in it"),
        (f"{TRAIN[0]}\n{TRAIN[1]}\n{TRAIN[0]}\n", f"train.txt: {TRAIN[0]} is listed twice"),
        ("../secret\n", "train.txt: ../secret is no name of an image"),
    ):
        path.write_text(content)
        with pytest.raises(DatasetError, match=message):
            CONVERTERS["voc_det"].open(root=str(year))
    path.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(DatasetError, match="train.txt: not a text file"):
        CONVERTERS["voc_det"].open(root=str(year))
    path.unlink()
    with pytest.raises(DatasetError, match="train.txt: not found; VOC's lists"):
        CONVERTERS["voc_det"].open(root=str(year))


def test_the_year(year: Path, tmp_path: Path):
    kit = year.parent
    year.rename(kit / "VOC2007")
    source = CONVERTERS["voc_seg"].open(root=str(kit))
    assert source.notes == ("the year is VOC2007",)
    assert source.facts["root"].endswith("VOC2007")
    (kit / "VOC2009").mkdir()
    with pytest.raises(DatasetError, match="expected VOCdevkit or the folder of a year"):
        CONVERTERS["voc_seg"].open(root=str(kit))
    with pytest.raises(DatasetError, match="found nothing"):
        CONVERTERS["voc_seg"].open(root=str(tmp_path / "nowhere"))


def part_of(source: Source, step: int) -> Source:
    kept = {split: list(source.items(split))[::step] for split in source.splits}
    return Source(
        class_names=source.class_names,
        counts={split: len(items) for split, items in kept.items()},
        items=kept.__getitem__,
        read=source.read,
    )


def test_real_detection(real_data: Path):
    from xml.etree import ElementTree

    root = real_data / "VOCdevkit"
    source = CONVERTERS["voc_det"].open(root=str(root))
    assert source.counts == {"train": 311, "val": 321}
    boxes, difficult = {}, 0
    for split in source.splits:
        found = list(source.rows(split))
        boxes[split] = sum(len(row["boxes"]) for row in found)
        difficult += sum(row[TALLY]["difficult objects, kept"] for row in found)
        assert sum(row[TALLY]["boxes dropped (empty or outside their image)"] for row in found) == 0
        for row in found[::40]:
            tree = ElementTree.parse(root / "VOC2012" / "Annotations" / f"{row['id']}.xml")
            size = [int(tree.findtext(f"size/{side}", "0")) for side in ("height", "width")]
            assert size == [row["height"], row["width"]]
            assert [CLASS_NAMES[label] for label in row["box_labels"]] == [
                element.text for element in tree.findall("object/name")
            ]
    assert boxes == {"train": 899, "val": 923}
    assert difficult == 340


def test_real_segmentation(real_data: Path, tmp_path: Path):
    root = real_data / "VOCdevkit" / "VOC2012"
    source = CONVERTERS["voc_seg"].open(root=str(root))
    assert source.counts == {"train": 311, "val": 321}
    result = convert(CONVERTERS["voc_seg"], part_of(source, 8), str(tmp_path))
    classes = set()
    for split, part in result.items():
        for shard in part.manifest.shards:
            for row in ShardReader(tmp_path / split / shard.path).rows(range(shard.rows)):
                found = np.array(Image.open(io.BytesIO(row["mask"])))
                with Image.open(root / "SegmentationClass" / f"{row['id']}.png") as picture:
                    assert np.array_equal(found, np.array(picture))
                classes |= set(np.unique(found).tolist())
    assert classes == {*range(21), 255}
