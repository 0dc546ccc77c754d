"""A worker's share: part after part, images to files, a record of each part when it is done."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from sr4ir_dist import storage
from sr4ir_dist.data.schema import DatasetError
from sr4ir_dist.prediction.inputs import InputImage, PredictionError, read_image
from sr4ir_dist.prediction.plan import Part, Plan
from sr4ir_dist.prediction.predictor import Prediction, Predictor
from sr4ir_dist.tasks.palette import voc_palette

SR_FOLDER, MASK_FOLDER = "sr", "masks"
_PALETTE = [channel for colour in voc_palette() for channel in colour]
# What is read ahead and what is still being written are in memory.
_AHEAD = 2


class PartWorker:
    """Predicts parts of a plan with networks that it loads once.

    While the networks work on an image, the next ones are read and the last ones written.

    Args:
        plan: the prediction.
        threads: torch's threads; None for its own default. Another number may change results by
            rounding.
        device: where the networks lie; by default this process's.
    """

    def __init__(
        self, plan: Plan, *, threads: int | None = None, device: torch.device | None = None
    ) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self._plan = plan
        self._predictor = Predictor(
            plan.checkpoint,
            plan.roles,
            images=plan.images,
            tiling=plan.tiling,
            most_pixels=plan.most_pixels,
            device=device,
        )
        self._reading = ThreadPoolExecutor(_AHEAD, "sr4ir-read")
        self._writing = ThreadPoolExecutor(_AHEAD, "sr4ir-write")

    def predict(self, part: Part) -> dict[str, Any]:
        """Predict the images of a part and write its record, last; what was done stays as it is.

        Returns:
            The record: `images`, a list of one entry an image.

        Raises:
            StorageError: the storage did not answer, which says nothing of an image.
        """
        place = part.record_uri(self._plan.out)
        if storage.exists(place):
            # Whoever was to do it before has died after all was written.
            return storage.read_json(place)
        written: list[Future[None]] = []
        entries = []
        for image, pixels in self._read(part):
            entry: dict[str, Any] = {"path": image.path}
            try:
                prediction = self._predictor.predict(pixels())
            except (DatasetError, PredictionError) as error:
                entries.append(entry | {"skipped": str(error)})
                continue
            entries.append(entry | _findings(prediction))
            written.append(self._writing.submit(write_images, self._plan.out, image, prediction))
            if len(written) > _AHEAD:
                written.pop(0).result()
        for each in written:
            each.result()
        record = {"images": entries}
        storage.write_json(place, record)
        return record

    def close(self) -> None:
        """End the threads."""
        for pool in (self._reading, self._writing):
            pool.shutdown(cancel_futures=True)

    def _read(self, part: Part) -> Iterator[tuple[InputImage, Callable[[], Tensor]]]:
        """The images and what gives, or raises, what became of reading each."""
        futures: list[Future[Tensor]] = []
        for index, image in enumerate(part.images):
            for ahead in part.images[index + len(futures) : index + 1 + _AHEAD]:
                futures.append(self._reading.submit(read_image, ahead.uri))
            yield image, futures.pop(0).result


def write_images(out: str, image: InputImage, prediction: Prediction) -> None:
    """Write an image's SR image and mask, as far as there are any; each appears whole.

    Raises:
        StorageError: it cannot be written.
    """
    if prediction.sr is not None:
        picture = Image.fromarray(prediction.sr.permute(1, 2, 0).numpy())
        storage.write_bytes(storage.join(out, SR_FOLDER, f"{image.name}.png"), _png(picture))
    if prediction.mask is not None:
        picture = Image.fromarray(prediction.mask.numpy())
        picture.putpalette(_PALETTE)
        storage.write_bytes(storage.join(out, MASK_FOLDER, f"{image.name}.png"), _png(picture))


def _findings(prediction: Prediction) -> dict[str, Any]:
    """What the record says of an image; rounded, so that files are no longer than they need be."""
    height, width = prediction.size
    entry: dict[str, Any] = {"height": height, "width": width}
    if prediction.scores is not None:
        entry["class"] = int(prediction.scores.argmax())
        entry["scores"] = [round(score, 6) for score in prediction.scores.tolist()]
    if prediction.boxes is not None:
        boxes, labels, scores = (
            prediction.boxes[name].tolist() for name in ("boxes", "labels", "scores")
        )
        entry["boxes"] = [[round(side, 3) for side in box] for box in boxes]
        entry["labels"] = labels
        entry["scores"] = [round(score, 6) for score in scores]
    return entry


def _png(picture: Image.Image) -> bytes:
    sink = io.BytesIO()
    picture.save(sink, "PNG")
    return sink.getvalue()
