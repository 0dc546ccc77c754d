"""What can be wrong with a prediction before a worker starts, checked and written down."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Any, Literal

from sr4ir_dist import checkpoint, recipes, storage
from sr4ir_dist.checkpoint import Checkpoint
from sr4ir_dist.config import Experiment, Role
from sr4ir_dist.hub.versions import resolve
from sr4ir_dist.prediction.inputs import InputImage, PredictionError, list_inputs, plain
from sr4ir_dist.prediction.tiles import Tiling, make_tiling
from sr4ir_dist.training.build import make_task
from sr4ir_dist.training.state import JUDGED, load_class_names, load_experiment

FORMAT_VERSION = 2
IDENTITY = "prediction.json"
"""The file that says what a folder's predictions were made from, and with which options."""
PARTS = "parts"
"""Where the records of finished parts are kept until all is done."""
SUMMARY = "summary.json"
"""The file that makes a prediction finished; it is written last."""
Target = Literal["label", "mask", "boxes"]
# Said for people: digests tell what counts, of the images their places, sizes and times of change.
_ABOUT = ("input", "checkpoint")
# A part is what is done again after a kill, and what is handed to a worker at once.
_MOST_IMAGES, _PARTS = 32, 64
# For 2^23 pixels the task networks take 0.5 (detection) to 4 GB (DeepLabV3 with ResNet50). SR
# images alone are kept as bytes, a few of them at a time: 2^28 pixels of one take 0.8 GB.
_MOST_TASK_PIXELS, _MOST_SR_PIXELS = 1 << 23, 1 << 28


@dataclass(frozen=True)
class Plan:
    """A prediction that can start; it is small, whatever the number of images.

    Attributes:
        checkpoint: the checkpoint's URI.
        experiment: the checkpoint's.
        out: where results go.
        roles: the networks that are needed.
        images: whether SR images are written.
        target: what the task network finds, or None where there is nothing to be found.
        classes: names of the classes.
        tiling: how large images are cut for the SR network.
        most_pixels: of the largest result.
        identity: what `prediction.json` holds: results depend on this and on nothing else.
    """

    checkpoint: str
    experiment: Experiment
    out: str
    roles: tuple[Role, ...]
    images: bool
    target: Target | None
    classes: tuple[str, ...]
    tiling: Tiling
    most_pixels: int
    identity: dict[str, Any]


@dataclass(frozen=True)
class Part:
    """Images that are predicted together.

    Attributes:
        number: of the part, from 0, in the order of the input.
        images: the images, in that order.
    """

    number: int
    images: tuple[InputImage, ...]

    def record_uri(self, out: str) -> str:
        """Where the record of the finished part lies."""
        return storage.join(out, PARTS, f"{self.number:07d}.json")


def make_plan(
    uri: str,
    source: str,
    out: str,
    *,
    images: bool = True,
    predictions: bool = True,
    tile: int | None = None,
    overlap: int | None = None,
    most_pixels: int | None = None,
    data: str | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[Plan, list[Part]]:
    """Check what a prediction needs, and claim its folder.

    Args:
        uri: a checkpoint, a run for its newest one, or `hub://NAME`.
        source: a folder, a list of images or an image, see `list_inputs`.
        out: where results go.
        images: write SR images, where there is an SR network.
        predictions: write what the task network finds, where there is one.
        tile: see `make_tiling`.
        overlap: see `make_tiling`.
        most_pixels: images whose result has more pixels are skipped; None for as many as 4 GB of
            memory can take.
        data: dataset that names the classes; None for the one that the run was trained on, where it
            can be read.
        say: is told what a user should know.

    Returns:
        The plan, and its images in parts. Which part an image is in depends on the list of images
        alone.

    Raises:
        PredictionError: there is nothing to predict on or to write, results would lie among the
            images, or the folder has results of another checkpoint, input or options.
        CheckpointError: there is no such checkpoint, or it is damaged.
        DatasetError: there is no such folder or dataset.
        StorageError: the storage cannot be written.
        ValueError: an option is out of its range.
    """
    out, source = plain(out), plain(source)
    saved = checkpoint.load(resolve(uri))
    experiment = load_experiment(saved)
    task = make_task(experiment) if predictions else None
    roles = _needed(experiment, images, predictions)
    images = images and "sr" in roles
    tiling = Tiling(0, 0)
    if "sr" in roles:
        assert experiment.sr is not None
        tiling = make_tiling(experiment.sr, experiment.scale, tile, overlap)
    if most_pixels is None:
        most_pixels = _MOST_SR_PIXELS if task is None else _MOST_TASK_PIXELS
    if most_pixels < 1:
        raise PredictionError(f"most_pixels={most_pixels}: expected at least 1")
    classes, notes = (), []
    if task is not None:
        classes, note = load_class_names(saved, task.num_classes, data)
        notes += [note] if note else []
    found, more = list_inputs(source)
    for note in (*notes, *more):
        say(f"note: {note}")
    _check_apart(source, out, found)
    identity = {
        "format_version": FORMAT_VERSION,
        "experiment": experiment.name,
        "checkpoint": saved.uri,
        "checkpoint_sha256": _checkpoint_digest(saved),
        "input": source,
        "images": len(found),
        "images_sha256": _digest([astuple(image) for image in found]),
        "sr_images": images,
        "predictions": task is not None,
        "tile": tiling.tile,
        "overlap": tiling.overlap,
        "most_pixels": most_pixels,
        "classes": list(classes),
    }
    _claim(out, identity)
    plan = Plan(
        checkpoint=saved.uri,
        experiment=experiment,
        out=out,
        roles=roles,
        images=images,
        target=None if task is None else task.target,
        classes=classes,
        tiling=tiling,
        most_pixels=most_pixels,
        identity=identity,
    )
    return plan, cut_into_parts(found)


def cut_into_parts(images: list[InputImage]) -> list[Part]:
    """The images in parts of 32, in the order of the input; of fewer where that makes few parts."""
    size = max(1, min(_MOST_IMAGES, math.ceil(len(images) / _PARTS)))
    starts = range(0, len(images), size)
    return [Part(n, tuple(images[start : start + size])) for n, start in enumerate(starts)]


def _needed(experiment: Experiment, images: bool, predictions: bool) -> tuple[Role, ...]:
    """The networks that what is wanted needs, of those that the checkpoint has."""
    recipe = recipes.get(experiment.recipe)
    known: list[Role] = [role for role in JUDGED if role in recipe.init_from]
    wanted: dict[Role, bool] = {
        "sr": images or (predictions and "task" in known and recipe.judged_on == "sr"),
        "task": predictions,
    }
    roles: tuple[Role, ...] = tuple(role for role in known if wanted[role])
    if not roles:
        has = " and ".join(f"{'an SR' if role == 'sr' else 'a task'} network" for role in known)
        raise PredictionError(
            f"nothing to write: {experiment.name} has {has}, whose results are switched off "
            "(--no-images, --no-predictions)"
        )
    return roles


def _check_apart(source: str, out: str, images: list[InputImage]) -> None:
    """Results are not to be taken for images, nor to replace any."""
    inside = [image.uri for image in images if image.uri.startswith(f"{out}/")]
    if inside or f"{out}/".startswith(f"{source}/"):
        raise PredictionError(f"--out {out} and the images of {source} must lie apart")


def _claim(out: str, identity: dict[str, Any]) -> None:
    """Write what the results will be made from, or compare it with what is there."""
    place = storage.join(out, IDENTITY)
    if not storage.exists(place):
        storage.check_writable(out)
        storage.write_json(place, identity)
        return
    there = storage.read_json(place)
    there = there if isinstance(there, dict) else {}
    keys = [key for key in {**identity, **there} if key not in _ABOUT]
    other = [key for key in keys if there.get(key) != identity.get(key)]
    if not other:
        return
    words = [f"{key}={there.get(key)!r:.80}, not {identity.get(key)!r:.80}" for key in other]
    hints = {"checkpoint_sha256": "checkpoint", "images_sha256": "input"}
    for key, about in hints.items():
        if key in other and there.get(about) == identity[about]:
            words.append(f"{about} {identity[about]} has changed since")
        elif key in other:
            words.append(f"{about} {there.get(about)}, not {identity[about]}")
    raise PredictionError(
        f"--out {out} has predictions of another kind: {'; '.join(words)}. Name another place, or "
        "delete it"
    )


def _checkpoint_digest(saved: Checkpoint) -> str:
    """Of what predictions depend on, so that a copy of a checkpoint counts as the same."""
    names = ["experiment.json", *(f"{role}.safetensors" for role in JUDGED)]
    return _digest([(name, saved.files[name][1]) for name in names if name in saved.files])


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
