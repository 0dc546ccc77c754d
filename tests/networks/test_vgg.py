import pytest
import torch
from torchvision.models import vgg19
from torchvision.models.vgg import cfgs, make_layers

from sr4ir_dist.losses.tdp import tdp
from sr4ir_dist.networks.normalize import imagenet_normalize
from sr4ir_dist.networks.pretrained import WeightsError, load_state
from sr4ir_dist.networks.vgg import CONVOLUTIONS, VGG19


def published() -> dict[str, torch.Tensor]:
    """A file with torchvision's names, and a classifier's."""
    torch.manual_seed(0)
    state = make_layers(cfgs["E"]).state_dict()
    return {f"features.{name}": value for name, value in state.items()} | {
        "classifier.0.weight": torch.zeros(1), "classifier.6.bias": torch.zeros(1)
    }  # fmt: skip


def test_the_names_are_those_of_torchvisions_file() -> None:
    with torch.device("meta"):
        names = set(vgg19(weights=None).state_dict())
    assert {name for name in names if name.startswith("features.")} < set(published())
    assert {name.split(".")[0] for name in names} == {"features", "classifier"}


@pytest.mark.parametrize(
    ("layer", "channels", "side", "tensors"),
    [("conv2_2", 128, 16, 8), ("conv3_4", 256, 8, 16), ("conv5_4", 512, 2, 32)],
)
def test_features_are_a_convolutions_before_its_relu(
    layer: str, channels: int, side: int, tensors: int
) -> None:
    state = published()
    network = VGG19(layer)
    report = load_state(network, state, what="vgg19.pth", backbone=network.backbone)
    assert len(report.loaded) == len(network.state_dict()) == tensors
    assert not report.missing
    images = torch.rand(2, 3, 32, 32)
    features = network(images)
    assert list(features) == [layer] == [network.layer]
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = (images - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    for number, weight in enumerate(state[n] for n in state if n.endswith("weight")):
        stage, conv = list(CONVOLUTIONS)[number].removeprefix("conv").split("_")
        if conv == "1" and stage != "1":
            x = torch.max_pool2d(x, 2)
        place = list(CONVOLUTIONS.values())[number]
        x = torch.conv2d(x, weight, state[f"features.{place}.bias"], padding=1)
        if list(CONVOLUTIONS)[number] == layer:
            break
        x = x.relu()
    assert features[layer].shape == (2, channels, side, side)
    assert features[layer].min() < 0
    torch.testing.assert_close(features[layer], x)


def test_the_loss_reaches_the_image_and_no_weight() -> None:
    network = VGG19("conv3_4").train()
    sr, hr = torch.rand(2, 3, 16, 16, requires_grad=True), torch.rand(2, 3, 16, 16)
    loss = tdp(network(sr), network(hr), {network.layer: 2.0})
    difference = network(sr)["conv3_4"] - network(hr)["conv3_4"]
    torch.testing.assert_close(loss, 2 * difference.abs().mean())
    loss.backward()
    assert sr.grad is not None
    assert sr.grad.any()
    assert not any(parameter.requires_grad for parameter in network.parameters())
    empty = torch.rand(0, 3, 16, 16, requires_grad=True)
    tdp(network(empty), network(empty), {network.layer: 1.0}).backward()
    assert empty.grad is not None


def test_refuses() -> None:
    with pytest.raises(ValueError, match="layer 'relu5_4' is unknown; choose from .*'conv5_4'"):
        VGG19("relu5_4")
    network = VGG19()
    state = published()
    del state["features.34.bias"]
    with pytest.raises(WeightsError, match="missing: network.34.bias\n"):
        load_state(network, state, what="vgg19.pth", backbone=network.backbone)


def test_normalisation_made_in_evaluation_serves_training() -> None:
    images = torch.rand(1, 3, 2, 2, dtype=torch.float64)
    with torch.inference_mode():
        before = imagenet_normalize(images)
    images.requires_grad_()
    normalized = imagenet_normalize(images)
    normalized.sum().backward()
    assert torch.equal(normalized, before)
    assert images.grad is not None
    torch.testing.assert_close(images.grad[0, 0], torch.full((2, 2), 1 / 0.229).double())
    blue = (images[0, 2].detach() - 0.406) / 0.225
    torch.testing.assert_close(normalized[0, 2].detach(), blue)
