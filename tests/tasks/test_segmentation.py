from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sr4ir_dist.metrics.miou import MIoU
from sr4ir_dist.tasks.segmentation import Segmentation


@pytest.mark.parametrize(
    ("network", "parameters", "channels", "stride"),
    [
        ("deeplabv3_mobilenet_v3_large", 11_029_328, 960, 16),
        ("deeplabv3_resnet50", 42_004_074, 2048, 8),
    ],
)
def test_network_is_deeplabv3_with_an_auxiliary_head(
    network: str, parameters: int, channels: int, stride: int
) -> None:
    task = Segmentation(20, network)
    with torch.device("meta"):
        module = task.build()
        images = torch.rand(2, 3, 64, 96)
        assert task.feature_channels == channels
        features = module.get_submodule("backbone")(images)["out"]
        assert features.shape == (2, channels, 64 // stride, 96 // stride)
        outputs = module(images)
    assert {name: value.shape for name, value in outputs.items()} == {
        "out": (2, 21, 64, 96),
        "aux": (2, 21, 64, 96),
    }
    assert {key.split(".")[0] for key in module.state_dict()} == {
        "backbone", "classifier", "aux_classifier"
    }  # fmt: skip
    assert sum(p.numel() for p in module.parameters()) == parameters


def test_batch_norm_of_the_backbone_is_mobilenets_own() -> None:
    with torch.device("meta"):
        module = Segmentation(20).build()
    kinds = {
        name.split(".")[0]: (layer.eps, layer.momentum)
        for name, layer in module.named_modules()
        if isinstance(layer, nn.BatchNorm2d)
    }
    assert kinds == {
        "backbone": (1e-3, 0.01),
        "classifier": (1e-5, 0.1),
        "aux_classifier": (1e-5, 0.1),
    }
    rates = [layer.p for layer in module.modules() if isinstance(layer, nn.Dropout)]
    assert sorted(rates) == [0.1, 0.5]


def test_forward_normalises_with_imagenet_statistics() -> None:
    images = torch.tensor([0.485, 0.456, 0.406 + 0.225]).view(1, 3, 1, 1)
    outputs = Segmentation(2).forward(lambda x: {"out": x}, images)
    expected = torch.tensor([0.0, 0.0, 1.0]).view(1, 3, 1, 1)
    torch.testing.assert_close(outputs["out"], expected)


def logits_and_masks() -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = {
        name: torch.randn(2, 4, 5, 6, generator=generator, dtype=torch.float64).requires_grad_()
        for name in ("out", "aux")
    }
    masks = torch.randint(0, 4, (2, 5, 6), generator=generator, dtype=torch.uint8)
    masks[0, :3] = 255
    return logits, masks


def test_loss_averages_over_valid_pixels_and_halves_the_auxiliary_head() -> None:
    task = Segmentation(3)
    logits, masks = logits_and_masks()
    expected = sum(
        weight * F.cross_entropy(logits[name], masks.long(), ignore_index=255)
        for name, weight in (("out", 1.0), ("aux", 0.5))
    )
    torch.testing.assert_close(task.loss(logits, masks), expected, rtol=1e-14, atol=0)
    count = task.loss_count(masks)
    assert count.dtype == torch.float64
    assert count == 2 * 5 * 6 - 3 * 6


def test_loss_of_nothing_but_void_is_a_zero_with_a_graph() -> None:
    task = Segmentation(3)
    logits, masks = logits_and_masks()
    loss = task.loss(logits, torch.full_like(masks, 255))
    loss.backward()
    assert loss == 0
    assert all(value.grad is not None and not value.grad.any() for value in logits.values())
    assert task.loss_count(torch.full_like(masks, 255)) == 0


def test_losses_of_shares_weighted_by_their_counts_are_that_of_all() -> None:
    task = Segmentation(3)
    logits, masks = logits_and_masks()
    parts = [
        ({name: value[i : i + 1] for name, value in logits.items()}, masks[i : i + 1])
        for i in range(2)
    ]
    counts = [task.loss_count(mask) for _, mask in parts]
    assert counts[0] != counts[1]
    weighted = sum(task.loss(*part) * n for part, n in zip(parts, counts, strict=True))
    torch.testing.assert_close(weighted / sum(counts), task.loss(logits, masks))


def test_the_other_heads_group_is_aux() -> None:
    with torch.device("meta"):
        network = Segmentation(20).build()
    groups = dict(Segmentation(20).parameter_groups(network))
    aux = [p for name, p in network.named_parameters() if name.startswith("aux_classifier.")]
    assert [id(p) for p in groups["aux"]] == [id(p) for p in aux]
    assert sum(p.numel() for p in aux) == 3_851


def test_a_step_needs_as_many_images_as_it_says() -> None:
    torch.manual_seed(0)
    task = Segmentation(2)
    network = task.build().train()
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        task.forward(network, torch.rand(task.min_images - 1, 3, 32, 32))
    assert task.forward(network, torch.rand(task.min_images, 3, 32, 32))["out"].isfinite().all()


def test_predict_and_metric() -> None:
    task = Segmentation(2)
    outputs = {"out": torch.zeros(1, 3, 2, 2), "aux": torch.rand(1, 3, 2, 2)}
    outputs["out"][0, 2, 0, 1] = 1
    assert task.predict(outputs).tolist() == [[[0, 2], [0, 0]]]
    assert task.predict(outputs).dtype == torch.uint8
    metric = task.metric()
    assert isinstance(metric, MIoU)
    metric.update(outputs, torch.tensor([[[0, 2], [0, 255]]], dtype=torch.uint8))
    assert metric.compute() == 100
    assert metric.details() == {"absent_classes": 1}


def test_refuses_more_classes_than_masks_of_bytes_hold() -> None:
    assert Segmentation(254).num_classes == 254
    with pytest.raises(ValueError, match="num_classes is 255; it must be 1 to 254"):
        Segmentation(255)


def test_loss_equals_the_published_one(parity: Path) -> None:
    record = torch.load(parity / "metrics.pt", weights_only=True)
    loss = Segmentation(20).loss(record["pred"], record["seg_target"])
    # The record has it with phase 2's weight.
    assert 0.34 * loss.item() == pytest.approx(record["auxce"], rel=1e-6)
