"""The training step against records of the published method (`--parity DIR`)."""

import math
from collections import defaultdict

import pytest
import torch

from sr4ir_dist import experiments
from sr4ir_dist.config import Experiment, override
from sr4ir_dist.training.build import build_networks, make_setup
from sr4ir_dist.training.engines import PlainEngine
from sr4ir_dist.training.loop import learning_rates
from sr4ir_dist.training.step import Inputs, train_step

NAMES = {"cls": "cub200"}
TOLERANCE = 1e-9


class RecordingEngine(PlainEngine):
    """Keeps the norms of the gradients that each update used."""

    norms: dict[str, float]

    def step(self, lr):
        self.norms = {
            name: p.grad.norm().item()
            for name, p in self.module.named_parameters()
            if p.grad is not None
        }
        super().step(lr)


def records(folder):
    for path in sorted(folder.glob("*.pt")):
        record = torch.load(path, weights_only=True)
        if "steps" in record:
            yield path.name, record


def make_experiment(record) -> Experiment:
    settings = record["train_opt"]
    sr, task = settings["optim_sr"], settings["optim_cls"]
    return override(
        experiments.make(f"{NAMES[record['task']]}/edsr-x{record['scale']}/sr4ir"),
        [
            f"epochs={settings['epoch']}",
            f"warmup_epochs={settings['warmup_epoch']}",
            f"batch_size={settings['batch_size']}",
            f"task.classes={len(record['init_task']['fc.bias'])}",
            f"optimizers.sr.lr={sr['lr']}",
            f"optimizers.task.lr={task['lr']}",
            f"optimizers.task.weight_decay={task['weight_decay']}",
        ],
    )


def assert_like(tensor, summary, what):
    tensor = tensor.detach().double()
    assert list(tensor.shape) == summary["shape"], what
    scale = summary["abs"]
    assert math.isclose(tensor.abs().sum().item(), scale, rel_tol=TOLERANCE), what
    assert abs(tensor.sum().item() - summary["sum"]) <= TOLERANCE * scale, what
    assert math.isclose(tensor.norm().item(), summary["l2"], rel_tol=TOLERANCE), what
    first = torch.tensor(summary["first"], dtype=torch.float64)
    largest = tensor.abs().max().item()
    assert (tensor.flatten()[:4] - first).abs().max() <= TOLERANCE * largest, what


def watch(network, layer, seen):
    """Keep every output of a network or layer of it, by the mode that it ran in."""
    layer.register_forward_hook(lambda _, __, out: seen.append((network.training, out.detach())))


@pytest.mark.timeout(900)
def test_steps_equal_the_published_ones(parity):
    tested = 0
    for name, record in records(parity):
        assert record["task"] in NAMES, f"{name} is of task {record['task']!r}"
        _check_record(name, record)
        tested += 1
    assert tested, f"no record of training steps in {parity}"


def _check_record(name, record):
    torch.set_num_threads(2)
    experiment = make_experiment(record)
    modules = build_networks(experiment)
    for role, module in modules.items():
        missing, unexpected = module.load_state_dict(record[f"init_{role}"], strict=False)
        assert not unexpected
        assert all(key.endswith("num_batches_tracked") for key in missing)
        module.double()
    setup = make_setup(experiment, modules, engine="plain")
    for engine in setup.engines.values():
        engine.__class__ = RecordingEngine
    seen = defaultdict(list)
    watch(modules["sr"], modules["sr"], seen["sr"])
    watch(modules["task"], modules["task"], seen["logits"])
    watch(modules["task"], modules["task"].layer4, seen["l4"])

    for number, step in enumerate(record["steps"]):
        what = f"{name}, step {number}"
        for outputs in seen.values():
            outputs.clear()
        rates = learning_rates(setup, number, len(record["batches"]))
        assert rates["sr"] == pytest.approx(step["lr_sr"][0], rel=1e-12), what
        assert rates["task"] == pytest.approx(step["lr_task"][0], rel=1e-12), what
        images, labels = record["batches"][step["batch_index"]]
        cells = step["mask_cells"][0]
        inputs = Inputs(images.double(), step["sr_in"][0], cells, labels)
        after_warmup = step["epoch"] > experiment.warmup_epochs
        losses = train_step(setup, inputs, after_warmup=after_warmup, rates=rates)

        expected = [value for _, value in step["losses"]]
        assert [loss.item() for loss in losses.values()] == pytest.approx(expected, rel=TOLERANCE)
        for (training, sr), summary in zip(seen["sr"], step["sr_out"], strict=True):
            assert training
            assert_like(sr, summary, f"{what}, SR image")
        # The published method runs the whole network for the TDP loss; features are all it uses.
        calls = step["task_calls"]
        for (training, features), call in zip(seen["l4"], calls, strict=True):
            assert training == call["training"], what
            for layer, summary in call["feats"].items():
                assert layer == "l4"
                assert_like(features, summary, f"{what}, l4")
        for (_, logits), call in zip(
            seen["logits"], [call for call in calls if call["training"]], strict=True
        ):
            torch.testing.assert_close(logits, call["logits"], rtol=TOLERANCE, atol=1e-10)
        for role, engine in setup.engines.items():
            norms = engine.norms
            for key, value in step[f"grad_norms_{role}"].items():
                assert norms[key] == pytest.approx(value, rel=TOLERANCE, abs=1e-14), f"{what} {key}"
            total = math.hypot(*norms.values())
            assert total == pytest.approx(step[f"grad_total_{role}"], rel=TOLERANCE), what
            state = modules[role].state_dict()
            for key, summary in step[f"param_csum_{role}"].items():
                assert_like(state[key], summary, f"{what}, {key}")
