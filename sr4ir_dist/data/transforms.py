"""From a stored image to what the step sees, on bytes (uint8), so that HR stays on the 8-bit grid.

A transform is a frozen dataclass that says how many random numbers a sample needs (`draws`) and
is called with them: it holds no generator, so a sample's augmentation depends on its key alone.
"""

import io
import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode
from torchvision.transforms.v2 import functional


class Transform(Protocol):
    """What the loader asks of a transform."""

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
            target: what belongs to the image; labels pass unchanged.
            draws: float64 1-D, `self.draws` numbers in [0,1).

        Returns:
            The new image, uint8 3,H',W', and its target.
        """
        ...


def decode(data: bytes) -> Tensor:
    """Decodes an image file.

    Args:
        data: the file's bytes: JPEG, PNG, WebP, GIF (first frame), or what else Pillow reads.

    Returns:
        uint8 RGB tensor 3,H,W. Alpha is dropped, grey is repeated, 16-bit values are rounded to
        8 bits; the orientation tag is not applied, as in the published evaluations.

    Raises:
        ValueError: the bytes are no readable image.
    """
    try:
        encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
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
            rgb = picture.convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:
        raise ValueError(f"no readable image: {error}") from error
    pixels = torch.frombuffer(bytearray(rgb.tobytes()), dtype=torch.uint8)
    return pixels.view(rgb.height, rgb.width, 3).permute(2, 0, 1).contiguous()


@dataclass(frozen=True)
class ResizeCrop:
    """Classification's transform: short side resized to `resize`, then a square crop.

    Training crops at random and mirrors half of the images; evaluation crops the centre with
    torchvision's rounding. The resize is bilinear with antialiasing, within one grey level of
    Pillow's, which the published results used; the long side is rounded down like torchvision's.

    Attributes:
        resize: pixels of the short side after the resize.
        crop: height and width of the result.
        train: random (True) or centre (False) crop.

    Raises:
        ValueError: crop is not in 1..resize.
    """

    resize: int = 256
    crop: int = 224
    train: bool = False

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
        """The crop's height and width."""
        return self.crop, self.crop

    def __call__(self, image: Tensor, target: Any, draws: Tensor) -> tuple[Tensor, Any]:
        """Transforms one sample; see `Transform`."""
        if min(image.shape[-2:]) != self.resize:
            image = functional.resize(image, [self.resize], antialias=True)
        if not self.train:
            height, width = image.shape[-2:]
            # Python's round (half to even), as torchvision rounds the centre.
            top, left = (round((side - self.crop) / 2) for side in (height, width))
            return image[:, top : top + self.crop, left : left + self.crop], target
        top, left, flip = draws.tolist()
        image = _random_crop(image, self.crop, top, left)
        return (image.flip(-1) if flip < 0.5 else image), target


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
        image = _random_crop(image, self.crop, top, left)
        if mirror < 0.5:
            image = image.flip(-1)
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
    # Indexing rather than torch's padding, which knows no uint8 replication.
    if image.shape[-2] != height:
        image = image[:, torch.arange(height).clamp_(max=image.shape[-2] - 1)]
    if image.shape[-1] != width:
        image = image[:, :, torch.arange(width).clamp_(max=image.shape[-1] - 1)]
    return image


def _random_crop(image: Tensor, crop: int, top: float, left: float) -> Tensor:
    height, width = image.shape[-2:]
    row, column = math.floor(top * (height - crop + 1)), math.floor(left * (width - crop + 1))
    return image[:, row : row + crop, column : column + crop]
