"""Checkpoints judged with one thing exchanged: each other's SR networks, or the degradation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import product

from sr4ir_dist import checkpoint, recipes
from sr4ir_dist.config import ExperimentError, Role
from sr4ir_dist.hub.versions import resolve
from sr4ir_dist.training import state
from sr4ir_dist.training.plan import EvaluationRequest, make_request

BLURS = (0.0, 5.0, 10.0, 15.0)
"""Standard deviations in HR pixels of Table S5's blurs; 0 is no blur."""

PAPER_CROSS_TASK = {
    ("seg", "seg"): 55.0, ("seg", "det"): 22.4, ("seg", "cls"): 61.0,
    ("det", "seg"): 50.3, ("det", "det"): 25.5, ("det", "cls"): 60.2,
    ("cls", "seg"): 48.4, ("cls", "det"): 20.0, ("cls", "cls"): 71.4,
}  # fmt: skip
"""Table S4 by the task of the SR network and the task that it is used for (EDSR x8)."""

Keyed = dict[tuple[str, str], EvaluationRequest]


def cross_task(
    checkpoints: Mapping[str, str],
    *,
    split: str = "val",
    settings: Sequence[str] = (),
    say: Callable[[str], None] = lambda text: None,
) -> Keyed:
    """Requests of Table S4: each checkpoint's task network, with the SR network of each.

    Nothing is trained again; each is judged on the data of the run whose task network it is.

    Args:
        checkpoints: checkpoints, runs or hub's names by label.
        split: of the data.
        settings: `key.path=value` assignments to every experiment.
        say: is told what is fetched.

    Returns:
        A request by the label of the SR network and that of the task network.

    Raises:
        CheckpointError: there is no such checkpoint.
        ExperimentError: a checkpoint lacks one of the networks, or their scales or SR networks'
            kinds differ.
        WeightsError: an SR network is of another size.
    """
    kinds = {}
    for label, uri in checkpoints.items():
        experiment = state.load_experiment(checkpoint.load(resolve(uri)))
        if experiment.sr is None or experiment.task is None:
            raise ExperimentError(f"{label}: {experiment.name} has not both networks")
        kinds[label] = f"{experiment.sr.network} x{experiment.scale}"
    if len(set(kinds.values())) > 1:
        raise ExperimentError(f"SR networks of different kinds cannot be exchanged: {kinds}")
    requests: Keyed = {}
    for sr, task in product(checkpoints, repeat=2):
        exchanged: dict[Role, str] = {} if sr == task else {"sr": checkpoints[sr]}
        requests[sr, task] = make_request(
            checkpoints[task],
            data=None,
            split=split,
            settings=settings,
            networks=exchanged,
            say=say,
        )
    return requests


def degradations(
    checkpoints: Mapping[str, str],
    blurs: Sequence[float] = BLURS,
    *,
    data: Sequence[str] | None = None,
    split: str = "val",
    settings: Sequence[str] = (),
    say: Callable[[str], None] = lambda text: None,
) -> Keyed:
    """Requests of a sweep over blurs, as Table S5's columns; the paper trains anew for each.

    Args:
        checkpoints: checkpoints, runs or hub's names by label.
        blurs: standard deviations in HR pixels of the Gaussian before the bicubic; 0 for none.
        data: URIs of datasets; None for what each run was trained on.
        split: of the data.
        settings: `key.path=value` assignments to every experiment.
        say: is told what is fetched.

    Returns:
        A request by label and blur.

    Raises:
        CheckpointError: there is no such checkpoint.
        ExperimentError: a blur is out of range, or a checkpoint is judged on HR images.
    """
    requests: Keyed = {}
    for label, uri in checkpoints.items():
        for blur in blurs:
            request = make_request(
                uri,
                data=data,
                split=split,
                settings=[*settings, f"degradation.blur={blur}"],
                say=say,
            )
            if recipes.get(request.experiment.recipe).judged_on == "hr":
                raise ExperimentError(f"{label}: {request.experiment.name} is judged on HR images")
            requests[label, f"{blur:g}"] = request
    return requests
