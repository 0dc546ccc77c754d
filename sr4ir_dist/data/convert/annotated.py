"""What the rows of all annotated sources go through: sizes, masks and boxes that can be trained on.

What is found wrong here is a bad row of the conversion, so that nothing fails in mid-training.
"""

import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from sr4ir_dist.data.convert.source import TALLY, Row, read_file
from sr4ir_dist.data.schema import VOID, DatasetError, clip_boxes


def read_class_numbers(uri: str) -> NDArray[np.uint8]:
    """The class numbers in a mask's file: the palette's indices, or grey values.

    Raises:
        DatasetError: the file is missing, does not decode, or has no 8-bit class numbers.
        StorageError: the storage did not answer.
    """
    data = read_file(uri)
    try:
        with Image.open(io.BytesIO(data)) as picture:
            if picture.mode not in ("P", "L", "1"):
                raise DatasetError(
                    f"{uri}: mask of mode {picture.mode}, expected class numbers of 8 bits "
                    "(a palette or a grey image)"
                )
            return np.array(picture).astype(np.uint8)
    except DatasetError:
        raise
    # Damaged files make Pillow's readers raise almost anything.
    except Exception as error:
        raise DatasetError(f"{uri}: no readable mask: {str(error).split(' <')[0]}") from error


def with_mask(row: Row, mask: NDArray[np.uint8], classes: int, where: str) -> Row:
    """A row with its mask.

    Args:
        row: of ``read_image_file``.
        mask: H,W: 0 background, 1 to ``classes``, 255 void.
        classes: how many classes there are besides the background.
        where: the mask's file, for messages.

    Raises:
        DatasetError: the mask has another size than the image, or other class numbers.
    """
    if mask.shape != (row["height"], row["width"]):
        raise DatasetError(
            f"{where}: mask of {'x'.join(map(str, mask.shape))} pixels, its image has "
            f"{row['height']}x{row['width']}"
        )
    found = np.flatnonzero(np.bincount(mask.ravel(), minlength=256))
    wrong = [int(number) for number in found if number > classes and number != VOID]
    if wrong:
        raise DatasetError(
            f"{where}: class numbers {wrong[:10]}, expected 0 to {classes} and {VOID} (void)"
        )
    sink = io.BytesIO()
    Image.fromarray(mask).save(sink, "PNG")
    empty = not any(0 < number < VOID for number in found)
    return {**row, "mask": sink.getvalue(), TALLY: {"images without objects": int(empty)}}


def with_boxes(
    row: Row, boxes: ArrayLike, labels: Sequence[int], crowd: Sequence[bool], where: str
) -> Row:
    """A row with its boxes, cut to the image; what is left of none is dropped and counted.

    Args:
        row: of ``read_image_file``.
        boxes: n x 4: x0, y0, x1, y1 in pixels.
        labels: each box's class, from 0.
        crowd: whether each box is around many objects.
        where: the annotation's file, for messages.

    Raises:
        DatasetError: a coordinate is not finite.
    """
    given = np.asarray(boxes, np.float64).reshape(-1, 4)
    if not np.isfinite(given).all():
        raise DatasetError(f"{where}: a box has coordinates that are not finite")
    clipped, kept = clip_boxes(given, row["height"], row["width"])
    cut = kept & (np.abs(clipped - given) > 1e-3).any(axis=1)
    return {
        **row,
        "boxes": clipped[kept].tolist(),
        "box_labels": [label for label, keep in zip(labels, kept, strict=True) if keep],
        "crowd": [flag for flag, keep in zip(crowd, kept, strict=True) if keep],
        TALLY: {
            "boxes": int(kept.sum()),
            "boxes cut to their image": int(cut.sum()),
            "boxes dropped (empty or outside their image)": int((~kept).sum()),
            "images without objects": int(not kept.any()),
        },
    }
