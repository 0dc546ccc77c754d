"""The figures that the paper reports, by the name of the experiment behind each.

`lpips` and `psnr` (dB) are those of the images that the task network is judged on; `miou`, `map`
and `top1` are per cent. What is not here is not in the paper's text: Table 7's figures above all.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_SCENARIOS = ("s2t", "t2s", "joint", "sr4ir")

# Rows of Tables 1 and 2: the task's figure, LPIPS, PSNR at x4 and at x8; of Table 3 without PSNR.
_TABLE_1 = {
    "l2t": ((58.6, 0.300, 26.16), (49.3, 0.476, 22.54)),
    "edsr": (
        ((60.2, 0.241, 28.94), (52.3, 0.407, 24.41)),
        ((56.6, 0.352, 26.83), (49.2, 0.461, 23.14)),
        ((58.0, 0.318, 27.64), (50.0, 0.480, 23.58)),
        ((60.7, 0.220, 28.21), (55.0, 0.380, 23.91)),
    ),
    "swinir": (
        ((61.4, 0.221, 29.57), (53.9, 0.387, 24.75)),
        ((53.2, 0.376, 26.04), (48.7, 0.466, 23.06)),
        ((57.5, 0.341, 27.55), (50.0, 0.480, 23.63)),
        ((62.2, 0.194, 28.83), (56.5, 0.355, 24.23)),
    ),
}
_TABLE_2 = {
    "l2t": ((27.5, 0.411, 22.77), (18.9, 0.559, 20.29)),
    "edsr": (
        ((30.3, 0.336, 24.62), (21.9, 0.494, 21.62)),
        ((27.2, 0.317, 23.37), (15.5, 0.476, 20.48)),
        ((28.3, 0.354, 23.71), (20.3, 0.506, 20.98)),
        ((32.4, 0.275, 23.94), (25.5, 0.416, 20.86)),
    ),
    "swinir": (
        ((31.5, 0.309, 25.13), (23.7, 0.474, 21.85)),
        ((29.7, 0.284, 23.59), (18.9, 0.449, 20.59)),
        ((31.4, 0.331, 23.94), (21.9, 0.489, 21.11)),
        ((33.9, 0.239, 24.38), (27.8, 0.382, 21.07)),
    ),
}
_CARS = {
    "l2t": ((78.7, 0.304), (61.0, 0.478)),
    "edsr": (
        ((82.7, 0.176), (68.3, 0.328)),
        ((80.1, 0.190), (56.9, 0.448)),
        ((80.8, 0.196), (65.2, 0.378)),
        ((83.3, 0.158), (71.4, 0.326)),
    ),
    "swinir": (
        ((84.0, 0.159), (71.4, 0.308)),
        ((82.0, 0.162), (61.0, 0.397)),
        ((83.4, 0.179), (66.6, 0.355)),
        ((85.1, 0.136), (73.9, 0.292)),
    ),
}
_CUB = {
    "l2t": ((70.8, 0.298), (58.2, 0.465)),
    "edsr": (
        ((71.1, 0.216), (59.8, 0.365)),
        ((70.5, 0.208), (56.5, 0.401)),
        ((70.8, 0.226), (58.6, 0.380)),
        ((72.8, 0.179), (62.6, 0.326)),
    ),
    "swinir": (
        ((72.8, 0.201), (61.2, 0.349)),
        ((72.1, 0.190), (58.7, 0.377)),
        ((72.9, 0.212), (61.2, 0.364)),
        ((74.7, 0.157), (65.3, 0.301)),
    ),
}

_ABLATIONS: dict[str, dict[str, float]] = {
    # Table 4
    "voc_seg/edsr-x8/sr4ir-no-tdp": {"miou": 53.3, "lpips": 0.407},
    "cars/edsr-x8/sr4ir-no-tdp": {"top1": 69.9, "lpips": 0.327},
    # Table 5
    "voc_seg/edsr-x8/sr4ir-only-sr": {"miou": 51.7},
    "voc_seg/edsr-x8/sr4ir-only-hr": {"miou": 53.3},
    "voc_seg/edsr-x8/sr4ir-no-cqmix": {"miou": 54.7},
    "cars/edsr-x8/sr4ir-only-sr": {"top1": 66.7},
    "cars/edsr-x8/sr4ir-only-hr": {"top1": 59.3},
    "cars/edsr-x8/sr4ir-no-cqmix": {"top1": 70.3},
    # Table 6
    "voc_seg/edsr-x8/sr4ir-vgg": {"miou": 53.6},
    "voc_seg/edsr-x8/sr4ir-fixed-tdp": {"miou": 53.6},
    "voc_seg/edsr-x8/joint-tdp": {"miou": 3.5},
    "cars/edsr-x8/sr4ir-vgg": {"top1": 69.4},
    "cars/edsr-x8/sr4ir-fixed-tdp": {"top1": 70.3},
    "cars/edsr-x8/joint-tdp": {"top1": 3.7},
    # Tables S1 and S2
    "cars/edsr-x8/s-vgg2t": {"top1": 69.7},
    "cars/edsr-x8/sr4ir2t": {"top1": 71.1},
    "cars/edsr-x8/h2t-on-s": {"top1": 29.4},
    "cars/edsr-x8/h2t-on-s-vgg": {"top1": 46.5},
    "cars/edsr-x8/h2t-on-sr4ir": {"top1": 52.3},
    # Table S3, the larger task network
    "voc_seg_resnet50/x8/l2t": {"miou": 50.2},
    # Table S5
    "voc_seg/x8-blur5/l2t": {"miou": 47.9, "lpips": 0.543},
    "voc_seg/x8-blur10/l2t": {"miou": 38.3, "lpips": 0.631},
    "voc_seg/x8-blur15/l2t": {"miou": 29.5, "lpips": 0.650},
    "voc_seg/edsr-x8-blur5/sr4ir": {"miou": 56.4, "lpips": 0.367},
    "voc_seg/edsr-x8-blur10/sr4ir": {"miou": 49.8, "lpips": 0.485},
    "voc_seg/edsr-x8-blur15/sr4ir": {"miou": 41.4, "lpips": 0.543},
}


def _of_a_grid(data: str, names: tuple[str, ...], oracle: float, rows: dict[str, Any]) -> Iterator:
    yield f"{data}/h2t", {names[0]: oracle}
    for number, scale in enumerate((4, 8)):
        yield f"{data}/x{scale}/l2t", dict(zip(names, rows["l2t"][number], strict=True))
        for network in ("edsr", "swinir"):
            for recipe, values in zip(_SCENARIOS, rows[network], strict=True):
                figures = dict(zip(names, values[number], strict=True))
                yield f"{data}/{network}-x{scale}/{recipe}", figures


_FIGURES: dict[str, dict[str, float]] = {
    **dict(_of_a_grid("voc_seg", ("miou", "lpips", "psnr"), 63.3, _TABLE_1)),
    **dict(_of_a_grid("voc_det", ("map", "lpips", "psnr"), 36.7, _TABLE_2)),
    **dict(_of_a_grid("cars", ("top1", "lpips"), 86.4, _CARS)),
    **dict(_of_a_grid("cub200", ("top1", "lpips"), 78.3, _CUB)),
    **_ABLATIONS,
}


def figures(experiment: str) -> dict[str, float]:
    """What the paper reports of an experiment, by its name; nothing where it is not the paper's."""
    return dict(_FIGURES.get(experiment, {}))
