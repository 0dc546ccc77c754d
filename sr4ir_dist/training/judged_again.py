"""LPIPS of runs that finished before its weights were at hand: nothing is trained again for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sr4ir_dist import storage
from sr4ir_dist.checkpoint import CheckpointError
from sr4ir_dist.training import launch
from sr4ir_dist.training.capacity import Resources
from sr4ir_dist.training.plan import NO_LPIPS, RESULT, EvaluationRequest, Plan, make_request


@dataclass(frozen=True)
class Lacking:
    """A finished run without LPIPS.

    Attributes:
        result: its result, as `launch.train` gives it.
        data: URI of the dataset, or of each one of a mix, to judge on.
        weights: VGG16's.
    """

    result: dict[str, Any]
    data: str | tuple[str, ...]
    weights: str


def lacking_weights(plan: Plan, result: dict[str, Any]) -> str | None:
    """VGG16's weights, where they are at hand now and the run was judged without them."""
    return None if "lpips" in result["metrics"] else plan.lpips


def add_lpips(
    runs: Sequence[Lacking], resources: Resources, *, cache_dir: str | None = None
) -> list[dict[str, Any]]:
    """Judge the last checkpoint of runs once more, and keep its LPIPS in their results.

    Args:
        runs: which, all of one storage.
        resources: what to ask of the cluster that `parallel.connect` joined.
        cache_dir: node-local cache of shards from remote storage.

    Returns:
        Their results; where a run's checkpoint is gone, with a note that says so.

    Raises:
        ExperimentError: the cluster has not what the evaluation asks for.
        StorageError: the storage failed.
        TrainingError: a worker failed.
    """
    results = [run.result for run in runs]
    requests: dict[int, EvaluationRequest] = {}
    for number, run in enumerate(runs):
        try:
            requests[number] = make_request(
                run.result["checkpoint"],
                data=run.data,
                split="val",
                settings=[f"evaluation.lpips={run.weights}"],
            )
        except CheckpointError as error:
            results[number] = _noted(run.result, f"{NO_LPIPS}{error}")
    if not requests:
        return results
    figures = launch.evaluate(list(requests.values()), resources, cache_dir=cache_dir)
    for number, found in zip(requests, figures, strict=True):
        result = _noted(results[number])
        result["metrics"] = result["metrics"] | {"lpips": found["lpips"]}
        storage.write_json(storage.join(result["run_uri"], RESULT), result)
        results[number] = result
    return results


def _noted(result: dict[str, Any], *notes: str) -> dict[str, Any]:
    kept = [note for note in result["notes"] if not note.startswith(NO_LPIPS)]
    return result | {"notes": [*kept, *notes]}
