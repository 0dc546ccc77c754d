import math

import pytest
import torch
from torch import Tensor

from sr4ir_dist.benchmark.step_cost import _Watch
from sr4ir_dist.networks import swinir
from sr4ir_dist.networks.edsr import RGB_MEAN
from sr4ir_dist.networks.swinir import SwinIR


def tiny(scale: int = 2, **settings: float) -> SwinIR:
    torch.manual_seed(0)
    sizes = {"blocks": 2, "features": 6, "depth": 2, "heads": 2, "window": 4}
    sizes |= {"reconstruction": 3, "image_size": 8, "drop_path": 0.0}
    network = SwinIR(scale, **(sizes | settings))
    with torch.no_grad():  # the published start is so small that attention hardly matters
        for name, parameter in network.named_parameters():
            if "bias_table" in name or "qkv" in name:
                parameter.normal_()
    return network


def blocks(network: SwinIR) -> list[swinir._Block]:
    return [module for module in network.modules() if isinstance(module, swinir._Block)]


@pytest.mark.parametrize(
    ("scale", "parameters", "tensors"),
    [(2, 11_752_487, 548), (4, 11_900_199, 550), (8, 12_047_911, 552)],
)
def test_size_and_keys_are_those_of_the_public_files(
    scale: int, parameters: int, tensors: int
) -> None:
    network = SwinIR(scale)
    assert sum(p.numel() for p in network.parameters()) == parameters
    stems = ["conv_first", "patch_embed.norm", "norm", "conv_after_body", "conv_before_upsample.0"]
    stems += ["conv_last", *(f"upsample.{2 * i}" for i in range({2: 1, 4: 2, 8: 3}[scale]))]
    expected = set()
    for group in range(6):
        stems.append(f"layers.{group}.conv")
        for i in range(6):
            block = f"layers.{group}.residual_group.blocks.{i}"
            stems += [f"{block}.{n}" for n in ("norm1", "norm2", "attn.qkv", "attn.proj")]
            stems += [f"{block}.mlp.fc1", f"{block}.mlp.fc2"]
            expected |= {f"{block}.attn.relative_position_bias_table"}
            expected |= {f"{block}.attn.relative_position_index"}
            expected |= {f"{block}.attn_mask"} if i % 2 else set()
    expected |= {f"{stem}.{kind}" for stem in stems for kind in ("weight", "bias")}
    state = network.state_dict()
    assert set(state) == expected
    assert len(expected) == tensors
    block = "layers.5.residual_group.blocks.5"
    shapes = {
        "conv_first.weight": (180, 3, 3, 3),
        f"{block}.attn_mask": (36, 64, 64),
        f"{block}.attn.relative_position_index": (64, 64),
        f"{block}.attn.relative_position_bias_table": (225, 6),
        f"{block}.attn.qkv.weight": (540, 180),
        f"{block}.mlp.fc1.weight": (360, 180),
        "conv_before_upsample.0.weight": (64, 180, 3, 3),
        "upsample.0.weight": (256, 64, 3, 3),
        "conv_last.weight": (3, 64, 3, 3),
    }
    assert {name: tuple(state[name].shape) for name in shapes} == shapes
    assert state[f"{block}.attn_mask"].unique().tolist() == [-100, 0]
    index = state[f"{block}.attn.relative_position_index"]
    # One row down is one step of 15, one column right one step of 1.
    assert [index[9, 9].item(), index[17, 9].item(), index[10, 9].item()] == [112, 127, 113]
    storages = {value.untyped_storage().data_ptr() for value in state.values()}
    assert len(storages) == tensors  # formats such as safetensors refuse shared memory


def test_initial_values() -> None:
    network = SwinIR(2, blocks=1, depth=2)
    for block in blocks(network):
        for layer in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
            assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05)
            assert not layer.bias.any()
        assert block.attn.relative_position_bias_table.std().item() == pytest.approx(0.02, rel=0.1)


def reference_attention(x: Tensor, state: dict[str, Tensor], prefix: str, shift: int) -> Tensor:
    """Attention of H,W,C without windows, rolls or masks: each pixel looks at those of its cell."""
    heads, window = 2, 4
    height, width, channels = x.shape
    d = channels // heads
    qkv = x @ state[f"{prefix}.qkv.weight"].T + state[f"{prefix}.qkv.bias"]
    table = state[f"{prefix}.relative_position_bias_table"]
    pixels = [(i, j) for i in range(height) for j in range(width)]
    result = torch.zeros_like(x)
    for i, j in pixels:
        cell = ((i - shift) // window, (j - shift) // window)
        near = [(a, b) for a, b in pixels if ((a - shift) // window, (b - shift) // window) == cell]
        for head in range(heads):
            q, k, v = (slice(part * channels + head * d, part * channels + (head + 1) * d)
                       for part in range(3))  # fmt: skip
            scores = []
            for a, b in near:
                offset = (i - a + window - 1) * (2 * window - 1) + (j - b + window - 1)
                scores.append((qkv[i, j, q] * qkv[a, b, k]).sum() / math.sqrt(d)
                              + table[offset, head])  # fmt: skip
            weights = torch.stack(scores).softmax(0)
            values = torch.stack([qkv[a, b, v] for a, b in near])
            result[i, j, head * d : (head + 1) * d] = weights @ values
    return result @ state[f"{prefix}.proj.weight"].T + state[f"{prefix}.proj.bias"]


def reference(lr: Tensor, state: dict[str, Tensor]) -> Tensor:
    """tiny() at x2 on an image 3,10,7, written down from the paper's figure 2."""
    mean = torch.tensor(RGB_MEAN).double().view(3, 1, 1)

    def conv(x: Tensor, name: str) -> Tensor:
        return torch.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], padding=1)

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        x = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return x * state[f"{name}.weight"] + state[f"{name}.bias"]

    rows = [*range(10), 8, 7]  # mirrored without repeating the last row
    columns = [*range(7), 5]
    shallow = conv((lr - mean)[:, rows][:, :, columns], "conv_first")
    x = norm(shallow.permute(1, 2, 0), "patch_embed.norm")
    for group in range(2):
        start = x
        for i in range(2):
            name = f"layers.{group}.residual_group.blocks.{i}"
            attended = reference_attention(norm(x, f"{name}.norm1"), state, f"{name}.attn", 2 * i)
            x = x + attended
            inner = norm(x, f"{name}.norm2") @ state[f"{name}.mlp.fc1.weight"].T
            inner = inner + state[f"{name}.mlp.fc1.bias"]
            inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
            x = x + inner @ state[f"{name}.mlp.fc2.weight"].T + state[f"{name}.mlp.fc2.bias"]
        x = start + conv(x.permute(2, 0, 1), f"layers.{group}.conv").permute(1, 2, 0)
    deep = conv(norm(x, "norm").permute(2, 0, 1), "conv_after_body") + shallow
    up = conv(deep, "conv_before_upsample.0")
    up = torch.where(up > 0, up, 0.01 * up)
    up = conv(torch.pixel_shuffle(conv(up, "upsample.0"), 2), "conv_last") + mean
    return up[:, :20, :14]


@pytest.mark.parametrize("training", [True, False])
def test_forward_equals_a_pixel_by_pixel_reference(training: bool) -> None:
    network = tiny().double().train(training)
    lr = torch.rand(2, 3, 10, 7, dtype=torch.float64)
    with torch.no_grad():
        result = network(lr)
    expected = torch.stack([reference(image, network.state_dict()) for image in lr])
    assert result.std() > 0.01
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("height", "width"), [(3, 9), (1, 1), (4, 4), (5, 12)])
def test_pads_right_and_bottom_and_crops_back(height: int, width: int) -> None:
    network = tiny(scale=4).double()
    lr = torch.rand(1, 3, height, width, dtype=torch.float64)
    bottom, right = -height % 4, -width % 4
    mode = "reflect" if bottom < height and right < width else "replicate"
    padded = torch.nn.functional.pad(lr, (0, right, 0, bottom), mode=mode)
    result = network(lr)
    assert result.shape == (1, 3, 4 * height, 4 * width)
    assert torch.equal(result, network(padded)[..., : 4 * height, : 4 * width])


def test_masks_are_made_once_a_size_and_never_for_unshifted_blocks() -> None:
    network = tiny(blocks=3)
    swinir._shift_mask.cache_clear()
    with torch.inference_mode():
        network(torch.rand(1, 3, 8, 12))
    made = swinir._shift_mask.cache_info()
    assert (made.misses, made.hits) == (1, 2)
    network(torch.rand(1, 3, 7, 10)).sum().backward()  # what evaluation made must serve training
    again = swinir._shift_mask.cache_info()
    assert (again.misses, again.hits) == (1, 5)
    network.double()(torch.rand(1, 3, 8, 12).double())
    assert swinir._shift_mask.cache_info().misses == 2
    unshifted = tiny(depth=1)
    swinir._shift_mask.cache_clear()
    unshifted(torch.rand(1, 3, 8, 8))
    assert swinir._shift_mask.cache_info().misses == 0
    assert not any("attn_mask" in name for name in unshifted.state_dict())


def test_the_stored_mask_is_the_one_in_use() -> None:
    stored = SwinIR(2, blocks=1, depth=2).state_dict()["layers.0.residual_group.blocks.1.attn_mask"]
    used = swinir._shift_mask(48, 48, 8, torch.float32, torch.device("cpu"))
    assert torch.equal(stored, used)
    assert not used[:5].any()  # windows that the shift does not cut
    assert (used[-1] == 0).sum() == 4 * 16**2  # the corner falls into four quarters
    other = tiny(image_size=7).state_dict()["layers.0.residual_group.blocks.1.attn_mask"]
    assert other.shape == (4, 16, 16)


def test_stochastic_depth_grows_linearly_and_keeps_the_expectation() -> None:
    network = tiny(drop_path=0.6, blocks=2, depth=3)
    assert [b.drop_path for b in blocks(network)] == pytest.approx([0, 0.12, 0.24, 0.36, 0.48, 0.6])
    assert [b.drop_path for b in blocks(tiny(blocks=1, depth=1, drop_path=0.5))] == [0]
    block = blocks(network)[-1].double()
    x = torch.rand(1, 4, 4, 6, dtype=torch.float64)
    with torch.no_grad():
        block.mlp.fc2.weight.zero_()  # leaves one random branch
        branch = block.eval()(x) - x
        torch.manual_seed(3)
        rows = block.train()(x.expand(4000, -1, -1, -1)) - x
    kept = rows.flatten(1).abs().amax(1) > 0
    torch.testing.assert_close(rows[kept], (branch / 0.4).expand_as(rows[kept]))
    assert kept.double().mean().item() == pytest.approx(0.4, abs=0.03)


def test_stochastic_depth_follows_the_global_generator_in_training_alone() -> None:
    network = tiny(drop_path=0.9)
    lr = torch.rand(1, 3, 8, 8).expand(8, -1, -1, -1)
    torch.manual_seed(5)
    first, second = network(lr), network(lr)
    torch.manual_seed(5)
    assert torch.equal(network(lr), first)
    assert not torch.equal(first, second)
    assert not torch.equal(first[0], first[1])  # each image by its own coin
    network.eval()
    assert torch.equal(network(lr), network(lr))


def test_recomputed_groups_give_the_same_for_less_memory() -> None:
    lr = torch.rand(2, 3, 16, 12, generator=torch.Generator().manual_seed(1))
    outputs, gradients, peaks = [], [], []
    for recompute in (False, True):
        network = tiny(blocks=3, depth=3, drop_path=0.5, recompute=recompute).train()

        def step(network: SwinIR = network) -> Tensor:
            torch.manual_seed(2)
            output = network(lr)
            output.square().mean().backward()
            return output.detach()

        outputs.append(step())
        gradients.append({name: p.grad for name, p in network.named_parameters()})
        with torch.no_grad():
            torch.manual_seed(2)
            assert torch.equal(network(lr), outputs[0])
        network.zero_grad()
        # Alone: beside a counter of FLOPs, whose hooks hold on to what groups compute.
        with _Watch() as watch:
            step()
        peaks.append(watch.peak)
    assert torch.equal(*outputs)
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        found = gradients[1][name]
        assert gradient is not None
        assert found is not None
        assert torch.equal(found, gradient), name
    assert peaks[1] < 0.5 * peaks[0]


def test_images_of_a_batch_do_not_see_each_other() -> None:
    network = tiny().double()
    lr = torch.rand(3, 3, 9, 8, dtype=torch.float64)
    alone = torch.cat([network(image[None]) for image in lr])
    torch.testing.assert_close(network(lr), alone, rtol=1e-12, atol=1e-12)


def test_an_empty_batch_reaches_every_parameter() -> None:
    network = tiny(drop_path=0.5)
    empty = network(torch.rand(0, 3, 9, 8))
    assert empty.shape == (0, 3, 18, 16)
    empty.sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.count_nonzero() == 0, name


def test_every_parameter_learns() -> None:
    network = tiny()
    network(torch.rand(2, 3, 8, 8)).square().sum().backward()
    silent = [n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


def test_bfloat16_autocast_stays_close() -> None:
    network = tiny().eval()
    lr = torch.rand(2, 3, 9, 8)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = network(lr)
        mixed.sum().backward()
    exact = network(lr)
    assert not torch.equal(mixed.float(), exact)
    torch.testing.assert_close(mixed.float(), exact, rtol=0, atol=0.03)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale": 3}, "scale is 3; SwinIR needs a power of two"),
        ({"blocks": 0}, "blocks is 0; it must be at least 1"),
        ({"depth": 0}, "depth is 0"),
        ({"image_size": 0}, "image_size is 0"),
        ({"features": 64}, "features is 64; it must be a multiple of heads, 6"),
        ({"window": 7}, "window is 7; it must be even"),
        ({"mlp_ratio": 0}, "mlp_ratio is 0"),
        ({"drop_path": 1.0}, r"drop_path is 1.0; it must be in \[0, 1\)"),
    ],
)
def test_settings_are_checked(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SwinIR(**({"scale": 4} | settings))
