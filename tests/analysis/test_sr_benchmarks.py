"""PSNR and SSIM on the field's benchmarks, held against scikit-image and known figures."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from random_runs import publish_random, write_drawn_image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from sr4ir_dist.analysis.loaded import load
from sr4ir_dist.analysis.sr_benchmarks import pairs, score
from sr4ir_dist.config import ExperimentError
from sr4ir_dist.degradation import quantize

SMALL = ["sr.blocks=1", "sr.features=8"]


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "s"
    publish_random(run, "drawn_cls/edsr-x4/s", *SMALL)
    return load(str(run))


@pytest.fixture
def benchmark(tmp_path):
    """Three images, one grey, of sides that 4 does not divide."""
    for number, size in enumerate([(50, 45), (48, 64), (61, 43)]):
        write_drawn_image(tmp_path / "HR" / f"image{number}.png", *size, seed=number)
    Image.open(tmp_path / "HR/image2.png").convert("L").save(tmp_path / "HR/image2.png")
    return tmp_path


def as_bytes(image):
    return (image[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)


def as_luma(image):
    red, green, blue = np.moveaxis(as_bytes(image).astype(np.float64), -1, 0)
    return 16 + (65.481 * red + 128.553 * green + 24.966 * blue) / 255


def test_figures_equal_scikit_images_on_the_same_images(network, benchmark):
    """SSIM by the Gaussian window of Wang et al., 11 pixels wide, without its border."""
    expected = {"psnr": [], "ssim": [], "ssim_rgb": []}
    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    for pair in pairs(str(benchmark), 4):
        with torch.inference_mode():
            sr = quantize(network.setup.modules["sr"](pair.lr)).numpy()
        sr = torch.from_numpy(sr)
        cut = (slice(4, -4), slice(4, -4))
        ours, theirs = as_luma(sr)[cut], as_luma(pair.hr)[cut]
        expected["psnr"].append(peak_signal_noise_ratio(theirs, ours, data_range=255))
        expected["ssim"].append(structural_similarity(theirs, ours, data_range=255, **settings))
        pixels = as_bytes(pair.hr)[cut], as_bytes(sr)[cut]
        expected["ssim_rgb"].append(
            structural_similarity(*pixels, data_range=255, channel_axis=2, **settings)
        )
    found, bicubic = score({"S": network}, {"Three": str(benchmark)})
    assert (found.network, found.images, found.of) == ("S", 3, "drawn_cls/edsr-x4/s")
    for name, values in expected.items():
        assert getattr(found, name) == pytest.approx(np.mean(values), abs=1e-6)
    assert bicubic.network == "bicubic"
    assert "made here" in bicubic.lr


def test_lr_images_of_the_benchmark_are_taken_and_must_fit(network, benchmark):
    for pair in list(pairs(str(benchmark), 4)):
        folder = benchmark / "LR_bicubic" / "X4"
        folder.mkdir(parents=True, exist_ok=True)
        grey = np.full((*pair.lr.shape[-2:], 3), 128, np.uint8)
        Image.fromarray(grey).save(folder / f"{pair.name}x4.png")
    assert all(
        math.isclose(pair.lr.mean(), 128 / 255, rel_tol=1e-6) for pair in pairs(str(benchmark), 4)
    )
    Image.new("RGB", (5, 5)).save(benchmark / "LR_bicubic/X4/image0x4.png")
    with pytest.raises(ExperimentError, match="image0"):
        list(pairs(str(benchmark), 4))


def test_what_cannot_be_judged_is_named(network, tmp_path):
    (tmp_path / "HR").mkdir()
    with pytest.raises(ExperimentError, match="is no benchmark"):
        score({"S": network}, {"empty": str(tmp_path)})
    publish_random(tmp_path / "x8", "drawn_cls/edsr-x8/s", *SMALL)
    with pytest.raises(ExperimentError, match="different scales"):
        score({"S": network, "x8": load(str(tmp_path / "x8"))}, {})
    publish_random(tmp_path / "h2t", "drawn_cls/h2t", "task.classes=8")
    with pytest.raises(ExperimentError, match="no SR network"):
        score({"T": load(str(tmp_path / "h2t"))}, {})


def test_bicubic_has_its_published_figure_on_set5(network, real_data):
    folder = str(real_data / "sr_benchmarks" / "Set5")
    _, bicubic = score({"S": network}, {"Set5": folder})
    assert bicubic.psnr == pytest.approx(28.43, abs=0.01)
    assert "the benchmark's" in bicubic.lr
