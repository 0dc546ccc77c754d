import copy
import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.ops import FrozenBatchNorm2d

from sr4ir_dist.metrics.coco import COCOmAP
from sr4ir_dist.tasks.detection import LOSSES, Detection, Detector, settle

SMALL = Detection(3, min_size=64, max_size=96)


@pytest.fixture(scope="module")
def trained() -> Detector:
    """A detector whose features are of order one, with fewer proposals to sample."""
    torch.manual_seed(0)
    network = SMALL.build()
    settle(network, [torch.rand(3, *size) for size in ((64, 90), (50, 48)) for _ in range(8)])
    return sample_less(network)


def sample_less(network: Any) -> Any:
    """The same network, which trains on 32 proposals an image in place of 512."""
    network.roi_heads.fg_bg_sampler.batch_size_per_image = 32
    return network


def two_images() -> tuple[list[Tensor], tuple[dict[str, Tensor], ...]]:
    generator = torch.Generator().manual_seed(1)
    images = [torch.rand(3, *size, generator=generator) for size in ((64, 90), (50, 48))]
    targets = tuple(
        {
            "boxes": torch.tensor(boxes),
            "labels": torch.tensor([1, 3]),
            "crowd": torch.tensor([False, False]),
            "image_id": torch.tensor(number),
        }
        for number, boxes in enumerate(
            ([[4.0, 8, 40, 50], [10, 10, 60, 30]], [[0.0, 0, 48, 50], [20, 20, 40, 49]])
        )
    )
    return images, targets


def losses_of(network: nn.Module, images: Any, targets: Any) -> dict[str, Tensor]:
    torch.manual_seed(3)  # of the proposals that are sampled
    return SMALL.forward(network, images, targets)


def assert_equal(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_network_has_the_published_structure_whatever_it_starts_from() -> None:
    with torch.device("meta"):
        network = Detection(20).build()
    parameters = dict(network.named_parameters())
    trainable = {name for name, p in parameters.items() if p.requires_grad}
    assert sum(p.numel() for p in parameters.values()) == 19_027_604
    assert sum(parameters[name].numel() for name in trainable) == 18_968_708
    frozen = parameters.keys() - trainable
    assert len(frozen) == 30
    assert {name.split(".")[2] for name in frozen} == set("0123456")
    assert all(name.startswith("backbone.body.") for name in frozen)
    norms = [layer for layer in network.modules() if "BatchNorm" in type(layer).__name__]
    assert {(type(layer), layer.eps) for layer in norms} == {(FrozenBatchNorm2d, 1e-5)}
    sizes = {part: 0 for part in ("backbone", "rpn", "roi_heads")}
    for name, p in parameters.items():
        sizes[name.split(".")[0]] += p.numel()
    assert sizes == {"backbone": 4_414_944, "rpn": 609_355, "roi_heads": 14_003_305}


def test_keys_and_settings_are_torchvisions() -> None:
    with torch.device("meta"):
        network: Any = Detection(20, min_size=320, max_size=640).build()
        peer: Any = detection.fasterrcnn_mobilenet_v3_large_fpn(
            weights=None, weights_backbone=None, num_classes=21
        )
    shapes = {name: value.shape for name, value in peer.state_dict().items()}
    assert {name: value.shape for name, value in network.state_dict().items()} == {
        name: shape for name, shape in shapes.items() if not name.endswith("num_batches_tracked")
    }
    assert network.transform.min_size == (320,)
    assert network.transform.max_size == 640
    assert (peer.transform.min_size, peer.transform.max_size) == ((800,), 1333)
    default = Detection(20)
    assert (default.min_size, default.max_size) == (800, 1333)
    for part in ("rpn", "roi_heads"):
        mine, theirs = (
            {
                name: repr(value)
                for name, value in vars(getattr(module, part)).items()
                if not name.startswith("__") and name not in ("_modules", "_parameters", "training")
            }
            for module in (network, peer)
        )
        for settings in (mine, theirs):
            settings.pop("proposal_matcher", None)
            settings.pop("fg_bg_sampler", None)
        assert {k: v for k, v in mine.items() if " at 0x" not in v} == {
            k: v for k, v in theirs.items() if " at 0x" not in v
        }
    assert network.rpn.score_thresh == 0.05
    generators = network.rpn.anchor_generator, peer.rpn.anchor_generator
    assert len({(g.sizes, g.aspect_ratios) for g in generators}) == 1


def smooth_images() -> list[Tensor]:
    coarse = torch.rand(2, 3, 10, 12)
    return list(F.interpolate(coarse, scale_factor=8, mode="bilinear"))


def scales_of_blocks(network: Any, images: list[Tensor]) -> list[float]:
    """The spread of each backbone block's output."""
    found = []
    x = network.transform(images)[0].tensors
    with torch.no_grad():
        for block in network.backbone.body.values():
            x = block(x)
            found.append(x.std().item())
    return found


def test_settling_keeps_activations_of_order_one_through_all_blocks() -> None:
    starts = []
    for _ in range(2):
        torch.manual_seed(0)
        task = Detection(3, min_size=160, max_size=192)
        network = task.build()
        images = smooth_images()
        before = scales_of_blocks(network, images)
        settle(network, images)
        starts.append(network.state_dict())
    assert before[-1] < 1e-6
    scales = scales_of_blocks(network, images)
    assert len(scales) == 17
    assert 0.2 < min(scales) < max(scales) < 5
    features = task.features(network, smooth_images())
    assert all(0.2 < level.std() < 10 for level in features.values())
    assert {value.dtype for value in starts[0].values()} == {torch.float32}
    assert_equal(starts[0], starts[1])
    body = network.get_submodule("backbone.body")
    assert not any(module._forward_hooks for module in body.modules())


def test_losses_and_detections_are_torchvisions(trained: Detector) -> None:
    peer = sample_less(
        detection.fasterrcnn_mobilenet_v3_large_fpn(
            weights=None, weights_backbone=None, num_classes=4, min_size=64, max_size=96
        )
    )
    peer.load_state_dict(trained.state_dict(), strict=False)
    # In float64, for which proposals are kept hangs on single bits of their scores.
    peer, network = peer.double(), copy.deepcopy(trained).double()
    # It keeps the stride that it guesses from its first images.
    peer.eval()(list(torch.rand(1, 3, 96, 96).double()))
    images, targets = two_images()
    images = [image.double() for image in images]
    found = SMALL.forward(network.eval(), images)
    assert [set(image) for image in found] == [{"boxes", "labels", "scores"}] * 2
    assert all(len(image["boxes"]) for image in found)
    torch.testing.assert_close(found, peer.eval()(images), rtol=1e-9, atol=1e-9)
    peer.train()
    for layer in peer.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eval()
    losses = losses_of(network.train(), images, targets)
    torch.manual_seed(3)
    wanted = [{"boxes": target["boxes"].double(), "labels": target["labels"]} for target in targets]
    expected = {name: loss.double() for name, loss in peer(images, wanted).items()}
    torch.testing.assert_close(losses, expected, rtol=1e-9, atol=0)
    assert min(loss.item() for loss in losses.values()) > 0


def test_targets_decide_between_losses_and_detections_not_the_mode(trained: Detector) -> None:
    images, targets = two_images()
    results = {}
    for training in (True, False):
        trained.train(training)
        results[training] = (
            losses_of(trained, images, targets),
            SMALL.forward(trained, images),
        )
        assert {module.training for module in trained.modules()} == {training}
    assert tuple(results[True][0]) == LOSSES
    assert_equal(results[True], results[False])
    with pytest.raises(AssertionError, match="positive height and width"):
        trained.eval()(images, [{"boxes": torch.zeros(1, 4), "labels": torch.ones(1).long()}] * 2)
    assert not any(module.training for module in trained.modules())


def test_a_frozen_detector_teaches_its_images(trained: Detector) -> None:
    images, targets = two_images()
    images = [image.requires_grad_() for image in images]
    learning = [p for p in trained.parameters() if p.requires_grad]
    trained.requires_grad_(False)
    SMALL.loss(losses_of(trained.eval(), images, targets), targets).backward()
    for p in learning:
        p.requires_grad_(True)
    assert all(image.grad is not None and image.grad.abs().sum() > 0 for image in images)
    assert all(p.grad is None for p in trained.parameters())


def test_objects_of_crowds_are_left_out(trained: Detector) -> None:
    images, targets = two_images()
    expected = losses_of(trained, images, targets)
    crowd = {
        "boxes": torch.cat([targets[0]["boxes"], torch.tensor([[0.0, 0, 90, 64]])]),
        "labels": torch.tensor([1, 3, 2]),
        "crowd": torch.tensor([False, False, True]),
        "image_id": torch.tensor(0),
    }
    assert_equal(losses_of(trained, images, (crowd, targets[1])), expected)
    crowd["crowd"] = torch.tensor([False, False, False])
    assert losses_of(trained, images, (crowd, targets[1])) != expected


def test_results_do_not_hang_on_the_images_that_came_first(trained: Detector) -> None:
    images, _ = two_images()
    expected = SMALL.forward(trained.eval(), images)
    fresh = sample_less(SMALL.build()).eval()
    fresh.load_state_dict(trained.state_dict())
    assert all(len(image["boxes"]) for image in expected)
    SMALL.forward(fresh, [torch.rand(3, 40, 90)])  # 29x64: a stride of 64 to torchvision
    assert_equal(SMALL.forward(fresh, images), expected)


def test_boxes_take_the_images_precision(trained: Detector) -> None:
    images, targets = two_images()
    network = copy.deepcopy(trained).double()
    images = [image.double() for image in images]
    losses = losses_of(network, images, targets)
    assert {loss.dtype for loss in losses.values()} == {torch.float64}
    exact = [target | {"boxes": target["boxes"].double()} for target in targets]
    assert_equal(losses_of(network, images, exact), losses)
    assert {target["boxes"].dtype for target in targets} == {torch.float32}


@pytest.mark.parametrize("proposals", [True, False])
def test_a_batch_without_objects_has_finite_losses(trained: Detector, proposals: bool) -> None:
    images, targets = two_images()
    nothing = [
        target | {name: target[name][:0] for name in ("boxes", "labels", "crowd")}
        for target in targets
    ]
    objectness = trained.get_parameter("rpn.head.cls_logits.bias")
    before = objectness.detach().clone()
    if not proposals:
        objectness.data.fill_(-50)
    losses = losses_of(trained.train(), images, nothing)
    objectness.data.copy_(before)
    SMALL.loss(losses, nothing).backward()
    trained_gradients = [p.grad for p in trained.parameters() if p.grad is not None]
    trained.zero_grad()
    assert all(gradient.isfinite().all() for gradient in trained_gradients)
    assert losses["loss_box_reg"] == losses["loss_rpn_box_reg"] == 0
    assert (losses["loss_classifier"] > 0) == proposals
    assert losses["loss_objectness"].isfinite()


def test_features_are_of_the_resized_canvas(trained: Detector) -> None:
    images, _ = two_images()
    features = SMALL.features(trained, images)
    assert list(features) == ["0", "1"]
    # 64x90 stays as it is, 50x48 becomes 66x64; both lie on a canvas of 96x96.
    assert {value.shape for value in features.values()} == {(2, 256, 3, 3)}
    assert_equal(SMALL.features(trained.train(), images), SMALL.features(trained.eval(), images))
    stacked = torch.rand(2, 3, 64, 64)
    assert_equal(SMALL.features(trained, stacked), SMALL.features(trained, list(stacked)))


def test_bf16_rounds_neither_features_nor_anchors(trained: Detector) -> None:
    seen = []
    generator: nn.Module = trained.rpn.anchor_generator  # pyright: ignore[reportAssignmentType]
    hook = generator.register_forward_hook(lambda m, i, anchors: seen.extend(anchors))
    images, targets = two_images()
    exact = losses_of(trained, images, targets)
    with torch.autocast("cpu", torch.bfloat16):
        near = losses_of(trained, images, targets)
        features = SMALL.features(trained, images)
    hook.remove()
    assert {value.dtype for value in features.values()} == {torch.float32}
    assert_equal(seen[:2], seen[2:])
    assert SMALL.loss(near).item() == pytest.approx(SMALL.loss(exact).item(), rel=0.2)


def test_loss_is_the_sum_and_detections_are_the_prediction() -> None:
    losses = {name: torch.tensor(2.0**i) for i, name in enumerate(LOSSES)}
    assert SMALL.loss(losses) == 15
    found = [{"boxes": torch.zeros(0, 4)}]
    assert SMALL.predict(found) is found
    metric = SMALL.metric()
    assert isinstance(metric, COCOmAP)
    assert metric.classes == 3


def test_refuses_sizes() -> None:
    make: Any = functools.partial(Detection, 3)
    for sizes in ({"min_size": 0}, {"min_size": 1334}, {"max_size": 799}):
        with pytest.raises(ValueError, match="expected 1 <= min_size <= max_size"):
            make(**sizes)
