"""Rebuild exported networks without this package, as a reader of their JSON would.

Arguments: folders with `NAME.json` and `NAME.safetensors`, each as FOLDER/NAME; writes the outputs
on `images.safetensors` of the folder to `NAME-outputs.safetensors`.
"""

import importlib
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torchvision.models.swin_transformer import shifted_window_attention


def construct(value):
    if isinstance(value, dict) and "constructor" in value:
        module, name = value["constructor"].rsplit(".", 1)
        arguments = {key: construct(item) for key, item in value["arguments"].items()}
        return getattr(importlib.import_module(module), name)(**arguments)
    return value


def recognise(about, weights, images):
    network = construct(about["build"])
    network.load_state_dict(weights)
    network.eval()
    if about["task"] == "detection":
        return {
            f"{i}.{k}": v for i, one in enumerate(network(list(images))) for k, v in one.items()
        }
    rule = about["input"]["normalisation"]
    mean, std = (torch.tensor(rule[key]).view(1, 3, 1, 1) for key in ("subtract", "divide_by"))
    outputs = network((images - mean) / std)
    return {"outputs": outputs["out"] if about["task"] == "segmentation" else outputs}


def edsr(about, weights, images):
    settings = about["build"]["arguments"]

    def conv(x, k):
        weight = weights[f"{k}.weight"]
        return F.conv2d(x, weight, weights[f"{k}.bias"], padding=weight.shape[-1] // 2)

    x = r = conv(conv(255 * images, "sub_mean"), "head.0")
    for i in range(settings["n_resblocks"]):
        r = r + conv(F.relu(conv(r, f"body.{i}.body.0")), f"body.{i}.body.2")
    x = x + conv(r, f"body.{settings['n_resblocks']}")
    for i in range(settings["scale"][0].bit_length() - 1):
        x = F.pixel_shuffle(conv(x, f"tail.0.{2 * i}"), 2)
    return {"outputs": conv(conv(x, "tail.1"), "add_mean") / 255}


def swinir(about, weights, images):
    settings = about["build"]["arguments"]
    window, mean = settings["window_size"], torch.tensor([0.4488, 0.4371, 0.4040]).view(1, 3, 1, 1)
    bottom, right = (-side % window for side in images.shape[-2:])

    def conv(x, k):
        return F.conv2d(x, weights[f"{k}.weight"], weights[f"{k}.bias"], padding=1)

    def tokens(x):
        return x.permute(0, 2, 3, 1)

    def to_images(t):
        return t.permute(0, 3, 1, 2)

    def linear(t, k):
        return F.linear(t, weights[f"{k}.weight"], weights[f"{k}.bias"])

    def norm(t, k):
        return F.layer_norm(t, t.shape[-1:], weights[f"{k}.weight"], weights[f"{k}.bias"])

    def attend(t, p, shift):
        table = weights[f"{p}.relative_position_bias_table"]
        return shifted_window_attention(
            t,
            weights[f"{p}.qkv.weight"],
            weights[f"{p}.proj.weight"],
            table[weights[f"{p}.relative_position_index"]].permute(2, 0, 1)[None],
            [window, window],
            table.shape[1],
            [shift, shift],
            qkv_bias=weights[f"{p}.qkv.bias"],
            proj_bias=weights[f"{p}.proj.bias"],
            training=False,
        )

    x = conv(F.pad(images, (0, right, 0, bottom), "reflect") - mean, "conv_first")
    t = norm(tokens(x), "patch_embed.norm")
    for g, depth in enumerate(settings["depths"]):
        inner = t
        for b in range(depth):
            p = f"layers.{g}.residual_group.blocks.{b}"
            shift = window // 2 if b % 2 else 0
            inner = inner + attend(norm(inner, f"{p}.norm1"), f"{p}.attn", shift)
            hidden = F.gelu(linear(norm(inner, f"{p}.norm2"), f"{p}.mlp.fc1"))
            inner = inner + linear(hidden, f"{p}.mlp.fc2")
        t = t + tokens(conv(to_images(inner), f"layers.{g}.conv"))
    x = x + conv(to_images(norm(t, "norm")), "conv_after_body")
    x = F.leaky_relu(conv(x, "conv_before_upsample.0"), 0.01)
    for i in range(settings["upscale"].bit_length() - 1):
        x = F.pixel_shuffle(conv(x, f"upsample.{2 * i}"), 2)
    height, width = (side * settings["upscale"] for side in images.shape[-2:])
    return {"outputs": (conv(x, "conv_last") + mean)[..., :height, :width]}


SR = {"EDSR": edsr, "SwinIR": swinir}

with torch.inference_mode():
    for place in map(Path, sys.argv[1:]):
        about = json.loads(place.with_suffix(".json").read_text())
        weights = load_file(place.with_suffix(".safetensors"))
        images = load_file(place.parent / "images.safetensors")["images"]
        forward = SR.get(about["build"]["constructor"], recognise)
        outputs = forward(about, weights, images)
        outputs = {name: value.contiguous() for name, value in outputs.items()}
        save_file(outputs, place.with_name(f"{place.name}-outputs.safetensors"))

assert "sr4ir_dist" not in sys.modules
