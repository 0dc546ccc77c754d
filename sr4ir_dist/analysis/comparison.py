"""The same images by several methods: LR, bilinear, each checkpoint's, HR (Figures 4 to 6, S9)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sr4ir_dist import storage
from sr4ir_dist.analysis.loaded import Loaded, Sample, load, samples
from sr4ir_dist.analysis.overlays import (
    Overlay,
    drawn,
    image_figure,
    image_psnr,
    predicted,
    true,
)
from sr4ir_dist.analysis.pictures import Cell, sheet
from sr4ir_dist.config import ExperimentError
from sr4ir_dist.data.splits import dataset_uris, open_split
from sr4ir_dist.degradation import enlarge_bilinear


@dataclass(frozen=True)
class Row:
    """One image by all methods.

    Attributes:
        id: its name in the dataset.
        position: its place in the split, from 0.
        cells: an image for each title of the comparison.
    """

    id: str
    position: int
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Comparison:
    """Checkpoints that can be compared on one split of a dataset.

    Attributes:
        loaded: the checkpoints by label, in the order of their columns.
        data: URIs of the datasets.
        split: the split.
        names: of the classes, without background; empty where no checkpoint has a task network.
        scale: how much smaller LR images are; None where no checkpoint sees any.
    """

    loaded: Mapping[str, Loaded]
    data: tuple[str, ...]
    split: str
    names: tuple[str, ...]
    scale: int | None

    @property
    def titles(self) -> tuple[str, ...]:
        """What the columns of a row are."""
        enlarged = ("LR", "bilinear") if self.scale is not None else ()
        return (*enlarged, *self.loaded, "HR")


def compare(
    checkpoints: Mapping[str, str],
    *,
    data: Sequence[str] | None = None,
    split: str = "val",
    settings: Sequence[str] = (),
) -> Comparison:
    """Load checkpoints and check that they see the same images.

    Args:
        checkpoints: a URI for each label, as `loaded.load` takes it.
        data: URIs of the datasets; by default what the first one's run was trained on.
        split: the split.
        settings: `key.path=value` assignments to every checkpoint's experiment.

    Raises:
        CheckpointError: there is no such checkpoint, or it is damaged.
        ExperimentError: they have other scales, tasks or classes, or a setting is wrong.
        DatasetError: there is no such dataset or split.
    """
    loaded = {label: load(uri, settings=settings) for label, uri in checkpoints.items()}
    if not loaded:
        raise ExperimentError("no checkpoint was named to be compared")
    first = next(iter(loaded.values()))
    uris = dataset_uris(first.data if data is None else data)
    degraded = {
        label: each.setup.experiment
        for label, each in loaded.items()
        if each.setup.recipe.judged_on != "hr"
    }
    _check_same("scale", {label: each.scale for label, each in degraded.items()})
    _check_same("degradation", {label: each.degradation for label, each in degraded.items()})
    tasks = {label: task for label, each in loaded.items() if (task := each.setup.task)}
    _check_same("task", {label: task.target for label, task in tasks.items()})
    names: tuple[str, ...] = ()
    if tasks:
        names = tuple(open_split(uris, split).manifest.class_names)
    for label, task in tasks.items():
        if task.num_classes != len(names):
            raise ExperimentError(
                f"{label} tells {task.num_classes} classes apart, but {', '.join(uris)} has "
                f"{len(names)}"
            )
    scale = next((each.scale for each in degraded.values()), None)
    return Comparison(loaded, uris, split, names, scale)


def rows(
    comparison: Comparison, positions: Collection[int], *, overlay: bool = True
) -> Iterator[Row]:
    """The rows of some images, in the split's order.

    Args:
        comparison: from `compare`.
        positions: places of the images in the split, from 0.
        overlay: show what the task networks find, and what is there.

    Raises:
        ExperimentError: a checkpoint's transforms make other images than the first one's.
    """
    for position, parts in zip(sorted(positions), together(comparison, positions), strict=False):
        with torch.no_grad():
            row = Row(parts[0].id, position, tuple(_cells(comparison, parts, overlay)))
        yield row


def together(comparison: Comparison, positions: Collection[int]) -> Iterator[tuple[Sample, ...]]:
    """Some images as each checkpoint sees them, in the split's order.

    Args:
        comparison: from `compare`.
        positions: places of the images in the split, from 0.

    Raises:
        ExperimentError: a checkpoint's transforms make other images than the first one's.
    """
    last = max(positions, default=-1)
    with ExitStack() as stack:
        streams = [
            stack.enter_context(closing(samples(each, comparison.data, comparison.split)))
            for each in comparison.loaded.values()
        ]
        # The networks run only where an image is asked for.
        for position, parts in enumerate(islice(zip(*streams, strict=True), last + 1)):
            if position in positions:
                _check_same_image(comparison, parts)
                yield parts


def figures(
    comparison: Comparison,
    label: str,
    count: int | None,
    told: Callable[[int], None] = lambda done: None,
) -> list[float]:
    """How well one checkpoint does on each of the split's first images, in their order.

    It is the task's figure of the image (`overlays.image_figure`), or without a task network PSNR.

    Args:
        comparison: from `compare`.
        label: the checkpoint.
        count: how many images; None for all.
        told: is told how many are done.
    """
    loaded = comparison.loaded[label]
    setup, found = loaded.setup, []
    settings = setup.experiment.evaluation
    view = setup.recipe.judged_on
    for sample in samples(loaded, comparison.data, comparison.split, count):
        with torch.no_grad():
            if setup.task is None:
                sr, hr = (own_size(sample, sample.views.image(each)) for each in (view, "hr"))
                figure = image_psnr(sr, hr, border=settings.border, channel=settings.channel)
            else:
                outputs = sample.views.task_outputs(view)
                figure = image_figure(setup.task, outputs, sample.inputs.targets)
        found.append(figure)
        told(len(found))
    return found


def own_size(sample: Sample, canvas: Tensor) -> Tensor:
    """An image, 1,3,H,W, without the canvas around it."""
    height, width = sample.inputs.sizes[0]
    return canvas[..., :height, :width]


def write_figure(
    comparison: Comparison,
    out: str,
    *,
    count: int = 6,
    overlay: bool = True,
    told: Callable[[int], None] = lambda done: None,
) -> list[str]:
    """Write a PNG of one row an image, a column a method.

    Args:
        comparison: from `compare`.
        out: path or URI of the PNG.
        count: how many images, the first of the split.
        overlay: show what the task networks find, and what is there.
        told: is told how many are done.

    Returns:
        The images' names.
    """
    shown: list[Row] = []
    for row in rows(comparison, range(count), overlay=overlay):
        shown.append(row)
        told(len(shown))
    storage.write_bytes(out, sheet(comparison.titles, [row.cells for row in shown]))
    return [row.id for row in shown]


def _cells(comparison: Comparison, parts: Sequence[Sample], overlay: bool) -> Iterator[Cell]:
    first, scale = parts[0], comparison.scale
    if scale is not None:
        lr = next(part.inputs.lr for part in parts if part.inputs.lr is not None)
        for image in (F.interpolate(lr, scale_factor=scale), enlarge_bilinear(lr, scale)):
            yield Cell(drawn(own_size(first, image)[0], Overlay()))
    truth = Overlay()
    for loaded, sample in zip(comparison.loaded.values(), parts, strict=True):
        setup, said = loaded.setup, Overlay()
        if overlay and setup.task is not None:
            outputs = sample.views.task_outputs(setup.recipe.judged_on)
            said = predicted(setup.task, outputs, sample.inputs.targets, comparison.names)
            truth = true(setup.task, sample.inputs.targets, comparison.names)
        yield _cell(sample, sample.views.image(setup.recipe.judged_on), said)
    yield _cell(first, first.inputs.hr, truth)


def _cell(sample: Sample, image: Tensor, said: Overlay) -> Cell:
    return Cell(drawn(own_size(sample, image)[0], said), said.caption, said.right)


def _check_same_image(comparison: Comparison, parts: Sequence[Sample]) -> None:
    first = parts[0]
    for label, sample in zip(comparison.loaded, parts, strict=True):
        if sample.id != first.id or sample.inputs.sizes != first.inputs.sizes:
            raise ExperimentError(
                f"{label} sees {sample.id} at {_size(sample)}, but {next(iter(comparison.loaded))} "
                f"sees {first.id} at {_size(first)}: set the same data settings (data.resize=...)"
            )


def _size(sample: Sample) -> str:
    return "x".join(map(str, sample.inputs.sizes[0]))


def _check_same(what: str, values: Mapping[str, Any]) -> None:
    first = next(iter(values), "")
    for label, value in values.items():
        if value != values[first]:
            raise ExperimentError(
                f"the {what} of {label} is {value}, but that of {first} is {values[first]}: "
                "compare checkpoints that see the same images"
            )
