"""PSNR and SSIM of SR networks on Set5, Set14, B100 and Urban100 (Table S6)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from sr4ir_dist import storage
from sr4ir_dist.analysis.loaded import Loaded
from sr4ir_dist.config import ExperimentError
from sr4ir_dist.data.transforms import decode
from sr4ir_dist.degradation import degrade, quantize
from sr4ir_dist.metrics.psnr import PSNR
from sr4ir_dist.metrics.ssim import SSIM

_HR, _LR = "HR", "LR_bicubic"


@dataclass(frozen=True)
class Score:
    """An SR network on a benchmark, as such figures are published.

    Attributes:
        benchmark: the benchmark's name.
        network: the network's label; `bicubic` is the interpolation.
        of: whose network it is: its experiment's name.
        images: how many there are.
        psnr: dB, on luma with as many border pixels cut as the scale.
        ssim: on the same.
        ssim_rgb: the mean of three channels, which the paper's figures seem to be.
        lr: where the LR images come from.
    """

    benchmark: str
    network: str
    of: str
    images: int
    psnr: float
    ssim: float
    ssim_rgb: float
    lr: str


@dataclass(frozen=True)
class Pair:
    """An image of a benchmark: N,3,H,W and N,3,H/scale,W/scale in [0, 1], N = 1."""

    name: str
    hr: Tensor
    lr: Tensor


def score(
    networks: Mapping[str, Loaded],
    benchmarks: Mapping[str, str],
    told: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> list[Score]:
    """Judge SR networks, and bicubic enlargement, on benchmarks.

    A benchmark is a folder with `HR/NAME.png` and, where its LR images are at hand,
    `LR_bicubic/X4/NAMEx4.png`; else they are made by the antialiased bicubic that MATLAB's is.

    Args:
        networks: checkpoints by label, all of one scale.
        benchmarks: URIs of folders by name.
        told: of each benchmark, how many images are done.

    Raises:
        ExperimentError: a checkpoint has no SR network, or the scales differ.
        DatasetError: an image cannot be read.
        StorageError: a folder cannot be read.
    """
    scale = _scale(networks)
    modules: dict[str, Callable[[Tensor], Tensor]] = {
        label: loaded.setup.modules["sr"] for label, loaded in networks.items()
    }
    device = next(iter(networks.values())).setup.device
    modules["bicubic"] = partial(_bicubic, scale=scale)
    scores = []
    for benchmark, folder in benchmarks.items():
        names = _names(folder)
        meters = {
            label: (
                PSNR(border=scale, channel="y"),
                SSIM(border=scale, channel="y"),
                SSIM(border=scale, channel="rgb"),
            )
            for label in modules
        }
        source = "the benchmark's" if _has_lr(folder, scale) else "made here, antialiased bicubic"
        for number, pair in enumerate(pairs(folder, scale), 1):
            for label, module in modules.items():
                with torch.inference_mode():
                    sr = module(pair.lr.to(device)).float().cpu()
                for meter in meters[label]:
                    meter.update(sr, pair.hr)
            told(benchmark, number, len(names))
        for label, (psnr, ssim, rgb) in meters.items():
            of = networks[label].setup.experiment.name if label in networks else "interpolation"
            figures = psnr.compute(), ssim.compute(), rgb.compute()
            scores.append(Score(benchmark, label, of, len(names), *figures, source))
    return scores


def check(folder: str, scale: int) -> None:
    """See that a folder is a benchmark, without reading its images.

    Raises:
        ExperimentError: it has no HR images, or LR images of this scale for some of them only.
        StorageError: it cannot be read.
    """
    names = _names(folder)
    if not _has_lr(folder, scale):
        return
    there = storage.list_names(storage.join(folder, _LR, f"X{scale}"))
    missing = sorted({f"{name}x{scale}.png" for name in names} - set(there))
    if missing:
        raise ExperimentError(
            f"{folder}/{_LR}/X{scale} lacks {len(missing)} of {len(names)} LR images, such as "
            f"{missing[0]}; without that folder, LR images are made"
        )


def pairs(folder: str, scale: int) -> Iterator[Pair]:
    """The images of a benchmark by name; HR is cut to a multiple of the scale, grey becomes RGB."""
    given = _has_lr(folder, scale)
    for name in _names(folder):
        hr = _read(storage.join(folder, _HR, f"{name}.png"))
        height, width = (side // scale * scale for side in hr.shape[-2:])
        hr = hr[..., :height, :width]
        if given:
            lr = _read(storage.join(folder, _LR, f"X{scale}", f"{name}x{scale}.png"))
        else:
            lr = degrade(hr, scale, kind="bicubic_antialias")
        expected = (height // scale, width // scale)
        if tuple(lr.shape[-2:]) != expected:
            raise ExperimentError(
                f"{name} of {folder} has an LR image of {tuple(lr.shape[-2:])} pixels, expected "
                f"{expected} at x{scale}"
            )
        yield Pair(name, hr, quantize(lr))


def _bicubic(lr: Tensor, *, scale: int) -> Tensor:
    # With antialiasing torch's kernel is MATLAB's (a = -0.5), as in published figures of bicubic.
    return F.interpolate(lr, scale_factor=scale, mode="bicubic", antialias=True)


def _scale(networks: Mapping[str, Loaded]) -> int:
    scales = {}
    for label, loaded in networks.items():
        if "sr" not in loaded.setup.modules:
            raise ExperimentError(f"{label}: {loaded.setup.experiment.name} has no SR network")
        scales[label] = loaded.setup.experiment.scale
    if len(set(scales.values())) != 1:
        raise ExperimentError(f"the networks are of different scales: {scales}")
    return next(iter(scales.values()))


def _names(folder: str) -> list[str]:
    files = storage.list_names(storage.join(folder, _HR))
    names = sorted(name.removesuffix(".png") for name in files if name.endswith(".png"))
    if not names:
        raise ExperimentError(f"{folder} is no benchmark: there is no {_HR}/*.png in it")
    return names


def _has_lr(folder: str, scale: int) -> bool:
    where = storage.join(folder, _LR, f"X{scale}", f"{_names(folder)[0]}x{scale}.png")
    return storage.exists(where)


def _read(uri: str) -> Tensor:
    return decode(storage.read_bytes(uri))[None].float() / 255
