import copy
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from sr4ir_dist.metrics.coco import COCOmAP


def found(boxes: list[list[float]], labels: list[int], scores: list[float]) -> dict[str, Tensor]:
    return {
        "boxes": torch.tensor(boxes).reshape(-1, 4),
        "labels": torch.tensor(labels, dtype=torch.int64),
        "scores": torch.tensor(scores),
    }


def there(
    number: int, boxes: list[list[float]], labels: list[int], crowd: list[bool] | None = None
) -> dict[str, Tensor]:
    return {
        "boxes": torch.tensor(boxes).reshape(-1, 4),
        "labels": torch.tensor(labels, dtype=torch.int64),
        "crowd": torch.tensor(crowd or [False] * len(boxes), dtype=torch.bool),
        "image_id": torch.tensor(number),
    }


BOX, OTHER = [10.0, 20.0, 110.0, 220.0], [150.0, 20.0, 170.0, 60.0]
SHIFTED = [10.0, 20.0, 110.0, 144.0]  # 124 of 200 rows: IoU 0.62, right at 3 of 10 thresholds
FAR = [300.0, 300.0, 330.0, 330.0]


def judged(detections: Any, targets: Any, classes: int = 3) -> COCOmAP:
    metric = COCOmAP(classes)
    metric.update(detections, targets)
    return metric


@pytest.mark.parametrize(
    ("detections", "expected"),
    [
        pytest.param(found([BOX, OTHER], [1, 2], [0.9, 0.2]), 100, id="all right"),
        pytest.param(found([SHIFTED, OTHER], [1, 2], [0.9, 0.2]), 65, id="one at IoU 0.62"),
        pytest.param(found([BOX], [1], [0.9]), 50, id="one class missed"),
        pytest.param(found([BOX, OTHER], [2, 1], [0.9, 0.2]), 0, id="classes exchanged"),
        pytest.param(found([BOX, OTHER, FAR], [1, 2, 1], [0.9, 0.2, 0.1]), 100, id="worst false"),
        pytest.param(found([BOX, OTHER, FAR], [1, 2, 1], [0.9, 0.2, 0.95]), 75, id="best false"),
        pytest.param(found([BOX, BOX, OTHER], [1, 1, 2], [0.9, 0.8, 0.2]), 100, id="found twice"),
        pytest.param(found([BOX, OTHER, FAR], [1, 2, 3], [0.9, 0.2, 0.9]), 100, id="absent class"),
        pytest.param(found([], [], []), 0, id="nothing found"),
    ],
)
def test_hand_made_cases(detections: dict[str, Tensor], expected: float) -> None:
    metric = judged([detections], [there(7, [BOX, OTHER], [1, 2])])
    assert metric.compute() == pytest.approx(expected, abs=1e-9)


def test_details_are_ap_at_two_overlaps() -> None:
    metric = judged([found([SHIFTED], [1], [0.9])], [there(0, [BOX], [1])])
    assert metric.compute() == pytest.approx(30)
    assert metric.details() == {"map50": pytest.approx(100), "map75": 0}


def test_crowds_are_neither_missed_nor_falsely_found() -> None:
    target = there(0, [BOX, OTHER], [1, 1], [False, True])
    assert judged([found([BOX], [1], [0.5])], [target]).compute() == pytest.approx(100)
    inside = [152.0, 22.0, 168.0, 50.0]
    both = found([BOX, inside], [1, 1], [0.5, 0.9])
    assert judged([both], [target]).compute() == pytest.approx(100)
    target["crowd"][1] = False
    assert judged([both], [target]).compute() < 60


def test_nothing_to_find_is_nan() -> None:
    assert math.isnan(COCOmAP(2).compute())
    empty = judged([found([BOX], [1], [0.9])], [there(0, [], [])])
    assert math.isnan(empty.compute())
    assert all(math.isnan(value) for value in empty.details().values())
    only_crowd = judged([found([BOX], [1], [0.9])], [there(0, [BOX], [1], [True])])
    assert math.isnan(only_crowd.compute())
    assert judged([found([], [], [])], [there(0, [BOX], [1])]).compute() == 0


def drawn(images: int = 12, classes: int = 3) -> tuple[list[Any], list[Any]]:
    """Random objects; most are found somewhere near, some elsewhere, up to 150 an image."""
    random = np.random.default_rng(0)
    detections, targets = [], []
    for number in range(images):
        count = int(random.integers(0, 8))
        corner = random.uniform(0, 200, (count, 2))
        boxes = np.concatenate([corner, corner + random.uniform(5, 150, (count, 2))], axis=1)
        labels = random.integers(1, classes + 1, count)
        crowd = random.uniform(size=count) < 0.15
        near = np.repeat(boxes, 2, axis=0) + random.normal(0, 4, (2 * count, 4))
        other = np.sort(random.uniform(0, 300, (150 if number == 3 else 4, 2, 2)), axis=1)
        guesses = np.concatenate([near, other.reshape(-1, 4)])
        guessed = np.concatenate(
            [np.repeat(labels, 2), random.integers(1, classes + 1, len(other))]
        )
        # Equal scores, so that the order of images and boxes matters.
        scores = random.integers(1, 10, len(guesses)) / 10
        detections.append(found(guesses.tolist(), guessed.tolist(), scores.tolist()))
        targets.append(there(1000 - 7 * number, boxes.tolist(), labels.tolist(), crowd.tolist()))
    return detections, targets


def by_pycocotools(detections: list[Any], targets: list[Any], classes: int = 3) -> np.ndarray:
    """The 12 figures of pycocotools' documented way, through result records."""

    def width_and_height(box: Tensor) -> list[float]:
        x0, y0, x1, y1 = box.double().tolist()
        return [x0, y0, x1 - x0, y1 - y0]

    order = sorted(range(len(targets)), key=lambda i: int(targets[i]["image_id"]))
    truth = COCO()
    results: Any = []
    annotations: list[Any] = []
    for i in order:
        key = int(targets[i]["image_id"])
        for box, label, crowd in zip(
            *(targets[i][n] for n in ("boxes", "labels", "crowd")), strict=True
        ):
            x, y, w, h = width_and_height(box)
            annotations.append({
                "id": len(annotations) + 1, "image_id": key, "category_id": int(label),
                "bbox": [x, y, w, h], "area": w * h, "iscrowd": int(crowd),
            })  # fmt: skip
        for box, label, score in zip(
            *(detections[i][n] for n in ("boxes", "labels", "scores")), strict=True
        ):
            results.append({
                "image_id": key, "category_id": int(label), "bbox": width_and_height(box),
                "score": float(score.double()),
            })  # fmt: skip
    dataset: Any = {
        "images": [{"id": int(target["image_id"])} for target in targets],
        "categories": [{"id": number} for number in range(1, classes + 1)],
        "annotations": annotations,
        "info": {},
    }
    truth.dataset = dataset
    truth.createIndex()
    evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return np.asarray(evaluation.stats)


def test_equals_pycocotools_own_way(capsys: pytest.CaptureFixture[str]) -> None:
    detections, targets = drawn()
    expected = by_pycocotools(detections, targets) * 100
    capsys.readouterr()
    metric = judged(detections, targets)
    assert metric.compute() == pytest.approx(expected[0], rel=1e-12)
    assert metric.details() == {
        "map50": pytest.approx(expected[1], rel=1e-12),
        "map75": pytest.approx(expected[2], rel=1e-12),
    }
    assert 5 < expected[0] < 60
    assert capsys.readouterr().out == ""


def test_figures_do_not_depend_on_ranks() -> None:
    detections, targets = drawn()
    whole = judged(detections, targets)
    ranks = [judged(detections[i::3], targets[i::3]) for i in (2, 0, 1)]
    states = [pickle.loads(pickle.dumps(rank.state("cpu"))) for rank in ranks]
    merged = COCOmAP(3)
    for state in states:
        merged = merged.merge(COCOmAP(3).from_state(state))
    one_by_one = COCOmAP(3)
    for pair in zip(reversed(detections), reversed(targets), strict=True):
        one_by_one.update([pair[0]], [pair[1]])
    for other in (merged, one_by_one):
        assert other.compute() == whole.compute()
        assert other.details() == whole.details()
    assert ranks[0].compute() != whole.compute()
    assert len(ranks[0].state()) == 4


def test_an_image_that_both_have_counts_once() -> None:
    detections, targets = drawn()
    whole = judged(detections, targets)
    first, second = judged(detections[:8], targets[:8]), judged(detections[5:], targets[5:])
    assert first.merge(second).compute() == whole.compute()
    again = copy.deepcopy(whole)
    again.update(detections[:2], targets[:2])
    assert again.compute() == whole.compute()


def test_later_batches_count() -> None:
    metric = judged([found([BOX], [1], [0.9])], [there(0, [BOX], [1])])
    assert metric.compute() == pytest.approx(100)
    metric.update([found([FAR], [2], [0.9])], [there(1, [BOX], [2])])
    assert metric.compute() == pytest.approx(50)


def test_refuses() -> None:
    with pytest.raises(ValueError, match="classes is 0"):
        COCOmAP(0)
    with pytest.raises(ValueError, match="1 images of detections, 0 of targets"):
        COCOmAP(2).update([found([], [], [])], [])
    for label in (0, 3):
        with pytest.raises(ValueError, match=f"image 5 has an object of class {label}.* 1 to 2"):
            COCOmAP(2).update([found([], [], [])], [there(5, [BOX], [label])])
    with pytest.raises(ValueError, match="cannot merge"):
        COCOmAP(2).merge(COCOmAP(3))
