import pytest
import torch
import torch.nn.functional as F

from sr4ir_dist.metrics.topk import TopK
from sr4ir_dist.tasks.classification import Classification


@pytest.mark.parametrize(("classes", "parameters"), [(196, 11_277_060), (200, 11_279_112)])
def test_network_is_resnet18(classes: int, parameters: int) -> None:
    network = Classification(classes).build()
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert {name.split(".")[0] for name in network.state_dict()} == {
        "conv1", "bn1", "layer1", "layer2", "layer3", "layer4", "fc"
    }  # fmt: skip


def test_features_are_layer4_after_its_relu() -> None:
    torch.manual_seed(0)
    task = Classification(5)
    features = task.features(task.build(), torch.rand(2, 3, 64, 96))
    assert features["l4"].shape == (2, 512, 2, 3)
    assert features["l4"].min() == 0


def test_forward_normalises_with_imagenet_statistics() -> None:
    task = Classification(2)
    images = torch.tensor([0.485, 0.456, 0.406 + 0.225]).view(1, 3, 1, 1)
    expected = torch.tensor([0.0, 0.0, 1.0]).view(1, 3, 1, 1)
    torch.testing.assert_close(task.forward(lambda x: x, images), expected)


def test_loss_is_the_mean_cross_entropy() -> None:
    task = Classification(4)
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([0, 1, 2, 3, 0, 1])
    expected = -F.log_softmax(logits, 1)[torch.arange(6), targets].mean()
    torch.testing.assert_close(task.loss(logits, targets), expected)
    assert task.loss_count(targets) is None


def test_predict_and_metric() -> None:
    task = Classification(3)
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 1.0]])
    assert task.predict(logits).tolist() == [1, 0]
    metric = task.metric()
    assert isinstance(metric, TopK)
    metric.update(logits, torch.tensor([1, 2]))
    assert metric.compute() == 50
