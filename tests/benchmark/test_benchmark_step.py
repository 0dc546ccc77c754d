import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from sr4ir_dist.benchmark.step import (
    PUBLISHED,
    Contender,
    compare,
    contender,
    make_experiment,
    random_batch,
)
from sr4ir_dist.data.convert.drawn import DRAWN, open_drawn
from sr4ir_dist.data.convert.write import convert

COSTS = Path(__file__).parents[1] / "assets" / "step_costs.json"
RECORD = (
    "record them: pytest tests/benchmark/test_benchmark_step.py -k costs_no_more "
    "--record=tests/assets"
)
# Of a forward and backward per image in 1e9 operations: the published step, and the least with
# every layer computed one after the other.
COUNTED = {
    "cub200/edsr-x8": (70.6, 70.6),
    "cub200/edsr-x4": (92.6, 92.6),
    "voc_seg/edsr-x8": (320.8, 292.7),
    "voc_seg/edsr-x4": (421.8, 393.6),
    "voc_det/edsr-x8": (433.5, 347.8),
    "voc_det/edsr-x4": (515.1, 429.4),
}
SMALL = {
    "cub200": ["data.resize=64", "data.crop=64"],
    "voc_seg": ["data.resize=64", "data.crop=64"],
    "voc_det": ["data.shrink=96", "task.min_size=96", "task.max_size=160"],
}

# So large that what a step keeps for its backward is more than gradients and shows in its peak.
LARGER = {
    "cub200": ["data.resize=128", "data.crop=128"],
    "voc_seg": ["data.resize=128", "data.crop=128"],
    "voc_det": ["data.shrink=192", "task.min_size=192", "task.max_size=320"],
}


def make(label: str, name: str, images: int, *settings: str) -> Contender:
    experiment = make_experiment(name, [f"batch_size={images}", *settings])
    return contender(label, experiment, random_batch(experiment, images))


@pytest.mark.parametrize(
    "name",
    [
        "cub200/edsr-x8",
        "cub200/edsr-x4",
        "voc_seg/edsr-x8",
        pytest.param("voc_seg/edsr-x4", marks=pytest.mark.slow),
        pytest.param("voc_det/edsr-x8", marks=pytest.mark.slow),
        pytest.param("voc_det/edsr-x4", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("label", [PUBLISHED, "ours"])
def test_flops_per_image_at_full_size(name: str, label: str):
    published, least = COUNTED[name]
    each = make(label, f"{name}/sr4ir", 2)
    gflops = each.cost().gflops / 2
    if label == PUBLISHED:
        assert gflops == pytest.approx(published, rel=0.01)
    else:
        assert gflops < least


@pytest.mark.parametrize("data", SMALL)
def test_losses_are_the_published_ones(data: str):
    """In float64: batch norm over the pooled values of two small images magnifies rounding.

    Without dropout, which draws in the order in which values lie in memory. The second step's are
    those of updated networks.
    """
    settings = ["batch_size=2", *SMALL[data]]
    experiment = make_experiment(f"{data}/edsr-x4/sr4ir", settings)
    batch = random_batch(experiment, 2)
    batch = replace(batch, hr=batch.hr.double() / 255)
    pair = [contender(label, experiment, batch) for label in (PUBLISHED, "ours")]
    for each in pair:
        for module in each.modules:
            module.double()
            for layer in module.modules():
                if isinstance(layer, torch.nn.Dropout):
                    layer.p = 0.0
    for number in range(2):
        losses = []
        for each in pair:
            each.clock.seed = number
            losses.append({name: loss.item() for name, loss in each.run().items()})
        published, ours = losses
        assert ours.keys() == published.keys()
        for name, loss in published.items():
            assert ours[name] == pytest.approx(loss, rel=1e-8), (number, name)
    published, ours = compare(pair, steps=1, warm_up=1)
    assert published.speedup == 1.0
    assert ours.cost.gflops <= published.cost.gflops
    assert ours.cost.peak_mb <= published.cost.peak_mb


@pytest.mark.proof
@pytest.mark.timeout(1200)
def test_detections_losses_in_fp32_hang_on_rounding(record):
    """The published step differs from itself where its weights lie in another order."""
    told = {}
    for scale in (4, 8):
        label = f"voc_det/edsr-x{scale}/sr4ir"
        published, elsewhere, ours = (make(name, label, 2) for name in (PUBLISHED, PUBLISHED, ""))
        for module in elsewhere.modules:
            module.to(memory_format=torch.channels_last)
        losses = [{n: v.item() for n, v in c.run().items()} for c in (published, elsewhere, ours)]
        told[label] = {
            what: {name: abs(found[name] / loss - 1) for name, loss in losses[0].items()}
            for what, found in zip(("channels last", "ours"), losses[1:], strict=True)
        }
    record("detection_rounding", {"relative differences from the published step": told})
    for differences in told.values():
        limit = 3 * max(differences["channels last"].values())
        assert all(found < limit for found in differences["ours"].values())


@pytest.mark.parametrize(
    "name",
    [
        *(f"cub200/edsr-x4/{r}" for r in ("sr4ir", "sr4ir-no-tdp", "s", "s2t", "t2s", "joint")),
        "cub200/h2t",
        "cub200/x4/l2t",
        *(f"cub200/edsr-x4/{r}" for r in ("joint-tdp", "sod-mtgan", "sr4ir-fixed-tdp")),
        "cub200/edsr-x4/sr4ir precision=bf16",
        "cub200/edsr-x4/sr4ir-vgg fixed.vgg_layer=conv2_2",
        "cub200/swinir-x4/sr4ir sr.blocks=2 sr.depth=2",
        "voc_seg/edsr-x4/sr4ir",
        "voc_seg/edsr-x4/sr4ir precision=bf16",
        "voc_det/edsr-x4/sr4ir",
        "voc_det/edsr-x4/sr4ir precision=bf16",
    ],
)
def test_a_step_costs_no_more_than_it_did(
    name: str, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
):
    """No clock: a change that raises a count fails here; one that lowers it is to be recorded.

    `--record=tests/assets` stores what this machine counts.
    """
    experiment, *settings = name.split()
    each = make("ours", experiment, 2, *LARGER[name.split("/")[0]], *settings)
    each.run()  # makes the optimizers' states
    cost = each.cost()
    found = {
        "gflops": round(cost.gflops, 3),
        "operators": cost.operators,
        "syncs": cost.syncs,
        "peak_mb": round(cost.peak_mb, 1),
    }
    folder = request.config.getoption("--record")
    if folder:
        # With pytest-xdist, its processes store in turn.
        with FileLock(tmp_path_factory.getbasetemp().parent / "step_costs.lock"):
            store(Path(folder, COSTS.name), name, found)
        return
    known = json.loads(COSTS.read_text()).get(name) if COSTS.exists() else None
    if known is None:
        pytest.fail(f"no costs of {name} are known; {RECORD}")
    assert found.keys() == known.keys()
    # How many boxes a detector proposes hangs on rounding.
    raised = {kind: (known[kind], now) for kind, now in found.items() if now > 1.02 * known[kind]}
    assert raised == {}, f"a step of {name} costs more than it did (before, now)"
    lowered = {kind: (known[kind], now) for kind, now in found.items() if now < 0.98 * known[kind]}
    assert lowered == {}, f"a step of {name} costs less than it did (before, now); {RECORD}"


def store(path: Path, name: str, costs: dict[str, float]) -> None:
    """Write down what a step costs, beside the others."""
    stored = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(dict(sorted((stored | {name: costs}).items())), indent=1) + "\n")


def test_recomputed_groups_need_less_memory_for_more_operations():
    small = ("sr.blocks=4", "sr.depth=2", "sr.features=24", "sr.heads=2")
    plain, again = (
        make("ours", "drawn_cls/swinir-x4/pretrain", 4, *small, f"sr.recompute={value}")
        for value in ("false", "true")
    )
    costs = []
    for each in (plain, again):
        each.run()
        costs.append(each.cost())
    assert costs[1].peak_mb < 0.6 * costs[0].peak_mb
    assert costs[0].gflops < costs[1].gflops < 1.4 * costs[0].gflops


def test_published_step_of_another_recipe():
    with pytest.raises(ValueError, match="recipe='s2t'"):
        make(PUBLISHED, "cub200/edsr-x4/s2t", 2, *SMALL["cub200"])
    with pytest.raises(ValueError, match="precision='bf16'.*--no-published"):
        make(PUBLISHED, "cub200/edsr-x4/sr4ir", 2, "precision=bf16", *SMALL["cub200"])


@pytest.mark.slow
def test_the_loop_tells_what_waits_for_data_and_for_other_ranks(tmp_path: Path):
    data = tmp_path / "drawn"
    convert(DRAWN, open_drawn(train_count=16, val_count=8, size=32), str(data))
    small = ["sr.blocks=1", "sr.features=8", "data.resize=32", "data.crop=32"]
    words = ["step", "drawn_cls/edsr-x4/sr4ir", *(f"--set={setting}" for setting in small)]
    words += ["--images", "2", "--steps", "2", "--warm-up", "1", "--no-published"]
    words += ["--data", str(data), "--ranks", "2", "--json", str(tmp_path / "out.json")]
    job = Path(__file__).parents[2] / "jobs" / "benchmark.py"
    subprocess.run([sys.executable, str(job), *words], check=True)
    loop = json.loads((tmp_path / "out.json").read_text())["loop"]
    assert loop["ranks"] == 2
    assert loop["seconds"].keys() == {"step", "compute", "transfer", "waiting", "data"}
    assert 0 < loop["seconds"]["transfer"] < loop["seconds"]["step"]
    assert 0 < loop["seconds"]["data"] < loop["seconds"]["step"]
