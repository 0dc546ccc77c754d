"""One of several processes that train together.

Its arguments: FOLDER DATA FLAWED FEW RANK RANKS.

All that the tests want to know of two ranks is computed here in one go, because starting a process
costs more than any of it. Results go to FOLDER/rank-RANK.pt.
"""

import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from tiny_runs import (
    CUT,
    canvas_inputs,
    drawn_batch,
    flawed_experiment,
    outcome,
    restored,
    run_steps,
    segmentation_outcome,
    share_of,
    staged,
    task_experiment,
    tiny_experiment,
    tiny_setup,
)
from torch import nn

from sr4ir_dist import checkpoint
from sr4ir_dist.training import state
from sr4ir_dist.training.batch_norm import average_running_statistics, synchronise
from sr4ir_dist.training.build import build_networks, make_setup, open_loader
from sr4ir_dist.training.evaluate import evaluate
from sr4ir_dist.training.loop import Hooks, LossLog, NonFiniteLossError, train
from sr4ir_dist.training.state import Progress
from sr4ir_dist.training.step import train_step
from sr4ir_dist.training.views import make_inputs

WIDTH, HEIGHT, CHANNELS = 3, 4, 6
smooth_setup = partial(tiny_setup, smooth=True)
smooth_restored = partial(restored, smooth=True)


def main(folder, data, flawed, few, rank, world_size):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size
    )
    results = {
        "engines": engines(rank, world_size),
        "stages": stages(folder, rank, world_size),
        "passes": passes(rank, world_size),
        "batch_norm": batch_norm(rank, world_size),
        "local": local_batch_norm(rank, world_size),
        "segmentation": segmentation_outcome(rank, world_size),
        "canvas": canvas_inputs(rank, world_size),
        "bf16": bf16(rank, world_size),
        "short": short_gradients(rank, world_size),
        "evaluation": evaluation(data, rank, world_size),
        "non_finite": non_finite(rank, world_size),
        "flawed": flawed_run(flawed, rank, world_size),
        "tasks": {task: task_run(task, few, rank, world_size) for task in ("seg", "det")},
    }
    torch.save(results, folder / f"rank-{rank}.pt")
    dist.destroy_process_group()


def engines(rank, world_size):
    """Outcomes of the same steps by recipe and plain engine."""
    results = {}
    for recipe in ("sr4ir", "joint"):
        for kind, double in (("plain", False), ("double", True)):
            setup = smooth_setup(
                tiny_experiment(recipe),
                engine="plain",
                double=double,
                rank=rank,
                world_size=world_size,
            )
            results[f"{recipe}/{kind}"] = outcome(setup, run_steps(setup))
    setup = smooth_setup(
        tiny_experiment("sr4ir"), engine="plain", double=True, rank=rank, world_size=world_size
    )
    results["unweighted"] = outcome(setup, run_steps(setup, last=1, weighted=False))
    return results


def stages(folder, rank, world_size):
    """The same steps at each ZeRO stage, whole and from a checkpoint in their middle."""
    results = {}
    for recipe in ("sr4ir", "joint"):
        for stage in (0, 1, 2):
            experiment = staged(recipe, stage)
            first = smooth_setup(experiment, engine="deepspeed", rank=rank, world_size=world_size)
            losses = run_steps(first, last=CUT)
            result = {"cut": outcome(first, {})}
            if recipe == "sr4ir":
                files = state.snapshot(first, Progress(step=CUT))
                uri = str(folder / f"stage-{stage}")
                if rank == 0:
                    checkpoint.publish(uri, CUT, files)
                dist.barrier()
            result["end"] = outcome(first, losses | run_steps(first, first=CUT))
            if recipe == "sr4ir":
                second = smooth_restored(experiment, uri, rank=rank, world_size=world_size)
                result["restored"] = outcome(second, {})
                result["resumed"] = outcome(second, run_steps(second, first=CUT))
            results[f"{recipe}/{stage}"] = result
    return results


def passes(rank, world_size):
    """Steps of two passes each, with plain engines and at each ZeRO stage."""
    results = {}
    for stage in ("plain", 0, 1, 2):
        experiment = staged("sr4ir", 0 if stage == "plain" else stage)
        experiment = experiment.model_copy(update={"micro_batch": 2})
        engine = "plain" if stage == "plain" else "deepspeed"
        setup = smooth_setup(experiment, engine=engine, rank=rank, world_size=world_size)
        results[stage] = outcome(setup, run_steps(setup, last=CUT))
    return results


def batch_norm_case(count, dtype):
    """The whole batch and the gradient of its output."""
    generator = torch.Generator().manual_seed(count)
    shape = (count, CHANNELS, HEIGHT, WIDTH)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * 2 + 5
    return x.to(dtype), torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def batch_norm_layer(dtype):
    layer = nn.BatchNorm2d(CHANNELS).to(dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += torch.randn(CHANNELS, generator=generator).to(dtype)
    return layer


def batch_norm(rank, world_size):
    """Synchronised layers on shares of 5 images and of 1: outputs, gradients, statistics."""
    results = {}
    for dtype in (torch.float32, torch.float64):
        layer = synchronise(nn.Sequential(batch_norm_layer(dtype)))
        for count in (5, 1):
            x, grad = batch_norm_case(count, dtype)
            starts = [-(-count * r // world_size) for r in range(world_size + 1)]
            part = slice(starts[rank], starts[rank + 1])
            x = x[part].requires_grad_()
            layer.zero_grad()
            output = layer(x)
            output.backward(grad[part])
            results[f"{dtype}/{count}"] = {
                "output": output.detach(),
                "grad": x.grad,
                **{f"grad_{name}": p.grad.clone() for name, p in layer.named_parameters()},
                **{name: value.clone() for name, value in layer.named_buffers()},
            }
        layer.eval()
        results[f"{dtype}/eval"] = layer(batch_norm_case(5, dtype)[0]).detach()
    single = synchronise(nn.Sequential(nn.BatchNorm2d(CHANNELS)))
    single(torch.ones(1 - rank, CHANNELS, 1, 1))
    results["one value"] = {name: value.clone() for name, value in single.named_buffers()}
    return results


def local_batch_norm(rank, world_size):
    """Running statistics before and after they are averaged, also with an empty share."""
    results = []
    experiment = tiny_experiment("h2t", "batch_norm=local")
    setup = tiny_setup(experiment, engine="deepspeed", rank=rank, world_size=world_size)
    for number, count in enumerate((5, 1)):
        whole = drawn_batch(number, count)
        inputs = make_inputs(setup, share_of(whole, rank, world_size), epoch=1)
        train_step(setup, inputs, after_warmup=True, rates={"task": [1e-2]})
        network = setup.modules["task"]
        before = {name: value.clone() for name, value in network.named_buffers()}
        average_running_statistics(network, inputs.share / world_size)
        after = {name: value.clone() for name, value in network.named_buffers()}
        results.append({"before": before, "after": after})
    return results


def bf16(rank, world_size):
    """Both kinds of phases under autocast."""
    results = {}
    for recipe in ("sr4ir", "joint"):
        setup = smooth_setup(
            tiny_experiment(recipe, "precision=bf16"),
            engine="deepspeed",
            rank=rank,
            world_size=world_size,
        )
        results[recipe] = outcome(setup, run_steps(setup))
    return results


def short_gradients(rank, world_size):
    """A step whose gradients travel in bfloat16, at each ZeRO stage, and one in float32."""
    results = {}
    for stage in ("plain", 0, 1, 2):
        experiment = staged("sr4ir", 0 if stage == "plain" else stage)
        experiment = experiment.model_copy(update={"gradients": "bf16"})
        engine = "plain" if stage == "plain" else "deepspeed"
        setup = smooth_setup(experiment, engine=engine, rank=rank, world_size=world_size)
        results[stage] = outcome(setup, run_steps(setup, last=1))
    return results


def evaluation(data, rank, world_size):
    experiment = tiny_experiment("sr4ir", "evaluation.batch_size=4", "task.classes=8")
    setup = tiny_setup(experiment, engine="none", rank=rank, world_size=world_size)
    with open_loader(setup, data, "val") as loader:
        return evaluate(setup, loader)


def flawed_run(data, rank, world_size):
    """The history of a run on a dataset with images that cannot be read."""
    setup = tiny_setup(flawed_experiment(), engine="plain", rank=rank, world_size=world_size)
    with (
        open_loader(setup, data, "train") as training,
        open_loader(setup, data, "val") as validation,
    ):
        hooks = Hooks(publish=lambda progress: None)
        return list(train(setup, training, validation, Progress(), hooks).history)


def task_run(task, data, rank, world_size):
    """A run's last evaluation, and the same networks judged by each rank alone."""
    experiment = task_experiment(task)
    modules = build_networks(experiment)
    setup = make_setup(experiment, modules, rank=rank, world_size=world_size, engine="deepspeed")
    with (
        open_loader(setup, data, "train") as training,
        open_loader(setup, data, "val") as validation,
    ):
        hooks = Hooks(publish=lambda progress: None)
        progress = train(setup, training, validation, Progress(), hooks)
    alone = make_setup(experiment, modules, engine="none")
    with open_loader(alone, data, "val") as loader:
        return {"together": progress.history[-1], "alone": evaluate(alone, loader)}


def non_finite(rank, world_size):
    """What each rank raises when the last rank's loss alone is not finite."""
    setup = tiny_setup(tiny_experiment("pretrain"), engine="none", rank=rank, world_size=world_size)
    log = LossLog(setup)
    value = float("nan") if rank == world_size - 1 else 1.0
    log.add(6, (f"fine-{rank}",), {"pixel_sr": torch.tensor(1.0)})
    log.add(7, (f"bad-{rank}",), {"pixel_sr": torch.tensor(value)})
    try:
        log.collect()
    except NonFiniteLossError as error:
        return str(error)
    return "nothing"


if __name__ == "__main__":
    folder, data, flawed, few, world_size, rank = sys.argv[1:]
    main(Path(folder), data, flawed, few, int(rank), int(world_size))
