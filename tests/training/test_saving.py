"""Saves overlap with training; one that fails harms nothing else."""

import io
import json
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from tiny_runs import tiny_experiment, tiny_setup

from sr4ir_dist import checkpoint, storage
from sr4ir_dist.training import saving, state
from sr4ir_dist.training.plan import Plan
from sr4ir_dist.training.saving import Saver, SavingError
from sr4ir_dist.training.state import Progress

pytestmark = pytest.mark.usefixtures("process_group")


@pytest.fixture(scope="module")
def setup(process_group):
    """A small SR network alone, with weights and an optimizer to save."""
    setup = tiny_setup(tiny_experiment("pretrain"), engine="plain")
    network, engine = setup.modules["sr"], setup.engines["sr"]
    engine.backward(network(torch.rand(1, 3, 8, 8)).mean())
    engine.step([1e-4])
    return setup


@pytest.fixture
def plan(setup, tmp_path):
    return Plan(setup.experiment, ("the data",), "the-run", str(tmp_path / "run"), {}, 1)


class Gate:
    """Lets writes of checkpoints wait or fail."""

    def __init__(self, monkeypatch):
        self.open = threading.Event()
        self.open.set()
        self.failing: set[int] = set()
        self.threads = set()
        write = storage.write_bytes

        def gated(uri, data):
            self.threads.add(threading.current_thread())
            assert self.open.wait(20)
            if uri.endswith("manifest.json") and int(uri.split("/")[-2][-9:]) in self.failing:
                raise storage.StorageError(f"{uri}: the disk is full")
            write(uri, data)

        monkeypatch.setattr(storage, "write_bytes", gated)


@pytest.fixture
def gate(monkeypatch):
    return Gate(monkeypatch)


@pytest.fixture
def saver(setup, plan):
    """A saver, what it said and what it reported."""
    said, reported = [], []

    def report(figures, uri):
        reported.append((figures["step"], uri and checkpoint.verify(uri).uri))

    with Saver(setup, plan, say=said.append, report=report) as saver:
        saver.said, saver.reported = said, reported
        yield saver


def at(step, *, judged=False):
    return Progress(step=step, history=({"step": step, "psnr": float(step)},) if judged else ())


def published(plan):
    return [int(uri[-9:]) for uri in checkpoint.newest_first(plan.run_uri)]


def test_steps_go_on_while_a_checkpoint_is_written(setup, plan, saver, gate):
    gate.open.clear()
    module = setup.modules["sr"]
    before = {name: value.clone() for name, value in module.state_dict().items()}
    saver.save(at(1))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 1  # what the next step does
    assert published(plan) == []
    gate.open.set()
    saver.finish()
    (uri,) = checkpoint.newest_first(plan.run_uri)
    found = checkpoint.verify(uri).tensors("sr.safetensors", before)
    assert all(torch.equal(found[name], value) for name, value in before.items())
    assert state.load_progress(checkpoint.load(uri)) == at(1)
    assert state.load_run(checkpoint.load(uri)) == {"run": "the-run", "data": ["the data"]}
    assert threading.main_thread() not in gate.threads
    assert len(gate.threads) == 1


def test_a_save_waits_for_the_one_before(plan, saver, gate):
    gate.open.clear()
    saver.save(at(1, judged=True))
    assert saver.reported == []
    threading.Timer(0.3, gate.open.set).start()
    started = time.monotonic()
    saver.save(at(2))
    assert time.monotonic() - started > 0.25
    assert 1 in published(plan)
    # Whoever is told of a checkpoint finds it published.
    assert [step for step, uri in saver.reported if uri] == [1]
    saver.finish()
    assert published(plan) == [2, 1]
    assert len(saver.reported) == 1


def test_ranks_hear_of_a_long_upload_before_they_give_up(plan, saver, gate, monkeypatch):
    heard, shared = [], saving.shared
    monkeypatch.setattr(saving, "_TELL_EVERY_S", 0.05)
    monkeypatch.setattr(saving, "shared", lambda *args: heard.append(shared(*args)) or heard[-1])
    gate.open.clear()
    saver.save(at(1))
    threading.Timer(0.5, gate.open.set).start()
    saver.finish()
    assert heard[-1] == (checkpoint.resolve(plan.run_uri), "")
    assert len(heard) > 3
    assert set(heard[:-1]) == {None}


def test_leaving_waits_for_what_is_written(setup, plan, gate):
    gate.open.clear()

    def fail():
        with Saver(setup, plan, say=print, report=lambda figures, uri: None) as saver:
            saver.save(at(1))
            threading.Timer(0.3, gate.open.set).start()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert published(plan) == [1]


def test_a_failed_save_costs_that_checkpoint_alone(plan, saver, gate):
    gate.failing = {3, 4}
    for step in (1, 2, 3, 4, 5):
        saver.save(at(step, judged=step > 1))
    saver.finish()
    assert published(plan) == [5, 2]
    assert all(checkpoint.verify(uri) for uri in checkpoint.newest_first(plan.run_uri))
    told = [(step, uri is not None) for step, uri in saver.reported]
    assert told == [(2, True), (3, False), (4, False), (5, True)]
    assert len(saver.said) == 2
    assert saver.said[0].startswith("the checkpoint after step 3 could not be saved: ")
    assert saver.said[0].endswith("the disk is full")


def test_a_failed_save_leaves_its_room_to_the_next(plan, saver, gate):
    gate.failing = {2}
    saver.save(at(1))
    saver.save(at(2))
    saver.save(at(3))
    saver.finish()
    folders = Path(plan.run_uri, checkpoint.FOLDER).iterdir()
    assert sorted(int(folder.name[-1]) for folder in folders) == [1, 3]


def test_saves_that_fail_again_and_again_end_the_run(plan, saver, gate):
    gate.failing = {2, 3, 5, 6, 7}
    for step in range(1, 8):
        saver.save(at(step))
    with pytest.raises(SavingError, match="3 checkpoints in a row .*: .*the disk is full"):
        saver.save(at(8))
    assert published(plan) == [4, 1]


def test_a_run_whose_last_save_fails_is_not_finished(plan, saver, gate):
    gate.failing = {2}
    saver.save(at(1))
    saver.save(at(2))
    with pytest.raises(storage.StorageError, match="last checkpoint .*: .*the disk is full"):
        saver.finish()
    assert published(plan) == [1]


def test_the_best_checkpoint_stays(setup, plan):
    figures = {1: 20.0, 2: 30.0, 3: 25.0, 4: float("nan"), 5: 21.0, 6: 22.0}
    with Saver(setup, plan, say=print, report=lambda figures, uri: None) as saver:
        for step, psnr in figures.items():
            saver.save(Progress(step=step, history=({"step": step, "psnr": psnr},)))
        saver.save(replace(at(7), history=({"step": 6, "psnr": 99.0},)))  # not judged itself
        saver.finish()
    assert published(plan) == [7, 6, 2]


def test_what_cannot_be_pruned_is_told_and_harms_nothing(plan, saver, monkeypatch):
    for step in (1, 2):
        saver.save(at(step))
    saver.finish()
    Path(plan.run_uri, "references").write_text("in the way")
    saver.save(at(3))
    saver.finish()
    assert published(plan) == [3, 2, 1]
    (line,) = saver.said
    assert line.startswith("older checkpoints could not be deleted: ")


@pytest.mark.parametrize(
    "record",
    [{"step": -1}, {"epoch": 0}, {"history": 3}, {"history": [[]]}, {"bad_rows": ["x"]}, []],
)
def test_a_progress_that_cannot_be_is_refused(plan, record):
    files = {"progress.json": json.dumps(record).encode(), "run.json": b"[]"}
    saved = checkpoint.load(checkpoint.publish(plan.run_uri, 1, files))
    with pytest.raises(checkpoint.CheckpointError, match=r"progress\.json of checkpoint"):
        state.load_progress(saved)
    with pytest.raises(checkpoint.CheckpointError, match=r"run\.json .* names no run and dataset"):
        state.load_run(saved)


@pytest.mark.parametrize("change", ["missing", "unknown", "shape", "dtype", "pickle"])
def test_networks_and_optimizers_refuse_other_tensors(setup, plan, change):
    files = state.snapshot(setup, at(1))
    for name, load in (
        ("sr.safetensors", lambda saved: state.load_networks(setup.modules, saved)),
        ("sr.optimizer.safetensors", lambda saved: state.load_optimizers(setup.engines, saved)),
    ):
        uri = checkpoint.publish(plan.run_uri, 1, files | {name: altered(files[name], change)})
        with pytest.raises(checkpoint.CheckpointError, match=rf"^{name} of checkpoint .*step-"):
            load(checkpoint.load(uri))
        load(checkpoint.load(checkpoint.publish(plan.run_uri, 1, files)))


def altered(data, change):
    tensors = safetensors.torch.load(data)
    first = next(iter(tensors))
    if change == "missing":
        del tensors[first]
    elif change == "unknown":
        tensors["another"] = torch.zeros(1)
    elif change == "shape":
        tensors[first] = tensors[first][None].clone()
    elif change == "dtype":
        tensors[first] = tensors[first].half()
    else:
        content = io.BytesIO()
        torch.save(tensors, content)
        return content.getvalue()
    return safetensors.torch.save(tensors)
