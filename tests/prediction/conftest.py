"""Checkpoints with random weights, and folders of LR images."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from random_runs import drawn_images, publish_random

from sr4ir_dist import experiments
from sr4ir_dist.data.convert.drawn import DRAWN, open_drawn
from sr4ir_dist.data.convert.write import convert

SETTINGS = {
    "edsr": ("sr.blocks=1", "sr.features=8"),
    "det": ("task.min_size=96", "task.max_size=160"),
}


@pytest.fixture(scope="session")
def drawn_data(tmp_path_factory):
    """A dataset that names 8 classes."""
    uri = str(tmp_path_factory.mktemp("drawn") / "data")
    convert(DRAWN, open_drawn(train_count=2, val_count=2, size=32), uri, threads=1)
    return uri


@pytest.fixture(scope="session")
def published(tmp_path_factory, drawn_data):
    """A function that publishes a small run of an experiment; gives its URI and networks."""
    made = {}

    def publish(name):
        if name not in made:
            settings = [s for key, each in SETTINGS.items() if key in name for s in each]
            if experiments.make(name).task is not None:
                settings.append("task.classes=8")
            run = str(tmp_path_factory.mktemp("run") / "run")
            made[name] = run, publish_random(run, name, *settings, data=drawn_data)
        return made[name]

    return publish


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """A folder of LR images of different sizes and depths, a broken one among them."""
    root = tmp_path_factory.mktemp("photos")
    write_photos(root, 9)
    (root / "b" / "broken.png").write_bytes(b"not an image")
    return root


def write_photos(root: Path, count: int) -> None:
    """Write so many smooth images into two folders; names come twice."""
    for number in range(count):
        (image,) = drawn_images(1, 24 + number, 40 - number, seed=number)
        pixels = (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        path = root / "ab"[number % 2] / f"{number // 2}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
