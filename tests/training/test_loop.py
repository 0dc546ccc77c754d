"""The loop: interrupted runs repeat uninterrupted ones, and what it reports."""

import json
import math
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from tiny_runs import flawed_experiment, restored, tiny_experiment, tiny_setup
from torch import nn

from sr4ir_dist import checkpoint, experiments
from sr4ir_dist.degradation import degrade
from sr4ir_dist.metrics.psnr import PSNR
from sr4ir_dist.overrides import override
from sr4ir_dist.training import state
from sr4ir_dist.training.agreement import Wish
from sr4ir_dist.training.build import build_networks, make_setup, open_loader
from sr4ir_dist.training.evaluate import evaluate
from sr4ir_dist.training.loop import Hooks, NonFiniteLossError, learning_rates, train
from sr4ir_dist.training.state import Progress

pytestmark = [pytest.mark.usefixtures("process_group"), pytest.mark.timeout(900)]
VAL = 9


@pytest.fixture
def scratch() -> Iterator[str]:
    """A folder that goes with the test: pytest would keep these checkpoints for three sessions."""
    with tempfile.TemporaryDirectory() as folder:
        yield folder


def short_experiment(recipe="sr4ir", *settings):
    """Two epochs of two steps of 20 images, the first epoch without the TDP loss."""
    classes = [] if recipe == "pretrain" else ["task.classes=8"]
    run = ["epochs=2", "warmup_epochs=1", "batch_size=20", "evaluation.batch_size=4"]
    return tiny_experiment(recipe, *classes, *run, "checkpoint.every_steps=1", *settings)


def with_dropout(modules):
    """Networks that draw from torch's global generator in every step."""
    modules["task"].fc = nn.Sequential(nn.Dropout(0.5), modules["task"].fc)
    return modules


def fresh(experiment, engine):
    return make_setup(experiment, with_dropout(build_networks(experiment)), engine=engine)


def from_checkpoint(experiment, engine, uri):
    """What a worker does to go on: networks, then engines, then optimizers, then progress."""
    saved = checkpoint.load(uri)
    modules = with_dropout(build_networks(experiment.model_copy(update={"seed": 7})))
    state.load_networks(modules, saved)
    setup = make_setup(experiment, modules, engine=engine)
    state.load_optimizers(setup.engines, saved)
    return setup, state.load_progress(saved)


def run(setup, data, progress, publish=lambda progress: None, **settings):
    with (
        open_loader(setup, data, "train") as training,
        open_loader(setup, data, "val") as validation,
    ):
        hooks = Hooks(publish=publish, **settings.pop("hooks", {}))
        return train(setup, training, validation, progress, hooks, **settings)


def content(setup, progress):
    """A checkpoint's files, with the measured time left out of the progress."""
    files = state.snapshot(setup, progress)
    record = json.loads(files["progress.json"])
    assert record.pop("seconds") > 0
    return files | {"progress.json": record}


def engines(stage):
    return [f"zero.sr={stage}", f"zero.task={stage}"]


@pytest.mark.parametrize(
    ("engine", "stage", "cuts"),
    [("plain", 0, (1, 2, 3, 4)), ("deepspeed", 0, (1, 2)), ("deepspeed", 1, (1, 3))],
)
def test_an_interrupted_run_equals_an_uninterrupted_one(drawn, scratch, engine, stage, cuts):
    experiment = short_experiment("sr4ir", *engines(stage))
    setup = fresh(experiment, engine)
    published = {}

    def publish(progress):
        files = state.snapshot(setup, progress)
        if progress.step in cuts:
            published[progress.step] = checkpoint.publish(scratch, progress.step, files)

    end = run(setup, drawn, Progress(), publish)
    whole = content(setup, end)
    assert (end.step, end.epoch) == (4, 3)
    assert {name for name in whole if "optimizer" in name} == {
        "sr.optimizer.safetensors",
        "task.optimizer.safetensors",
    }

    for cut in cuts:
        again, progress = from_checkpoint(experiment, engine, published[cut])
        assert progress.step == cut
        assert content(again, run(again, drawn, progress)) == whole, f"cut after step {cut}"
        shutil.rmtree(published[cut])


def leave(experiment, data, folder, hooks):
    """Trains until the hooks say so; gives the checkpoint that was saved last and where it is."""
    setup, published = fresh(experiment, "plain"), []

    def publish(progress):
        uri = checkpoint.publish(folder, progress.step, state.snapshot(setup, progress))
        published.append((progress.step, uri))

    progress = run(setup, data, Progress(), publish, hooks=hooks)
    step, uri = published[-1]
    assert step == progress.step
    assert len(progress.history) == 0
    return uri, progress


@pytest.mark.parametrize("left_after", [1, 2, 3, 4])
def test_a_run_that_leaves_saves_first_and_goes_on_as_if_it_had_not(drawn, scratch, left_after):
    experiment = short_experiment("sr4ir", "checkpoint.every_steps=null")
    setup = fresh(experiment, "plain")
    whole = content(setup, run(setup, drawn, Progress()))

    asked = []

    def wish():
        asked.append(1)
        return Wish.LEAVE if len(asked) == left_after else Wish.NONE

    # At an epoch's end, before the evaluation, which may take longer than there is.
    uri, progress = leave(experiment, drawn, scratch, {"wish": wish})
    assert progress.step == left_after

    second, progress = from_checkpoint(experiment, "plain", uri)
    assert content(second, run(second, drawn, progress)) == whole


def test_a_run_leaves_in_the_middle_of_an_evaluation(drawn, scratch):
    """The state after the last step is saved, and judged by those who go on."""
    settings = ["checkpoint.every_steps=null", "evaluation.batch_size=2"]
    experiment = short_experiment("sr4ir", *settings)
    setup = fresh(experiment, "plain")
    whole = content(setup, run(setup, drawn, Progress()))

    doing = []
    hooks = {
        "entered": lambda what, step: doing.append(what),
        "wish": lambda: Wish.LEAVE if doing[-1] == "evaluating" else Wish.NONE,
    }
    uri, _ = leave(experiment, drawn, scratch, hooks)
    assert doing[-1] == "evaluating"

    second, progress = from_checkpoint(experiment, "plain", uri)
    assert content(second, run(second, drawn, progress)) == whole


@pytest.mark.parametrize("wished_after", [1, 2, 3])
def test_a_wish_to_save_is_met_once(drawn, wished_after):
    settings = ["checkpoint.every_steps=null", "checkpoint.every_epochs=9"]
    setup = fresh(short_experiment("sr4ir", *settings), "plain")
    steps, asked = [], []

    def wish():
        asked.append(1)
        return Wish.SAVE if len(asked) == wished_after else Wish.NONE

    run(setup, drawn, Progress(), lambda p: steps.append(p.step), hooks={"wish": wish})
    assert steps == [wished_after, 4]  # the last one is judged


@pytest.mark.parametrize(("engine", "stage"), [("plain", 0), ("deepspeed", 0), ("deepspeed", 2)])
def test_saving_and_logging_change_nothing(drawn, engine, stage):
    experiment = short_experiment("sr4ir", *engines(stage))
    saved = fresh(experiment, engine)
    calls = []

    def publish(progress):
        calls.append(progress.step)
        state.snapshot(saved, progress)

    first = run(saved, drawn, Progress(), publish, log_every=1)
    rarely = experiment.model_copy(
        update={"checkpoint": experiment.checkpoint.model_copy(update={"every_steps": None})}
    )
    silent = fresh(rarely, engine)
    second = run(silent, drawn, Progress(), log_every=100)
    assert calls == [1, 2, 3, 4]
    ends = content(saved, first), content(silent, second)
    for name in ("sr.safetensors", "task.safetensors"):
        assert ends[0][name] == ends[1][name]
    assert first.history == second.history


def test_published_steps(drawn):
    def steps(*settings):
        experiment = short_experiment("pretrain", "epochs=4", *settings)
        setup = tiny_setup(experiment, engine="plain")
        published = []
        end = run(setup, drawn, Progress(), lambda progress: published.append(progress))
        assert published[-1] == end
        return [(p.step, p.epoch, p.step_in_epoch) for p in published]

    unset = "checkpoint.every_steps=null"
    rare = "evaluation.every_epochs=100"
    assert steps(unset, rare) == [(2, 2, 0), (4, 3, 0), (6, 4, 0), (8, 5, 0)]
    assert steps(unset, rare, "checkpoint.every_epochs=3") == [(6, 4, 0), (8, 5, 0)]
    assert steps("checkpoint.every_steps=3", rare, "checkpoint.every_epochs=4") == [
        (3, 2, 1),
        (6, 4, 0),
        (8, 5, 0),
    ]


def test_evaluation_counts_every_sample_once(drawn):
    experiment = short_experiment("joint")
    setup = tiny_setup(experiment, engine="none")
    with open_loader(setup, drawn, "val") as loader:
        figures = evaluate(setup, loader)
        images, labels = [], []
        for batch in loader.epoch(1):
            images.append(batch.hr)
            labels.append(batch.targets)
    assert [len(part) for part in labels] == [4, 4, 1]
    hr, targets = torch.cat(images).float() / 255, torch.cat(labels)
    assert setup.task is not None
    with torch.no_grad():
        sr = setup.modules["sr"](degrade(hr, 4))
        outputs = setup.task.forward(setup.modules["task"], sr)
    psnr = PSNR(border=8, channel="rgb")
    psnr.update(sr, hr)
    assert figures["images"] == VAL
    assert figures["top1"] == pytest.approx(
        100 * (outputs.argmax(1) == targets).double().mean().item()
    )
    assert figures["psnr"] == pytest.approx(psnr.compute(), rel=1e-6)


def test_evaluation_on_two_ranks_equals_one(drawn, two_ranks):
    experiment = tiny_experiment("sr4ir", "evaluation.batch_size=4", "task.classes=8")
    setup = tiny_setup(experiment, engine="none")
    with open_loader(setup, drawn, "val") as loader:
        figures = evaluate(setup, loader)
    assert figures["images"] == VAL
    for results in two_ranks.by_rank:
        assert results["evaluation"] == pytest.approx(figures, rel=1e-6)
    assert two_ranks.by_rank[0]["evaluation"] == two_ranks.by_rank[1]["evaluation"]


@pytest.mark.parametrize(("task", "figure"), [("seg", "miou"), ("det", "map")])
def test_two_ranks_train_and_judge_as_each_judges_alone(two_ranks, task, figure):
    for results in two_ranks.by_rank:
        found = results["tasks"][task]
        record = found["together"]
        assert (record["epoch"], record["step"], record["images"]) == (1, 2, 7)
        assert 0 <= record[figure] <= 100
        assert found["alone"].keys() == record.keys() - {"epoch", "step"}
        for name, value in found["alone"].items():
            assert record[name] == pytest.approx(value, rel=1e-6), name


def test_images_that_cannot_be_read_are_counted(flawed, scratch, two_ranks):
    experiment = flawed_experiment()
    setup = tiny_setup(experiment, engine="plain")

    def publish(progress):
        if progress.step == 1:
            checkpoint.publish(scratch, 1, state.snapshot(setup, progress))

    end = run(setup, flawed, Progress(), publish)
    assert [record["images"] for record in end.history] == [VAL - 1] * 2
    assert [record["bad_images"] for record in end.history] == [1, 1]
    assert [record["bad_training_images"] for record in end.history] == [3, 3]
    # Also those that were met before an interruption.
    progress = state.load_progress(checkpoint.load(checkpoint.resolve(scratch)))
    assert len(progress.bad_rows) > 0
    again = restored(experiment, scratch, engine="plain")
    assert content(again, run(again, flawed, progress)) == content(setup, end)
    for results in two_ranks.by_rank:
        for found, expected in zip(results["flawed"], end.history, strict=True):
            assert found == pytest.approx(expected, rel=1e-5)


def test_evaluation_changes_nothing_of_the_training_that_follows(drawn):
    ends = []
    for every in (1, 100):
        experiment = short_experiment("joint", f"evaluation.every_epochs={every}")
        setup = fresh(experiment, "plain")
        end = run(setup, drawn, Progress())
        ends.append(content(setup, end)["task.safetensors"])
        assert [record["epoch"] for record in end.history] == ([1, 2] if every == 1 else [2])
    assert ends[0] == ends[1]


@pytest.mark.parametrize("log_every", [1, 100])
def test_a_loss_that_is_not_finite_stops_the_run(drawn, log_every):
    experiment = short_experiment("joint", "checkpoint.every_steps=null")
    setup = tiny_setup(experiment, engine="plain")
    calls = []

    def spoil(module, inputs, output):
        calls.append(len(output))
        # The fourth call in training: step 4, the second of epoch 2.
        training = [count for count in calls if count == 20]
        return output * math.nan if module.training and len(training) == 4 else None

    setup.modules["sr"].register_forward_hook(spoil)
    with open_loader(setup, drawn, "train") as loader:
        ids = list(loader.epoch(2))[1].ids
    published = []
    with pytest.raises(NonFiniteLossError) as caught:
        run(setup, drawn, Progress(), lambda p: published.append(p.step), log_every=log_every)
    assert str(caught.value) == (f"the loss pixel_sr is nan at step 4 on samples {', '.join(ids)}")
    assert len(ids) == 20
    assert published == [2]


def test_every_rank_stops_where_one_ranks_loss_is_not_finite(two_ranks):
    message = "the loss pixel_sr is nan at step 7 on samples bad-0, bad-1"
    assert [results["non_finite"] for results in two_ranks.by_rank] == [message] * 2


def test_logged_losses_are_means_over_the_steps_since_the_last_line(drawn):
    lines = {}
    for every in (1, 2, 3):
        setup = tiny_setup(short_experiment("joint", "epochs=3"), engine="plain")
        logged = {
            "logged": lambda p, losses, speed, every=every: lines.setdefault(every, []).append(
                losses
            )
        }
        run(setup, drawn, Progress(), hooks=logged, log_every=every)
    assert [len(lines[every]) for every in (1, 2, 3)] == [6, 3, 2]
    for every in (2, 3):
        for number, line in enumerate(lines[every]):
            steps = lines[1][number * every : (number + 1) * every]
            for term in ("pixel_sr", "task_sr"):
                mean = sum(step[term] for step in steps) / every
                assert line[term] == pytest.approx(mean, rel=1e-12)
            assert line["lr_sr"] == steps[-1]["lr_sr"]


def test_the_time_of_a_step_is_told_by_its_parts(drawn):
    setup = tiny_setup(short_experiment("sr4ir"), engine="plain")
    speeds, entered = [], []
    hooks = {
        "logged": lambda progress, losses, speed: speeds.append((progress, speed)),
        "entered": lambda doing, step: entered.append((doing, step)),
    }
    run(setup, drawn, Progress(), hooks=hooks, log_every=2)
    assert [progress.step for progress, _ in speeds] == [2, 4]
    for epoch, (progress, speed) in enumerate(speeds, 1):
        parts = speed["data_wait"] + speed["phase_1"] + speed["phase_2"]
        # Both steps of an epoch, and little else, lie between two readings.
        elapsed = progress.seconds - (speeds[0][0].seconds if epoch == 2 else 0)
        assert min(speed["phase_1"], speed["phase_2"]) > 0
        assert 0.5 * elapsed < 2 * parts <= 1.05 * elapsed
        assert 40 / elapsed * 0.9 < speed["images_per_second"] < 40 / (2 * parts) * 1.1
        assert speed["data_wait_rank"] == 0
        assert 0.1 < speed["memory_gib"] < 20
    parts = ["data", "phase 1", "phase 2"]
    expected = [(part, step) for step in (0, 1) for part in parts]
    assert [each for each in entered if each[0] != "saving"][:6] == expected
    assert ("evaluating", 4) in entered
    assert entered[-1] == ("saving", 4)


def test_a_recipe_without_phases_only_judges_and_publishes(drawn, scratch):
    experiment = short_experiment("h2t-on-s", "warmup_epochs=0")
    setup = tiny_setup(experiment, engine="deepspeed")
    before = {
        name: value.clone()
        for role in ("sr", "task")
        for name, value in setup.modules[role].state_dict(prefix=role).items()
    }
    published = []

    def publish(progress):
        files = state.snapshot(setup, progress)
        published.append(checkpoint.publish(scratch, progress.step, files))

    end = run(setup, drawn, Progress(), publish)
    assert setup.engines == {}
    assert (end.step, len(end.history), len(published)) == (0, 1, 1)
    assert end.history[0].keys() == {"epoch", "step", "psnr", "ssim", "top1", "images"}
    assert end.history[0]["images"] == VAL
    saved = checkpoint.load(published[0])
    for role in ("sr", "task"):
        for name, value in saved.tensors(f"{role}.safetensors").items():
            assert torch.equal(value, before[role + name]), name
    # Started again, it has nothing left to do.
    assert run(setup, drawn, end, publish) == end
    assert len(published) == 1


def published_rate(t, base, floor, boundaries):
    """The published schedule after t steps; a boundary belongs to the period that it ends."""
    start, end = next((a, b) for a, b in zip((0, *boundaries), boundaries, strict=False) if t <= b)
    return floor + 0.5 * (base - floor) * (1 + math.cos(math.pi * (t - start) / (end - start)))


def test_learning_rates_of_the_loop_restart_when_the_tdp_loss_sets_in(drawn):
    setup = tiny_setup(short_experiment("sr4ir", "epochs=3"), engine="plain")
    lines = []
    run(
        setup,
        drawn,
        Progress(),
        hooks={"logged": lambda progress, losses, speed: lines.append(losses)},
        log_every=1,
    )
    expected = [published_rate(t, 1e-4, 1e-6, (2, 6)) for t in range(6)]
    assert [line["lr_sr"] for line in lines] == pytest.approx(expected, rel=1e-12)
    assert expected[2] == 1e-6
    assert expected[3] > 0.8 * 1e-4
    expected = [published_rate(t, 3e-2, 1e-4, (2, 6)) for t in range(6)]
    assert [line["lr_task"] for line in lines] == pytest.approx(expected, rel=1e-12)
    # The first step with the TDP loss is the one at the floor.
    assert ["tdp_sr" in line for line in lines] == [False, False, True, True, True, True]


@pytest.mark.parametrize(
    ("recipe", "warmup", "boundaries"),
    [("sr4ir", 0, (30,)), ("sr4ir", 3, (30,)), ("sr4ir", 2, (20, 30)), ("joint", 2, (30,))],
)
def test_learning_rates_by_recipe_and_warm_up(recipe, warmup, boundaries):
    experiment = short_experiment(recipe, "epochs=3", f"warmup_epochs={warmup}")
    setup = tiny_setup(experiment, engine="plain")
    for t in range(31):
        rates = learning_rates(setup, t, 10)
        assert rates["sr"] == pytest.approx([published_rate(t, 1e-4, 1e-6, boundaries)], rel=1e-12)
        assert rates["task"] == pytest.approx(
            [published_rate(t, 3e-2, 1e-4, boundaries)], rel=1e-12
        )


def test_halved_rates_rise_first_too():
    halved = override(
        experiments.make("folder_sr/edsr-x4/pretrain"), ["epochs=8", "lr_warmup_epochs=2"]
    )
    setup = tiny_setup(tiny_experiment("pretrain"), engine="plain")
    setup = replace(setup, experiment=halved)
    rates = [learning_rates(setup, step, 10)["sr"][0] for step in range(80)]
    peak = max(rates)
    assert rates[0] == pytest.approx(peak / 20)
    assert rates[:20] == sorted(rates[:20])
    assert rates[20] == peak
    assert rates[20:] == sorted(rates[20:], reverse=True)


def test_detections_rates_rise_for_an_epoch_before_their_cosine():
    steps = 10

    def rates(recipe):
        name = f"drawn_det/{'edsr-x4/' if recipe == 'sr4ir' else ''}{recipe}"
        settings = ["epochs=30", f"warmup_epochs={3 * (recipe == 'sr4ir')}", "task.classes=8"]
        setup = tiny_setup(override(experiments.make(name), settings), engine="plain")
        return [learning_rates(setup, t, steps)["task"][0] for t in range(30 * steps + 1)]

    base, floor = 2e-2, 1e-4
    for recipe, boundaries in (("sr4ir", (20, 290)), ("h2t", (300,))):
        found = rates(recipe)
        rise = [base * (1 / steps + (1 - 1 / steps) * t / steps) for t in range(steps)]
        rest = [published_rate(t, base, floor, boundaries) for t in range(29 * steps + 1)]
        assert found == pytest.approx([*rise, *rest], rel=1e-12)
    # One cosine of 30 epochs, of which the run sees 29.
    assert found[-2] > 1.5 * floor


def test_the_auxiliary_head_has_a_rate_of_its_own_down_to_the_same_floor():
    experiment = override(experiments.make("drawn_seg/h2t"), ["epochs=3", "task.classes=8"])
    setup = tiny_setup(experiment, engine="plain")
    for t in range(31):
        expected = [published_rate(t, base, 1e-4, (30,)) for base in (2e-2, 2e-1)]
        assert learning_rates(setup, t, 10)["task"] == pytest.approx(expected, rel=1e-12)
