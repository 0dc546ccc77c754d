import io
import threading
from collections.abc import Callable

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from sr4ir_dist.data.targets import join_targets
from sr4ir_dist.data.transforms import (
    Flip,
    PatchCrop,
    ResizeCrop,
    decode,
    replicate_into,
    replicate_to,
)


def smooth(height: int, width: int, seed: int = 0) -> torch.Tensor:
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    picture = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def coordinates(height: int, width: int) -> torch.Tensor:
    """An image whose channels are 7, the row and the column."""
    row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.full_like(row, 7), row, column]).to(torch.uint8)


def draws(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


NONE = draws()
LAST = 1 - 2**-53


@pytest.mark.parametrize("size", [(333, 517), (517, 333), (200, 900), (256, 300), (256, 256)])
def test_resize_equals_pillow_within_one_grey_level(size):
    image = smooth(*size)
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    expected = v2.functional.pil_to_tensor(
        v2.functional.center_crop(v2.functional.resize(picture, [256]), [224, 224])
    )
    result, target = ResizeCrop(256, 224)(image, 5, NONE)
    assert result.dtype == torch.uint8
    assert result.shape == (3, 224, 224)
    assert target == 5
    assert (result.int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize("size", [(9, 14), (10, 10), (12, 9), (9, 11)])
def test_centre_crop_rounds_like_torchvision(size):
    image = coordinates(*size)
    transform = ResizeCrop(min(size), 6)
    expected = v2.functional.center_crop(image, [6, 6])
    assert torch.equal(transform(image, None, NONE)[0], expected)


def test_random_crop_reaches_every_place_and_no_other():
    transform = ResizeCrop(8, 6, train=True)
    image = coordinates(8, 10)
    seen = set()
    for top in (0.0, 0.34, 0.67, LAST):
        for left in (0.0, 0.21, 0.41, 0.61, LAST):
            patch = transform(image, None, draws(top, left, 0.5))[0]
            first = patch[1:, 0, 0].tolist()
            assert torch.equal(patch, image[:, first[0] : first[0] + 6, first[1] : first[1] + 6])
            seen.add(tuple(first))
    assert seen == {(row, column) for row in range(3) for column in range(5)}
    mirrored = transform(image, None, draws(0, 0, 0.49))[0]
    assert torch.equal(mirrored, image[:, :6, :6].flip(-1))


def random_mask(height: int, width: int) -> torch.Tensor:
    """Random class numbers: every pixel tells where it came from."""
    numbers = np.random.default_rng(height * width).integers(0, 256, (height, width), np.uint8)
    return torch.from_numpy(numbers)


@pytest.mark.parametrize(
    "size", [(375, 500), (500, 375), (333, 500), (512, 700), (1040, 1300), (64, 90), (520, 600)]
)
def test_masks_are_resized_as_pillow_does(size):
    mask = random_mask(*size)
    transform = ResizeCrop(520, 480, center_crop=False)
    image, resized = transform(smooth(*size), mask, NONE)
    assert min(image.shape[-2:]) == 520
    assert resized.shape == image.shape[-2:]
    picture = Image.fromarray(mask.numpy())
    expected = v2.functional.resize(picture, [520], v2.InterpolationMode.NEAREST)
    assert torch.equal(resized, torch.from_numpy(np.array(expected)))


def test_masks_are_cropped_and_mirrored_like_their_image():
    image = coordinates(40, 60)
    mask = image[2] + 100 * (image[1] % 2)
    for transform, numbers in (
        (ResizeCrop(40, 24), ()),
        (ResizeCrop(40, 24, train=True), (0.3, 0.8, 0.9)),
        (ResizeCrop(40, 24, train=True), (0.9, 0.1, 0.1)),
    ):
        cut, cut_mask = transform(image, mask, draws(*numbers))
        assert cut_mask.shape == (24, 24)
        assert torch.equal(cut_mask, cut[2] + 100 * (cut[1] % 2))
    kept, kept_mask = ResizeCrop(40, 24, center_crop=False)(image, mask, NONE)
    assert torch.equal(kept, image)
    assert torch.equal(kept_mask, mask)


def test_resized_mask_stays_with_its_image():
    # A bright disc on black, and its mask: after any transform the mask says where it is bright.
    y, x = torch.meshgrid(torch.arange(90), torch.arange(130), indexing="ij")
    mask = ((y - 40) ** 2 + (x - 70) ** 2 < 30**2).to(torch.uint8)
    image = (mask * 255).expand(3, -1, -1).contiguous()
    for train, numbers in ((True, (0.7, 0.2, 0.1)), (True, (0.1, 0.9, 0.8)), (False, ())):
        result, found = ResizeCrop(120, 100, train=train)(image, mask, draws(*numbers))
        assert ((result[0] > 127) != (found == 1)).float().mean() < 0.01
        assert 0.2 < found.float().mean() < 0.8


def test_a_mask_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"mask has size \(30, 40\), its image \(30, 41\)"):
        ResizeCrop(20, 16)(smooth(32, 48)[:, :30, :41], random_mask(30, 40), NONE)


def detection_target(boxes: list[list[float]]) -> dict[str, torch.Tensor]:
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.arange(len(boxes)) + 1,
        "crowd": torch.zeros(len(boxes), dtype=torch.bool),
        "image_id": torch.tensor([3]),
    }


def test_flip_mirrors_boxes_with_their_image():
    image = torch.zeros(3, 20, 33, dtype=torch.uint8)
    image[:, 4:9, 2:12] = 255
    target = detection_target([[2, 4, 12, 9], [0, 0, 33, 20], [32.5, 0, 33, 0.5]])
    mirrored, found = Flip(train=True)(image, target, draws(0.49))
    assert found["boxes"].tolist() == [[21, 4, 31, 9], [0, 0, 33, 20], [0, 0, 0.5, 0.5]]
    assert (mirrored[:, 4:9, 21:31] == 255).all()
    assert int(mirrored.sum()) == int(image.sum())
    for name in ("labels", "crowd", "image_id"):
        assert torch.equal(found[name], target[name])
    assert target["boxes"][0].tolist() == [2, 4, 12, 9]
    again, back = Flip(train=True)(mirrored, found, draws(0.0))
    assert torch.equal(again, image)
    assert torch.equal(back["boxes"], target["boxes"])


def test_no_box_leaves_the_image_or_loses_its_extent():
    rng = np.random.default_rng(0)
    for width in rng.integers(8, 8000, 50).tolist():
        corners = np.sort(rng.uniform(0, width, (200, 2)).astype(np.float32), axis=1)
        corners[:, 1] = np.maximum(corners[:, 1], corners[:, 0] + np.float32(0.1)).clip(max=width)
        corners[:, 0] = np.minimum(corners[:, 0], corners[:, 1] - np.float32(0.1))
        corners[0], corners[1] = (0, width), (0, 0.1)
        boxes = np.stack(
            [corners[:, 0], corners[:, 0] * 0, corners[:, 1], corners[:, 0] * 0 + 8], 1
        )
        image = torch.zeros(3, 8, width, dtype=torch.uint8)
        found = Flip(train=True)(image, detection_target(boxes.tolist()), draws(0))[1]["boxes"]
        assert found[:, 0].min() >= 0
        assert found[:, 2].max() <= width
        assert (found[:, 2] > found[:, 0]).all()


def test_flip_keeps_the_rest():
    image, target = coordinates(20, 33), detection_target([])
    assert Flip(train=True)(image, target, draws(0.5)) == (image, target)
    assert Flip()(image, target, NONE) == (image, target)
    mirrored, found = Flip(train=True)(image, target, draws(0))
    assert found["boxes"].shape == (0, 4)
    assert torch.equal(mirrored, image.flip(-1))
    assert torch.equal(Flip(train=True)(image, None, draws(0))[0], mirrored)


def test_patch_has_eight_symmetries():
    transform = PatchCrop(4, 2, train=True)
    image = torch.arange(48, dtype=torch.uint8).view(3, 4, 4)
    patches = [
        transform(image, None, draws(0.3, 0.3, a, b, c))[0]
        for a in (0.2, 0.7)
        for b in (0.2, 0.7)
        for c in (0.2, 0.7)
    ]
    assert len({tuple(patch.flatten().tolist()) for patch in patches}) == 8
    turned = [torch.rot90(base, k, (1, 2)) for base in (image, image.flip(-1)) for k in range(4)]
    assert all(any(torch.equal(patch, want) for want in turned) for patch in patches)


def test_patch_lies_anywhere():
    transform = PatchCrop(8, 4, train=True)
    image = coordinates(11, 13)
    for top, left, row, column in ((0.0, 0.0, 0, 0), (LAST, LAST, 3, 5), (0.3, 0.5, 1, 3)):
        patch = transform(image, None, draws(top, left, 0.9, 0.9, 0.9))[0]
        assert torch.equal(patch, image[:, row : row + 8, column : column + 8])


def test_small_image_is_extended_by_its_edge():
    patch = PatchCrop(8, 4, train=True)(coordinates(5, 20), None, draws(0.5, 0, 0.9, 0.9, 0.9))[0]
    assert patch[1, :, 0].tolist() == [0, 1, 2, 3, 4, 4, 4, 4]
    assert patch[2, 0].tolist() == list(range(8))


def test_evaluation_cuts_to_a_multiple_of_scale():
    image = coordinates(11, 13)
    assert torch.equal(PatchCrop(8, 4)(image, None, NONE)[0], image[:, :8, :12])
    with pytest.raises(ValueError, match=r"image of \(3, 13\) is below scale 4"):
        PatchCrop(8, 4)(image[:, :3], None, NONE)


def test_replicate_to_keeps_what_fits():
    image = coordinates(5, 6)
    assert replicate_to(image, 5, 6) is image
    assert replicate_to(image, 7, 6)[1, :, 0].tolist() == [0, 1, 2, 3, 4, 4, 4]


@pytest.mark.parametrize(
    ("train", "transform", "count"),
    [
        (True, ResizeCrop, 3),
        (False, ResizeCrop, 0),
        (True, PatchCrop, 5),
        (False, PatchCrop, 0),
        (True, Flip, 1),
        (False, Flip, 0),
    ],
)
def test_draws_are_told(train, transform, count):
    assert transform(train=train).draws == count


def test_bad_sizes():
    with pytest.raises(ValueError, match=r"crop must be in 1..resize \(256\), got 257"):
        ResizeCrop(256, 257)
    with pytest.raises(ValueError, match=r"crop must be a multiple of scale \(4\), got 190"):
        PatchCrop(190, 4)
    with pytest.raises(ValueError, match="scale must be 1 or more, got 0"):
        PatchCrop(192, 0)


def encoded(picture: Image.Image, kind: str) -> bytes:
    sink = io.BytesIO()
    picture.save(sink, kind)
    return sink.getvalue()


# What each format can hold.
MODES = {
    "PNG": ("RGB", "L", "P", "RGBA", "LA", "1"),
    "BMP": ("RGB", "L", "P", "RGBA", "1"),
    "TIFF": ("RGB", "L", "CMYK", "P", "RGBA", "LA", "1"),
    "WEBP": ("RGB", "L", "RGBA"),
    "JPEG": ("RGB", "L", "CMYK", "1"),
    "GIF": ("RGB", "L", "P", "RGBA", "1"),
}


@pytest.mark.parametrize(
    ("kind", "mode"), [(kind, mode) for kind, modes in MODES.items() for mode in modes]
)
def test_decoding_equals_pillow(kind, mode):
    picture = Image.fromarray(smooth(40, 56).permute(1, 2, 0).numpy()).convert(mode)
    data = encoded(picture, kind)
    expected = np.array(Image.open(io.BytesIO(data)).convert("RGB"))
    result = decode(data)
    assert result.dtype == torch.uint8
    assert result.permute(1, 2, 0).numpy().tolist() == expected.tolist()


def test_sixteen_bits_become_eight():
    grey = np.arange(64, dtype=np.uint16).reshape(8, 8) * 4 * 257
    result = decode(encoded(Image.fromarray(grey), "PNG"))
    assert result.dtype == torch.uint8
    assert result[1].tolist() == (np.arange(64).reshape(8, 8) * 4).tolist()


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_grey_of_any_format(kind):
    grey = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    result = decode(encoded(Image.fromarray(grey), kind))
    expected = (grey / 257).round().astype(np.uint8)
    assert result.tolist() == [expected.tolist()] * 3


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_thirty_two_bits_are_refused(dtype):
    data = encoded(Image.fromarray(np.ones((8, 8), dtype)), "TIFF")
    with pytest.raises(ValueError, match="no readable image: 32-bit pixels"):
        decode(data)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_first_frame_of_an_animation(kind):
    first = Image.fromarray(smooth(40, 56).permute(1, 2, 0).numpy())
    sink = io.BytesIO()
    first.save(sink, kind, save_all=True, append_images=[first.rotate(180)], lossless=True)
    expected = np.array(Image.open(io.BytesIO(sink.getvalue())).convert("RGB"))
    assert decode(sink.getvalue()).permute(1, 2, 0).numpy().tolist() == expected.tolist()


@pytest.mark.parametrize("data", [b"", b"no image"])
def test_unreadable_bytes(data):
    with pytest.raises(ValueError, match="no readable image"):
        decode(data)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_truncated_image(kind):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    data = encoded(Image.fromarray(noise), kind)
    with pytest.raises(ValueError, match="no readable image"):
        decode(data[: len(data) // 2])


def test_joining_a_batch_wakes_no_other_threads():
    # torch would copy each image by all of its threads, which spin in between: they took half of
    # the time of those that decode.
    images = [torch.zeros(300, 400, 3, dtype=torch.uint8).permute(2, 0, 1) for _ in range(4)]
    hr = torch.empty(4, 400, 400, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    process = psutil.Process()

    def started(work: Callable[[], object]) -> int:
        """How many threads a new thread needs for the work."""
        counts = []

        def count() -> None:
            torch.set_num_threads(4)
            before = process.num_threads()
            work()
            counts.append(process.num_threads() - before)

        thread = threading.Thread(target=count)
        thread.start()
        thread.join()
        return counts[0]

    def join() -> None:
        for canvas, image in zip(hr, images, strict=True):
            replicate_into(canvas, image)
        join_targets([image[0] for image in images], "mask", 400, 400)

    assert started(join) == 0
    assert started(lambda: hr + 1) == 3
