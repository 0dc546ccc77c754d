"""SR4IR next to L->T on a small drawn dataset, from nothing to a table in minutes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from sr4ir_dist import experiments, parallel, storage
from sr4ir_dist.analysis.comparison import compare, write_figure
from sr4ir_dist.analysis.report.write import write_report
from sr4ir_dist.data.convert import CONVERTERS
from sr4ir_dist.data.convert.write import convert
from sr4ir_dist.data.shards import has_split
from sr4ir_dist.overrides import override
from sr4ir_dist.training import launch
from sr4ir_dist.training.plan import make_plan

PRETRAINING = ("epochs=4", "batch_size=16", "evaluation.every_epochs=4", "optimizers.sr.lr=1e-3")
TRAINING = ("epochs=4", "warmup_epochs=1", "evaluation.every_epochs=4")


@dataclass(frozen=True)
class Result:
    """What the quickstart made.

    Attributes:
        runs: the results of L->T and SR4IR, by the paper's label.
        data: the dataset's folder.
        picture: LR, bilinear, each run's and HR images side by side, a PNG.
        report: settings, curves, figures and images of both runs, an HTML page.
    """

    runs: dict[str, dict[str, Any]]
    data: str
    picture: str
    report: str


def run(folder: str, *, workers: int, say: Callable[[str], None]) -> Result:
    """Draw the dataset, pre-train an SR network, train L->T and SR4IR for equally many steps.

    What an earlier call finished is not done again.

    Args:
        folder: where dataset and runs go, a path or URI.
        workers: ranks of each run.
        say: is told what happens.

    Raises:
        ValueError: the folder cannot be used.
        TrainingError: a run failed.
    """
    folder = storage.absolute(folder)
    data = storage.join(folder, "data")
    if not (has_split(data, "train") and has_split(data, "val")):
        say(f"drawing a dataset into {data}")
        converter = CONVERTERS["drawn"]
        source = converter.open(train_count=1024, val_count=256, size=64, seed=0)
        convert(converter, source, data, overwrite=True)
    parallel.connect()

    def train(name: str, settings: tuple[str, ...]) -> dict[str, Any]:
        experiment = override(experiments.make(name), [*settings, f"precision={_precision()}"])
        plan = make_plan(experiment, data=data, storage_uri=folder)
        say(f"training {name}: {plan.run_uri}")
        return launch.train(plan, launch.Resources(workers=workers), log_every=32)

    pretrained = train("drawn_cls/edsr-x4/pretrain", PRETRAINING)
    runs = {
        "L->T": train("drawn_cls/x4/l2t", TRAINING),
        "SR4IR": train(
            "drawn_cls/edsr-x4/sr4ir", (*TRAINING, f"sr.weights={pretrained['run_uri']}")
        ),
    }
    checkpoints = {label: each["checkpoint"] for label, each in runs.items()}
    picture = storage.join(runs["SR4IR"]["run_uri"], "comparison.png")
    write_figure(compare(checkpoints), picture)
    report = storage.join(folder, "report.html")
    say(f"writing {report}")
    write_report(checkpoints, report, title="SR4IR next to L->T on the drawn dataset")
    return Result(runs, data, picture, report)


def _precision() -> str:
    """`bf16` where the processor computes in it, which halves the time, else `fp32`."""
    native = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return "bf16" if torch.cuda.is_available() or native() else "fp32"
