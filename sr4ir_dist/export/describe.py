"""How to build a network without this package, as JSON beside its weights.

A task network is torchvision's own: `build` names its constructor and the arguments, which may be
constructors themselves. An SR network's `layers` are its forward pass, line by line, in the names
of its tensors; `build` says where its authors' code is public, which reads the same names.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from sr4ir_dist import recipes
from sr4ir_dist.config import Experiment
from sr4ir_dist.networks.edsr import RGB_MEAN
from sr4ir_dist.networks.normalize import IMAGENET_MEAN, IMAGENET_STD
from sr4ir_dist.settings import SRNetwork
from sr4ir_dist.tasks import Task

_IMAGES = {"layout": "N,3,height,width", "dtype": "float32", "colour": "RGB", "range": [0, 1]}
_CONVOLUTION = (
    "conv(x, k) is the 2-D convolution (cross-correlation) with k.weight and k.bias, stride 1, its "
    "input padded with zeros so that the size stays; pixel_shuffle(x, 2) is PyTorch's"
)
_OUTPUTS = {
    "classification": ("N,{count}", "logits: softmax over the last axis gives probabilities"),
    "segmentation": (
        "N,{count},height,width",
        "logits of each pixel, `out` of torchvision's outputs: argmax over axis 1 gives classes",
    ),
    "detection": (
        "for each image boxes n,4, labels n, scores n",
        "boxes are x0, y0, x1, y1 in pixels of the input",
    ),
}


def describe_sr(experiment: Experiment) -> dict[str, Any]:
    """How to build an experiment's SR network and what goes in and comes out."""
    settings, scale = experiment.sr, experiment.scale
    assert settings is not None
    describe = {"edsr": _edsr, "swinir": _swinir}.get(settings.network, _interpolation)
    return {
        **describe(settings, scale),
        "scale": scale,
        "trained_on": "LR images made of HR images on the 8-bit grid: "
        + experiment.degradation.model_dump_json(),
        "output": {
            "layout": f"N,3,height*{scale},width*{scale}",
            "range": "about [0, 1], neither clamped nor rounded",
        },
    }


def describe_task(
    experiment: Experiment, task: Task, network: nn.Module, class_names: Sequence[str] | None
) -> dict[str, Any]:
    """How to build an experiment's task network and what goes in and comes out.

    Args:
        experiment: the experiment.
        task: its task.
        network: torchvision's network, without a real/fake score.
        class_names: the dataset's, without background; None where they are not known.
    """
    settings = experiment.task
    assert settings is not None
    background = settings.name != "classification"
    layout, meaning = _OUTPUTS[settings.name]
    normalisation: Any = "the network normalises and resizes its images itself"
    if settings.name != "detection":
        normalisation = {
            "subtract": IMAGENET_MEAN,
            "divide_by": IMAGENET_STD,
            "axis": 1,
            "note": "the ONNX graph takes images in [0, 1] and does this itself",
        }
    shown = {
        "sr": "SR images of the SR network, neither clamped nor rounded",
        "lr_up": f"LR images enlarged {experiment.scale} times, bilinearly, corner pixels aligned",
        "hr": "HR images",
    }
    return {
        "architecture": settings.network,
        "build": _torchvision(settings.network, task, network),
        "task": settings.name,
        "input": {
            **_IMAGES,
            "what": shown[recipes.get(experiment.recipe).judged_on],
            "normalisation": normalisation,
            "padding": "none: any size",
        },
        "output": {
            "layout": layout.format(count=task.num_classes + background),
            "meaning": meaning,
        },
        "classes": None if class_names is None else ["background"] * background + [*class_names],
    }


def _torchvision(name: str, task: Task, network: nn.Module) -> dict[str, Any]:
    count = task.num_classes
    if task.target == "label":
        return _call(f"torchvision.models.{name}", weights=None, num_classes=count)
    if task.target == "mask":
        return _call(
            f"torchvision.models.segmentation.{name}",
            weights=None,
            weights_backbone=None,
            num_classes=count + 1,
            aux_loss=True,
        )
    detector: Any = network
    anchors = detector.rpn.anchor_generator
    return _call(
        "torchvision.models.detection.FasterRCNN",
        backbone=_call(
            "torchvision.models.detection.backbone_utils.mobilenet_backbone",
            backbone_name="mobilenet_v3_large",
            weights=None,
            fpn=True,
        ),
        num_classes=count + 1,
        rpn_anchor_generator=_call(
            "torchvision.models.detection.anchor_utils.AnchorGenerator",
            sizes=anchors.sizes,
            aspect_ratios=anchors.aspect_ratios,
        ),
        rpn_score_thresh=detector.rpn.score_thresh,
        min_size=detector.transform.min_size[0],
        max_size=detector.transform.max_size,
    ) | {
        "note": "torchvision takes the stride of the feature maps, 32, from the first image that "
        "it sees, once resized, and is wrong below about 80 pixels"
    }


def _call(constructor: str, **arguments: Any) -> dict[str, Any]:
    return {"constructor": constructor, "arguments": arguments}


def _edsr(settings: SRNetwork, scale: int) -> dict[str, Any]:
    blocks = settings.blocks
    return {
        "architecture": "EDSR-baseline",
        "build": {
            "paper": "Lim et al., Enhanced Deep Residual Networks for Single Image "
            "Super-Resolution, CVPR Workshops 2017",
            "code": "github.com/sanghyun-son/EDSR-PyTorch, src/model/edsr.py; its images are in "
            "[0, 255], in and out",
            "constructor": "EDSR",
            "arguments": {
                "n_resblocks": blocks,
                "n_feats": settings.features,
                "scale": [scale],
                "rgb_range": 255,
                "n_colors": 3,
                "res_scale": 1,
            },
        },
        "input": {**_IMAGES, "normalisation": "none", "padding": "none: any size"},
        "layers": [
            _CONVOLUTION,
            f"x = conv(255 * images, sub_mean)  # subtracts the mean colour 255 * {RGB_MEAN}",
            "x = r = conv(x, head.0)",
            f"for i in 0..{blocks - 1}: r = r + conv(relu(conv(r, body.i.body.0)), body.i.body.2)",
            f"x = x + conv(r, body.{blocks})",
            *_doublings("tail.0", scale),
            "sr = conv(conv(x, tail.1), add_mean) / 255",
        ],
    }


def _swinir(settings: SRNetwork, scale: int) -> dict[str, Any]:
    groups, depth, features = settings.blocks, settings.depth, settings.features
    heads, window = settings.heads, settings.window
    side = -(-48 // window) * window
    return {
        "architecture": "SwinIR (classical super-resolution)",
        "build": {
            "paper": "Liang et al., SwinIR: Image Restoration Using Swin Transformer, ICCV "
            "Workshops 2021",
            "code": "github.com/JingyunLiang/SwinIR, models/network_swinir.py",
            "constructor": "SwinIR",
            "arguments": {
                "upscale": scale,
                "img_size": side,
                "window_size": window,
                "img_range": 1.0,
                "depths": [depth] * groups,
                "embed_dim": features,
                "num_heads": [heads] * groups,
                "mlp_ratio": 2,
                "upsampler": "pixelshuffle",
                "resi_connection": "1conv",
            },
        },
        "input": {
            **_IMAGES,
            "normalisation": "none",
            "padding": f"right and bottom to multiples of {window} by reflection without the edge "
            "(by repeating the edge where a pad is not smaller than its side), the result cropped "
            "to the size of the input times the scale; the ONNX graph does both itself",
        },
        "layers": [
            _CONVOLUTION,
            "norm(t, k) is layer normalisation over channels, eps 1e-5; linear(t, k) is "
            "t @ k.weight.T + k.bias; images are N,C,H,W, tokens N,H,W,C of the same place",
            f"x = conv(images - {RGB_MEAN}, conv_first)",
            "t = norm(x as tokens, patch_embed.norm)",
            f"for g in 0..{groups - 1}: t = t + conv(group(t, g) as images, layers.g.conv) as "
            f"tokens, where group(t, g) is: for b in 0..{depth - 1}, p = "
            "layers.g.residual_group.blocks.b: t = t + attend(norm(t, p.norm1)); "
            "t = t + linear(gelu(linear(norm(t, p.norm2), p.mlp.fc1)), p.mlp.fc2), gelu by erf",
            f"attend(t): windows of {window}x{window} tokens, row by row; q, k, v = thirds of "
            f"linear(w, p.attn.qkv), each of {heads} heads; softmax(q @ k.T / "
            f"sqrt({features // heads}) + bias) @ v, heads joined; linear(..., p.attn.proj)",
            "bias: p.attn.relative_position_bias_table[p.attn.relative_position_index], a row a "
            "pair of places, a column a head",
            f"where b is odd, t is rolled by -{window // 2} along height and width before attend "
            f"and back after it, and bias is -100 where two places of a window were not "
            "neighbours before (p.attn_mask is that of a square of "
            f"{side} pixels)",
            "x = x + conv(norm(t, norm) as images, conv_after_body)",
            "x = leaky_relu(conv(x, conv_before_upsample.0), slope 0.01)",
            *_doublings("upsample", scale),
            f"sr = conv(x, conv_last) + {RGB_MEAN}",
        ],
    }


def _doublings(prefix: str, scale: int) -> list[str]:
    places = range(0, 2 * (scale.bit_length() - 1), 2)
    return [f"x = pixel_shuffle(conv(x, {prefix}.{place}), 2)" for place in places]


def _interpolation(settings: SRNetwork, scale: int) -> dict[str, Any]:
    mode = settings.network
    arguments = {"scale_factor": scale, "mode": mode, "align_corners": mode == "bilinear"}
    return {
        "architecture": f"{mode} interpolation, without weights",
        "build": _call("torch.nn.functional.interpolate", **arguments),
        "input": {**_IMAGES, "normalisation": "none", "padding": "none: any size"},
    }
