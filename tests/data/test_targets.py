import io

import numpy as np
import pytest
import torch
from PIL import Image

from sr4ir_dist.data.targets import decode_mask, join_targets, read_target


def png(pixels: np.ndarray, mode: str | None = None) -> bytes:
    sink = io.BytesIO()
    picture = Image.fromarray(pixels)
    (picture.convert(mode) if mode else picture).save(sink, "PNG")
    return sink.getvalue()


def test_every_class_number_comes_back():
    numbers = np.arange(256, dtype=np.uint8).reshape(8, 32)
    mask = decode_mask(png(numbers))
    assert mask.dtype == torch.uint8
    assert torch.equal(mask, torch.from_numpy(numbers))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no readable mask"),
        (b"no image", "no readable mask"),
        (png(np.zeros((4, 4, 3), np.uint8)), "mode RGB, expected L"),
        (png(np.zeros((4, 4), np.uint16)), "expected L"),
        (png(np.zeros((4, 4), np.uint8), "P"), "mode P, expected L"),
        (png(np.eye(64, dtype=np.uint8))[:70], "no readable mask"),
    ],
)
def test_masks_that_are_none(data, message):
    with pytest.raises(ValueError, match=message):
        decode_mask(data)


def test_boxes_are_numbered_from_one():
    record = {"boxes": [[1, 2, 3.5, 4], [0, 0, 9, 9]], "box_labels": [0, 2], "crowd": [False, True]}
    target = read_target(record, "boxes", 71)
    assert target["boxes"].tolist() == [[1, 2, 3.5, 4], [0, 0, 9, 9]]
    assert target["labels"].tolist() == [1, 3]
    assert target["crowd"].tolist() == [False, True]
    assert target["image_id"].tolist() == [71]
    kinds = {name: value.dtype for name, value in target.items()}
    assert kinds == {
        "boxes": torch.float32,
        "labels": torch.int64,
        "crowd": torch.bool,
        "image_id": torch.int64,
    }


def test_an_image_without_objects_has_empty_boxes():
    target = read_target({"boxes": [], "box_labels": [], "crowd": []}, "boxes", 0)
    assert target["boxes"].shape == (0, 4)
    assert target["labels"].shape == target["crowd"].shape == (0,)
    assert (target["labels"].dtype, target["crowd"].dtype) == (torch.int64, torch.bool)


def test_masks_are_joined_with_void_beyond_the_image():
    masks = [torch.full((3, 5), 1, dtype=torch.uint8), torch.full((4, 2), 2, dtype=torch.uint8)]
    joined = join_targets(masks, "mask", 4, 6)
    assert joined.shape == (2, 4, 6)
    assert joined.dtype == torch.uint8
    for mask, (height, width), number in zip(joined, ((3, 5), (4, 2)), (1, 2), strict=True):
        assert (mask[:height, :width] == number).all()
        assert int((mask == 255).sum()) == 24 - height * width


def test_nothing_is_joined_to_empty_targets():
    assert join_targets([], "mask", 12, 16).shape == (0, 12, 16)
    assert join_targets([], "mask", 12, 16).dtype == torch.uint8
    assert join_targets([], "boxes", 12, 16) == ()
    assert join_targets([], "label", 12, 16).dtype == torch.int64
    assert join_targets([None], None, 12, 16) is None
