"""Small drawn datasets, and checkpoints with random weights that see their images."""

import pytest
from random_runs import publish_random

from sr4ir_dist import experiments
from sr4ir_dist.data.convert.drawn import DRAWN, open_drawn
from sr4ir_dist.data.convert.write import convert

_SIZE = ("data.resize=32", "data.crop=32", "evaluation.border=2")
_SMALL = {
    "edsr": ("sr.blocks=1", "sr.features=8"),
    "det": ("task.min_size=96", "task.max_size=160"),
}


@pytest.fixture(scope="session")
def small_data(tmp_path_factory):
    """A dataset for every task: 8 images of 32 x 32 pixels in either split, 8 classes."""
    uri = str(tmp_path_factory.mktemp("drawn") / "data")
    convert(DRAWN, open_drawn(train_count=8, val_count=8, size=32), uri, threads=1)
    return uri


@pytest.fixture(scope="session")
def published(tmp_path_factory, small_data):
    """A function that publishes a small run of an experiment; gives its URI."""
    made = {}

    def publish(name, *settings, history=()):
        key = (name, settings, tuple(map(str, history)))
        if key not in made:
            run = tmp_path_factory.mktemp("runs") / "run"
            chosen = [setting for part, each in _SMALL.items() if part in name for setting in each]
            if experiments.make(name).task is not None:
                chosen.append("task.classes=8")
            chosen += ["data.shrink=32"] if "det" in name else _SIZE
            publish_random(run, name, *chosen, *settings, data=small_data, history=history)
            made[key] = str(run)
        return made[key]

    return publish
