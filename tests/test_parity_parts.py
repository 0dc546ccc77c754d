"""Parts against records of the published implementation: degradation, metrics, schedules."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sr4ir_dist.degradation import crop_back, degrade, enlarge_bilinear, pad_to, pad_to_multiple
from sr4ir_dist.losses.tdp import tdp
from sr4ir_dist.metrics.psnr import PSNR
from sr4ir_dist.metrics.topk import TopK
from sr4ir_dist.training.schedules import learning_rate


def records(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    if not path.exists():
        pytest.skip(f"no {name} among the records")
    return torch.load(path, weights_only=True)


def unit(grey: Tensor) -> Tensor:
    return grey.float() / 255


def assert_same_grid(images: Tensor, grey: Tensor) -> None:
    """Equal but for rounding ties: at most 1 value of 1,000, by one grey level."""
    assert images.shape == grey.shape
    difference = (images * 255 - grey).abs().round()
    assert difference.max() <= 1
    assert difference.mean() <= 1e-3


@pytest.mark.parametrize("scale", [2, 4, 8])
def test_degradation_and_bilinear_enlargement(parity: Path, scale: int) -> None:
    record = records(parity, "degradation.pt")
    expected = record[f"x{scale}"]
    assert_same_grid(degrade(unit(record["hr"]), scale), expected["lr"])
    up = enlarge_bilinear(unit(expected["lr"][:1]), scale)
    torch.testing.assert_close(up, expected["bilinear_up"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("scale", [4, 8])
def test_lists_are_padded_to_a_canvas_and_cropped_back(parity: Path, scale: int) -> None:
    record = records(parity, "degradation.pt")
    images, expected = record["list"], record[f"list_x{scale}"]
    height, width = (
        -(-max(image.shape[dim] for image in images) // scale) * scale for dim in (1, 2)
    )
    canvas = torch.cat([pad_to(image[None], height, width, "reflect") for image in images])
    assert torch.equal(canvas, expected["batch"])
    assert_same_grid(degrade(unit(canvas), scale), expected["lr"])
    back = crop_back(canvas, [image.shape[-2:] for image in images])
    assert len(back) == len(expected["back"])
    assert all(torch.equal(a, b) for a, b in zip(back, expected["back"], strict=True))


def test_segmentation_is_padded_by_its_edge(parity: Path) -> None:
    record = records(parity, "degradation.pt")["seg_eval"]
    padded = pad_to_multiple(record["hr"], 8)
    assert torch.equal(padded, record["padded"])
    assert_same_grid(degrade(unit(padded), 8), record["lr"])


def test_psnr(parity: Path) -> None:
    record = records(parity, "metrics.pt")
    metric = PSNR()
    metric.update(record["n"], record["a"])
    assert metric.compute() == pytest.approx(record["psnr"], rel=1e-6)
    assert metric.count == record["count"]
    assert metric.count + metric.dropped == len(record["a"])


@pytest.mark.parametrize(("place", "k"), [(0, 1), (1, 5)])
def test_top_k(parity: Path, place: int, k: int) -> None:
    record = records(parity, "metrics.pt")
    metric = TopK(k)
    metric.update(record["logits"], record["label"])
    assert metric.compute() == pytest.approx(record["acc"][place], rel=1e-9)


def test_tdp_loss_on_detections_layers(parity: Path) -> None:
    record = records(parity, "metrics.pt")
    loss = tdp(record["feat_sr"], record["feat_hr"], {"0": 0.5, "1": 0.5})
    assert loss.item() == pytest.approx(record["feature_loss"], rel=1e-6)


@pytest.mark.parametrize(
    ("name", "base_lr", "floor", "periods", "warmup"),
    [
        ("cls_sr", 1e-4, 1e-6, [20, 180], 0),
        ("cls_task", 3e-2, 1e-4, [20, 180], 0),
        ("seg_sr", 1e-4, 1e-6, [10, 90], 0),
        ("seg_task", 2e-2, 1e-4, [10, 90], 0),
        ("seg_aux", 2e-1, 1e-4, [10, 90], 0),
        ("det_sr", 1e-4, 1e-6, [2, 27], 1),
        ("det_task", 2e-2, 1e-4, [2, 27], 1),
        ("det_single", 2e-2, 1e-4, [30], 1),
    ],
)
def test_schedules(
    parity: Path, name: str, base_lr: float, floor: float, periods: list[int], warmup: int
) -> None:
    record = records(parity, "schedules.pt")
    steps = record["N"]
    rates = [
        learning_rate(
            step,
            base_lr=base_lr,
            floor=floor,
            periods_in_steps=[period * steps for period in periods],
            warmup_steps=warmup * steps,
        )
        for step in range(len(record[name]))
    ]
    assert rates == pytest.approx(record[name], rel=1e-12, abs=0)
