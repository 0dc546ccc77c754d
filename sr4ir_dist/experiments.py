"""Experiment names and what they stand for.

`make("cub200/edsr-x8/sr4ir")` gives the Experiment; `names()` lists all of them. A name is
`<data>/<sr>-x<scale>/<recipe>`, `<data>/h2t` for the oracle and `<data>/x<scale>/l2t` without an SR
network.
"""

from __future__ import annotations

import difflib
import re
from typing import Any

from sr4ir_dist import recipes
from sr4ir_dist.config import Experiment, ExperimentError, from_tree

_CLASSIFICATION: dict[str, Any] = {}  # the Experiment's defaults are the paper's classification
_DRAWN: dict[str, Any] = {
    "epochs": 20,
    "warmup_epochs": 2,
    "batch_size": 32,
    "data": {"resize": 64, "crop": 64},
    "sr": {"blocks": 4, "features": 32},
    "evaluation": {"every_epochs": 5, "batch_size": 64},
}
_FOLDER_SR: dict[str, Any] = {
    "epochs": 300,
    "warmup_epochs": 0,
    "batch_size": 16,
    "data": {"transform": "patch"},
    "degradation": {"kind": "bicubic_antialias"},
    "evaluation": {"every_epochs": 50, "batch_size": 1},
    "checkpoint": {"every_epochs": 10},
}

DATA: dict[str, tuple[str, dict[str, Any]]] = {
    "drawn_cls": ("drawn shapes and textures, made by `prepare_data.py drawn`", _DRAWN),
    "cub200": ("CUB-200-2011 birds, 200 classes", _CLASSIFICATION),
    "folder_cls": ("any tree of images, one folder a class", _CLASSIFICATION),
    "folder_sr": ("any folder of HR images (DIV2K, T91), for SR pre-training", _FOLDER_SR),
}
"""Data settings by name: a description, and what differs from the Experiment's defaults."""

SCALES = (2, 4, 8)
_SR_PATCH = 48  # LR side of a pre-training patch, as EDSR and SwinIR publish it


def names() -> list[str]:
    """All experiment names, grouped by data."""
    result = []
    for data in DATA:
        for recipe in _recipes_of(data):
            roles = recipes.RECIPES[recipe].init_from
            if "sr" in roles:
                result += [f"{data}/edsr-x{scale}/{recipe}" for scale in SCALES]
            elif recipes.RECIPES[recipe].judged_on == "hr":
                result.append(f"{data}/{recipe}")
            else:
                result += [f"{data}/x{scale}/{recipe}" for scale in SCALES]
    return result


def make(name: str) -> Experiment:
    """Build the experiment of a name, at the paper's settings.

    Raises:
        ExperimentError: no such experiment; the nearest name is given.
    """
    if name not in set(names()):
        near = difflib.get_close_matches(name, names(), n=1, cutoff=0.3)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ExperimentError(f"unknown experiment {name!r}{hint} (--list shows all)")
    data, *middle, recipe = name.split("/")
    scale = 4
    if middle:
        match = re.search(r"x(\d)$", middle[0])
        assert match is not None, name
        scale = int(match.group(1))
    roles = recipes.RECIPES[recipe].init_from
    tree: dict[str, Any] = {"name": name, "recipe": recipe, "scale": scale}
    tree |= {key: value for key, value in DATA[data][1].items() if key != "sr"}
    tree["sr"] = DATA[data][1].get("sr", {}) if "sr" in roles else None
    if "task" not in roles:
        tree["task"] = None
    if not _has_warmup(recipes.RECIPES[recipe]):
        tree["warmup_epochs"] = 0
    if data == "folder_sr":
        # The convention of SR benchmarks: luma, with as many border pixels cut as the scale.
        tree["evaluation"] = tree["evaluation"] | {"channel": "y", "border": scale}
        tree["data"] = tree["data"] | {"crop": _SR_PATCH * scale, "resize": _SR_PATCH * scale}
    return from_tree(tree)


def relevant(experiment: Experiment) -> Experiment:
    """The experiment with every setting at its default that no recipe it needs reads.

    It needs its own recipe and those that it starts from. Two experiments that train the same are
    then equal, and name the same run.

    Raises:
        ExperimentError: the name is unknown, or says another recipe or scale than the settings.
    """
    plain = make(experiment.name)
    if experiment.recipe != plain.recipe or experiment.scale != plain.scale:
        raise ExperimentError(
            f"name={experiment.name!r} does not fit recipe={experiment.recipe!r} and "
            f"scale={experiment.scale}"
        )
    recipe = recipes.get(experiment.recipe)
    origins = set(recipe.init_from.values()) - {recipes.PRETRAINED}
    needed = [recipe, *(recipes.get(origin) for origin in sorted(origins))]
    terms = [term for other in needed for phase in other.phases for term in phase.terms]
    views = {other.judged_on for other in needed} | {term.view for term in terms}
    tree, defaults = experiment.model_dump(mode="json"), plain.model_dump(mode="json")
    for role in ("sr", "task"):
        if role not in recipe.init_from:
            tree[role] = None
        elif tree[role] is None:
            raise ExperimentError(
                f"recipe {experiment.recipe} needs a {role} network, but {role} is null"
            )
        if not any(role in other.updates for other in needed):
            tree["optimizers"][role] = defaults["optimizers"][role]
            tree["zero"][role] = defaults["zero"][role]
    for loss in set(tree["losses"]) - {term.loss for term in terms}:
        tree["losses"][loss] = defaults["losses"][loss]
    if views == {"hr"}:
        tree["degradation"] = defaults["degradation"]
    if "cqmix" not in views:
        tree["cqmix"] = defaults["cqmix"]
    if not _has_warmup(recipe):
        tree["warmup_epochs"] = 0
    return from_tree(tree)


def prerequisite(experiment: Experiment, recipe: str) -> Experiment:
    """The experiment of another recipe that this one starts from, at the same settings.

    Args:
        experiment: the one that starts from the other.
        recipe: the other's recipe, a value of `Recipe.init_from`.
    """
    data, *middle, _ = experiment.name.split("/")
    target = recipes.get(recipe)
    if "sr" not in target.init_from:
        middle = [] if target.judged_on == "hr" else [f"x{experiment.scale}"]
    plain = make("/".join([data, *middle, recipe]))
    tree = experiment.model_dump(mode="json")
    tree |= {"name": plain.name, "recipe": recipe, "scale": plain.scale}
    for role in target.init_from:
        tree[role]["start"] = None
    return relevant(from_tree(tree))


def _has_warmup(recipe: recipes.Recipe) -> bool:
    waits = any(term.after_warmup for phase in recipe.phases for term in phase.terms)
    return waits or recipe.restart


def _recipes_of(data: str) -> list[str]:
    return ["pretrain"] if data == "folder_sr" else list(recipes.RECIPES)
