"""Segmentation and detection on real Ray workers: trained, judged, and judged again alone."""

import pytest

from sr4ir_dist import checkpoint, experiments
from sr4ir_dist.data.convert import CONVERTERS
from sr4ir_dist.data.convert.write import convert
from sr4ir_dist.overrides import override
from sr4ir_dist.training import launch, state
from sr4ir_dist.training.build import build_networks, make_setup, open_loader
from sr4ir_dist.training.evaluate import evaluate
from sr4ir_dist.training.plan import make_plan

# Ray Train sets Ray Data's defaults, and Ray Data warns of them.
pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.*"),
]
SMALL = {
    "seg": ["data.resize=32", "data.crop=32"],
    # A learning rate that a detector of random weights survives for a few steps.
    "det": ["task.min_size=64", "task.max_size=64", "optimizers.task.lr=1e-3"],
}


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """A drawn dataset of very few images: a detector trains on 512 proposals of each."""
    uri = str(tmp_path_factory.mktemp("data") / "few")
    convert(CONVERTERS["drawn"], CONVERTERS["drawn"].open(train_count=8, val_count=7, size=32), uri)
    return uri


@pytest.mark.parametrize(("task", "figure"), [("seg", "miou"), ("det", "map")])
def test_two_workers_train_and_judge_as_one_process_judges(cluster, few, tmp_path, task, figure):
    run = ["epochs=2", "warmup_epochs=1", "batch_size=4", "sr.blocks=1", "sr.features=8"]
    experiment = override(
        experiments.make(f"drawn_{task}/edsr-x4/sr4ir"),
        [*run, "evaluation.border=2", "evaluation.batch_size=6", *SMALL[task]],
    )
    plan = make_plan(experiment, data=few, storage_uri=str(tmp_path))
    result = launch.train(plan, launch.Resources(workers=2, cpus=1, gpu=False))
    assert result["steps"] == 2 * 8 // 4
    metrics = result["metrics"]
    assert metrics["images"] == 7
    assert 0 <= metrics[figure] <= 100

    modules = build_networks(plan.experiment)
    state.load_networks(modules, checkpoint.load(result["checkpoint"]))
    setup = make_setup(plan.experiment, modules, engine="none")
    with open_loader(setup, few, "val") as loader:
        alone = evaluate(setup, loader)
    assert alone.keys() == metrics.keys() - {"epoch", "step"}
    for name, value in alone.items():
        assert metrics[name] == pytest.approx(value, rel=1e-6), name
