import io

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from sr4ir_dist.data.transforms import PatchCrop, ResizeCrop, decode, replicate_to


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
    [(True, ResizeCrop, 3), (False, ResizeCrop, 0), (True, PatchCrop, 5), (False, PatchCrop, 0)],
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
