"""From the records of all parts to the tables that people read, in the order of the input.

Records are read one after the other and rows go to files at once, so that memory does not grow with
the number of images.
"""

from __future__ import annotations

import csv
import json
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from sr4ir_dist import storage
from sr4ir_dist.prediction.plan import Part, Plan

SCORES, BOXES, SKIPPED = "scores.csv", "boxes.json", "skipped.csv"
_AHEAD = 16  # records that are read at once


def merge(plan: Plan, parts: Iterable[Part]) -> dict[str, Any]:
    """Write the tables of a prediction whose parts are all done.

    - `scores.csv`: image, class number (from 0) and name, and the probability of each class.
    - `boxes.json`: a COCO dataset whose annotations have scores; an image's id is its place in the
      input, from 1, and boxes are in pixels of the image that the task network was given.
    - `skipped.csv`: image and reason, where there are any.

    Args:
        plan: the prediction.
        parts: all of its parts, in order.

    Returns:
        How many `images` there are, how many were `predicted` and how many `skipped`, and the
        tables that were written, `files`.

    Raises:
        StorageError: a record cannot be read, or a table cannot be written.
    """
    counts = {"images": 0, "skipped": 0}
    with tempfile.TemporaryDirectory(prefix="sr4ir-merge-") as folder, ExitStack() as stack:

        def opened(name: str) -> TextIO:
            return stack.enter_context(Path(folder, name).open("w", newline="", encoding="utf-8"))

        tables: dict[str, TextIO] = {}
        skipped = csv.writer(opened(SKIPPED), lineterminator="\n")
        skipped.writerow(["image", "reason"])
        writer: _Scores | _Boxes | None = None
        if plan.target == "label":
            writer = _Scores(tables.setdefault(SCORES, opened(SCORES)), plan)
        elif plan.target == "boxes":
            boxes = tables.setdefault(BOXES, opened(BOXES))
            writer = _Boxes(boxes, Path(folder, "annotations"), stack, plan)
        for entry in _entries(plan.out, parts):
            counts["images"] += 1
            if "skipped" in entry:
                counts["skipped"] += 1
                skipped.writerow([entry["path"], entry["skipped"]])
            elif writer is not None:
                writer.add(counts["images"], entry)
        if writer is not None:
            writer.finish()
        stack.close()
        files = [*tables, *([SKIPPED] if counts["skipped"] else [])]
        for name in files:
            storage.upload(Path(folder, name), storage.join(plan.out, name))
    return {
        "images": counts["images"],
        "predicted": counts["images"] - counts["skipped"],
        "skipped": counts["skipped"],
        "files": files,
    }


class _Scores:
    """Rows of `scores.csv`."""

    def __init__(self, file: TextIO, plan: Plan) -> None:
        self._rows = csv.writer(file, lineterminator="\n")
        self._names = _class_names(plan)
        # Also where no image could be predicted: an empty file would be no table.
        self._rows.writerow(["image", "class", "name", *self._names])

    def add(self, number: int, entry: dict[str, Any]) -> None:
        best, scores = entry["class"], (f"{score:.6f}" for score in entry["scores"])
        self._rows.writerow([entry["path"], best, self._names[best], *scores])

    def finish(self) -> None:
        """There is nothing after the last row."""


class _Boxes:
    """`boxes.json`: images first, and then the annotations, which wait in a file of their own."""

    def __init__(self, file: TextIO, aside: Path, stack: ExitStack, plan: Plan) -> None:
        self._file = file
        self._aside = stack.enter_context(aside.open("w+", encoding="utf-8"))
        self._annotations = 0
        self._images = 0
        head = {
            "info": {"description": f"{plan.experiment.name}: {plan.checkpoint}"},
            "categories": [{"id": n, "name": name} for n, name in enumerate(_class_names(plan), 1)],
        }
        file.write(json.dumps(head)[:-1] + ', "images": [')

    def add(self, number: int, entry: dict[str, Any]) -> None:
        image = {
            "id": number,
            "file_name": entry["path"],
            "height": entry["height"],
            "width": entry["width"],
        }
        self._file.write((",\n" if self._images else "\n") + json.dumps(image))
        self._images += 1
        for box, label, score in zip(entry["boxes"], entry["labels"], entry["scores"], strict=True):
            x0, y0, x1, y1 = box
            width, height = round(x1 - x0, 3), round(y1 - y0, 3)
            self._annotations += 1
            annotation = {
                "id": self._annotations,
                "image_id": number,
                "category_id": label,
                "bbox": [x0, y0, width, height],
                "area": round(width * height, 3),
                "iscrowd": 0,
                "score": score,
            }
            separator = ",\n" if self._annotations > 1 else "\n"
            self._aside.write(separator + json.dumps(annotation))

    def finish(self) -> None:
        self._file.write('], "annotations": [')
        self._aside.seek(0)
        while text := self._aside.read(1 << 20):
            self._file.write(text)
        self._file.write("]}\n")


def _class_names(plan: Plan) -> tuple[str, ...]:
    assert plan.experiment.task is not None
    count = plan.experiment.task.classes or 0
    return plan.classes or tuple(f"class {label}" for label in range(count))


def _entries(out: str, parts: Iterable[Part]) -> Iterator[dict[str, Any]]:
    """The entry of each image, in the order of the input."""
    waiting: deque[Future[Any]] = deque()
    left = iter(parts)
    with ThreadPoolExecutor(_AHEAD) as pool:
        while True:
            for part in islice(left, _AHEAD - len(waiting)):
                waiting.append(pool.submit(storage.read_json, part.record_uri(out)))
            if not waiting:
                return
            yield from waiting.popleft().result()["images"]
