"""Prediction by the workers of a Ray cluster."""

import os
import signal
from pathlib import Path

import psutil
import pytest
import torch
from PIL import Image
from predicted_folders import contents
from random_runs import drawn_images, publish_random

from sr4ir_dist.prediction.cluster import on_cluster
from sr4ir_dist.prediction.inputs import PredictionError
from sr4ir_dist.prediction.plan import make_plan
from sr4ir_dist.prediction.run import here, predict
from sr4ir_dist.training.capacity import Resources

pytestmark = pytest.mark.usefixtures("cluster")
SETTINGS = ("sr.blocks=1", "sr.features=8", "task.classes=8")
SMALL = ("task.min_size=96", "task.max_size=160")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    uri = str(tmp_path_factory.mktemp("run") / "run")
    publish_random(uri, "drawn_det/edsr-x4/sr4ir", *SETTINGS, *SMALL)
    return uri


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("photos")
    for number in range(19):
        (image,) = drawn_images(1, 24 + number, 40 - number, seed=number)
        pixels = (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        (root / "ab"[number % 2]).mkdir(exist_ok=True)
        Image.fromarray(pixels).save(root / "ab"[number % 2] / f"{number // 2}.png")
    (root / "b" / "broken.png").write_bytes(b"not an image")
    return root


def workers() -> list[psutil.Process]:
    """The processes that predict."""
    found = psutil.Process().children(recursive=True)
    return [each for each in found if "_Worker" in " ".join(each.cmdline())]


def test_any_number_of_workers_writes_what_one_process_writes_though_one_dies(
    run: str, photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    alone, parts = make_plan(run, str(photos), str(tmp_path / "alone"))
    predict(alone, parts, here(threads=1, device=torch.device("cpu")))
    expected = contents(tmp_path / "alone")
    assert len(expected) == 19 + 4
    capfd.readouterr()
    for count in (2, 4):
        out = tmp_path / str(count)
        told: list[str] = []
        killed: list[psutil.Process] = []

        def hear(text: str, told: list[str] = told, killed: list[psutil.Process] = killed) -> None:
            told.append(text)
            if not killed:  # when the first part is done
                killed.append(workers()[0])
                os.kill(killed[0].pid, signal.SIGKILL)

        plan, parts = make_plan(run, str(photos), str(out))
        summary = predict(plan, parts, on_cluster(Resources(count, cpus=1, gpu=False)), hear)
        assert (summary["predicted"], summary["skipped"]) == (19, 1)
        assert len(killed) == 1
        assert told[-1].startswith("20 of 20 images, ")
        assert any(line.startswith("skipped b/broken.png") for line in told)
        assert contents(out) == expected
    # Ray Data's own progress is not beside ours.
    written = capfd.readouterr()
    for word in ("Dataset", "rogress bar", "row/s"):
        assert word not in written.out + written.err


def test_what_a_worker_raises_is_told_as_it_is(run: str, photos: Path, tmp_path: Path):
    plan, parts = make_plan(run, str(photos), str(tmp_path / "out"))
    (tmp_path / "out" / "sr").write_text("where a folder should be")
    with pytest.raises(PredictionError, match=r"out/sr/a/\d.png: .*Not a directory: '[^']*'$"):
        predict(plan, parts, on_cluster(Resources(1, cpus=1, gpu=False)))
