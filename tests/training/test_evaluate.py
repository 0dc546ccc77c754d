"""Figures do not depend on how images are put into batches."""

import pytest
from PIL import Image

from sr4ir_dist import experiments
from sr4ir_dist.data.convert import CONVERTERS
from sr4ir_dist.data.convert.write import convert
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


def figures(data, batch_size, *settings):
    experiment = override(
        experiments.make("folder_sr/edsr-x4/pretrain"),
        ["sr.blocks=1", "sr.features=8", f"evaluation.batch_size={batch_size}", *settings],
    )
    setup = make_setup(experiment, build_networks(experiment), engine="none")
    with open_loader(setup, data, "val") as loader:
        told = []
        return evaluate(setup, loader, told.append), told


def test_images_of_different_sizes_are_judged_without_their_padding(data):
    # The network sees the padding beside an image: what it reaches is cut off with the border.
    alone, told = figures(data, 1, "evaluation.border=24")
    together, _ = figures(data, 4, "evaluation.border=24")
    assert alone["images"] == together["images"] == 5
    assert together["psnr"] == pytest.approx(alone["psnr"], rel=1e-4)
    assert together["ssim"] == pytest.approx(alone["ssim"], rel=1e-4)
    assert told[-1] == "judged 5 of 5 batches"
