"""Real images from their official layouts to a trained run (`--real-data=DIR`)."""

import math

import pytest

from sr4ir_dist import experiments, storage
from sr4ir_dist.data.convert import CONVERTERS
from sr4ir_dist.data.convert.write import convert
from sr4ir_dist.overrides import override
from sr4ir_dist.training import launch
from sr4ir_dist.training.plan import make_plan

# Ray Train sets Ray Data's defaults, and Ray Data warns of them.
pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.*"),
]
SMALL = ("data.resize=64", "data.crop=48", "evaluation.border=4", "sr.blocks=1", "sr.features=8")


@pytest.mark.slow
def test_pretraining_on_t91_then_sr4ir_on_cub(real_data, cluster, tmp_path):
    t91, cub, runs = (str(tmp_path / name) for name in ("t91", "cub", "runs"))
    convert(
        CONVERTERS["sr-folder"], CONVERTERS["sr-folder"].open(root=str(real_data / "T91/HR")), t91
    )
    convert(
        CONVERTERS["cub200"], CONVERTERS["cub200"].open(root=str(real_data / "CUB_200_2011")), cub
    )
    two = launch.Resources(workers=2, cpus=1, gpu=False)

    pretraining = override(
        experiments.make("folder_sr/edsr-x4/pretrain"),
        [*SMALL, "epochs=25", "degradation.kind=bicubic", "optimizers.sr.lr=3e-3"],
    )
    first = launch.train(make_plan(pretraining, data=t91, storage_uri=runs), two)
    assert first["metrics"]["images"] == 9

    weights = real_data / "weights" / "resnet18_imagenet_partial.pth"
    experiment = override(
        experiments.make("cub200/edsr-x4/sr4ir"),
        [
            *(*SMALL, "epochs=2", "warmup_epochs=1", "batch_size=64", "evaluation.every_epochs=1"),
            *(f"sr.weights={first['run_uri']}", f"task.weights={weights}", "task.partial=true"),
            *("optimizers.task.lr=0.02", "evaluation.lpips=null"),
        ],
    )
    plan = make_plan(experiment, data=cub, storage_uri=runs)
    assert plan.experiment.task is not None
    assert plan.experiment.task.classes == 40
    result = launch.train(plan, two)
    assert result["metrics"]["images"] == 1173
    assert result["steps"] == 2 * math.ceil(1200 / 64)
    # Two epochs at 48 pixels reach little, but a start from the wrong weights stays at chance, 2.5.
    assert result["metrics"]["top1"] > 5
    assert storage.exists(result["checkpoint"])
