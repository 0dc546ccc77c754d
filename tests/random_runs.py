"""Runs that nobody trained, but whose networks tell images apart: random weights, published."""

import json

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.utils import save_image

from sr4ir_dist import checkpoint, experiments
from sr4ir_dist.overrides import override
from sr4ir_dist.tasks.detection import Detector, settle
from sr4ir_dist.training.build import build_networks, make_setup
from sr4ir_dist.training.state import Progress, snapshot


def publish_random(run, name, *settings, data="datasets/none", step=1, history=()):
    """Publish a checkpoint of an experiment with random weights; gives its networks."""
    experiment = override(experiments.make(name), settings)
    modules = build_networks(experiment, torch.device("cpu"), ("sr", "task"))
    for module in modules.values():
        randomise(module)
    setup = make_setup(experiment, modules, engine="none")
    files = snapshot(setup, Progress(epoch=3, step=step, history=history))
    files["run.json"] = json.dumps({"run": "a-run-0123abcd", "data": [data]}).encode()
    checkpoint.publish(str(run), step, files)
    return modules


def randomise(module):
    """Statistics of batch norm from some images: without them a deep network's outputs are flat."""
    images = drawn_images(16, 128, 128)
    if isinstance(module, Detector):
        settle(module, images)
        return
    norms = [layer for layer in module.modules() if isinstance(layer, nn.BatchNorm2d)]
    for layer in norms:
        layer.momentum = 1.0
    if norms:
        with torch.no_grad():
            module.train()(images[:4, :, :64, :64])
    for layer in norms:
        # Four images hardly differ in some channels, whose rounding errors would be amplified.
        layer.running_var.clamp_(min=0.01)


def drawn_images(*shape, seed=0):
    count, height, width = shape
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 6, 7, generator=generator)
    fine = torch.rand(count, 3, height, width, generator=generator)
    return F.interpolate(coarse, (height, width), mode="bilinear") * 0.8 + fine * 0.2


def write_drawn_image(path, height, width, seed=0):
    """Write one of `drawn_images`; the suffix says the format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_image(drawn_images(1, height, width, seed=seed), path)
