"""The Experiment: every setting that can change a run's results, as one frozen, typed value.

Where a run is stored, how many workers it has and how often it logs are not part of it: they may
change between two halves of a run without changing what is computed.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

Role = Literal["sr", "task"]
Scale = Literal[2, 4, 8]
Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Rate = Annotated[float, Field(gt=0, le=10, allow_inf_nan=False)]
SSIM_WINDOW = 11
"""Side of SSIM's window in pixels."""

_NAMED = ("name", "recipe", "scale")


class ExperimentError(ValueError):
    """A setting that cannot be used; the message names the field, the value and what is allowed."""


class Settings(BaseModel):
    """A frozen group of settings that refuses unknown keys and values of another type."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, validate_default=True)


class DataSettings(Settings):
    """How a sample becomes a training or evaluation image (paper section 4.1, supplement)."""

    transform: Literal["resize_crop", "patch"] = "resize_crop"
    """`resize_crop`: short side to `resize`, then a `crop` square. `patch`: HR patches for SR."""
    resize: Positive = 256
    """Short side in pixels before the crop (`resize_crop` only)."""
    crop: Positive = 224
    """Side of the training crop in HR pixels; a multiple of the scale."""


class DegradationSettings(Settings):
    """How LR images are made from HR images."""

    kind: Literal["bicubic", "bicubic_antialias"] = "bicubic"
    """`bicubic` is the paper's, without antialiasing; `bicubic_antialias` is MATLAB's kind."""


class SRNetwork(Settings):
    """The SR network and where its weights start."""

    network: Literal["edsr", "bilinear", "bicubic"] = "edsr"
    """`edsr`, or an interpolation, which has no weights and cannot be trained."""
    blocks: Positive = 16
    """Residual blocks of EDSR."""
    features: Positive = 64
    """Channels of EDSR."""
    weights: str | None = None
    """Where a pretrained start comes from: a weight file, a checkpoint or a run (path or URI)."""
    partial: bool = False
    """Load what fits from `weights` and keep the rest as initialised."""
    start: str | None = None
    """A checkpoint or run to start from in place of the one that the recipe names."""


class TaskNetwork(Settings):
    """The recognition task, its network and where its weights start."""

    name: Literal["classification"] = "classification"
    network: Literal["resnet18"] = "resnet18"
    classes: Positive | None = None
    """Number of classes; None takes it from the dataset's manifest."""
    weights: str | None = None
    """Where a pretrained start comes from: a weight file, a checkpoint or a run (path or URI)."""
    partial: bool = False
    """Load what fits from `weights` and keep the rest as initialised."""
    start: str | None = None
    """A checkpoint or run to start from in place of the one that the recipe names."""


class AdamW(Settings):
    """AdamW, for the SR network (spec: learning rate 1e-4, no weight decay)."""

    type: Literal["adamw"] = "adamw"
    lr: Rate = 1e-4
    lr_floor: Weight = 1e-6
    """Learning rate at the end of each cosine period."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (
        0.9,
        0.999,
    )
    weight_decay: Weight = 0.0


class SGD(Settings):
    """SGD with momentum, for the task network."""

    type: Literal["sgd"] = "sgd"
    lr: Rate = 3e-2
    lr_floor: Weight = 1e-4
    """Learning rate at the end of each cosine period."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: Weight = 1e-4


class Optimizers(Settings):
    """One optimizer for each network; a recipe uses those of the networks that it updates."""

    sr: AdamW = AdamW()
    task: SGD = SGD()


class LossWeights(Settings):
    """Factors on the terms of a recipe, by loss; 1 is the paper's weighting."""

    pixel: Weight = 1.0
    tdp: Weight = 1.0
    task: Weight = 1.0


class CQMixSettings(Settings):
    """CQMix (paper section 3.3): a grid of cells, each SR or HR by a fair coin."""

    grid: Annotated[int, Field(ge=1, le=64)] = 4
    """Cells along each side; 4 x 4 for classification, 8 x 8 for segmentation and detection."""


class ZeroStages(Settings):
    """DeepSpeed ZeRO stage of each engine."""

    sr: Literal[0, 1, 2] = 0
    task: Literal[0, 1, 2] = 0


class EvaluationSettings(Settings):
    """When and on what a run is judged."""

    every_epochs: Positive = 10
    """Evaluate after each so many epochs, and always after the last."""
    batch_size: Positive = 32
    """Images of an evaluation step over all ranks."""
    border: NonNegative = 8
    """Pixels cut from every side before PSNR and SSIM."""
    channel: Literal["rgb", "y"] = "rgb"
    """PSNR and SSIM on RGB (the paper), or on luma (SR benchmarks)."""


class CheckpointSettings(Settings):
    """When a run's whole state is published, and how many states are kept."""

    every_epochs: Positive = 1
    """Publish after each so many epochs, and after every evaluation."""
    every_steps: Positive | None = None
    """Also publish after each so many steps of the run; None: at epochs only."""
    keep: Positive = 2
    """The newest so many checkpoints are kept."""


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
    batch_size: Positive = 128
    """Images of a training step over all ranks."""
    data: DataSettings = DataSettings()
    degradation: DegradationSettings = DegradationSettings()
    sr: SRNetwork | None = SRNetwork()
    task: TaskNetwork | None = TaskNetwork()
    optimizers: Optimizers = Optimizers()
    losses: LossWeights = LossWeights()
    cqmix: CQMixSettings = CQMixSettings()
    batch_norm: Literal["sync", "local"] = "sync"
    """Statistics of batch norm in training: over the global batch, or over each rank's share."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """`bf16` runs the networks' forwards under autocast; weights stay in float32."""
    zero: ZeroStages = ZeroStages()
    evaluation: EvaluationSettings = EvaluationSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()

    @model_validator(mode="after")
    def _check_sizes(self) -> Experiment:
        if self.data.crop % self.scale:
            raise ValueError(f"data.crop={self.data.crop} must be a multiple of scale={self.scale}")
        if self.data.transform == "resize_crop" and self.data.crop > self.data.resize:
            raise ValueError(
                f"data.crop={self.data.crop} must not exceed data.resize={self.data.resize}"
            )
        smallest = 2 * self.evaluation.border + SSIM_WINDOW
        if self.data.transform == "resize_crop" and self.data.crop < smallest:
            raise ValueError(
                f"data.crop={self.data.crop} leaves nothing to judge: evaluation.border="
                f"{self.evaluation.border} and SSIM's window of {SSIM_WINDOW} need {smallest}"
            )
        if self.warmup_epochs > self.epochs:
            raise ValueError(
                f"warmup_epochs={self.warmup_epochs} must not exceed epochs={self.epochs}"
            )
        for role in ("sr", "task"):
            optimizer = getattr(self.optimizers, role)
            if optimizer.lr_floor > optimizer.lr:
                raise ValueError(
                    f"optimizers.{role}.lr_floor={optimizer.lr_floor} must not exceed "
                    f"optimizers.{role}.lr={optimizer.lr}"
                )
        return self

    def digest(self, *, data: str) -> str:
        """Eight hex digits that tell this experiment on this data from any other.

        Args:
            data: the digests of the manifests that the run reads.
        """
        content = json.dumps([self.model_dump(mode="json"), data], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:8]


def from_json(text: str | bytes) -> Experiment:
    """Parse an experiment file.

    Raises:
        ExperimentError: the text is not JSON, or a field is unknown, missing or out of range.
    """
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ExperimentError(f"the experiment is not valid JSON: {error}") from error
    return from_tree(value)


def from_tree(tree: Any) -> Experiment:
    """Make an experiment of nested dicts of JSON values.

    Raises:
        ExperimentError: a field is unknown, missing, of the wrong type or out of range.
    """
    try:
        # As JSON, whose lists may be tuples and whose integers may be floats in strict mode too.
        return Experiment.model_validate_json(json.dumps(tree))
    except ValidationError as error:
        raise ExperimentError(_explain(error)) from error


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
        if path in _NAMED:
            raise ExperimentError(
                f"--set {assignment}: {path} is part of the experiment's name; name another one"
            )
        if path not in known:
            raise ExperimentError(_unknown(path, known))
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        _assign(tree, path, value)
    return from_tree(tree)


def field_paths() -> dict[str, Any]:
    """Every dotted path of an Experiment and its type."""
    return dict(_paths(Experiment, ""))


def _paths(model: type[BaseModel], prefix: str) -> Iterable[tuple[str, Any]]:
    for name, field in model.model_fields.items():
        yield prefix + name, field.annotation
        for kind in _alternatives(field.annotation):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from _paths(kind, f"{prefix}{name}.")


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    if get_origin(annotation) in (Union, UnionType):
        return get_args(annotation)
    return (annotation,)


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


def _unknown(path: str, known: Mapping[str, Any]) -> str:
    settable = [name for name in known if name not in _NAMED]
    last = path.rpartition(".")[2]
    nearest = difflib.get_close_matches(path, settable, n=1, cutoff=0.5) or [
        name for name in settable if name.rpartition(".")[2] == last
    ]
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    return f"unknown key {path!r}{hint} (--show lists every key)"


def _explain(error: ValidationError) -> str:
    lines = []
    for problem in error.errors():
        path = ".".join(str(part) for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            lines.append(_unknown(path, field_paths()))
        elif path:
            lines.append(f"{path}={problem['input']!r}: {message}")
        else:
            lines.append(message)
    return "; ".join(lines)
