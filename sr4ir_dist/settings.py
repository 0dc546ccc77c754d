"""The settings of an experiment, group by group; `config.Experiment` holds one of each."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

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


class Settings(BaseModel):
    """A frozen group of settings that refuses unknown keys and values of another type."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, validate_default=True)


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
    """DeepSpeed ZeRO stage of each engine: 1 shares out optimizer states, 2 gradients too.

    At 1 and 2 gradients are reduced during the backward, but for detection. At 2 phase 2 has a
    single backward, whose memory is that of all views together.
    """

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
