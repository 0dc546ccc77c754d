"""Figures do not depend on how images are put into batches."""

import pytest
import torch
from PIL import Image
from torch import nn

from sr4ir_dist import experiments
from sr4ir_dist.data.convert import CONVERTERS
from sr4ir_dist.data.convert.write import convert
from sr4ir_dist.data.loader import Loader
from sr4ir_dist.data.splits import open_split
from sr4ir_dist.data.transforms import Flip
from sr4ir_dist.overrides import override
from sr4ir_dist.training.build import build_networks, make_setup, open_loader
from sr4ir_dist.training.evaluate import evaluate

SIZES = [(80, 96), (128, 80), (104, 104), (82, 126), (96, 88), (120, 80)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for number, (width, height) in enumerate(SIZES):
        gradient = Image.linear_gradient("L").resize((width, height))
        bands = (gradient.rotate(30 * number), gradient, gradient.rotate(90))
        Image.merge("RGB", bands).save(folder / f"{number}.png")
    uri = str(tmp_path_factory.mktemp("data") / "folder")
    convert(CONVERTERS["sr-folder"], CONVERTERS["sr-folder"].open(str(folder), val_count=5), uri)
    return uri


class Distance(nn.Module):
    """A stand-in for LPIPS's network, which needs weights that the tests do not have."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(3.0))

    def forward(self, a, b):
        return self.factor * (a - b).abs().mean((1, 2, 3))


def figures(data, batch_size, *settings, lpips=None):
    experiment = override(
        experiments.make("folder_sr/edsr-x4/pretrain"),
        ["sr.blocks=1", "sr.features=8", f"evaluation.batch_size={batch_size}", *settings],
    )
    setup = make_setup(experiment, build_networks(experiment), engine="none", lpips=lpips)
    with open_loader(setup, data, "val") as loader:
        told = []
        return evaluate(setup, loader, told.append), told


def test_images_of_different_sizes_are_judged_one_by_one(data):
    alone, told = figures(data, 1)
    together, _ = figures(data, 4)
    assert alone.keys() == {"psnr", "ssim", "images"}
    assert alone["images"] == together["images"] == 5
    assert together == pytest.approx(alone, rel=1e-9)
    assert told[-1] == "judged 5 of 5 batches"


def test_compiled_networks_are_judged_without_compiling_for_each_size(data):
    from torch._dynamo.utils import counters

    expected, _ = figures(data, 4)
    counters.clear()
    assert figures(data, 4, "compile=true")[0] == expected
    assert counters["frames"]["total"] == 0


def test_lpips_is_reported_where_its_network_is_there(data):
    found, _ = figures(data, 2, lpips=Distance())
    assert found.keys() == {"psnr", "ssim", "lpips", "images"}
    assert 0 < found["lpips"] < 6


def test_images_that_the_border_leaves_nothing_of_are_counted(data):
    found, _ = figures(data, 2, "evaluation.border=36")
    assert found["images"] == 5
    # 72 pixels of border and 11 of SSIM's window; LPIPS, where it is on, needs 16.
    assert found["too_small"] == sum(min(size) < 83 for size in val_sizes(data))
    assert 0 < found["too_small"] < 5


def val_sizes(data):
    with Loader(
        open_split(data, "val"),
        transform=Flip(),
        batch_size=1,
        seed=0,
        rank=0,
        world_size=1,
        shuffle=False,
    ) as loader:
        return [tuple(batch.sizes[0].tolist()) for batch in loader.epoch(1)]
