"""The figures that the paper prints, by experiment name."""

from __future__ import annotations

_METRICS: dict[str, tuple[str, ...]] = {
    "voc_seg": ("miou", "lpips", "psnr"),  # Table 1
    "voc_det": ("map", "lpips", "psnr"),  # Table 2
    "cars": ("top1", "lpips"),  # Table 3
    "cub200": ("top1", "lpips"),  # Table 3
}
# Of each experiment the figures that `_METRICS` names. Names leave out the dataset.
_ROWS: dict[str, dict[str, tuple[float, ...]]] = {
    "voc_seg": {
        "h2t": (63.3,),
        "x4/l2t": (58.6, 0.300, 26.16),
        "x8/l2t": (49.3, 0.476, 22.54),
        "edsr-x4/s2t": (60.2, 0.241, 28.94),
        "edsr-x8/s2t": (52.3, 0.407, 24.41),
        "edsr-x4/t2s": (56.6, 0.352, 26.83),
        "edsr-x8/t2s": (49.2, 0.461, 23.14),
        "edsr-x4/joint": (58.0, 0.318, 27.64),
        "edsr-x8/joint": (50.0, 0.480, 23.58),
        "edsr-x4/sr4ir": (60.7, 0.220, 28.21),
        "edsr-x8/sr4ir": (55.0, 0.380, 23.91),
        "swinir-x4/s2t": (61.4, 0.221, 29.57),
        "swinir-x8/s2t": (53.9, 0.387, 24.75),
        "swinir-x4/t2s": (53.2, 0.376, 26.04),
        "swinir-x8/t2s": (48.7, 0.466, 23.06),
        "swinir-x4/joint": (57.5, 0.341, 27.55),
        "swinir-x8/joint": (50.0, 0.480, 23.63),
        "swinir-x4/sr4ir": (62.2, 0.194, 28.83),
        "swinir-x8/sr4ir": (56.5, 0.355, 24.23),
    },
    "voc_det": {
        "h2t": (36.7,),
        "x4/l2t": (27.5, 0.411, 22.77),
        "x8/l2t": (18.9, 0.559, 20.29),
        "edsr-x4/s2t": (30.3, 0.336, 24.62),
        "edsr-x8/s2t": (21.9, 0.494, 21.62),
        "edsr-x4/t2s": (27.2, 0.317, 23.37),
        "edsr-x8/t2s": (15.5, 0.476, 20.48),
        "edsr-x4/joint": (28.3, 0.354, 23.71),
        "edsr-x8/joint": (20.3, 0.506, 20.98),
        "edsr-x4/sr4ir": (32.4, 0.275, 23.94),
        "edsr-x8/sr4ir": (25.5, 0.416, 20.86),
        "swinir-x4/s2t": (31.5, 0.309, 25.13),
        "swinir-x8/s2t": (23.7, 0.474, 21.85),
        "swinir-x4/t2s": (29.7, 0.284, 23.59),
        "swinir-x8/t2s": (18.9, 0.449, 20.59),
        "swinir-x4/joint": (31.4, 0.331, 23.94),
        "swinir-x8/joint": (21.9, 0.489, 21.11),
        "swinir-x4/sr4ir": (33.9, 0.239, 24.38),
        "swinir-x8/sr4ir": (27.8, 0.382, 21.07),
    },
    "cars": {
        "h2t": (86.4,),
        "x4/l2t": (78.7, 0.304),
        "x8/l2t": (61.0, 0.478),
        "edsr-x4/s2t": (82.7, 0.176),
        "edsr-x8/s2t": (68.3, 0.328),
        "edsr-x4/t2s": (80.1, 0.190),
        "edsr-x8/t2s": (56.9, 0.448),
        "edsr-x4/joint": (80.8, 0.196),
        "edsr-x8/joint": (65.2, 0.378),
        "edsr-x4/sr4ir": (83.3, 0.158),
        "edsr-x8/sr4ir": (71.4, 0.326),
        "swinir-x4/s2t": (84.0, 0.159),
        "swinir-x8/s2t": (71.4, 0.308),
        "swinir-x4/t2s": (82.0, 0.162),
        "swinir-x8/t2s": (61.0, 0.397),
        "swinir-x4/joint": (83.4, 0.179),
        "swinir-x8/joint": (66.6, 0.355),
        "swinir-x4/sr4ir": (85.1, 0.136),
        "swinir-x8/sr4ir": (73.9, 0.292),
    },
    "cub200": {
        "h2t": (78.3,),
        "x4/l2t": (70.8, 0.298),
        "x8/l2t": (58.2, 0.465),
        "edsr-x4/s2t": (71.1, 0.216),
        "edsr-x8/s2t": (59.8, 0.365),
        "edsr-x4/t2s": (70.5, 0.208),
        "edsr-x8/t2s": (56.5, 0.401),
        "edsr-x4/joint": (70.8, 0.226),
        "edsr-x8/joint": (58.6, 0.380),
        "edsr-x4/sr4ir": (72.8, 0.179),
        "edsr-x8/sr4ir": (62.6, 0.326),
        "swinir-x4/s2t": (72.8, 0.201),
        "swinir-x8/s2t": (61.2, 0.349),
        "swinir-x4/t2s": (72.1, 0.190),
        "swinir-x8/t2s": (58.7, 0.377),
        "swinir-x4/joint": (72.9, 0.212),
        "swinir-x8/joint": (61.2, 0.364),
        "swinir-x4/sr4ir": (74.7, 0.157),
        "swinir-x8/sr4ir": (65.3, 0.301),
    },
}


def figures(name: str) -> dict[str, float]:
    """What the paper prints of an experiment (Tables 1 to 3), by the names of our figures.

    Args:
        name: the experiment's; one that is not the paper's has no figures.
    """
    data, _, rest = name.partition("/")
    values = _ROWS.get(data, {}).get(rest, ())
    return dict(zip(_METRICS.get(data, ()), values, strict=False))
