"""What every task promises to the training step."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from sr4ir_dist.settings import TASK_NETWORKS, TaskNetwork
from sr4ir_dist.tasks import TASKS, Task, make_task
from sr4ir_dist.tasks.classification import Classification
from sr4ir_dist.tasks.detection import Detection
from sr4ir_dist.tasks.segmentation import Segmentation

SMALL = [Classification(3), Segmentation(3), Detection(3, min_size=64, max_size=96)]
SIDE = 64


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def small_batch(task: Task, count: int = 2) -> tuple[Any, Any]:
    """Random images, and targets of the task's kind."""
    images = torch.rand(count, 3, SIDE, SIDE)
    if task.target == "label":
        return images, torch.arange(count) % 3
    if task.target == "mask":
        return images, torch.randint(0, 4, (count, SIDE, SIDE), dtype=torch.uint8)
    targets = tuple(
        {
            "boxes": torch.tensor([[4.0, 8, 40, 50], [10, 10, 60, 30]]),
            "labels": torch.tensor([1, 3]),
            "crowd": torch.tensor([False, False]),
            "image_id": torch.tensor(number),
        }
        for number in range(count)
    )
    return list(images), targets


def each(task: Task) -> str:
    return type(task).__name__


def test_every_network_is_made_from_settings() -> None:
    assert set(TASKS) == set(TASK_NETWORKS)
    for name, networks in TASK_NETWORKS.items():
        for network in networks:
            settings: Any = {"name": name, "network": network, "classes": 7}
            task = make_task(TaskNetwork(**settings, min_size=320, max_size=640))
            sizes = {"min_size": 320, "max_size": 640} if name == "detection" else {}
            assert task == TASKS[name](7, network, **sizes)
            assert task.num_classes == 7
    with pytest.raises(ValueError, match="task.classes is not set"):
        make_task(TaskNetwork(name="segmentation", network="deeplabv3_resnet50"))
    with pytest.raises(ValueError, match="network is 'resnet18'; segmentation has"):
        make_task(TaskNetwork(name="segmentation", network="resnet18", classes=2))


@pytest.mark.parametrize("make", [Classification, Segmentation, Detection])
def test_refuses(make: Callable[..., Task]) -> None:
    with pytest.raises(ValueError, match="num_classes is 0"):
        make(0)
    with pytest.raises(ValueError, match=r"network is 'vgg'; \w+ has"):
        make(2, "vgg")


@pytest.mark.parametrize("task", SMALL, ids=each)
@pytest.mark.parametrize("training", [True, False])
def test_features_are_the_backbones_in_a_whole_forward_bit_for_bit(
    task: Task, training: bool
) -> None:
    network = task.build().train(training)
    images, targets = small_batch(task)
    seen = []
    hook = task.backbone(network).register_forward_hook(lambda m, i, o: seen.append(o))
    state = {name: value.clone() for name, value in network.state_dict().items()}
    task.forward(network, images, targets)
    hook.remove()
    network.load_state_dict(state)
    features, expected = task.features(network, images), task.select(seen[0])
    assert list(features) == list(expected) == list(task.feature_weights)
    assert all(torch.equal(features[name], expected[name]) for name in features)
    assert list(features.values())[-1].shape[:2] == (2, task.feature_channels)


@pytest.mark.parametrize("task", SMALL, ids=each)
def test_features_run_the_backbone_alone(task: Task) -> None:
    network = task.build()
    ran = set()
    for name, module in network.named_modules():
        module.register_forward_hook(lambda m, i, o, name=name: ran.add(name.split(".")[0]))
    task.features(network, small_batch(task)[0])
    allowed = {
        "label": {"conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"},
        "mask": {"backbone"},
        "boxes": {"transform", "backbone"},
    }
    assert ran == allowed[task.target]


@pytest.mark.parametrize("task", SMALL, ids=each)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_outputs_have_the_images_dtype_also_under_autocast(task: Task, dtype: torch.dtype) -> None:
    network: Any = task.build().to(dtype).train()
    if task.target == "boxes":  # fewer proposals to train on, for speed
        network.roi_heads.fg_bg_sampler.batch_size_per_image = 32
    images, targets = small_batch(task)
    images = [image.to(dtype) for image in images]
    if task.target != "boxes":
        images = torch.stack(images)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        outputs = task.forward(network, images, targets)
    loss = task.loss(outputs, targets)
    assert loss.dtype == dtype
    assert loss.isfinite()
    values = outputs.values() if isinstance(outputs, dict) else [outputs]
    assert {value.dtype for value in values} == {dtype}
    loss.backward()
    learning = [p for _, group in task.parameter_groups(network) for p in group]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in learning)
    found = task.predict(task.forward(network.eval(), images))
    assert len(found) == 2


@pytest.mark.parametrize("task", SMALL, ids=each)
def test_an_empty_share_gives_gradients_of_zero_and_keeps_statistics(task: Task) -> None:
    network = task.build().train()
    before = {name: value.clone() for name, value in network.named_buffers() if "running" in name}
    images, targets = small_batch(task, 0)
    loss = task.loss(task.forward(network, images, targets), targets)
    loss.backward()
    assert loss == 0
    for _, group in task.parameter_groups(network):
        assert all(p.grad is not None and not p.grad.any() for p in group)
    assert all(torch.equal(network.get_buffer(name), value) for name, value in before.items())
    assert all(len(value) == 0 for value in task.features(network, images).values())
    count = task.loss_count(targets)
    assert count is None or count == 0


@pytest.mark.parametrize("task", SMALL, ids=each)
def test_groups_hold_every_trainable_parameter_once(task: Task) -> None:
    network = task.build()
    next(network.parameters()).requires_grad_(False)
    groups = dict(task.parameter_groups(network))
    assert list(groups) == (["main", "aux"] if task.target == "mask" else ["main"])
    found = [id(p) for group in groups.values() for p in group]
    assert sorted(found) == sorted(id(p) for p in network.parameters() if p.requires_grad)
    assert groups["main"]


@pytest.mark.parametrize(
    ("task", "source"),
    [
        (Classification(3), torchvision.models.resnet18),
        (Segmentation(3), torchvision.models.mobilenet_v3_large),
        (Segmentation(3, "deeplabv3_resnet50"), torchvision.models.resnet50),
        (Detection(3), torchvision.models.mobilenet_v3_large),
    ],
)
def test_published_says_where_each_imagenet_tensor_goes(
    task: Task, source: Callable[..., nn.Module]
) -> None:
    with torch.device("meta"):
        state, network = source().state_dict(), task.build().state_dict()
    published = task.published
    moved = {
        published.target + name.removeprefix(published.source): value.shape
        for name, value in state.items()
        if name.startswith(published.source) and not name.startswith(published.head)
    }
    left = {name for name in state if name.startswith(published.head)}
    assert len(moved) + len(left) == len(state)
    inside = {
        name: value.shape
        for name, value in network.items()
        if name.startswith(published.target)
        and not name.startswith(() if published.target else published.head)
    }

    def counted(shapes: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in shapes.items() if not k.endswith("num_batches_tracked")}

    assert counted(moved) == counted(inside)
    assert len(inside) > 50


@pytest.mark.parametrize("task", SMALL, ids=each)
def test_a_random_start_is_drawn_from_torchs_global_generator(task: Task) -> None:
    def start(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        return task.build().state_dict()

    first, again, other = start(1), start(1), start(2)
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    weights = [name for name in first if name.endswith("weight") and first[name].ndim == 4]
    assert not any(torch.equal(first[name], other[name]) for name in weights)
