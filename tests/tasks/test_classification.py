import pytest
import torch
import torch.nn.functional as F

from sr4ir_dist.metrics import TopK
from sr4ir_dist.tasks import TASKS
from sr4ir_dist.tasks.classification import Classification


@pytest.mark.parametrize(("classes", "parameters"), [(196, 11_277_060), (200, 11_279_112)])
def test_network_is_resnet18(classes: int, parameters: int) -> None:
    network = TASKS["classification"](classes).build()
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert {name.split(".")[0] for name in network.state_dict()} == {
        "conv1", "bn1", "layer1", "layer2", "layer3", "layer4", "fc"
    }  # fmt: skip


@pytest.mark.parametrize("training", [True, False])
def test_features_equal_a_hook_on_layer4_bit_for_bit(training: bool) -> None:
    torch.manual_seed(0)
    task = Classification(5)
    network = task.build().train(training)
    images = torch.rand(2, 3, 64, 96)
    seen = []
    hook = network.get_submodule("layer4").register_forward_hook(lambda m, i, o: seen.append(o))
    state = {name: value.clone() for name, value in network.state_dict().items()}
    task.forward(network, images)
    hook.remove()
    network.load_state_dict(state)
    features = task.features(network, images)
    assert set(features) == set(task.feature_weights) == {"l4"}
    assert features["l4"].shape == (2, 512, 2, 3)
    assert torch.equal(features["l4"], seen[0])
    assert features["l4"].min() == 0


def test_forward_normalises_with_imagenet_statistics() -> None:
    task = Classification(2)
    images = torch.tensor([0.485, 0.456, 0.406 + 0.225]).view(1, 3, 1, 1)
    expected = torch.tensor([0.0, 0.0, 1.0]).view(1, 3, 1, 1)
    torch.testing.assert_close(task.forward(lambda x: x, images), expected)
    assert task.normalize(images.double()).dtype == torch.float64


def test_evaluation_first_does_not_spoil_training() -> None:
    task = Classification(2)
    images = torch.rand(1, 3, 4, 4, dtype=torch.float16)  # a dtype that no other test uses
    with torch.inference_mode():
        task.normalize(images)
    task.normalize(images.clone().requires_grad_()).sum().backward()


def test_loss_is_the_mean_cross_entropy_and_survives_an_empty_batch() -> None:
    task = Classification(4)
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([0, 1, 2, 3, 0, 1])
    expected = -F.log_softmax(logits, 1)[torch.arange(6), targets].mean()
    torch.testing.assert_close(task.loss(logits, targets), expected)

    network = task.build().train()
    before = {name: value.clone() for name, value in network.named_buffers() if "running" in name}
    loss = task.loss(task.forward(network, torch.rand(0, 3, 64, 64)), targets[:0])
    loss.backward()
    assert loss == 0
    assert all(p.grad is not None and not p.grad.any() for p in network.parameters())
    assert all(torch.equal(network.get_buffer(name), value) for name, value in before.items())


def test_predict_and_metric() -> None:
    task = Classification(3)
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 1.0]])
    assert task.predict(logits).tolist() == [1, 0]
    metric = task.metric()
    assert isinstance(metric, TopK)
    metric.update(logits, torch.tensor([1, 2]))
    assert metric.compute() == 50


def test_refuses() -> None:
    with pytest.raises(ValueError, match="num_classes is 0"):
        Classification(0)
    with pytest.raises(ValueError, match="'depth' is unknown.*zero_init_residual"):
        Classification(3).build(depth=18)
    network = Classification(3).build(zero_init_residual=True)
    assert not network.get_parameter("layer1.0.bn2.weight").any()
