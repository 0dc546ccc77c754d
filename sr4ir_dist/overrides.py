"""Changes to an Experiment by dotted path, as `--set key.path=value` gives them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from sr4ir_dist.config import (
    NAMED,
    Experiment,
    ExperimentError,
    field_paths,
    from_tree,
)
from sr4ir_dist.suggestions import unknown_key


def override(experiment: Experiment, assignments: Iterable[str]) -> Experiment:
    """Return the experiment with `key.path=value` assignments applied in order.

    Values are JSON (`4`, `1e-3`, `null`, `[0.9, 0.99]`); what is not JSON is taken as a string.

    Raises:
        ExperimentError: no `=` in an assignment, an unknown key (the nearest one is named), or a
            value of the wrong type or range.
    """
    tree = experiment.model_dump(mode="json")
    known = field_paths()
    for assignment in assignments:
        path, separator, text = assignment.partition("=")
        path = path.strip()
        if not separator:
            raise ExperimentError(f"--set {assignment!r} must have the form key.path=value")
        if path in NAMED:
            raise ExperimentError(
                f"--set {assignment}: {path} is part of the experiment's name; name another one"
            )
        if path not in known:
            raise ExperimentError(unknown_key(path, set(known) - set(NAMED)))
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        _assign(tree, path, value)
    return from_tree(tree)


def _assign(tree: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    node = tree
    for depth, parent in enumerate(parents):
        if node[parent] is None:
            group = ".".join(parents[: depth + 1])
            raise ExperimentError(
                f"--set {path}={value}: this experiment has no {group} network, so {group} is null"
            )
        node = node[parent]
        if not isinstance(node, dict):
            group = ".".join(parents[: depth + 1])
            raise ExperimentError(f"--set {path}={value}: {group} was set to {node!r} before")
    node[last] = value
