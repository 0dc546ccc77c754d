"""From a high-resolution batch to the low-resolution batch that the networks see.

The low-resolution image is made on the fly, on the batch's device, and is on the 8-bit grid like
an image that was stored and read again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def quantize(images: Tensor) -> Tensor:
    """Rounds values to the 8-bit grid {0, 1/255, ..., 1} and clamps them to [0, 1].

    Ties round to even. The result has no gradient worth using.

    Args:
        images: Floating tensor of any shape.
    """
    return (images * 255).round().clamp(0, 255) / 255


def _bicubic(hr: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(hr, size=size, mode="bicubic", align_corners=False)


def _bicubic_antialias(hr: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(hr, size=size, mode="bicubic", align_corners=False, antialias=True)


DEGRADATIONS: dict[str, Callable[[Tensor, tuple[int, int]], Tensor]] = {
    "bicubic": _bicubic,
    "bicubic_antialias": _bicubic_antialias,
}


def gaussian_blur(images: Tensor, sigma: float) -> Tensor:
    """Blurs images with a Gaussian of three standard deviations to each side (Table S5).

    Borders are mirrored, or repeated where the image is too small to be mirrored.

    Args:
        images: N,3,H,W floating tensor; N may be 0.
        sigma: Standard deviation in pixels, above 0; the paper's are 5, 10 and 15.
    """
    radius = math.ceil(3 * sigma)
    places = torch.arange(-radius, radius + 1, dtype=torch.float64)
    weights = torch.exp(-places.square() / (2 * sigma**2))
    weights = (weights / weights.sum()).to(images)
    mode = "reflect" if radius < min(images.shape[-2:]) else "replicate"
    channels = images.shape[1]
    images = F.pad(images, (radius,) * 4, mode=mode)
    for shape in ((1, 1, -1, 1), (1, 1, 1, -1)):
        kernel = weights.view(shape).repeat(channels, 1, 1, 1)
        images = F.conv2d(images, kernel, groups=channels)
    return images


def degrade(hr: Tensor, scale: int, *, kind: str = "bicubic", blur: float = 0.0) -> Tensor:
    """Makes the low-resolution batch of a high-resolution one.

    `"bicubic"` is what SR4IR trains and tests on: the cubic kernel with a = -0.75 and no
    antialiasing, so a strided filter that sees 4 x 4 pixels of every block and lets fine detail
    alias. `"bicubic_antialias"` widens the kernel (a = -0.5) by the scale, as MATLAB's `imresize`
    and the public SR benchmarks do; against Set5's files it differs by at most two grey levels
    inside, and by more in the outer two LR pixels, where MATLAB mirrors the image and torch
    renormalises the kernel. The two kinds differ a lot: SR networks trained for one do badly on
    the other.

    Args:
        hr: N,3,H,W floating tensor in [0, 1]; N may be 0.
        scale: How many times smaller the result is; divides H and W.
        kind: A key of `DEGRADATIONS`.
        blur: Standard deviation in HR pixels of a Gaussian blur before it; 0 for none.

    Returns:
        N,3,H/scale,W/scale on the 8-bit grid, in hr's dtype and on its device.

    Raises:
        ValueError: Unknown kind, integer images, a scale below 1, or sides that are not multiples
            of it.
    """
    if kind not in DEGRADATIONS:
        raise ValueError(f"degradation kind {kind!r} is unknown; choose from {list(DEGRADATIONS)}")
    if not hr.is_floating_point():
        raise ValueError(f"hr has dtype {hr.dtype}; degrade needs floating values in [0, 1]")
    if scale < 1:
        raise ValueError(f"scale is {scale}; it must be at least 1")
    height, width = hr.shape[-2:]
    if height % scale or width % scale:
        raise ValueError(
            f"hr is {height}x{width}; both sides must be multiples of the scale {scale}"
        )
    if blur:
        hr = gaussian_blur(hr, blur)
    return quantize(DEGRADATIONS[kind](hr, (height // scale, width // scale)))


def enlarge_bilinear(lr: Tensor, scale: int) -> Tensor:
    """Enlarges an LR batch bilinearly, corner pixels aligned: what L->T shows the task network.

    Args:
        lr: N,3,h,w floating tensor; N may be 0.
        scale: How many times larger the result is.

    Returns:
        N,3,h*scale,w*scale.
    """
    size = (lr.shape[-2] * scale, lr.shape[-1] * scale)
    return F.interpolate(lr, size=size, mode="bilinear", align_corners=True)


def pad_to(images: Tensor, height: int, width: int, mode: str = "replicate") -> Tensor:
    """Pads a batch at its right and bottom to a given size.

    Args:
        images: N,3,H,W of any dtype; N may be 0.
        height: Height of the result, at least H.
        width: Width of the result, at least W.
        mode: `"replicate"` repeats the edge (segmentation's evaluation); `"reflect"` mirrors the
            image, and repeats the edge where a pad is not smaller than its side (detection's
            batches).

    Raises:
        ValueError: Unknown mode, or a size smaller than the images'.
    """
    if mode not in ("replicate", "reflect"):
        raise ValueError(f"pad mode {mode!r} is unknown; choose from ['replicate', 'reflect']")
    bottom, right = height - images.shape[-2], width - images.shape[-1]
    if bottom < 0 or right < 0:
        raise ValueError(
            f"images are {images.shape[-2]}x{images.shape[-1]}; cannot pad to {height}x{width}"
        )
    if not (bottom or right):
        return images
    if bottom >= images.shape[-2] or right >= images.shape[-1]:
        mode = "replicate"
    return F.pad(images, (0, right, 0, bottom), mode=mode)


def pad_to_multiple(images: Tensor, multiple: int, mode: str = "replicate") -> Tensor:
    """Pads a batch at its right and bottom until both sides are multiples of a number.

    Args:
        images: N,3,H,W of any dtype; N may be 0.
        multiple: Usually the scale.
        mode: As in `pad_to`.

    Raises:
        ValueError: As `pad_to`.
    """
    if mode == "reflect" and torch.compiler.is_exporting():
        return _reflect_in_graph(images, multiple)
    height, width = (-(-side // multiple) * multiple for side in images.shape[-2:])
    return pad_to(images, height, width, mode)


def _reflect_in_graph(images: Tensor, multiple: int) -> Tensor:
    """Pads as `pad_to_multiple` does, without a branch that hangs on the size.

    An exported graph holds for every size: which rule applies is part of the indices.
    """

    def places(side: int) -> tuple[Tensor, Tensor]:
        # Not -(-side // multiple): ONNX rounds integer divisions towards zero.
        padded = (side + multiple - 1) // multiple * multiple
        place = torch.arange(padded, device=images.device)
        mirrored = torch.where(place < side, place, 2 * (side - 1) - place)
        return mirrored, place.clamp(max=side - 1)

    (row, edge_row), (column, edge_column) = places(images.shape[-2]), places(images.shape[-1])
    fits = (row >= 0).all() & (column >= 0).all()
    rows = torch.where(fits, row, edge_row)
    return images.index_select(2, rows).index_select(3, torch.where(fits, column, edge_column))


def crop_back(images: Tensor, sizes: Tensor | Sequence[Sequence[int]]) -> list[Tensor]:
    """Cuts every image of a padded batch back to its own size.

    Args:
        images: N,3,H,W.
        sizes: N pairs of height and width, as in `Batch.sizes`; a tensor should be on the CPU,
            since its values are read.

    Returns:
        N tensors 3,h,w: views of `images`.

    Raises:
        ValueError: Not one size an image, or a size larger than the canvas.
    """
    pairs = sizes.tolist() if isinstance(sizes, torch.Tensor) else sizes
    if len(pairs) != len(images):
        raise ValueError(f"sizes has {len(pairs)} entries for {len(images)} images")
    for height, width in pairs:
        if height > images.shape[-2] or width > images.shape[-1]:
            raise ValueError(
                f"size {height}x{width} exceeds the canvas {images.shape[-2]}x{images.shape[-1]}"
            )
    return [image[:, :h, :w] for image, (h, w) in zip(images, pairs, strict=True)]
