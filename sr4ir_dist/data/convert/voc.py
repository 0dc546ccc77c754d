"""PASCAL VOC in its official layout (``VOCdevkit/VOC2012``), for segmentation and for detection."""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from xml.etree import ElementTree

from sr4ir_dist import storage
from sr4ir_dist.data.convert.annotated import read_class_numbers, with_boxes, with_mask
from sr4ir_dist.data.convert.source import (
    TALLY,
    Converter,
    ImageFile,
    Row,
    Source,
    read_file,
    read_image_file,
    read_lines,
)
from sr4ir_dist.data.schema import DatasetError

# In alphabetical order, which is that of the masks' palette: 1 is aeroplane.
CLASS_NAMES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
)  # fmt: skip
_LABELS = {name: label for label, name in enumerate(CLASS_NAMES)}
_CORNERS = ("xmin", "ymin", "xmax", "ymax")


@dataclass(frozen=True)
class _Sample:
    """A sample by its name in the lists, such as 2007_000032, and the year's folder."""

    folder: str
    name: str

    @property
    def image(self) -> ImageFile:
        return ImageFile(self.uri("JPEGImages", ".jpg"), self.name)

    def uri(self, kind: str, suffix: str) -> str:
        return storage.join(self.folder, kind, self.name + suffix)


def open_voc_seg(root: str) -> Source:
    """Open VOC's segmentation split.

    Args:
        root: ``VOCdevkit``, or a year's folder in it. Read are ``ImageSets/Segmentation``
            (``train.txt``, ``val.txt``), ``JPEGImages`` and ``SegmentationClass``.

    Returns:
        A source with the splits ``train`` and ``val``; masks keep their class numbers, 0 for the
        background and 255 for void.

    Raises:
        DatasetError: the layout is not as expected, or a list is missing, empty or malformed.
    """
    return _open(root, "Segmentation", _read_seg)


def open_voc_det(root: str) -> Source:
    """Open VOC's detection split.

    Args:
        root: ``VOCdevkit``, or a year's folder in it. Read are ``ImageSets/Main``
            (``train.txt``, ``val.txt``), ``JPEGImages`` and ``Annotations``.

    Returns:
        A source with the splits ``train`` and ``val``; objects marked difficult are kept like all
        others, as in the published conversion.

    Raises:
        DatasetError: the layout is not as expected, or a list is missing, empty or malformed.
    """
    return _open(root, "Main", _read_det)


def _open(root: str, lists: str, read: Callable[[_Sample], Row]) -> Source:
    folder, notes = _year_folder(root)
    samples = {
        split: [
            _Sample(folder, name)
            for name in _names(storage.join(folder, "ImageSets", lists, f"{split}.txt"))
        ]
        for split in ("train", "val")
    }
    return Source(
        class_names=CLASS_NAMES,
        counts={split: len(items) for split, items in samples.items()},
        items=samples.__getitem__,
        read=read,
        facts={"layout": f"PASCAL VOC, ImageSets/{lists}", "root": folder},
        notes=notes,
    )


def _year_folder(root: str) -> tuple[str, tuple[str, ...]]:
    """The folder of a year, and what to tell the user about its choice."""
    names = storage.list_names(root)
    if "ImageSets" in names:
        return root, ()
    years = [name for name in names if re.fullmatch(r"VOC\d{4}", name)]
    year = years[0] if len(years) == 1 else "VOC2012"
    if year not in years:
        raise DatasetError(
            f"{root}: expected VOCdevkit or the folder of a year, with ImageSets in it; "
            f"found {', '.join(names[:10]) or 'nothing'}"
        )
    return storage.join(root, year), (f"the year is {year}",)


def _names(uri: str) -> list[str]:
    """The samples' names in a list; a second column, as in the lists of a class, is left out."""
    lines = read_lines(uri, "VOC's lists must be there")
    names = [line.split()[0] for line in lines if line.strip()]
    if not names:
        raise DatasetError(f"{uri}: no image in it")
    if len(set(names)) < len(names):
        twice = Counter(names).most_common(1)[0][0]
        raise DatasetError(f"{uri}: {twice} is listed twice")
    outside = [name for name in names if "/" in name or "\\" in name or ".." in name]
    if outside:
        raise DatasetError(f"{uri}: {outside[0]} is no name of an image")
    return names


def _read_seg(sample: _Sample) -> Row:
    row = read_image_file(sample.image)
    uri = sample.uri("SegmentationClass", ".png")
    return with_mask(row, read_class_numbers(uri), len(CLASS_NAMES), uri)


def _read_det(sample: _Sample) -> Row:
    row = read_image_file(sample.image)
    uri = sample.uri("Annotations", ".xml")
    try:
        # Direct children only, throughout: a person's parts have names and boxes of their own.
        objects = ElementTree.fromstring(read_file(uri)).findall("object")
    except ElementTree.ParseError as error:
        raise DatasetError(f"{uri}: malformed XML: {error}") from error
    boxes, labels = [], []
    for number, element in enumerate(objects, 1):
        name = element.findtext("name", "").strip()
        if name not in _LABELS:
            raise DatasetError(
                f"{uri}: object {number} is {name!r}, expected one of {', '.join(CLASS_NAMES)}"
            )
        boxes.append(_box(element, f"{uri}: object {number}"))
        labels.append(_LABELS[name])
    row = with_boxes(row, boxes, labels, [False] * len(labels), uri)
    difficult = sum(element.findtext("difficult", "0").strip() == "1" for element in objects)
    return {**row, TALLY: {**row[TALLY], "difficult objects, kept": difficult}}


def _box(element: ElementTree.Element, where: str) -> tuple[float, float, float, float]:
    """An object's box: VOC counts pixels from 1 and includes the last one."""
    corners = element.find("bndbox")
    texts = [None if corners is None else corners.findtext(name) for name in _CORNERS]
    try:
        x0, y0, x1, y1 = (float(text or "") for text in texts)
    except ValueError:
        found = dict(zip(_CORNERS, texts, strict=True))
        raise DatasetError(f"{where} has bndbox {found}, expected four numbers") from None
    return x0 - 1, y0 - 1, x1, y1


_ROOT = (
    "--root is VOCdevkit, or a year's folder in it: the folder with ImageSets, JPEGImages, "
    "Annotations and SegmentationClass."
)
VOC_SEG = Converter(
    name="voc_seg",
    tasks=("images", "segmentation"),
    help="PASCAL VOC's segmentation split: 20 classes, masks with void edges.\n\n" + _ROOT,
    open=open_voc_seg,
    options={"root": "The source's folder."},
)
VOC_DET = Converter(
    name="voc_det",
    tasks=("images", "detection"),
    help="PASCAL VOC's detection split: 20 classes, difficult objects kept.\n\n" + _ROOT,
    open=open_voc_det,
    options={"root": "The source's folder."},
)
