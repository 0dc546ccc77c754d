"""From a stored image to what the step sees, on bytes (uint8), so that HR stays on the 8-bit grid.

A transform is a frozen dataclass that says how many random numbers a sample needs (`draws`) and
is called with them: it holds no generator, so a sample's augmentation depends on its key alone.
"""

import io
import math
import struct
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode
from torchvision.transforms.v2 import functional

from sr4ir_dist.data.targets import Target


class Transform(Protocol):
    """What the loader asks of a transform.

    Attributes:
        targets: the kinds of targets that it can transform.
    """

    targets: ClassVar[tuple[Target, ...]]

    @property
    def draws(self) -> int:
        """How many uniform numbers a sample needs."""
        ...

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of a result; of an empty share where results differ in size."""
        ...

    def __call__(self, image: Tensor, target: Any, draws: Tensor) -> tuple[Tensor, Any]:
        """Transforms one sample.

        Args:
            image: uint8 3,H,W.
            target: what belongs to the image, of a kind in `targets`; see `targets.read_target`.
                Labels and None pass unchanged.
            draws: float64 1-D, `self.draws` numbers in [0,1).

        Returns:
            The new image, uint8 3,H',W', and its target.
        """
        ...


MOST_PIXELS = 1 << 27
"""Of an image that is decoded; a few bytes may claim billions of them."""
_JPEG, _PNG = b"\xff\xd8", b"\x89PNG\r\n\x1a\n"


def decode(data: bytes | memoryview) -> Tensor:
    """Decodes an image file.

    Args:
        data: the file's bytes: JPEG, PNG, WebP, GIF (first frame), or what else Pillow reads.

    Returns:
        uint8 RGB tensor 3,H,W. Alpha is dropped, grey is repeated, 16-bit values are rounded to
        8 bits, of an animation the first frame is taken; the orientation tag is not applied, as
        in the published evaluations.

    Raises:
        ValueError: the bytes are no readable image, it has more than `MOST_PIXELS`, or its pixels
            are 32-bit numbers, of which nothing says which are black and white.
    """
    height, width = _size(data)
    if height * width > MOST_PIXELS:
        raise ValueError(f"{width} x {height} pixels, more than the {MOST_PIXELS:,} that are read")
    try:
        # Arrow's way to a tensor copies nothing, and nothing is written to the tensor.
        buffers = [None, pa.py_buffer(data)]
        encoded = torch.from_dlpack(pa.Array.from_buffers(pa.uint8(), len(data), buffers))
        # The operator behind torchvision.io.decode_image, whose wrapper warns at every call.
        image = torch.ops.image.decode_image(encoded, ImageReadMode.RGB.value, False)
    except (RuntimeError, ValueError):
        image = None
    if image is not None and image.dim() == 3:
        if image.dtype == torch.uint16:
            return (image.to(torch.float32) / 257).round().to(torch.uint8)
        return image
    try:
        with Image.open(io.BytesIO(data)) as picture:
            picture.load()
            pixels = _rgb(picture)
    # Damaged files make Pillow's many readers raise almost anything.
    except Exception as error:
        raise ValueError(f"no readable image: {error}") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _size(data: bytes | memoryview) -> tuple[int, int]:
    """Height and width that an image file claims; Pillow would take a tenth of the decoding."""
    try:
        if data[:8] == _PNG:
            width, height = struct.unpack_from(">II", data, 16)
            return height, width
        at = 2
        while data[:2] == _JPEG:
            marker, kind, length = struct.unpack_from(">BBH", data, at)
            if marker != 0xFF or not 0xC0 <= kind <= 0xFE:
                break
            if kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC):  # a start of frame
                return struct.unpack_from(">HH", data, at + 5)
            at += 2 + length
    except struct.error:
        pass
    try:
        with Image.open(io.BytesIO(data)) as picture:
            return picture.size[1], picture.size[0]
    except Exception as error:
        raise ValueError(f"no readable image: {error}") from error


def _rgb(picture: Image.Image) -> np.ndarray:
    """Pixels of a picture of any mode, uint8 H,W,3."""
    if picture.mode in ("I", "F"):
        raise ValueError(f"32-bit pixels (mode {picture.mode}), expected 8 or 16 bits")
    if picture.mode.startswith("I;16"):  # which Pillow's own conversion would clip to 8 bits
        grey = (np.asarray(picture).astype(np.float32) / 257).round().astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    return np.array(picture.convert("RGB"))


@dataclass(frozen=True)
class ResizeCrop:
    """Classification's and segmentation's transform: short side to `resize`, then a square crop.

    Training crops at random and mirrors half of the images; evaluation crops the centre with
    torchvision's rounding, or keeps the whole resized image. The resize is bilinear with
    antialiasing, within one grey level of Pillow's, which the published results used; the long
    side is rounded down like torchvision's. Masks are resized by Pillow's nearest neighbour.

    Attributes:
        resize: pixels of the short side after the resize.
        crop: height and width of the result.
        train: random crop and mirroring (True), or evaluation (False).
        center_crop: in evaluation, crop the centre (True) or not at all (False).

    Raises:
        ValueError: crop is not in 1..resize, or (when called) a mask has another size than its
            image.
    """

    targets: ClassVar[tuple[Target, ...]] = ("label", "mask")

    resize: int = 256
    crop: int = 224
    train: bool = False
    center_crop: bool = True

    def __post_init__(self) -> None:
        """Checks the sizes."""
        if not 1 <= self.crop <= self.resize:
            raise ValueError(f"crop must be in 1..resize ({self.resize}), got {self.crop}")

    @property
    def draws(self) -> int:
        """Top, left and flip in training; none in evaluation."""
        return 3 if self.train else 0

    @property
    def size(self) -> tuple[int, int]:
        """The crop's height and width; without a crop the least size of a result."""
        side = self.crop if self.train or self.center_crop else self.resize
        return side, side

    def __call__(self, image: Tensor, target: Any, draws: Tensor) -> tuple[Tensor, Any]:
        """Transforms one sample; see `Transform`."""
        mask = target if isinstance(target, Tensor) else None
        if mask is not None and mask.shape != image.shape[-2:]:
            sizes = f"{tuple(mask.shape)}, its image {tuple(image.shape[-2:])}"
            raise ValueError(f"mask has size {sizes}")
        if min(image.shape[-2:]) != self.resize:
            image = functional.resize(image, [self.resize], antialias=True)
            mask = None if mask is None else _resize_mask(mask, *image.shape[-2:])
        if self.train or self.center_crop:
            flip = 1.0
            if self.train:
                top, left, flip = draws.tolist()
                rows, columns = _random_crop(image, self.crop, top, left)
            else:
                rows, columns = _centre_crop(image, self.crop)
            image = _cut(image, rows, columns, mirror=flip < 0.5)
            mask = None if mask is None else _cut(mask, rows, columns, mirror=flip < 0.5)
        return image, target if mask is None else mask


@dataclass(frozen=True)
class Flip:
    """Detection's transform: training mirrors half of the images; no crop, and as a rule no resize.

    Attributes:
        train: mirror half of the images (True) or none (False).
        shrink: larger images are brought to this short side first; None keeps all as they are, as
            the published method does.

    Raises:
        ValueError: shrink is below 1.
    """

    targets: ClassVar[tuple[Target, ...]] = ("label", "boxes")

    train: bool = False
    shrink: int | None = None

    def __post_init__(self) -> None:
        """Checks the size."""
        if self.shrink is not None and self.shrink < 1:
            raise ValueError(f"shrink must be 1 or more, got {self.shrink}")

    @property
    def draws(self) -> int:
        """The flip in training; none in evaluation."""
        return 1 if self.train else 0

    @property
    def size(self) -> tuple[int, int]:
        """Any size will do: results keep their own."""
        return 64, 64

    def __call__(self, image: Tensor, target: Any, draws: Tensor) -> tuple[Tensor, Any]:
        """Transforms one sample; see `Transform`."""
        if self.shrink is not None and min(image.shape[-2:]) > self.shrink:
            image, target = self._shrunk(image, target)
        if not self.train or draws.item() >= 0.5:
            return image, target
        if isinstance(target, dict):
            x0, y0, x1, y1 = target["boxes"].unbind(1)
            width = image.shape[-1]
            target = target | {"boxes": torch.stack((width - x1, y0, width - x0, y1), 1)}
        return _mirror(image), target

    def _shrunk(self, image: Tensor, target: Any) -> tuple[Tensor, Any]:
        height, width = image.shape[-2:]
        image = functional.resize(image, [self.shrink or height], antialias=True)
        if isinstance(target, dict):
            ratios = torch.tensor([image.shape[-1] / width, image.shape[-2] / height])
            target = target | {"boxes": target["boxes"] * ratios.repeat(2)}
        return image, target


@dataclass(frozen=True)
class PatchCrop:
    """SR pre-training's transform: a random patch in one of its 8 symmetries.

    Training crops `crop` x `crop` HR pixels anywhere and mirrors, flips and turns the patch, each
    half of the time (Lim et al., EDSR, section 4.1); an image smaller than the patch is extended
    right and bottom by edge replication. Evaluation keeps the whole image but for the rows and
    columns at the bottom and right that exceed a multiple of `scale`.

    Attributes:
        crop: height and width of a training patch, a multiple of scale.
        scale: HR pixels per LR pixel.
        train: random patch (True) or whole image (False).

    Raises:
        ValueError: scale is below 1, crop is no positive multiple of it, or (when called in
            evaluation) an image is smaller than scale.
    """

    targets: ClassVar[tuple[Target, ...]] = ("label",)

    crop: int = 192
    scale: int = 4
    train: bool = False

    def __post_init__(self) -> None:
        """Checks the sizes."""
        if self.scale < 1:
            raise ValueError(f"scale must be 1 or more, got {self.scale}")
        if self.crop < 1 or self.crop % self.scale:
            raise ValueError(f"crop must be a multiple of scale ({self.scale}), got {self.crop}")

    @property
    def draws(self) -> int:
        """Top, left and the three halves of the symmetry in training; none in evaluation."""
        return 5 if self.train else 0

    @property
    def size(self) -> tuple[int, int]:
        """A patch's height and width; evaluation keeps each image's own."""
        return self.crop, self.crop

    def __call__(self, image: Tensor, target: Any, draws: Tensor) -> tuple[Tensor, Any]:
        """Transforms one sample; see `Transform`."""
        height, width = image.shape[-2:]
        if not self.train:
            height, width = height - height % self.scale, width - width % self.scale
            if 0 in (height, width):
                raise ValueError(f"image of {tuple(image.shape[-2:])} is below scale {self.scale}")
            return image[:, :height, :width], target
        image = replicate_to(image, max(height, self.crop), max(width, self.crop))
        top, left, mirror, flip, turn = draws.tolist()
        rows, columns = _random_crop(image, self.crop, top, left)
        image = _cut(image, rows, columns, mirror=mirror < 0.5)
        if flip < 0.5:
            image = image.flip(-2)
        return (image.transpose(-1, -2) if turn < 0.5 else image), target


def replicate_to(image: Tensor, height: int, width: int) -> Tensor:
    """Extends an image right and bottom by edge replication.

    Args:
        image: C,H,W of any dtype.
        height: new height, H or more.
        width: new width, W or more.

    Returns:
        C,height,width; the image itself where nothing is to be added.
    """
    if image.shape[-2:] == (height, width):
        return image
    canvas = image.new_empty(height, width, len(image)).permute(2, 0, 1)
    replicate_into(canvas, image)
    return canvas


def replicate_into(canvas: Tensor, image: Tensor) -> None:
    """Writes an image to the top left of a canvas, and its edges into what is left of it.

    Args:
        canvas: C,height,width, written to.
        image: C,H,W, no larger.
    """
    # torch's own padding knows no uint8 replication, indexing takes fifty times as long, and its
    # copies wake all of its threads for each image, which then wait spinning for the next one.
    pixels, source = canvas.numpy(), image.numpy()
    height, width = source.shape[-2:]
    pixels[:, :height, :width] = source
    pixels[:, height:, :width] = source[:, -1:]
    for channel in pixels:  # one by one, which numpy does five times as fast as all at once
        channel[:, width:] = channel[:, width - 1 : width]


def _random_crop(image: Tensor, crop: int, top: float, left: float) -> tuple[slice, slice]:
    height, width = image.shape[-2:]
    row, column = math.floor(top * (height - crop + 1)), math.floor(left * (width - crop + 1))
    return slice(row, row + crop), slice(column, column + crop)


def _centre_crop(image: Tensor, crop: int) -> tuple[slice, slice]:
    # Python's round (half to even), as torchvision rounds the centre.
    row, column = (round((side - crop) / 2) for side in image.shape[-2:])
    return slice(row, row + crop), slice(column, column + crop)


def _cut(pixels: Tensor, rows: slice, columns: slice, *, mirror: bool) -> Tensor:
    pixels = pixels[..., rows, columns]
    return _mirror(pixels) if mirror else pixels


def _mirror(pixels: Tensor) -> Tensor:
    if pixels.dim() == 2:
        return pixels.flip(-1)
    # Decoders and resizes leave a pixel's channels side by side; all is faster if they stay so.
    return pixels.permute(1, 2, 0).flip(1).permute(2, 0, 1)


def _resize_mask(mask: Tensor, height: int, width: int) -> Tensor:
    # Pillow itself: torch's rounding differs at ties, and the published masks came from Pillow.
    resized = Image.fromarray(mask.numpy()).resize((width, height), Image.Resampling.NEAREST)
    return torch.from_numpy(np.array(resized))
