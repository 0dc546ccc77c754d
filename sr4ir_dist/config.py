"""The Experiment: every setting that can change a run's results, as one frozen, typed value.

Where a run is stored, how many workers it has and how often it logs are not part of it: they may
change between two halves of a run without changing what is computed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any, Literal, get_args

from pydantic import BaseModel, ValidationError, model_validator

from sr4ir_dist.settings import (
    TASK_NETWORKS,
    CheckpointSettings,
    CQMixSettings,
    DataSettings,
    DegradationSettings,
    EvaluationSettings,
    FixedNetworks,
    LossWeights,
    NonNegative,
    Optimizers,
    Positive,
    Scale,
    Settings,
    SRNetwork,
    TaskNetwork,
    ZeroStages,
)
from sr4ir_dist.suggestions import unknown_key

Role = Literal["sr", "task"]
Network = Literal["sr", "task", "oracle", "vgg"]
"""The trainable roles, and two networks that only ever judge: the oracle is a second task network
with the weights of H->T, `vgg` an ImageNet network whose features some recipes compare."""
_TRANSFORMS = {
    "classification": ("resize_crop", "patch"),
    "segmentation": ("resize_crop",),
    "detection": ("flip",),
}

_LATER = {"micro_batch": None, "joined_views": False, "gradients": "fp32", "compile": False}
"""Fields that no run's name tells of at these values."""
_MOST_BYTES = 1 << 20  # of an experiment file, which has a few thousand

NAMED = ("name", "recipe", "scale")
"""What an experiment's name says, so that no setting may say otherwise."""


class ExperimentError(ValueError):
    """A setting that cannot be used; the message names the field, the value and what is allowed."""


class Experiment(Settings):
    """Everything that determines a run's results, given its data.

    Names follow `<data>/<sr>-x<scale>/<recipe>`; `experiments.make` builds one from its name.
    """

    name: str
    recipe: str
    scale: Scale
    seed: NonNegative = 200
    epochs: Positive = 200
    warmup_epochs: NonNegative = 20
    """First epochs without terms that start after the warm-up (the TDP loss)."""
    lr_warmup_epochs: NonNegative = 0
    """First epochs in which the learning rates rise linearly (detection: 1)."""
    batch_size: Positive = 128
    """Images of a training step over all ranks."""
    micro_batch: Positive | None = None
    """The most images of a rank's pass; a larger share takes several, whose gradients add up. Batch
    norm then sees the images of one pass, on all ranks. None: one pass."""
    data: DataSettings = DataSettings()
    degradation: DegradationSettings = DegradationSettings()
    sr: SRNetwork | None = SRNetwork()
    task: TaskNetwork | None = TaskNetwork()
    fixed: FixedNetworks = FixedNetworks()
    optimizers: Optimizers = Optimizers()
    losses: LossWeights = LossWeights()
    cqmix: CQMixSettings = CQMixSettings()
    batch_norm: Literal["sync", "local"] = "sync"
    """Statistics of batch norm in training: over the global batch, or over each rank's share."""
    joined_views: bool = False
    """SR, HR and CQMix images go through the task network in one pass, not in three. Batch norm
    takes each kind by itself still; dropout draws otherwise, and memory grows. Not for detection,
    whose losses are means over a pass, and not with `compile`."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """`bf16` runs the networks' forwards under autocast; weights stay in float32."""
    gradients: Literal["fp32", "bf16"] = "fp32"
    """As what gradients travel between ranks; `bf16` halves the bytes and rounds them."""
    compile: bool = False
    """Compile the networks' blocks (torch.compile), which takes minutes at a run's start."""
    zero: ZeroStages = ZeroStages()
    evaluation: EvaluationSettings = EvaluationSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()

    @model_validator(mode="after")
    def _check_sizes(self) -> Experiment:
        if self.data.transform != "flip" and self.data.crop % self.scale:
            raise ValueError(f"data.crop={self.data.crop} must be a multiple of scale={self.scale}")
        if self.data.transform == "resize_crop" and self.data.crop > self.data.resize:
            raise ValueError(
                f"data.crop={self.data.crop} must not exceed data.resize={self.data.resize}"
            )
        smallest = self.evaluation.smallest_side
        if self.data.transform == "resize_crop" and self.data.crop < smallest:
            raise ValueError(
                f"data.crop={self.data.crop} leaves nothing to judge: evaluation.border="
                f"{self.evaluation.border} and the window of SSIM or LPIPS need {smallest}"
            )
        for field in ("warmup_epochs", "lr_warmup_epochs"):
            if getattr(self, field) > self.epochs:
                raise ValueError(
                    f"{field}={getattr(self, field)} must not exceed epochs={self.epochs}"
                )
        for role in ("sr", "task"):
            optimizer = getattr(self.optimizers, role)
            if optimizer.lr_floor > optimizer.lr:
                raise ValueError(
                    f"optimizers.{role}.lr_floor={optimizer.lr_floor} must not exceed "
                    f"optimizers.{role}.lr={optimizer.lr}"
                )
        return self

    @model_validator(mode="after")
    def _check_networks(self) -> Experiment:
        task, sr = self.task, self.sr
        if self.joined_views and self.compile:
            raise ValueError(
                "joined_views=True is not for compile=True, whose blocks would be compiled anew in "
                "every step; expected one of them to be False"
            )
        if task is not None:
            if task.network not in TASK_NETWORKS[task.name]:
                raise ValueError(
                    f"task.network={task.network!r} is none for {task.name}; allowed: "
                    f"{', '.join(TASK_NETWORKS[task.name])}"
                )
            if self.joined_views and task.name == "detection":
                raise ValueError(
                    "joined_views=True is not for task.name='detection', whose losses are means "
                    "over a pass; expected False"
                )
            if task.min_size > task.max_size:
                raise ValueError(
                    f"task.min_size={task.min_size} must not exceed task.max_size={task.max_size}"
                )
            if self.data.transform not in _TRANSFORMS[task.name]:
                raise ValueError(
                    f"data.transform={self.data.transform!r} does not fit task.name={task.name!r};"
                    f" allowed: {', '.join(_TRANSFORMS[task.name])}"
                )
        layers = 0 if sr is None else sr.blocks * (sr.depth if sr.network == "swinir" else 1)
        if sr is not None and (layers > 256 or layers * sr.features**2 > 1 << 23):
            raise ValueError(
                f"sr.blocks={sr.blocks}, sr.depth={sr.depth} and sr.features={sr.features} are too "
                "many together: the largest EDSR has 32 blocks of 256 features"
            )
        if sr is not None and sr.network == "swinir" and sr.features % sr.heads:
            raise ValueError(f"sr.features={sr.features} must be a multiple of sr.heads={sr.heads}")
        return self

    def digest(self, *, data: str) -> str:
        """Eight hex digits that tell this experiment on this data from any other.

        Args:
            data: the digests of the manifests that the run reads.
        """
        tree = self.model_dump(mode="json")
        # What is reported, as far as its files are at hand, and what is kept change no weight.
        del tree["evaluation"]["lpips"]
        del tree["checkpoint"]["keep_best"], tree["checkpoint"]["every_minutes"]
        # Settings that came later, where they are as before there were any.
        if tree["sr"] is not None:
            del tree["sr"]["recompute"]
        for field, before in _LATER.items():
            if tree[field] == before:
                del tree[field]
        content = json.dumps([tree, data], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:8]


def from_json(text: str | bytes) -> Experiment:
    """Parse an experiment file.

    Raises:
        ExperimentError: the text is not JSON, or longer than 1 MiB, or a field is unknown, missing,
            of the wrong type or out of range.
    """
    if len(text) > _MOST_BYTES:
        raise ExperimentError(f"the experiment has {len(text)} bytes, more than {_MOST_BYTES}")
    try:
        return Experiment.model_validate_json(text)
    except ValidationError as error:
        raise ExperimentError(f"{_explain(error):.3000}") from error


def from_tree(tree: Any) -> Experiment:
    """Make an experiment of nested dicts of JSON values.

    Raises:
        ExperimentError: as `from_json`.
    """
    # As JSON, whose lists may be tuples and whose integers may be floats in strict mode too.
    return from_json(json.dumps(tree))


def field_paths() -> dict[str, Any]:
    """Every dotted path of an Experiment and its type."""
    return dict(_paths(Experiment, ""))


def _paths(model: type[BaseModel], prefix: str) -> Iterable[tuple[str, Any]]:
    for name, field in model.model_fields.items():
        yield prefix + name, field.annotation
        for kind in get_args(field.annotation) or (field.annotation,):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from _paths(kind, f"{prefix}{name}.")


def _explain(error: ValidationError) -> str:
    lines = []
    for problem in error.errors()[:10]:
        path = ".".join(str(part) for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        message = message.replace("Invalid JSON", "the experiment is not valid JSON")
        if problem["type"] == "extra_forbidden":
            lines.append(unknown_key(path, set(field_paths()) - set(NAMED)))
        elif path:
            lines.append(f"{path}={problem['input']!r:.200}: {message}")
        else:
            lines.append(message)
    return "; ".join(lines)
