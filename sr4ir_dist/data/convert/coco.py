"""Datasets in COCO's format: JSON of images, categories and instances, for both dense tasks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from json import loads
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as rle

from sr4ir_dist import storage
from sr4ir_dist.data.convert.annotated import with_boxes, with_mask
from sr4ir_dist.data.convert.source import Converter, ImageFile, Row, Source, read_image_file
from sr4ir_dist.data.schema import VOID, DatasetError

_SPLITS = ("train", "val")


@dataclass(frozen=True)
class _Sample:
    """An image with its annotations as they stand in the JSON."""

    uri: str
    name: str
    height: int
    width: int
    annotations: tuple[dict[str, Any], ...]
    json: str  # where the annotations are from, for messages


@dataclass(frozen=True)
class _Annotations:
    """One split's JSON."""

    categories: dict[int, str]
    samples: list[_Sample]


def open_coco_det(
    root: str | None = None,
    train_annotations: str | None = None,
    val_annotations: str | None = None,
    train_images: str | None = None,
    val_images: str | None = None,
) -> Source:
    """Open boxes in COCO's format.

    Args:
        root: the folder with ``annotations/instances_{train,val}2017.json``, ``train2017/`` and
            ``val2017/``; not needed when all others are given.
        train_annotations: the train split's JSON, instead of the one in ``root``.
        val_annotations: the same for val.
        train_images: the folder of the train split's images, instead of the one in ``root``.
        val_images: the same for val.

    Returns:
        A source with the splits ``train`` and ``val``. Category ids, which may have gaps, become
        labels in the order of the ids; ``iscrowd`` is kept.

    Raises:
        DatasetError: the layout is not as expected, or a JSON is malformed.
    """
    places = _places(root, train_annotations, val_annotations, train_images, val_images)
    return _open(places, "segmentation", _read_det)


def open_coco_seg(
    root: str | None = None,
    train_annotations: str | None = None,
    val_annotations: str | None = None,
    train_images: str | None = None,
    val_images: str | None = None,
) -> Source:
    """Open masks drawn from the instances in COCO's format.

    Where instances overlap, the smaller one is seen. Regions marked ``iscrowd`` are void, except
    where an instance lies on them.

    Args:
        root: as in ``open_coco_det``, like all others.
        train_annotations: the train split's JSON.
        val_annotations: the val split's JSON.
        train_images: the folder of the train split's images.
        val_images: the folder of the val split's images.

    Returns:
        A source with the splits ``train`` and ``val``; class numbers in masks are 1 and up in the
        order of the category ids, 0 is what no instance covers.

    Raises:
        DatasetError: the layout is not as expected, a JSON is malformed, or there are more
            classes than a mask can hold.
    """
    places = _places(root, train_annotations, val_annotations, train_images, val_images)
    source = _open(places, "bbox", _read_seg)
    if len(source.class_names) >= VOID:
        raise DatasetError(
            f"{places['train'][0]}: {len(source.class_names)} categories, a mask holds {VOID - 1}"
        )
    return source


def _places(root: str | None, *given: str | None) -> dict[str, tuple[str, str]]:
    """Each split's JSON and folder of images."""
    names = ("train-annotations", "val-annotations", "train-images", "val-images")
    parts = [("annotations", f"instances_{split}2017.json") for split in _SPLITS]
    parts += [(f"{split}2017",) for split in _SPLITS]
    places = []
    for name, uri, standard in zip(names, given, parts, strict=True):
        if uri is None and root is None:
            raise DatasetError(f"--{name} is missing: it is needed where there is no --root")
        places.append(storage.join(root, *standard) if uri is None and root is not None else uri)
    return {"train": (places[0], places[2]), "val": (places[1], places[3])}


def _open(
    places: dict[str, tuple[str, str]],
    unused: str,
    read: Callable[[_Sample, Sequence[int]], Row],
) -> Source:
    parts = {split: _load(json, images, unused) for split, (json, images) in places.items()}
    categories = parts["train"].categories
    if parts["val"].categories != categories:
        odd = sorted({*parts["val"].categories.items()} ^ {*categories.items()})[:5]
        raise DatasetError(
            f"{places['val'][0]}: categories differ from those of {places['train'][0]}: {odd}"
        )
    ids = sorted(categories)
    return Source(
        class_names=tuple(categories[key] for key in ids),
        counts={split: len(part.samples) for split, part in parts.items()},
        items=lambda split: parts[split].samples,
        read=lambda sample: read(sample, ids),
        facts={
            "layout": "COCO",
            "annotations": {split: json for split, (json, _) in places.items()},
            "images": {split: images for split, (_, images) in places.items()},
            "category_ids": ids,
        },
    )


def _load(json: str, images: str, unused: str) -> _Annotations:
    """Reads a split's JSON; ``unused`` is a key of annotations to let go of, to save memory."""
    try:
        # Not storage's reader, for the 448 MB of COCO's own file are more than it takes.
        content = loads(storage.read_bytes(json))
    except storage.StorageError as error:
        raise DatasetError(str(error)) from error
    except ValueError as error:
        raise DatasetError(f"{json}: not valid JSON: {error}") from error
    try:
        categories = {int(item["id"]): str(item["name"]) for item in content["categories"]}
        annotations: dict[Any, list[dict[str, Any]]] = {
            item["id"]: [] for item in content["images"]
        }
        for item in content["annotations"]:
            item.pop(unused, None)
            annotations[item["image_id"]].append(item)
        samples = [
            _Sample(
                storage.join(images, item["file_name"]),
                str(item["file_name"]),
                int(item["height"]),
                int(item["width"]),
                tuple(annotations[item["id"]]),
                json,
            )
            for item in content["images"]
        ]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DatasetError(
            f"{json}: not in COCO's format: {type(error).__name__}: {error}"
        ) from error
    names = [sample.name for sample in samples]
    outside = [name for name in names if name.startswith("/") or ".." in PurePosixPath(name).parts]
    problems = (
        (not categories, "no categories"),
        (not samples, "no images"),
        (len({*categories.values()}) < len(content["categories"]), "a category is there twice"),
        (len({*names}) < len(names) or len(annotations) < len(names), "an image is there twice"),
        (outside, f"file_name {outside[:1]} leaves the folder of images"),
    )
    for found, problem in problems:
        if found:
            raise DatasetError(f"{json}: {problem}")
    return _Annotations(categories, samples)


def _read_image(sample: _Sample) -> Row:
    row = read_image_file(ImageFile(sample.uri, sample.name))
    if (row["height"], row["width"]) != (sample.height, sample.width):
        raise DatasetError(
            f"{sample.uri}: image of {row['height']}x{row['width']} pixels, but {sample.json} says "
            f"{sample.height}x{sample.width}"
        )
    return row


def _read_det(sample: _Sample, ids: Sequence[int]) -> Row:
    row = _read_image(sample)
    boxes, labels, crowd = [], [], []
    for item in sample.annotations:
        where = _where(sample, item)
        labels.append(_label(item, ids, where))
        crowd.append(bool(item.get("iscrowd", 0)))
        try:
            x, y, width, height = (float(number) for number in item["bbox"])
        except (KeyError, TypeError, ValueError):
            found = item.get("bbox")
            raise DatasetError(f"{where}: bbox is {found!r}, expected four numbers") from None
        boxes.append((x, y, x + width, y + height))
    return with_boxes(row, boxes, labels, crowd, f"{sample.json}: {sample.name}")


def _read_seg(sample: _Sample, ids: Sequence[int]) -> Row:
    row = _read_image(sample)
    void = np.zeros((sample.height, sample.width), bool)
    drawn: list[tuple[int, int, NDArray[np.bool_]]] = []
    for item in sample.annotations:
        where = _where(sample, item)
        number = _label(item, ids, where) + 1
        covered = _rasterized(item.get("segmentation"), sample.height, sample.width, where)
        if item.get("iscrowd", 0):
            void |= covered
        else:
            drawn.append((int(covered.sum()), number, covered))
    mask = np.where(void, VOID, 0).astype(np.uint8)
    for _, number, covered in sorted(drawn, key=lambda one: -one[0]):
        mask[covered] = number
    return with_mask(row, mask, len(ids), f"{sample.json}: {sample.name}")


def _where(sample: _Sample, item: dict[str, Any]) -> str:
    return f"{sample.json}: annotation {item.get('id')} of {sample.name}"


def _label(item: dict[str, Any], ids: Sequence[int], where: str) -> int:
    if item.get("category_id") not in ids:
        raise DatasetError(f"{where}: category_id {item.get('category_id')!r} is no category")
    return ids.index(item["category_id"])


def _rasterized(value: Any, height: int, width: int, where: str) -> NDArray[np.bool_]:
    """The pixels that polygons or a run-length code cover."""
    try:
        if isinstance(value, dict):
            size, counts = list(value["size"]), value["counts"]
        else:
            code: Any = rle.merge(rle.frPyObjects(_polygons(value, height, width), height, width))
            size, counts = list(code["size"]), code["counts"].decode()
        if isinstance(counts, str):
            counts = _counts(counts)
        if size != [height, width] or min(counts) < 0 or sum(counts) != height * width:
            raise ValueError(f"size {size}, {sum(counts)} pixels, expected {[height, width]}")
    # pycocotools raises bare exceptions of several kinds.
    except Exception as error:
        raise DatasetError(f"{where}: malformed segmentation: {error}") from error
    # Runs go down the columns; the first one is not covered.
    return np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(width, height).T


def _counts(text: str) -> list[int]:
    """The runs in COCO's compressed code.

    pycocotools' own reader leaves pixels that a malformed code does not cover as they were in
    memory, and warns with numpy 2. Each run is a number in signed groups of five bits, as the
    difference to the run before the last one from the fourth on.
    """
    counts: list[int] = []
    value = shift = 0
    for byte in text.encode():
        group = byte - 48
        value |= (group & 31) << shift
        shift += 5
        if not group & 32:
            value -= (1 << shift) if group & 16 else 0
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    return counts


def _polygons(value: Any, height: int, width: int) -> Any:
    polygons = [[float(number) for number in polygon] for polygon in value]
    if not polygons or any(len(one) < 6 or len(one) % 2 for one in polygons):
        raise ValueError("expected polygons of three points or more")
    # pycocotools walks every polygon's edge in C: no infinite or endless walks.
    side = max(height, width)
    if not all(-side <= number <= 2 * side for one in polygons for number in one):
        raise ValueError("a point far outside the image")
    return polygons


_ROOT = (
    "--root has annotations/instances_train2017.json, annotations/instances_val2017.json, "
    "train2017/ and val2017/; any of the four may be given instead, for sets of one's own."
)
_OPTIONS = {
    "root": "The source's folder; not needed with the four places below.",
    "train_annotations": "The train split's JSON.",
    "val_annotations": "The val split's JSON.",
    "train_images": "The folder of the train split's images.",
    "val_images": "The folder of the val split's images.",
}
COCO_DET = Converter(
    name="coco_det",
    tasks=("images", "detection"),
    help="Boxes in COCO's format (instances_train2017.json and the like).\n\n" + _ROOT,
    open=open_coco_det,
    options=_OPTIONS,
)
COCO_SEG = Converter(
    name="coco_seg",
    tasks=("images", "segmentation"),
    help="Masks drawn from instances in COCO's format.\n\n" + _ROOT,
    open=open_coco_seg,
    options=_OPTIONS,
)
