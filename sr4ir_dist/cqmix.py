"""CQMix: images mixed cell by cell from an SR image and its HR image (paper, section 3.3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sr4ir_dist import keyed


def draw_cells(seed: int, epoch: int, keys: Tensor, grid: int) -> Tensor:
    """Tosses one fair coin per sample and cell.

    The coins are keyed by (seed, epoch, sample): they depend neither on the number of ranks, nor
    on a resume, nor on the device.

    Args:
        seed: The run's seed.
        epoch: The epoch, counted from 1.
        keys: N int64 row numbers of the samples.
        grid: Cells along each side: 4 for classification, 8 for segmentation and detection.

    Returns:
        N,1,grid,grid bool on keys' device; True is SR.

    Raises:
        ValueError: The grid is below 1.
    """
    if grid < 1:
        raise ValueError(f"grid is {grid}; it must be at least 1")
    coins = keyed.uniform(seed, epoch, keys, grid * grid, "cqmix") < 0.5
    return coins.reshape(len(keys), 1, grid, grid)


def cqmix(sr: Tensor, hr: Tensor, cells: Tensor) -> Tensor:
    """Takes each cell of the image from SR or from HR; values are copied, not blended.

    Pixel i of H belongs to cell floor(i * grid / H), in torch's own nearest enlargement: where
    its float32 product falls just short of a whole number (376 rows in 8 cells, for one), the
    border comes one pixel later, as in the published method. Sides need not be multiples of the
    grid.

    Args:
        sr: N,3,H,W, neither clamped nor quantised; detach it when the SR network is not trained.
        hr: N,3,H,W of the same dtype.
        cells: N,1,grid,grid; True or 1 is SR.

    Raises:
        ValueError: Shapes that do not belong together, or a grid finer than the image.
    """
    height, width = hr.shape[-2:]
    if sr.shape != hr.shape:
        raise ValueError(f"sr is {tuple(sr.shape)} but hr is {tuple(hr.shape)}")
    if cells.ndim != 4 or cells.shape[:2] != (hr.shape[0], 1):
        raise ValueError(f"cells is {tuple(cells.shape)}; expected ({hr.shape[0]}, 1, grid, grid)")
    if cells.shape[-2] > height or cells.shape[-1] > width:
        raise ValueError(f"cells is {tuple(cells.shape)}: finer than the {height}x{width} image")
    mask = F.interpolate(cells.to(torch.float32), size=(height, width), mode="nearest")
    return torch.where(mask > 0.5, sr, hr)
