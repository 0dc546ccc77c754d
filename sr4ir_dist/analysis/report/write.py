"""Write a report of one run or several: one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from sr4ir_dist import storage
from sr4ir_dist.analysis.comparison import compare
from sr4ir_dist.analysis.report.gather import Run, gather
from sr4ir_dist.analysis.report.images import Group, choose
from sr4ir_dist.analysis.report.page import page
from sr4ir_dist.checkpoint import CheckpointError
from sr4ir_dist.config import ExperimentError
from sr4ir_dist.data.schema import DatasetError


@dataclass(frozen=True)
class Shown:
    """Which images a report shows.

    Attributes:
        data: URIs of the datasets; None for what each run was trained on, where it can be read.
        split: the split.
        count: images of each group: the first, the worst, the best; 0 for no images at all.
        judged: the worst and best are of so many images, the first of the split.
        overlay: show what the task networks find, and what is there.
        settings: `key.path=value` assignments for the images, such as `data.resize=64`.
    """

    data: tuple[str, ...] | None = None
    split: str = "val"
    count: int = 3
    judged: int = 100
    overlay: bool = True
    settings: tuple[str, ...] = field(default=())


def write_report(
    runs: Mapping[str, str],
    out: str,
    shown: Shown | None = None,
    *,
    title: str | None = None,
    told: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> list[Run]:
    """Write a report; it appears whole or not at all.

    Args:
        runs: a run, a checkpoint or a hub's name for each label.
        out: path or URI of the HTML file.
        shown: which images; by default a few of those that the runs were trained with.
        title: the heading; by default the runs' labels.
        told: is told what is done, how far, and of how much.

    Returns:
        What was read of each run.

    Raises:
        CheckpointError: a run has no checkpoint, or it is damaged.
        ExperimentError: a setting of the images is wrong.
        DatasetError: there is no such dataset or split, where one was named.
        StorageError: the storage does not answer, or cannot be written.
    """
    shown = shown or Shown()
    found = [gather(label, uri) for label, uri in runs.items()]
    groups = _images({run.label: run.checkpoint for run in found}, shown, told)
    heading = title or " and ".join(run.label for run in found)
    storage.write_bytes(out, page(heading, found, groups).encode())
    return found


def _images(
    checkpoints: Mapping[str, str], shown: Shown, told: Callable[[str, int, int], None]
) -> list[tuple[str, str, Sequence[Group]]]:
    """The images of all runs side by side, or of each alone where they see different ones."""
    if not shown.count:
        return [("No images were asked for.", "", ())]
    try:
        return [_group(checkpoints, shown, told)]
    except CheckpointError:
        raise  # a damaged network is no matter of choosing images
    except (DatasetError, storage.StorageError) as error:
        if shown.data is not None:
            raise
        return [(f"No images (name the dataset by --data to have them): {error}", "", ())]
    except ExperimentError as error:
        if len(checkpoints) == 1:
            raise
        apart = [(f"Each run alone, for {error}", "", ())]
        return apart + [
            part for item in checkpoints.items() for part in _images(dict([item]), shown, told)
        ]


def _group(
    checkpoints: Mapping[str, str], shown: Shown, told: Callable[[str, int, int], None]
) -> tuple[str, str, Sequence[Group]]:
    compared = compare(checkpoints, data=shown.data, split=shown.split, settings=shown.settings)
    *_, last = checkpoints
    groups, said = choose(
        compared,
        count=shown.count,
        judged=shown.judged,
        overlay=shown.overlay,
        told=lambda done: told(f"images by {last}", done, shown.judged),
    )
    return f"{', '.join(compared.data)}, split {compared.split}.", said, groups
