import json
import math
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from sr4ir_dist import experiments
from sr4ir_dist.benchmark import scaling, scaling_outlook
from sr4ir_dist.benchmark.scaling_model import (
    Cluster,
    Collectives,
    PhaseWork,
    all_gather_seconds,
    all_reduce_seconds,
    predict,
    smallest_batch,
)
from sr4ir_dist.benchmark.scaling_work import count_work
from sr4ir_dist.benchmark.sockets import bytes_sent
from sr4ir_dist.overrides import override
from sr4ir_dist.training.build import build_networks

SMALL = ["data.resize=32", "data.crop=32", "batch_size=4"]
GPUS = (1, 2, 3, 4, 7, 8, 9, 16, 64, 65, 512)
CLUSTER = Cluster(
    flops=1e12,
    launch_s=1e-5,
    gpus_per_node=8,
    inside_bytes_s=100e9,
    between_bytes_s=10e9,
    call_s=1e-5,
    inside_s=1e-6,
    between_s=5e-6,
    images_s=1e6,
)
PHASES = (
    PhaseWork(("sr",), 1e9, 100, 4e6),
    PhaseWork(
        ("task",),
        2e9,
        200,
        40e6,
        (Collectives("all_gather", 20, 40_000), Collectives("all_reduce", 20, 40_000)),
    ),
)


@pytest.fixture(scope="module")
def experiment():
    made = experiments.make("drawn_cls/edsr-x4/sr4ir")
    return override(made, [*SMALL, "sr.blocks=2", "sr.features=16"])


@pytest.fixture(scope="module")
def data(experiment):
    with scaling.drawn_data(experiment, images=24) as uri:
        yield uri


@pytest.fixture(scope="module")
def prepared(experiment, data):
    return scaling.prepare(experiment, [data])


@pytest.fixture(scope="module")
def run(prepared, data):
    """Two real ranks for a few steps."""
    (run,) = scaling.measure(
        prepared, [data], ranks=[2], steps=2, warm_up=1, repeats=1, threads=1, say=print
    )
    return run


def test_a_phase_sends_its_own_networks_gradients_and_hardly_more(run):
    sr, task = run.phases
    assert (sr.updates, task.updates) == (("sr",), ("task",))
    # ResNet18 is so much larger that none of it can hide in phase 1, nor be missing in phase 2.
    assert task.gradients > 100 * sr.gradients > 0
    for phase in run.phases:
        assert 1 <= phase.measured / phase.gradients < 1.02
        # Gloo's headers: some 300 bytes a collective, and 4 kB in the first ones.
        assert 0 <= phase.rest < 0.005 * phase.measured
        assert phase.other == 0
    assert sr.batch_norm == 0 < task.batch_norm
    # What is shared outside of the phases are shares and losses, some numbers.
    assert run.outside < 100


def test_counted_work_is_what_two_ranks_did(run, prepared, data):
    sr, task = count_work(prepared, [data], gathered=False)
    assert [phase.gradient_bytes for phase in (sr, task)] == [
        phase.gradients
        for phase in run.phases  # 2(n-1)/n is 1 for two ranks
    ]
    assert sr.collectives == ()
    assert sum(c.bytes for c in task.collectives) == run.phases[1].batch_norm
    assert sum(c.calls for c in task.collectives) + 2 == run.calls


def test_the_parts_of_a_step_add_up(run):
    times = run.times
    parts = times.compute + times.transfer + times.waiting + times.data
    assert parts == pytest.approx(times.step)  # two steps, so that their median is their mean
    assert min(times.compute, times.transfer, times.waiting) > 0
    assert times.data >= 0
    latency, rate = run.link
    assert 0 < latency < 1 < rate


def test_waiting_for_the_slowest_rank_is_told_from_transfer():
    def rank(start):
        call = {"start": start, "end": 8.0}
        return {"began": 0.0, "ready": 1.0, "ended": 10.0, "calls": [call]}

    times = scaling.split_times([rank(2.0), rank(6.0)])
    assert times == scaling.Times(step=10, compute=5, transfer=2, waiting=2, data=1)


def test_bytes_sent_over_tcp_are_counted_by_the_kernel():
    with socket.create_server(("127.0.0.1", 0)) as server:
        with socket.create_connection(server.getsockname()) as client:
            peer, _ = server.accept()
            with peer:
                before = bytes_sent()
                client.sendall(b"x" * 30_000)
                peer.sendall(b"y" * 7)
                assert bytes_sent() - before == 30_007


def test_one_that_trains_nothing_or_has_other_data_is_refused(data):
    with pytest.raises(ValueError, match="trains nothing"):
        scaling.prepare(experiments.make("drawn_cls/edsr-x4/h2t-on-sr4ir"), [data])
    with pytest.raises(ValueError, match="ranks \\[0\\]: expected"):
        scaling.measure(None, [], ranks=[0], steps=1, warm_up=0, repeats=1, threads=1, say=print)


@pytest.mark.parametrize("name", ["drawn_cls/edsr-x4/pretrain", "drawn_seg/h2t"])
def test_flops_are_those_of_every_convolution_forward_and_backward(name, data):
    """Depthwise ones too. A gradient costs what the forward does, where there is one."""
    small = scaling.prepare(override(experiments.make(name), SMALL), [data])
    (phase,) = count_work(small, [data])
    ((role, module),) = build_networks(small).items()
    flops = []

    def note(layer, inputs, output):
        forward = 2 * layer.weight[0].numel() * output.numel() / len(output)
        flops.append(forward * (1 + inputs[0].requires_grad + layer.weight.requires_grad))

    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(note)
    module(torch.rand(2, 3, 8, 8) if role == "sr" else torch.rand(2, 3, 32, 32))
    assert phase.flops == pytest.approx(sum(flops), rel=1e-9)


def test_one_gpu_communicates_nothing():
    step = predict(PHASES, CLUSTER, gpus=1, batch=64)
    assert (step.communication, step.data, step.efficiency) == (0, 0, 1)
    assert step.compute == pytest.approx(64 * 3e9 / 1e12)


def test_free_links_and_launches_scale_perfectly():
    free = {"inside_bytes_s": math.inf, "between_bytes_s": math.inf, "images_s": math.inf}
    free |= dict.fromkeys(("call_s", "inside_s", "between_s", "launch_s"), 0.0)
    for gpus in GPUS:
        step = predict(PHASES, replace(CLUSTER, **free), gpus=gpus, batch=32 * gpus)
        assert step.efficiency == pytest.approx(1)


def test_more_gpus_cost_efficiency_and_larger_batches_win_it():
    for batch in (64, 4096):
        steps = [predict(PHASES, CLUSTER, gpus=gpus, batch=batch) for gpus in GPUS]
        for fewer, more in zip(steps, steps[1:], strict=False):
            assert more.communication >= fewer.communication
        even = [step.efficiency for step in steps if batch % step.gpus == 0]
        assert even == sorted(even, reverse=True)
    for gpus in GPUS:
        found = [predict(PHASES, CLUSTER, gpus=gpus, batch=gpus * k).efficiency for k in (1, 8, 64)]
        assert found == sorted(found)


def test_collectives_cost_what_is_computed_by_hand():
    # Two of a node: half of the bytes go each way, twice, over two hops.
    assert all_reduce_seconds(CLUSTER, 2, 1e9) == pytest.approx(1e-5 + 1e9 / 100e9 + 2e-6)
    # Two nodes: 7/8 twice inside, then 1/2 twice between, where ring and tree have equal latency.
    within = 2 * 7 / 8 * 1e9 / 100e9 + 14e-6
    assert all_reduce_seconds(CLUSTER, 16, 1e9) == pytest.approx(1e-5 + within + 0.1 + 1e-5)
    # 64 nodes and a byte: a tree of depth 6, there and back.
    assert all_reduce_seconds(CLUSTER, 512, 1) == pytest.approx(1e-5 + 14e-6 + 60e-6, rel=1e-3)
    # Gathering walks over all ranks.
    assert all_gather_seconds(CLUSTER, 16, 1e6) == pytest.approx(1e-5 + 1.5e-3 + 14e-6 + 5e-6)


def test_a_slow_loader_is_waited_for_and_bounds_efficiency():
    slow = replace(CLUSTER, images_s=1000.0)
    step = predict(PHASES, slow, gpus=8, batch=64)
    assert step.seconds == pytest.approx(64 / 1000)
    assert step.data > 0
    assert smallest_batch(PHASES, slow, gpus=8, efficiency=0.5) is None


def test_the_smallest_batch_is_the_smallest():
    for gpus in GPUS[1:]:
        batch = smallest_batch(PHASES, CLUSTER, gpus=gpus, efficiency=0.8)
        assert predict(PHASES, CLUSTER, gpus=gpus, batch=batch).efficiency >= 0.8
        if batch > gpus:
            assert predict(PHASES, CLUSTER, gpus=gpus, batch=batch - gpus).efficiency < 0.8


def test_overlap_hides_gradients_and_a_bad_number_is_refused():
    hidden = predict(PHASES, replace(CLUSTER, overlap=1.0), gpus=16, batch=4096)
    plain = predict(PHASES, CLUSTER, gpus=16, batch=4096)
    gradients = sum(all_reduce_seconds(CLUSTER, 16, phase.gradient_bytes) for phase in PHASES)
    assert plain.communication - hidden.communication == pytest.approx(gradients)
    with pytest.raises(ValueError, match="gpus 0"):
        predict(PHASES, CLUSTER, gpus=0, batch=1)


def test_a_machine_that_is_as_the_model_has_it_is_predicted_without_error():
    def times(compute, transfer=0.0):
        return scaling.Times(compute + transfer, compute, transfer, 0.0, 0.0)

    link, fixed, an_image = (2e-3, 1e9), 0.5, 0.1
    machine = scaling_outlook.this_machine(
        PHASES, 16, times(fixed + 16 * an_image), times(fixed + 4 * an_image), 4, link, 2
    )
    calls = 2 + 40
    sent = sum(phase.gradient_bytes for phase in PHASES) + 80_000
    two = times(fixed + 8 * an_image, calls * link[0] + sent / link[1])
    one = scaling.Run(1, times(fixed + 16 * an_image), (), 0.0, calls, None, 0.0)
    runs = [one, replace(one, ranks=2, times=two)]
    reduced = replace(PHASES[1], collectives=(Collectives("all_reduce", 40, 80_000),))
    found = scaling_outlook.check((PHASES[0], reduced), machine, runs, 16, cores=2)
    assert [each.error for each in found] == pytest.approx([0, 0], abs=1e-9)


def test_the_job_models_without_measuring(tmp_path):
    job = Path(__file__).parents[2] / "jobs" / "benchmark.py"
    arguments = ["--repeats", "0", "--model", "drawn_cls/h2t batch_norm=local", "--gpus", "1,8"]
    command = [sys.executable, job, "scaling", *arguments, "--json", tmp_path / "found.json"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=True)
    assert "drawn_cls/h2t batch_norm=local" in done.stdout
    found = json.loads((tmp_path / "found.json").read_text())
    ((_, model),) = found["model"].items()
    assert [each["steps"][0]["gpus"] for each in model["gpus"]] == [1, 8]
    assert model["work"][0]["collectives"] == []
