"""COCO's mean average precision of boxes, by pycocotools."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

_MOST_DETECTIONS = 100
_ALL_AREAS = (0.0, 1e10)


class _Image(NamedTuple):
    """What was found in an image and what is there; boxes are x0, y0, x1, y1 in pixels."""

    found: np.ndarray
    found_labels: np.ndarray
    scores: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray


@dataclass(eq=False)
class COCOmAP:
    """AP of boxes, averaged over IoU .50:.05:.95 and classes, in per cent.

    At most 100 detections an image, objects of every size; detections on crowds do not count
    (Lin et al., "Microsoft COCO", ECCV 2014). Without any object it is nan.

    Attributes:
        classes: Classes without background; labels are 1 to `classes`.

    Raises:
        ValueError: Fewer than one class.
    """

    classes: int
    _images: dict[int, _Image] = field(default_factory=dict, init=False, repr=False, compare=False)
    _figures: dict[str, float] | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Checks the setting."""
        if self.classes < 1:
            raise ValueError(f"classes is {self.classes}; it must be at least 1")

    def update(
        self, detections: Sequence[Mapping[str, Tensor]], targets: Sequence[Mapping[str, Tensor]]
    ) -> None:
        """Adds a batch; an image that was already seen is not counted again.

        Args:
            detections: For each image `boxes` n,4 (x0, y0, x1, y1), `labels` n and `scores` n.
            targets: For each image `boxes` m,4 in the same pixels, `labels` m, `crowd` m bool and
                `image_id`, a tensor of one number.

        Raises:
            ValueError: Not as many detections as targets, or a target's label out of range.
        """
        if len(detections) != len(targets):
            raise ValueError(f"{len(detections)} images of detections, {len(targets)} of targets")
        for found, target in zip(detections, targets, strict=True):
            key = int(target["image_id"])
            image = _Image(
                *(_array(found[name]) for name in ("boxes", "labels", "scores")),
                *(_array(target[name]) for name in ("boxes", "labels", "crowd")),
            )
            outside = (image.labels < 1) | (image.labels > self.classes)
            if outside.any():
                raise ValueError(
                    f"image {key} has an object of class {int(image.labels[outside][0])}; "
                    f"expected 1 to {self.classes}"
                )
            self._images.setdefault(key, image)
        self._figures = None

    def state(self, device: torch.device | str | None = None) -> dict[int, Any]:
        """Returns all images by their ids, as arrays that can be pickled.

        Args:
            device: Not used.
        """
        return dict(self._images)

    def from_state(self, state: Mapping[int, Any]) -> Self:
        """Returns a metric of the same classes that holds a state."""
        other = replace(self)
        other._images = dict(state)
        return other

    def merge(self, other: Self) -> Self:
        """Returns the metric of both metrics' images, each once; neither is changed.

        Raises:
            ValueError: The other metric is of another kind or has other classes.
        """
        if type(self) is not type(other) or self.classes != other.classes:
            raise ValueError(f"cannot merge {self} with {other}")
        return self.from_state({**other.state(), **self._images})

    def compute(self) -> float:
        """Returns the mean AP, 0 when nothing was found and nan when there is no object."""
        return self._evaluate()["map"]

    def details(self) -> dict[str, float]:
        """Returns `map50` and `map75`, the mean AP at IoU 0.50 and at 0.75."""
        return {name: value for name, value in self._evaluate().items() if name != "map"}

    def _evaluate(self) -> dict[str, float]:
        if self._figures is None:
            # It reports every stage on stdout.
            with contextlib.redirect_stdout(io.StringIO()):
                evaluation = COCOeval(self._objects(), self._detections(), "bbox")
                evaluation.params.areaRng = [list(_ALL_AREAS)]
                evaluation.params.areaRngLbl = ["all"]
                evaluation.params.maxDets = [_MOST_DETECTIONS]
                evaluation.evaluate()
                evaluation.accumulate()
            # IoU threshold, recall, class; -1 where a class has no object.
            precision = evaluation.eval["precision"][:, :, :, 0, 0]
            at = {round(100 * value): i for i, value in enumerate(evaluation.params.iouThrs)}
            parts = {"map": precision, "map50": precision[at[50]], "map75": precision[at[75]]}
            self._figures = {name: _mean(part) for name, part in parts.items()}
        return self._figures

    def _objects(self) -> COCO:
        return self._index(
            (key, box, label, {"iscrowd": int(crowd)})
            for key, image in sorted(self._images.items())
            for box, label, crowd in zip(image.boxes, image.labels, image.crowd, strict=True)
        )

    def _detections(self) -> COCO:
        return self._index(
            (key, box, label, {"iscrowd": 0, "score": float(score)})
            for key, image in sorted(self._images.items())
            for box, label, score in zip(image.found, image.found_labels, image.scores, strict=True)
        )

    def _index(self, rows: Any) -> COCO:
        annotations = []
        # pycocotools takes an id of 0 for "no match".
        for number, (key, box, label, more) in enumerate(rows, 1):
            x0, y0, x1, y1 = box.tolist()
            annotations.append(
                {
                    "id": number,
                    "image_id": key,
                    "category_id": int(label),
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": (x1 - x0) * (y1 - y0),
                    **more,
                }
            )
        index = COCO()
        index.dataset = {  # pyright: ignore[reportAttributeAccessIssue]
            "images": [{"id": key} for key in sorted(self._images)],
            "categories": [{"id": label} for label in range(1, self.classes + 1)],
            "annotations": annotations,
        }
        index.createIndex()
        return index


def _array(values: Tensor) -> np.ndarray:
    values = values.detach().cpu()
    return (values.double() if values.is_floating_point() else values).numpy()


def _mean(precision: np.ndarray) -> float:
    known = precision[precision > -1]
    return float(known.mean() * 100) if known.size else float("nan")
