"""Experiment names and what they stand for.

`make("cub200/edsr-x8/sr4ir")` gives the Experiment; `names()` lists all of them and `grid()` the 92
behind the paper's Tables 1 to 3. A name is `<data>/<sr>-x<scale>/<recipe>`, `<data>/h2t` for the
oracle and `<data>/x<scale>/l2t` without an SR network; `-blur5`, `-blur10` or `-blur15` after the
scale is Table S5's blur before the degradation.
"""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass, field
from typing import Any

from sr4ir_dist import recipes
from sr4ir_dist.config import Experiment, ExperimentError, from_tree
from sr4ir_dist.suggestions import did_you_mean

IMAGENET = "IMAGENET1K_V1"
DIV2K = "DIV2K"
SCALES = (2, 4, 8)
BLURS = (5, 10, 15)
_LR_WARMUP_EPOCHS = 5  # of large batches
_BLURRED = ("l2t", "sr4ir")
_SR_PATCH = 48  # LR side of a pre-training patch, as EDSR and SwinIR publish it
_MIDDLE = re.compile(r"^(?:(?P<sr>\w+)-)?x(?P<scale>[248])(?:-blur(?P<blur>\d+))?$")

SR_NETWORKS: dict[str, dict[str, Any]] = {
    "edsr": {"network": "edsr", "blocks": 16, "features": 64},
    "swinir": {"network": "swinir", "blocks": 6, "features": 180, "depth": 6, "heads": 6},
}
"""The published sizes of the SR networks."""


@dataclass(frozen=True)
class Data:
    """Settings that a kind of data brings.

    Attributes:
        about: a description.
        settings: what differs from the Experiment's defaults, in its nesting.
        sr: changes to the published SR networks (small data, small networks).
        published: the SR network starts from DIV2K weights, as in the paper.
    """

    about: str
    settings: dict[str, Any]
    sr: dict[str, Any] = field(default_factory=dict)
    published: bool = True


def _merged(*trees: dict[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for tree in trees:
        for key, value in tree.items():
            both = isinstance(value, dict) and isinstance(result.get(key), dict)
            result[key] = _merged(result[key], value) if both else value
    return result


# The recipes of the paper's supplement: 200 epochs at batch 128, 100 at 16 and 30 at 16.
_CLASSIFICATION: dict[str, Any] = {
    "task": {"weights": IMAGENET},
    "evaluation": {"lpips": IMAGENET},
}
_DENSE: dict[str, Any] = {
    "batch_size": 16,
    "cqmix": {"grid": 8},
    "evaluation": {"every_epochs": 5, "batch_size": 16, "lpips": IMAGENET},
}
_SEGMENTATION: dict[str, Any] = _DENSE | {
    "epochs": 100,
    "data": {"resize": 520, "crop": 480, "center_crop": False},
    "task": {
        "name": "segmentation",
        "network": "deeplabv3_mobilenet_v3_large",
        "weights": IMAGENET,
    },
    "optimizers": {"task": {"lr": 2e-2, "weight_decay": 1e-6}},
}
_DETECTION: dict[str, Any] = _DENSE | {
    "seed": 100,
    "epochs": 30,
    "lr_warmup_epochs": 1,
    "data": {"transform": "flip"},
    "task": {
        "name": "detection",
        "network": "fasterrcnn_mobilenet_v3_large_fpn",
        "weights": IMAGENET,
    },
    "optimizers": {"task": {"lr": 2e-2, "weight_decay": 1e-4}},
}
_DRAWN: dict[str, Any] = {
    "epochs": 20,
    "batch_size": 32,
    "data": {"resize": 64, "crop": 64},
    "task": {"weights": None, "min_size": 192, "max_size": 192},
    "evaluation": {"every_epochs": 5, "batch_size": 64, "lpips": None},
}
_DRAWN_SR = {
    "edsr": {"blocks": 4, "features": 32},
    "swinir": {"blocks": 2, "features": 24, "depth": 2, "heads": 2},
}
_FOLDER_SR: dict[str, Any] = {
    "data": {"transform": "patch"},
    "degradation": {"kind": "bicubic_antialias"},
    "evaluation": {"every_epochs": 100, "batch_size": 1},
    "checkpoint": {"every_epochs": 20},
}
# On DIV2K's 800 images these are the 300,000 and 500,000 steps of the two publications.
_PRETRAINING: dict[str, dict[str, Any]] = {
    "edsr": {
        "epochs": 6000,
        "batch_size": 16,
        "optimizers": {"sr": {"lr": 1e-4, "halve_at": [2 / 3]}},
    },
    "swinir": {
        "epochs": 20000,
        "batch_size": 32,
        "optimizers": {"sr": {"lr": 2e-4, "halve_at": [0.5, 0.8, 0.9, 0.95]}},
    },
}
_RESNET50 = {"task": {"network": "deeplabv3_resnet50"}}


def _drawn(about: str, task: dict[str, Any]) -> Data:
    return Data(about, _merged(task, _DRAWN), _DRAWN_SR, published=False)


DATA: dict[str, Data] = {
    "drawn_cls": _drawn("the drawn dataset (`prepare_data.py drawn`), 8 classes", _CLASSIFICATION),
    "drawn_seg": _drawn("the drawn dataset's masks", _SEGMENTATION),
    "drawn_det": _drawn("the drawn dataset's boxes", _DETECTION),
    "voc_seg": Data("PASCAL VOC 2012, 20 classes and background (Table 1)", _SEGMENTATION),
    "voc_det": Data("PASCAL VOC 2012, 20 classes of objects (Table 2)", _DETECTION),
    "cars": Data("Stanford Cars, 196 models (Table 3)", _CLASSIFICATION),
    "cub200": Data("CUB-200-2011 birds, 200 classes (Table 3)", _CLASSIFICATION),
    "voc_seg_resnet50": Data(
        "PASCAL VOC 2012 with DeepLabV3-ResNet50 (Table S3)", _merged(_SEGMENTATION, _RESNET50)
    ),
    "coco_seg": Data("COCO's instances as masks", _SEGMENTATION),
    "coco_det": Data("COCO's boxes", _DETECTION),
    "folder_cls": Data("any tree of images, one folder a class", _CLASSIFICATION),
    "folder_sr": Data(
        "any folder of HR images (DIV2K, T91), for SR pre-training", _FOLDER_SR, published=False
    ),
}
"""Data settings by name."""


def names() -> list[str]:
    """All experiment names, grouped by data."""
    return list(_known())


@functools.cache
def _known() -> dict[str, None]:
    return {name: None for data in DATA for name in _names_of(data)}


def grid() -> list[str]:
    """The 92 experiments behind Tables 1, 2 and 3: 23 for each of four datasets."""
    result = []
    for data in ("voc_seg", "voc_det", "cars", "cub200"):
        result += [f"{data}/h2t", f"{data}/x4/l2t", f"{data}/x8/l2t"]
        for sr in SR_NETWORKS:
            for scale in (4, 8):
                for recipe in ("s", "s2t", "t2s", "joint", "sr4ir"):
                    result.append(f"{data}/{sr}-x{scale}/{recipe}")
    return result


def make(name: str) -> Experiment:
    """Build the experiment of a name, at the paper's settings.

    Raises:
        ExperimentError: no such experiment; the nearest name is given.
    """
    if name not in _known():
        hint = did_you_mean(name, _known(), cutoff=0.3)
        raise ExperimentError(f"unknown experiment {name!r}{hint} (--list shows all)")
    key, *middle, recipe_name = name.split("/")
    data, recipe = DATA[key], recipes.RECIPES[recipe_name]
    match = _MIDDLE.match(middle[0]) if middle else None
    scale = int(match["scale"]) if match else 4
    tree = _merged(data.settings, {"name": name, "recipe": recipe_name, "scale": scale, "task": {}})
    tree["sr"] = None
    if match and match["sr"]:
        weights = DIV2K if data.published and recipe_name != "pretrain" else None
        tree["sr"] = SR_NETWORKS[match["sr"]] | data.sr.get(match["sr"], {}) | {"weights": weights}
    if match and match["blur"]:
        tree["degradation"] = {"blur": float(match["blur"])}
    if "task" not in recipe.init_from:
        tree["task"] = None
    if key == "folder_sr" and match:
        tree = _merged(tree, _PRETRAINING[match["sr"]])
    epochs = tree.get("epochs", Experiment.model_fields["epochs"].default)
    tree["warmup_epochs"] = round(epochs * _warmup(recipe_name))
    if key == "folder_sr":
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
    needed = _with_origins(experiment.recipe)
    terms = [term for other in needed for term in other.terms]
    views = {other.judged_on for other in needed} | {term.view for term in terms}
    tree, defaults = experiment.model_dump(mode="json"), plain.model_dump(mode="json")
    for role in ("sr", "task"):
        if role not in needed[0].init_from:
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
    for network, fields in (("oracle", ("oracle",)), ("vgg", ("vgg", "vgg_layer"))):
        if not any(network in other.init_from for other in needed):
            for name in fields:
                tree["fixed"][name] = defaults["fixed"][name]
    if views == {"hr"}:
        tree["degradation"] = defaults["degradation"]
        for name in ("lpips", "border", "channel"):
            tree["evaluation"][name] = defaults["evaluation"][name]
    if "cqmix" not in views:
        tree["cqmix"] = defaults["cqmix"]
    if not _warmup(experiment.recipe):
        tree["warmup_epochs"] = 0
    return from_tree(tree)


def large_batch(experiment: Experiment, images: int) -> Experiment:
    """The same experiment on a larger global batch, with learning rates to match.

    A batch k times as large has k times SGD's learning rate (Goyal et al., "Accurate, Large
    Minibatch SGD", 2017, section 2.1) and the square root of k times AdamW's (Malladi et al., "On
    the SDEs and Scaling Rules for Adaptive Gradient Algorithms", 2022), as have the floors to which
    they decay. The rates rise linearly in the first 5 epochs (Goyal et al., section 2.2), or as
    many as come before the TDP loss.

    Raises:
        ExperimentError: the batch is not larger, or leads to settings that are out of range.
    """
    factor = images / experiment.batch_size
    if factor <= 1:
        raise ExperimentError(
            f"large_batch={images} must be more than batch_size={experiment.batch_size}"
        )
    tree = experiment.model_dump(mode="json")
    tree["batch_size"] = images
    for settings in tree["optimizers"].values():
        by = factor if settings["type"] == "sgd" else math.sqrt(factor)
        settings["lr"] *= by
        settings["lr_floor"] *= by
    room = experiment.epochs
    if recipes.get(experiment.recipe).restart:
        room = experiment.warmup_epochs
    tree["lr_warmup_epochs"] = max(experiment.lr_warmup_epochs, min(_LR_WARMUP_EPOCHS, room))
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
    for role in ("sr", "task"):
        if role in target.init_from:
            tree[role]["start"] = None
    return relevant(from_tree(tree))


def _with_origins(recipe: str) -> list[recipes.Recipe]:
    """A recipe and all that it starts from, directly or not."""
    found = {recipe: recipes.get(recipe)}
    waiting = [recipe]
    while waiting:
        for origin in found[waiting.pop()].init_from.values():
            if origin != recipes.PRETRAINED and origin not in found:
                found[origin] = recipes.get(origin)
                waiting.append(origin)
    return list(found.values())


def _warmup(recipe: str) -> float:
    # That of a recipe which this one starts from counts too: both have the same settings.
    return max(other.warmup for other in _with_origins(recipe))


def _names_of(data: str) -> list[str]:
    if data == "folder_sr":
        return [f"{data}/{sr}-x{scale}/pretrain" for sr in SR_NETWORKS for scale in SCALES]
    result = []
    for name, recipe in recipes.RECIPES.items():
        blurs = ["", *(f"-blur{sigma}" for sigma in BLURS)] if name in _BLURRED else [""]
        sizes = [f"x{scale}{blur}" for scale in SCALES for blur in blurs]
        if "sr" in recipe.init_from:
            result += [f"{data}/{sr}-{size}/{name}" for sr in SR_NETWORKS for size in sizes]
        elif recipe.judged_on == "hr":
            result.append(f"{data}/{name}")
        else:
            result += [f"{data}/{size}/{name}" for size in sizes]
    return result
