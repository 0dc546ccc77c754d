"""The training step against records of the published method (`--parity DIR`)."""

import math
from collections import defaultdict

import published_step
import pytest
import torch
from torch import nn

from sr4ir_dist import experiments
from sr4ir_dist.config import Experiment
from sr4ir_dist.networks.pretrained import load_state
from sr4ir_dist.overrides import override
from sr4ir_dist.training.build import build_networks, make_setup
from sr4ir_dist.training.engines import PlainEngine
from sr4ir_dist.training.schedules import learning_rate
from sr4ir_dist.training.step import train_step
from sr4ir_dist.training.views import Inputs

DATA = {"cls": "cub200", "seg": "voc_seg", "det": "voc_det"}
# What each network has as its output of class scores, background included.
HEADS = {
    "cls": "fc.bias",
    "seg": "classifier.4.bias",
    "det": "roi_heads.box_predictor.cls_score.bias",
}
LR_WARMUP_EPOCHS = {"cls": 0, "seg": 0, "det": 1}
TOLERANCE = 1e-9
NOISE = 1e-15
"""Of sums that are zero but for rounding, such as the gradient of a bias before batch norm."""


class RecordingEngine(PlainEngine):
    """Keeps the norms of the gradients that each update used."""

    norms: dict[str, float]

    def step(self, rates):
        self.norms = {
            name: p.grad.norm().item()
            for name, p in self.module.named_parameters()
            if p.grad is not None
        }
        super().step(rates)


def records(folder):
    for path in sorted(folder.glob("*.pt")):
        record = torch.load(path, weights_only=True)
        if "steps" in record:
            yield path.name, record


def make_experiment(record) -> Experiment:
    settings, task = record["train_opt"], record["task"]
    network = "swinir" if "conv_first.weight" in record["init_sr"] else "edsr"
    kinds = [key for key in settings if key.startswith("optim_")]
    sr = settings["optim_sr"]
    (learner,) = (settings[key] for key in kinds if key != "optim_sr")
    classes = len(record["init_task"][HEADS[task]]) - (task != "cls")
    return override(
        experiments.make(f"{DATA[task]}/{network}-x{record['scale']}/sr4ir"),
        [
            f"epochs={settings['epoch']}",
            f"warmup_epochs={settings['warmup_epoch']}",
            f"batch_size={settings['batch_size']}",
            f"task.classes={classes}",
            f"optimizers.sr.lr={sr['lr']}",
            f"optimizers.task.lr={learner['lr']}",
            f"optimizers.task.weight_decay={learner['weight_decay']}",
        ],
    )


def assert_like(tensor, summary, what):
    if not isinstance(summary, dict):
        summary = torch.as_tensor(summary).double()
        assert tensor.shape == summary.shape, what
        largest = summary.abs().max().item() if summary.numel() else 0.0
        assert (tensor.double() - summary).abs().le(TOLERANCE * largest + 1e-12).all(), what
        return
    tensor = tensor.detach().double()
    assert list(tensor.shape) == list(summary["shape"]), what
    scale = summary["abs"]
    tolerance = {"rel_tol": TOLERANCE, "abs_tol": NOISE}
    assert math.isclose(tensor.abs().sum().item(), scale, **tolerance), what
    assert abs(tensor.sum().item() - summary["sum"]) <= TOLERANCE * scale + NOISE, what
    assert math.isclose(tensor.norm().item(), summary["l2"], **tolerance), what
    if not tensor.numel():
        return
    first = torch.tensor(summary["first"], dtype=torch.float64)
    largest = tensor.abs().max().item()
    assert (tensor.flatten()[: len(first)] - first).abs().max() <= TOLERANCE * largest + NOISE, what


def make_inputs(record, step) -> Inputs:
    images, targets = record["batches"][step["batch_index"]]
    lr, cells = step["sr_in"][0].double(), step["mask_cells"][0]
    if record["task"] != "det":
        sizes = [tuple(images.shape[-2:])] * len(images)
        return Inputs(images.double(), lr, sizes, targets, cells)
    # The canvas that the record's LR images were made of.
    height, width = (side * record["scale"] for side in lr.shape[-2:])
    hr = torch.stack([reflected(image.double(), height, width) for image in images])
    sizes = [tuple(image.shape[-2:]) for image in images]
    boxes = tuple(
        {**target, "crowd": torch.zeros(len(target["labels"]), dtype=torch.bool)}
        for target in targets
    )
    return Inputs(hr, lr, sizes, boxes, cells)


def reflected(image, height, width):
    bottom, right = height - image.shape[-2], width - image.shape[-1]
    mirror = bottom < image.shape[-2] and right < image.shape[-1]
    pad = nn.functional.pad(
        image[None], (0, right, 0, bottom), mode="reflect" if mirror else "replicate"
    )
    return pad[0]


@pytest.fixture
def determined(monkeypatch):
    """What the records did to be determined: no dropout, and samples are the first elements."""
    monkeypatch.setattr(
        torch, "randperm", lambda count, *_, device=None, **__: torch.arange(count, device=device)
    )


def without_dropout(module):
    for layer in module.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0


@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("determined")
def test_steps_equal_the_published_ones(parity):
    tested = 0
    for name, record in records(parity):
        assert record["task"] in DATA, f"{name} is of task {record['task']!r}"
        check_record(name, record)
        tested += 1
    assert tested, f"no record of training steps in {parity}"


@pytest.mark.usefixtures("determined")
@pytest.mark.parametrize(("task", "scale"), [("seg", 8), ("det", 4)])
def test_steps_equal_the_methods_description(task, scale):
    record = published_step.make_record(task, scale)
    if task == "seg":
        check_record(f"seg x{scale}", record)
    else:
        small = ["task.min_size=96", "task.max_size=128"]
        check_record(f"det x{scale}", record, small, prepare=published_step.sample_few)


def check_record(name, record, settings=(), prepare=lambda task_network: None):
    torch.set_num_threads(2)
    experiment = override(make_experiment(record), settings)
    # Stochastic depth is a kind of dropout.
    if experiment.sr.network == "swinir":
        experiment = override(experiment, ["sr.drop_path=0"])
    modules = build_networks(experiment)
    for role, module in modules.items():
        load_state(module, record[f"init_{role}"], what=f"{name}, {role}")
        without_dropout(module)
        module.double()
    prepare(modules["task"])
    setup = make_setup(experiment, modules, engine="plain")
    for engine in setup.engines.values():
        engine.__class__ = RecordingEngine
    seen = defaultdict(list)
    watch(setup, seen)
    for number, step in enumerate(record["steps"]):
        what = f"{name}, step {number}"
        for outputs in seen.values():
            outputs.clear()
        rates = check_rates(setup, record, number, step, what)
        after_warmup = step["epoch"] > experiment.warmup_epochs
        inputs = make_inputs(record, step)
        losses = train_step(setup, inputs, after_warmup=after_warmup, rates=rates)
        expected = [value for _, value in step["losses"]]
        assert [loss.item() for loss in losses.values()] == pytest.approx(expected, rel=TOLERANCE)
        check_calls(setup, seen, step, what)
        check_updates(setup, step, what)


def watch(setup, seen):
    """Keep every SR image, every feature, and every output of the whole task network."""
    task, (sr, network) = setup.task, (setup.modules["sr"], setup.modules["task"])
    sr.register_forward_hook(lambda m, _, out: seen["sr"].append((m.training, out.detach())))
    network.register_forward_hook(lambda m, _, out: seen["task"].append((m.training, out)))
    task.backbone(network).register_forward_hook(
        lambda _, __, out: seen["features"].append((network.training, task.select(out)))
    )


def check_rates(setup, record, number, step, what):
    """The recorded rates, after a comparison with the schedule of the record's settings."""
    settings, count = record["train_opt"], len(record["batches"])
    for role, recorded in (("sr", step["lr_sr"]), ("task", step["lr_task"])):
        names = [key for key in settings if key.startswith("scheduler_")]
        (name,) = (key for key in names if (key == "scheduler_sr") == (role == "sr"))
        base_rates = setup.engines[role].base_rates
        found = [
            learning_rate(
                number,
                base_lr=base,
                floor=settings[name]["eta_min"],
                periods_in_steps=[period * count for period in settings[name]["periods"]],
                warmup_steps=LR_WARMUP_EPOCHS[record["task"]] * count,
            )
            for base in base_rates
        ]
        # Segmentation records backbone, classifier and auxiliary head; the first two are one here.
        assert [found[0], found[-1]] == pytest.approx([recorded[0], recorded[-1]], rel=1e-12), what
    return {
        role: [rates[0], *rates[len(rates) - len(setup.engines[role].base_rates) + 1 :]]
        for role, rates in (("sr", step["lr_sr"]), ("task", step["lr_task"]))
    }


def check_calls(setup, seen, step, what):
    for (training, sr), summary in zip(seen["sr"], step["sr_out"], strict=True):
        assert training
        assert_like(sr, summary, f"{what}, SR image")
    # The published method runs the whole network for the TDP loss; features are all it uses.
    calls = step["task_calls"]
    for (training, features), call in zip(seen["features"], calls, strict=True):
        assert training == call["training"], what
        compared = [layer for layer in call["feats"] if layer in features]
        assert compared or not call["feats"], f"{what}: features of {list(call['feats'])}"
        for layer in compared:
            assert_like(features[layer], call["feats"][layer], f"{what}, {layer}")
    trained = [call for call in calls if call["training"]]
    for (_, outputs), call in zip(seen["task"], trained, strict=True):
        logits = call.get("logits")
        if isinstance(logits, torch.Tensor):
            main = outputs["out"] if isinstance(outputs, dict) and "out" in outputs else outputs
            assert_like(main, logits, f"{what}, logits")


def check_updates(setup, step, what):
    for role, engine in setup.engines.items():
        recorded, norms = step[f"grad_norms_{role}"], engine.norms
        # The published switch un-freezes the detector's stem, whose gradients nothing reads.
        frozen = {n for n, p in setup.modules[role].named_parameters() if not p.requires_grad}
        assert set(recorded) - frozen == set(norms) - frozen, what
        for key in set(recorded) - frozen:
            value = recorded[key]
            assert norms[key] == pytest.approx(value, rel=TOLERANCE, abs=1e-14), f"{what} {key}"
        if not frozen & set(recorded):
            total = math.hypot(*norms.values())
            assert total == pytest.approx(step[f"grad_total_{role}"], rel=TOLERANCE), what
        state = setup.modules[role].state_dict()
        for key, summary in step[f"param_csum_{role}"].items():
            assert_like(state[key], summary, f"{what}, {key}")
