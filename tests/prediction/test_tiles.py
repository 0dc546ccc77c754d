import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sr4ir_dist.networks import SR_NETWORKS
from sr4ir_dist.networks.edsr import EDSR
from sr4ir_dist.networks.swinir import SwinIR
from sr4ir_dist.prediction.tiles import Tiling, make_tiling, reach, render
from sr4ir_dist.settings import SRNetwork

EDSR_SETTINGS = SRNetwork(network="edsr", blocks=2, features=4)
SWINIR_SETTINGS = SRNetwork(network="swinir", blocks=1, features=4, depth=2, heads=2, window=4)


def nearest(lr):
    return lr.repeat_interleave(2, dim=-2).repeat_interleave(2, dim=-1)


def random_image(height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(1, 3, height, width, generator=generator, dtype=torch.float64)


def make_network(settings, scale=4):
    torch.manual_seed(0)
    if settings.network == "edsr":
        network = EDSR(scale, blocks=settings.blocks, features=settings.features)
    else:
        sizes = {"blocks": settings.blocks, "features": settings.features, "depth": settings.depth}
        network = SwinIR(
            scale, **sizes, heads=settings.heads, window=settings.window, reconstruction=4
        )
    return network.double().eval()


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 9), st.integers(0, 5))
def test_every_pixel_comes_from_one_tile(height, width, tile, overlap):
    seen = []

    def network(lr):
        seen.append(lr.shape[-2:])
        return nearest(lr)

    lr, tiling = random_image(height, width), Tiling(tile, overlap)
    assert torch.equal(render(network, lr, 2, tiling), nearest(lr))
    # What the network gets at once is bounded, whatever the image's size.
    assert max(h * w for h, w in seen) <= (tile + 2 * overlap) ** 2
    assert (len(seen) > 1) == (height * width > (tile + 2 * overlap) ** 2)


def test_a_tile_is_finished_before_the_next_one_is_made():
    told = []

    def finish(sr):
        told.append("finish")
        return (sr * 255).to(torch.uint8)

    def network(lr):
        told.append("network")
        return nearest(lr)

    whole = render(network, random_image(6, 4), 2, Tiling(2, 0), finish)
    assert told == ["network", "finish"] * 6
    assert whole.dtype == torch.uint8
    assert whole.shape == (1, 3, 12, 8)


@pytest.mark.parametrize("scale", [2, 4, 8])
def test_reach_is_how_far_an_edsr_sees(scale):
    network, far = make_network(EDSR_SETTINGS, scale), reach(EDSR_SETTINGS)
    side = 2 * far + 9
    lr = random_image(side, side).requires_grad_()
    # The SR pixels of the LR pixel in the middle, each weighted differently.
    middle = slice(side // 2 * scale, (side // 2 + 1) * scale)
    sr = network(lr)[0, :, middle, middle]
    (gradient,) = torch.autograd.grad((sr * torch.rand_like(sr)).sum(), lr)
    places = gradient[0].abs().sum(dim=0).nonzero() - side // 2
    assert far - 2 <= int(places.abs().max()) <= far


@pytest.mark.parametrize(("height", "width"), [(61, 53), (20, 90), (37, 37)])
@pytest.mark.parametrize("scale", [2, 4])
def test_edsr_in_tiles_is_edsr_at_once(height, width, scale):
    network, lr = make_network(EDSR_SETTINGS, scale), random_image(height, width)
    tiling = make_tiling(EDSR_SETTINGS, scale, tile=16)
    assert tiling.overlap == reach(EDSR_SETTINGS)
    with torch.no_grad():
        whole = network(lr)
        tiled = render(network, lr, scale, Tiling(16, tiling.overlap))
        # Without an overlap it is not, so that the image is no easy one.
        rough = render(network, lr, scale, Tiling(16, 0))
    assert torch.allclose(tiled, whole, rtol=0, atol=1e-12)
    assert not torch.allclose(rough, whole, rtol=0, atol=1e-4)


def test_edsr_with_too_small_an_overlap_is_exact_away_from_the_cut():
    network, lr = make_network(EDSR_SETTINGS, 2), random_image(48, 20)
    with torch.no_grad():
        whole, tiled = network(lr), render(network, lr, 2, Tiling(24, 3))
    differs = ((whole - tiled).abs().amax(dim=(0, 1, 3)) > 1e-12).nonzero().flatten() // 2
    # A tile sees 3 pixels beyond the cut at 24; what it misses reaches that much less far into it.
    assert len(differs) > 0
    near = reach(EDSR_SETTINGS) - 3
    assert 24 - near <= int(differs.min())
    assert int(differs.max()) < 24 + near


@pytest.mark.parametrize(("height", "width"), [(60, 44), (61, 47)])
def test_swinir_in_tiles_on_its_windows_is_swinir_at_once(height, width):
    network, lr = make_network(SWINIR_SETTINGS, 2), random_image(height, width)
    overlap = -(-reach(SWINIR_SETTINGS) // 4) * 4
    with torch.no_grad():
        whole = network(lr)
        tiled = render(network, lr, 2, make_tiling(SWINIR_SETTINGS, 2, 8, overlap))
        off = render(network, lr, 2, Tiling(9, overlap))
    assert torch.allclose(tiled, whole, rtol=0, atol=1e-12)
    # Tiles beside the windows are another computation, whatever the overlap.
    assert not torch.allclose(off, whole, rtol=0, atol=1e-6)


def test_defaults_take_about_the_same_memory_at_every_scale():
    edsr, swinir = SRNetwork(), SRNetwork(network="swinir", blocks=6, features=180)
    assert [make_tiling(edsr, scale) for scale in (2, 4, 8)] == [
        Tiling(512, 36),
        Tiling(256, 36),
        Tiling(128, 36),
    ]
    assert [make_tiling(swinir, scale) for scale in (2, 4, 8)] == [
        Tiling(256, 32),
        Tiling(256, 32),
        Tiling(128, 32),
    ]
    assert not make_tiling(edsr, 4).cuts(328, 328)
    assert make_tiling(edsr, 4).cuts(328, 329)
    assert not make_tiling(edsr, 4, tile=0).cuts(5000, 5000)


def test_interpolation_is_never_cut():
    # Corners that are aligned belong to the whole image.
    for name in ("bilinear", "bicubic"):
        assert name in SR_NETWORKS
        assert not make_tiling(SRNetwork(network=name), 4, tile=2).cuts(5000, 5000)


@pytest.mark.parametrize(
    ("settings", "tile", "overlap", "message"),
    [
        (EDSR_SETTINGS, -1, None, "tile=-1: expected 0 or more"),
        (EDSR_SETTINGS, 8, -2, "overlap=-2: expected 0 or more"),
        (SWINIR_SETTINGS, 10, None, "tile=10: SwinIR's tiles lie on its windows; .* of 4"),
        (SWINIR_SETTINGS, 8, 6, "overlap=6: SwinIR's"),
    ],
)
def test_what_cannot_be_is_refused(settings, tile, overlap, message):
    with pytest.raises(ValueError, match=message):
        make_tiling(settings, 4, tile, overlap)
