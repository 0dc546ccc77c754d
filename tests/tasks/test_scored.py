from typing import Any

import pytest
import torch
from torch import Tensor

from sr4ir_dist.tasks import Task
from sr4ir_dist.tasks.classification import Classification
from sr4ir_dist.tasks.detection import Detection
from sr4ir_dist.tasks.scored import Scored, forward_scored
from sr4ir_dist.tasks.segmentation import Segmentation

TASKS = [Classification(3), Segmentation(3), Detection(3, min_size=64, max_size=96)]
each = pytest.mark.parametrize("task", TASKS, ids=lambda task: type(task).__name__)


def scored_network(task: Task) -> Scored:
    torch.manual_seed(0)
    return Scored(task.build(), task).eval()


def images_and_targets(task: Task, count: int = 2) -> tuple[Any, Any]:
    images = torch.rand(count, 3, 64, 64)
    if task.target != "boxes":
        return images, None
    target = {
        "boxes": torch.tensor([[4.0, 8, 40, 50]]),
        "labels": torch.tensor([2]),
        "crowd": torch.tensor([False]),
    }
    return list(images), [target] * count


def flat(outputs: Any) -> list[Tensor]:
    return list(outputs.values()) if isinstance(outputs, dict) else [outputs]


@each
def test_one_forward_gives_the_plain_outputs_and_a_score_of_the_last_layer(task: Task) -> None:
    scored = scored_network(task)
    images, targets = images_and_targets(task)
    runs = []
    scored.network.register_forward_hook(lambda m, i, o: runs.append(m))
    torch.manual_seed(1)
    outputs, scores = forward_scored(task, scored, images, targets)
    assert len(runs) == 1
    torch.manual_seed(1)
    expected = task.forward(scored.network, images, targets)
    assert all(torch.equal(*pair) for pair in zip(flat(outputs), flat(expected), strict=True))
    layer = list(task.features(scored.network, images).values())[-1]
    weight, bias = scored.score.weight[0], scored.score.bias
    torch.testing.assert_close(scores, layer.mean((2, 3)) @ weight + bias)
    assert scores.shape == (2,)
    assert not task.backbone(scored.network)._forward_hooks or task.target == "boxes"


@each
def test_outputs_and_scores_teach_images_and_weights(task: Task) -> None:
    scored = scored_network(task)
    images, targets = images_and_targets(task)
    images = [image.requires_grad_() for image in images]
    batch = images if task.target == "boxes" else torch.stack(images)
    _, scores = forward_scored(task, scored, batch, targets)
    scores.sum().backward()
    assert all(image.grad is not None and image.grad.any() for image in images)
    assert scored.score.weight.grad is not None
    assert scored.score.weight.grad.any()


@each
def test_engines_and_precisions(task: Task) -> None:
    scored = scored_network(task).train()

    class Engine:
        def __call__(self, *args: Any) -> Any:
            return scored(*args)

    images, targets = images_and_targets(task)
    with torch.autocast("cpu", torch.bfloat16):
        outputs, scores = forward_scored(task, Engine(), images, targets)
    assert {value.dtype for value in (scores, *flat(outputs))} == {torch.float32}


@each
def test_an_empty_share_has_no_scores_but_a_graph(task: Task) -> None:
    scored = scored_network(task).train()
    images, targets = images_and_targets(task, 0)
    outputs, scores = forward_scored(task, scored, images, targets)
    assert scores.shape == (0,)
    scores.sum().backward()
    assert scored.score.weight.grad is not None
    assert not scored.score.weight.grad.any()
    assert all(len(value) == 0 or value == 0 for value in map(torch.atleast_1d, flat(outputs)))


@each
def test_keys_and_groups(task: Task) -> None:
    scored = scored_network(task)
    inside = {f"network.{name}" for name in scored.network.state_dict()}
    assert set(scored.state_dict()) == inside | {"score.weight", "score.bias"}
    groups, plain = scored.parameter_groups(), task.parameter_groups(scored.network)
    assert [name for name, _ in groups] == [name for name, _ in plain]
    found = [id(p) for _, group in groups for p in group]
    assert sorted(found) == sorted(id(p) for p in scored.parameters() if p.requires_grad)
    assert scored.score.weight in set(groups[0][1])
