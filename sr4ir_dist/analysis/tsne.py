"""How far SR images lie from HR images in a task network's features (section S1, t-SNE)."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from sr4ir_dist import storage
from sr4ir_dist.analysis.comparison import Comparison, own_size, together
from sr4ir_dist.analysis.extras import need
from sr4ir_dist.analysis.loaded import Loaded
from sr4ir_dist.config import ExperimentError
from sr4ir_dist.degradation import crop_back
from sr4ir_dist.tasks.scored import Scored

HR = "HR"
_LEAST = 3  # images that neighbours can be found among
_PERPLEXITY = 30.0  # van der Maaten and Hinton's, where there are images enough


@dataclass(frozen=True)
class Features:
    """Pooled features of the same images in several versions.

    Attributes:
        ids: the images' names.
        vectors: of each version, `HR` and a label a checkpoint, float64 images,channels.
    """

    ids: tuple[str, ...]
    vectors: Mapping[str, NDArray[np.float64]]

    def gap(self, label: str) -> float:
        """How far a version is from HR: 0 where all its features are HR's.

        It is the mean distance of an image's features to those of its HR image, over the mean
        distance between the features of two HR images; 1 is as far as another image.
        """
        hr = self.vectors[HR]
        own = np.linalg.norm(self.vectors[label] - hr, axis=1).mean()
        apart = np.linalg.norm(hr[:, None] - hr[None], axis=2)
        return float(own / apart[~np.eye(len(hr), dtype=bool)].mean())


def collect(
    comparison: Comparison,
    oracle: Loaded | None = None,
    *,
    count: int = 200,
    told: Callable[[int], None] = lambda done: None,
) -> Features:
    """The features of HR images and of what each checkpoint makes of them.

    One task network sees them all; its last feature map is averaged over its pixels.

    Args:
        comparison: from `compare`.
        oracle: whose task network it is, as a rule of recipe h2t; None for the first checkpoint's.
        count: how many images, the first of the split.
        told: is told how many are done.

    Raises:
        ExperimentError: it has no task network, or there are too few images.
    """
    judge = next(iter(comparison.loaded.values())) if oracle is None else oracle
    if judge.setup.task is None:
        raise ExperimentError(
            f"{judge.uri} has no task network to see features with: name one by --oracle"
        )
    if HR in comparison.loaded:
        raise ExperimentError(f"the label {HR} is that of HR images: choose another one")
    found: dict[str, list[Tensor]] = {label: [] for label in (HR, *comparison.loaded)}
    ids = []
    with torch.no_grad():
        for parts in together(comparison, range(count)):
            ids.append(parts[0].id)
            found[HR].append(_pooled(judge, own_size(parts[0], parts[0].inputs.hr)))
            for (label, loaded), sample in zip(comparison.loaded.items(), parts, strict=True):
                image = sample.views.image(loaded.setup.recipe.judged_on)
                found[label].append(_pooled(judge, own_size(sample, image)))
            told(len(ids))
    if len(ids) < _LEAST:
        raise ExperimentError(f"{len(ids)} images are too few for t-SNE, which needs {_LEAST}")
    vectors = {label: torch.stack(each).double().numpy() for label, each in found.items()}
    return Features(tuple(ids), vectors)


def embed(features: Features, *, seed: int = 0) -> dict[str, NDArray[np.float64]]:
    """All versions in one plane, by t-SNE (van der Maaten and Hinton, JMLR 2008).

    Args:
        features: from `collect`.
        seed: another seed, another plane.

    Returns:
        Of each version the images' places, images,2.

    Raises:
        MissingLibraryError: scikit-learn is not installed.
    """
    together = np.concatenate(list(features.vectors.values()))
    perplexity = min(_PERPLEXITY, (len(together) - 1) / 3)
    places = (
        need("sklearn.manifold")
        .TSNE(perplexity=perplexity, init="pca", random_state=seed)
        .fit_transform(together)
    )
    parts = np.split(places.astype(np.float64), len(features.vectors))
    return dict(zip(features.vectors, parts, strict=True))


def write_scatter(
    features: Features, places: Mapping[str, NDArray[np.float64]], out: str
) -> dict[str, Any]:
    """Write a PNG with a plot a checkpoint: its images next to HR's, each tied to its own.

    Args:
        features: from `collect`.
        places: from `embed`.
        out: path or URI of the PNG.

    Returns:
        `gap`, each checkpoint's distance from HR (`Features.gap`), and `points`, a list of `id`,
        `images`, `x` and `y`.
    """
    labels = [label for label in places if label != HR]
    gaps = {label: features.gap(label) for label in labels}
    with mpl.rc_context({"backend": "agg", "font.size": 10}):
        figure = Figure(figsize=(4.6 * len(labels), 4.6), layout="constrained")
        axes = figure.subplots(1, len(labels), squeeze=False, sharex=True, sharey=True)[0]
        for number, (axis, label) in enumerate(zip(axes, labels, strict=True)):
            _scatter(axis, places[HR], places[label], label, number)
            axis.set_title(f"{label}: {gaps[label]:.2f} from HR")
        sink = io.BytesIO()
        figure.savefig(sink, format="png", dpi=130)
    storage.write_bytes(out, sink.getvalue())
    return {"gap": gaps, "points": points(features.ids, places)}


def points(ids: Sequence[str], places: Mapping[str, NDArray[np.float64]]) -> list[dict[str, Any]]:
    """A record of each point: `id`, `images` (the version), `x` and `y`."""
    return [
        {"id": name, "images": label, "x": float(x), "y": float(y)}
        for label, part in places.items()
        for name, (x, y) in zip(ids, part, strict=True)
    ]


def _scatter(
    axis: Any, hr: NDArray[np.float64], sr: NDArray[np.float64], label: str, number: int
) -> None:
    for start, end in zip(hr, sr, strict=True):
        axis.plot(*zip(start, end, strict=True), color="0.85", linewidth=0.6, zorder=1)
    axis.scatter(*hr.T, s=14, color="0.25", marker="o", label=HR, zorder=2)
    axis.scatter(*sr.T, s=16, color=f"C{number}", marker="^", label=label, zorder=3)
    axis.set(xticks=[], yticks=[])
    axis.legend(loc="best", frameon=False)


def _pooled(judge: Loaded, image: Tensor) -> Tensor:
    """The mean of the last feature map of one image, on the CPU."""
    setup, module = judge.setup, judge.setup.modules["task"]
    assert setup.task is not None
    network = module.network if isinstance(module, Scored) else module
    image = image.to(setup.device)
    images = image
    if setup.task.target == "boxes":
        images = crop_back(image, [image.shape[-2:]])
    *_, last = setup.task.features(network, images).values()
    return last.float().mean(dim=(2, 3))[0].cpu()
