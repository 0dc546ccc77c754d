import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sr4ir_dist.metrics.miou import MIoU


def logits_of(predicted: Tensor, classes: int) -> Tensor:
    return F.one_hot(predicted.long(), classes).permute(0, 3, 1, 2).float()


def random_masks(*shape: int, classes: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    target, predicted = (torch.randint(0, classes, shape, generator=generator) for _ in range(2))
    target[target == 1] = 255
    return target.to(torch.uint8), predicted


def test_equals_the_published_figures(parity: Path) -> None:
    record = torch.load(parity / "metrics.pt", weights_only=True)
    metric = MIoU(21)
    metric.update(logits_of(record["seg_pred"], 21), record["seg_target"])
    assert torch.equal(metric.state().view(21, 21).long(), record["confmat"])
    torch.testing.assert_close(
        metric.per_class().float(), record["iou"] * 100, rtol=1e-6, atol=0, equal_nan=True
    )
    assert metric.compute() == pytest.approx(record["miou"], rel=1e-6)


def test_a_hand_made_case() -> None:
    target = torch.tensor([[[0, 0, 0, 1], [1, 1, 255, 255]]], dtype=torch.uint8)
    predicted = torch.tensor([[[0, 0, 1, 1], [1, 0, 0, 1]]])
    metric = MIoU(5)
    metric.update({"out": logits_of(predicted, 5), "aux": torch.zeros(1, 5, 2, 4)}, target)
    assert metric.state().view(5, 5)[:2, :2].tolist() == [[2, 1], [1, 2]]
    assert metric.state().sum() == 6
    assert metric.compute() == pytest.approx(50)  # 2 / 4 for both classes
    assert metric.details() == {"absent_classes": 3}


def test_a_class_that_is_only_predicted_counts_as_missed() -> None:
    target = torch.zeros(1, 2, 2, dtype=torch.uint8)
    metric = MIoU(3)
    metric.update(logits_of(torch.tensor([[[0, 0], [0, 2]]]), 3), target)
    assert metric.compute() == pytest.approx((75 + 0) / 2)
    assert metric.details() == {"absent_classes": 1}


def test_void_is_ignored_and_nothing_is_nan() -> None:
    target, predicted = random_masks(2, 6, 5)
    metric = MIoU(4)
    metric.update(logits_of(predicted, 4), torch.full_like(target, 255))
    metric.update(torch.zeros(0, 4, 6, 5), target[:0])
    assert math.isnan(metric.compute())
    assert math.isnan(MIoU(4).compute())
    assert metric.details() == {"absent_classes": 4}


def test_pixels_are_pooled_over_images_and_ranks() -> None:
    target, predicted = random_masks(5, 8, 6)
    whole = MIoU(4)
    whole.update(logits_of(predicted, 4), target)
    parts = [MIoU(4) for _ in range(3)]
    for part, images in zip(parts, (slice(0, 0), slice(0, 1), slice(1, 5)), strict=True):
        part.update(logits_of(predicted, 4)[images], target[images])
    before = parts[1].state()
    merged = parts[0].merge(parts[1]).merge(parts[2])
    summed = MIoU(4).from_state(sum((p.state() for p in parts), start=MIoU(4).state("cpu")))
    for other in (merged, summed):
        assert torch.equal(other.state(), whole.state())
        assert other.compute() == whole.compute()
    assert torch.equal(parts[1].state(), before)
    assert whole.state().dtype == torch.float64
    assert 0 < whole.compute() < 50


def test_counts_stay_exact_where_float32_is_not() -> None:
    many = torch.zeros(4, dtype=torch.float64)
    many[0] = 2.0**40 + 1
    metric = MIoU(2).from_state(many)
    metric.update(logits_of(torch.tensor([[[1]]]), 2), torch.zeros(1, 1, 1, dtype=torch.uint8))
    assert metric.state().tolist() == [2.0**40 + 1, 1, 0, 0]


def test_states_are_copies() -> None:
    target, predicted = random_masks(1, 6, 5)
    metric = MIoU(4)
    metric.update(logits_of(predicted, 4), target)
    before = metric.compute()
    metric.state().zero_()
    metric.merge(MIoU(4)).state().zero_()
    assert metric.compute() == before


def test_refuses() -> None:
    target, predicted = random_masks(2, 6, 5)
    with pytest.raises(ValueError, match="classes is 0"):
        MIoU(0)
    with pytest.raises(ValueError, match=r"expected \(N, 5, H, W\) and \(N, H, W\)"):
        MIoU(5).update(logits_of(predicted, 4), target)
    with pytest.raises(ValueError, match="expected"):
        MIoU(4).update(logits_of(predicted, 4), target[:, :5])
    with pytest.raises(ValueError, match="cannot merge"):
        MIoU(4).merge(MIoU(5))
    with pytest.raises(ValueError, match=r"\(16,\)"):
        MIoU(4).from_state(torch.zeros(9))
