"""The Experiment: every setting that can change a run's results, as one frozen, typed value.

Where a run is stored, how many workers it has and how often it logs are not part of it: they may
change between two halves of a run without changing what is computed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from sr4ir_dist.suggestions import unknown_key

Role = Literal["sr", "task"]
Network = Literal["sr", "task", "oracle", "vgg"]
"""The trainable roles, and two networks that only ever judge: the oracle is a second task network
with the weights of H->T, `vgg` an ImageNet network whose features some recipes compare."""
TaskName = Literal["classification", "segmentation", "detection"]
Scale = Literal[2, 4, 8]
Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Rate = Annotated[float, Field(gt=0, le=10, allow_inf_nan=False)]
SSIM_WINDOW = 11
"""Side of SSIM's window in pixels."""
LPIPS_SIDE = 16
"""Smallest side in pixels that LPIPS can judge: VGG16 halves images four times before its end."""
TASK_NETWORKS: dict[str, tuple[str, ...]] = {
    "classification": ("resnet18",),
    "segmentation": ("deeplabv3_mobilenet_v3_large", "deeplabv3_resnet50"),
    "detection": ("fasterrcnn_mobilenet_v3_large_fpn",),
}
"""torchvision's networks of each task; the first is the paper's."""
_TRANSFORMS = {
    "classification": ("resize_crop", "patch"),
    "segmentation": ("resize_crop",),
    "detection": ("flip",),
}

_MOST_BYTES = 1 << 20  # of an experiment file, which has a few thousand

NAMED = ("name", "recipe", "scale")
"""What an experiment's name says, so that no setting may say otherwise."""


class ExperimentError(ValueError):
    """A setting that cannot be used; the message names the field, the value and what is allowed."""


class Settings(BaseModel):
    """A frozen group of settings that refuses unknown keys and values of another type."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, validate_default=True)


_LATER = {"micro_batch": None, "gradients": "fp32", "compile": False}
"""Fields that no run's name tells of at these values."""


class DataSettings(Settings):
    """How a sample becomes a training or evaluation image (paper section 4.1, supplement)."""

    transform: Literal["resize_crop", "flip", "patch"] = "resize_crop"
    """`resize_crop`: short side to `resize`, then a `crop` square. `flip`: images as they are
    (detection). `patch`: HR patches for SR."""
    resize: Positive = 256
    """Short side in pixels before the crop (`resize_crop` only)."""
    crop: Positive = 224
    """Side of the training crop in HR pixels; a multiple of the scale."""
    center_crop: bool = True
    """Evaluate the central crop (classification), or the whole resized image (segmentation)."""
    shrink: Positive | None = None
    """Short side to which larger images are brought (`flip` only); None keeps them as they are."""


class DegradationSettings(Settings):
    """How LR images are made from HR images."""

    kind: Literal["bicubic", "bicubic_antialias"] = "bicubic"
    """`bicubic` is the paper's, without antialiasing; `bicubic_antialias` is MATLAB's kind."""
    blur: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] = 0.0
    """Standard deviation, in HR pixels, of a Gaussian blur before it (Table S5); 0 for none."""


class SRNetwork(Settings):
    """The SR network and where its weights start."""

    network: Literal["edsr", "swinir", "bilinear", "bicubic"] = "edsr"
    """`edsr` or `swinir`, or an interpolation, which has no weights and cannot be trained."""
    blocks: Annotated[int, Field(ge=1, le=256)] = 16
    """Residual blocks of EDSR; groups of SwinIR (6)."""
    features: Annotated[int, Field(ge=1, le=1024)] = 64
    """Channels; SwinIR has 180."""
    depth: Annotated[int, Field(ge=1, le=64)] = 6
    """Transformer blocks of a group (SwinIR)."""
    heads: Positive = 6
    """Attention heads (SwinIR); they divide the channels."""
    window: Annotated[int, Field(ge=2, le=16, multiple_of=2)] = 8
    """Side of an attention window in LR pixels (SwinIR)."""
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Stochastic depth of the last block (SwinIR)."""
    recompute: bool = False
    """Keep a group's input alone and compute the rest again for the backward (SwinIR): a third
    more work for a fraction of the memory, and the same result."""
    weights: str | None = None
    """Where a pretrained start comes from: a weight file, a checkpoint or a run (path or URI), or
    the name of published weights (`DIV2K`)."""
    partial: bool = False
    """Load what fits from `weights` and keep the rest as initialised."""
    start: str | None = None
    """A checkpoint or run to start from in place of the one that the recipe names."""


class TaskNetwork(Settings):
    """The recognition task, its network and where its weights start."""

    name: TaskName = "classification"
    network: str = "resnet18"
    """One of `TASK_NETWORKS`."""
    classes: Annotated[int, Field(ge=1, le=25_000)] | None = None
    """Number of classes without background; None takes it from the dataset's manifest."""
    min_size: Positive = 800
    """Short side in pixels to which a detector brings its images."""
    max_size: Positive = 1333
    """Long side that a detector's images may not pass."""
    weights: str | None = None
    """Where a pretrained start comes from: a weight file, a checkpoint or a run (path or URI), or
    the name of torchvision's weights (`IMAGENET1K_V1`, for the backbone)."""
    partial: bool = False
    """Load what fits from `weights` and keep the rest as initialised."""
    start: str | None = None
    """A checkpoint or run to start from in place of the one that the recipe names."""


class FixedNetworks(Settings):
    """Networks in whose features some recipes compare images, and which never learn."""

    oracle: str | None = None
    """A checkpoint or run of recipe h2t; None: the one at the same settings (Table 6 B)."""
    vgg: str = "IMAGENET1K_V1"
    """ImageNet weights of VGG19: a file or torchvision's name (Tables 6 A and S1)."""
    vgg_layer: Literal["conv2_2", "conv3_4", "conv4_4", "conv5_4"] = "conv5_4"
    """The convolution whose output is compared, before its ReLU."""


class AdamW(Settings):
    """AdamW, for the SR network (spec: learning rate 1e-4, no weight decay)."""

    type: Literal["adamw"] = "adamw"
    lr: Rate = 1e-4
    lr_floor: Weight = 1e-6
    """Learning rate at the end of each cosine period."""
    halve_at: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = ()
    """Parts of the run after which the rate is halved; with any there is no cosine."""
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
    aux_factor: Annotated[float, Field(gt=0, le=1000)] = 10.0
    """The rate of segmentation's auxiliary head, as a multiple of `lr`."""
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
    perceptual: Weight = 1.0
    task: Weight = 1.0
    adversarial: Weight = 1.0
    real_fake: Weight = 1.0


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
    lpips: str | None = None
    """Report LPIPS too: ImageNet weights of VGG16, a file or torchvision's name. Where they cannot
    be had, there is no figure."""

    @property
    def smallest_side(self) -> int:
        """The smallest side in pixels of an image that can be compared with HR."""
        window = SSIM_WINDOW if self.lpips is None else LPIPS_SIDE
        return 2 * self.border + window


class CheckpointSettings(Settings):
    """When a run's whole state is published, and how many states are kept."""

    every_epochs: Positive = 1
    """Publish after each so many epochs, and after every evaluation."""
    every_steps: Positive | None = None
    """Also publish after each so many steps of the run."""
    every_minutes: Annotated[float, Field(gt=0, le=10_000)] | None = 15.0
    """Also publish when so much time has passed since the last checkpoint; None: never."""
    keep: Positive = 2
    """The newest so many checkpoints are kept."""
    keep_best: NonNegative = 1
    """And so many of the best, by the task's figure, or by PSNR where no task is judged."""


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
    precision: Literal["fp32", "bf16"] = "fp32"
    """`bf16` runs the networks' forwards under autocast; weights stay in float32."""
    gradients: Literal["fp32", "bf16"] = "fp32"
    """As what gradients travel between ranks; `bf16` halves the bytes and rounds them."""
    compile: bool = False
    """Compile the networks' blocks (torch.compile): minutes at a run's start, then faster steps."""
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
        if task is not None:
            if task.network not in TASK_NETWORKS[task.name]:
                raise ValueError(
                    f"task.network={task.network!r} is none for {task.name}; allowed: "
                    f"{', '.join(TASK_NETWORKS[task.name])}"
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
