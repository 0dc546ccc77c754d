"""Tiny runs over drawn numbers: what the tests of training and their rank processes share."""

from dataclasses import replace

import torch

from sr4ir_dist import checkpoint, experiments
from sr4ir_dist.batch import Batch
from sr4ir_dist.overrides import override
from sr4ir_dist.training import state
from sr4ir_dist.training.build import build_networks, make_setup
from sr4ir_dist.training.step import train_step
from sr4ir_dist.training.views import make_inputs

NAMES = {"h2t": "drawn_cls/h2t", "l2t": "drawn_cls/x4/l2t"}
CLASSES = 4
STEPS = (5, 4, 5, 1)
"""Images of each step over all ranks: on two ranks 3+2, 2+2, 3+2 and 1+0."""
COUNT = len(STEPS)
WARMUP_STEPS = 2
CUT = 2
"""Steps before the checkpoint in the middle."""
RATES = {"sr": [1e-4], "task": [1e-3]}
SAMPLED = 4096


def tiny_experiment(recipe, *settings):
    """An experiment with EDSR of one block and 8 features and a ResNet18 of 4 classes."""
    experiment = experiments.make(NAMES.get(recipe, f"drawn_cls/edsr-x4/{recipe}"))
    small = ["data.resize=32", "data.crop=32", "batch_size=5"]
    if experiment.sr is not None:
        small += ["sr.blocks=1", "sr.features=8"]
    if experiment.task is not None:
        small += [f"task.classes={CLASSES}"]
    if "vgg" in recipe:
        small += ["fixed.vgg_layer=conv2_2"]
    return override(experiment, [*small, *settings])


def flawed_experiment():
    """Two epochs of two steps of 20 images, each judged, published after every step."""
    run = ["epochs=2", "warmup_epochs=0", "batch_size=20", "evaluation.batch_size=4"]
    every = ["checkpoint.every_steps=1", "evaluation.every_epochs=1"]
    return tiny_experiment("pretrain", *run, *every)


def task_experiment(task):
    """One epoch of SR4IR for segmentation or detection, in batches of 4, judged at its end."""
    small = {
        "seg": ["data.resize=32", "data.crop=32"],
        # A learning rate that a detector of random weights survives for a few steps.
        "det": ["task.min_size=64", "task.max_size=64", "optimizers.task.lr=1e-3"],
    }
    run = ["epochs=1", "warmup_epochs=0", "batch_size=4", "sr.blocks=1", "sr.features=8"]
    judged = ["task.classes=8", "evaluation.border=2", "evaluation.batch_size=6"]
    experiment = experiments.make(f"drawn_{task}/edsr-x4/sr4ir")
    return override(experiment, [*run, *judged, *small[task]])


def drawn_batch(number, count, *, size=36, dtype=torch.float32):
    """A whole batch of smooth random images; 36 pixels leave 2 x 2 in ResNet18's last layer."""
    generator = torch.Generator().manual_seed(number)
    coarse = torch.rand(count, 3, 8, 8, generator=generator, dtype=torch.float64)
    fine = torch.rand(count, 3, size, size, generator=generator, dtype=torch.float64)
    hr = torch.nn.functional.interpolate(coarse, (size, size), mode="bilinear") * 0.8 + fine * 0.2
    return Batch(
        hr=hr.to(dtype),
        sizes=torch.full((count, 2), size),
        targets=torch.randint(CLASSES, (count,), generator=generator),
        ids=tuple(f"{number}-{i}" for i in range(count)),
        keys=torch.arange(count) + 100 * number,
        global_size=count,
    )


def share_of(batch, rank, world_size):
    """A rank's contiguous share; the first ranks have one more where it does not divide."""
    count = len(batch.hr)
    starts = [-(-count * r // world_size) for r in range(world_size + 1)]
    part = slice(starts[rank], starts[rank + 1])
    return replace(
        batch,
        hr=batch.hr[part],
        sizes=batch.sizes[part],
        targets=batch.targets[part],
        ids=batch.ids[part],
        keys=batch.keys[part],
    )


def without_kinks(modules):
    """Networks with a smooth SiLU for every ReLU.

    Float32 sums in another order turn a ReLU of a small image on or off now and then; through batch
    norm over a few values that makes per cents, where rounding alone makes 1e-5.
    """
    for module in modules.values():
        for parent in list(module.modules()):
            for name, child in parent.named_children():
                if isinstance(child, torch.nn.ReLU):
                    setattr(parent, name, torch.nn.SiLU())
    return modules


def tiny_setup(experiment, *, engine, rank=0, world_size=1, double=False, smooth=False):
    """Networks and engines of an experiment, in float64 or `without_kinks` where asked for."""
    modules = build_networks(experiment)
    if smooth:
        modules = without_kinks(modules)
    if double:
        modules = {role: module.double() for role, module in modules.items()}
    return make_setup(experiment, modules, rank=rank, world_size=world_size, engine=engine)


def staged(recipe, stage):
    """The tiny experiment with both engines at a ZeRO stage."""
    return tiny_experiment(recipe, f"zero.sr={stage}", f"zero.task={stage}")


def restored(experiment, run_uri, *, engine="deepspeed", rank=0, world_size=1, smooth=False):
    """Networks and engines as a run's newest checkpoint has them."""
    saved = checkpoint.load(checkpoint.resolve(run_uri))
    # Another seed, so that nothing but the checkpoint can bring the weights back.
    modules = build_networks(experiment.model_copy(update={"seed": 1}))
    if smooth:
        modules = without_kinks(modules)
    state.load_networks(modules, saved)
    setup = make_setup(experiment, modules, rank=rank, world_size=world_size, engine=engine)
    state.load_optimizers(setup.engines, saved)
    return setup


def run_steps(setup, first=0, last=COUNT, *, weighted=True):
    """Run some of the steps of STEPS; returns each term's losses over the global batch.

    Unweighted, every rank's loss counts the same, however many images it has.
    """
    dtype = next(next(iter(setup.modules.values())).parameters()).dtype
    reported = {}
    for number in range(first, last):
        whole = drawn_batch(number, STEPS[number], dtype=dtype)
        batch = share_of(whole, setup.rank, setup.world_size)
        inputs = make_inputs(setup, batch, epoch=1)
        if not weighted:
            inputs = replace(inputs, share=1.0, task_share=1.0)
        losses = train_step(setup, inputs, after_warmup=number >= WARMUP_STEPS, rates=RATES)
        for name, loss in losses.items():
            part = loss / setup.world_size
            if setup.world_size > 1:
                torch.distributed.all_reduce(part)
            reported[f"{number}/{name}"] = part
    return reported


def sampled(tensors):
    """At most about SAMPLED evenly spread numbers of each tensor, so that results stay small."""
    return {
        name: value.detach().flatten()[:: value.numel() // SAMPLED | 1].clone()
        for name, value in tensors.items()
    }


def outcome(setup, losses):
    """Losses, sampled weights, buffers and optimizer states; every rank must call it."""
    result = {"losses": losses, "weights": {}, "buffers": {}, "optimizers": {}}
    for role, module in setup.modules.items():
        for kind, named in (
            ("weights", module.named_parameters()),
            ("buffers", module.named_buffers()),
        ):
            result[kind] |= sampled({f"{role}.{name}": value for name, value in named})
    for role, engine in setup.engines.items():
        state = engine.optimizer_state()
        result["optimizers"] |= sampled({f"{role}.{key}": value for key, value in state.items()})
    return result


def segmentation_outcome(rank, world_size):
    """Two steps of SR4IR for segmentation in float64, on masks of which much is void."""
    settings = ["data.resize=32", "data.crop=32", "sr.blocks=1", "sr.features=8", "task.classes=4"]
    experiment = override(experiments.make("drawn_seg/edsr-x4/sr4ir"), settings)
    setup = tiny_setup(experiment, engine="plain", rank=rank, world_size=world_size, double=True)
    for layer in setup.modules["task"].modules():
        if isinstance(layer, torch.nn.Dropout):
            layer.p = 0.0
    losses = {}
    for number in range(2):
        batch = share_of(masked_batch(number), rank, world_size)
        inputs = make_inputs(setup, batch, epoch=1)
        rates = {"sr": [1e-4], "task": [1e-3, 1e-2]}
        for name, loss in train_step(setup, inputs, after_warmup=True, rates=rates).items():
            part = loss / world_size
            if world_size > 1:
                torch.distributed.all_reduce(part)
            losses[f"{number}/{name}"] = part
    return outcome(setup, losses)


def masked_batch(number):
    """Five images of which the first two, one rank's share, have hardly a valid pixel."""
    batch = drawn_batch(number, 5, dtype=torch.float64)
    generator = torch.Generator().manual_seed(number)
    masks = torch.randint(5, (5, 36, 36), generator=generator, dtype=torch.uint8)
    masks[:2, 3:] = 255
    return replace(batch, targets=masks)


def canvas_batch():
    """Five images of different sizes, padded to the largest height and width of all."""
    batch = drawn_batch(0, 5, dtype=torch.float64)
    sizes = torch.tensor([[20, 36], [22, 30], [36, 21], [30, 20], [26, 25]])
    boxes = {"boxes": torch.tensor([[2.0, 3.0, 15.0, 18.0]]), "labels": torch.tensor([1])}
    boxes["crowd"] = torch.tensor([False])
    return replace(batch, sizes=sizes, targets=(boxes,) * 5)


def canvas_inputs(rank, world_size):
    """What a rank of detection makes of its share: the canvas's size and the pixel loss."""
    settings = ["task.classes=4", "sr.network=bicubic", "task.min_size=64", "task.max_size=64"]
    experiment = override(experiments.make("drawn_det/edsr-x4/sr4ir"), settings)
    modules = build_networks(experiment)
    setup = make_setup(experiment, modules, rank=rank, world_size=world_size, engine="none")
    batch = share_of(canvas_batch(), rank, world_size)
    height, width = batch.sizes.max(dim=0).values.tolist()
    batch = replace(batch, hr=batch.hr[..., :height, :width])
    inputs = make_inputs(setup, batch, epoch=1)
    loss = (setup.modules["sr"](inputs.lr) - inputs.hr).abs().mean() * inputs.share / world_size
    if world_size > 1:
        torch.distributed.all_reduce(loss)
    return {"size": tuple(inputs.hr.shape[-2:]), "loss": loss, "cells": inputs.cells}
