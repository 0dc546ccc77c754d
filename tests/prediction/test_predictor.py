import pytest
import torch
import torch.nn.functional as F

from sr4ir_dist import checkpoint
from sr4ir_dist.degradation import enlarge_bilinear
from sr4ir_dist.prediction.inputs import PredictionError
from sr4ir_dist.prediction.predictor import Predictor, to_bytes
from sr4ir_dist.prediction.tiles import Tiling
from sr4ir_dist.tasks.scored import forward_scored
from sr4ir_dist.training.build import make_task
from sr4ir_dist.training.state import load_experiment

NEVER = Tiling(0, 0)
generator = torch.Generator().manual_seed(0)
IMAGE = torch.randint(256, (3, 6, 7), generator=generator, dtype=torch.uint8)
IMAGE = F.interpolate(IMAGE[None].float(), (28, 36), mode="bicubic")[0].clamp(0, 255).byte()
LR = IMAGE[None].float() / 255


def make_predictor(uri, roles=("sr", "task"), *, images=True, tiling=NEVER, most_pixels=1 << 24):
    saved = checkpoint.resolve(uri)
    return Predictor(saved, roles, images=images, tiling=tiling, most_pixels=most_pixels)


def adapter(uri):
    return make_task(load_experiment(checkpoint.load(checkpoint.resolve(uri))))


def outputs(uri, modules, images):
    """What the adapter and the network themselves make of an image."""
    task, network = adapter(uri), modules["task"].eval()
    with torch.inference_mode():
        return task, task.forward(network, images)


def super_resolved(modules):
    with torch.inference_mode():
        return modules["sr"].eval()(LR)


def test_classification_is_the_adapters(published):
    uri, modules = published("drawn_cls/edsr-x4/sr4ir")
    sr = super_resolved(modules)
    task, logits = outputs(uri, modules, sr)
    found = make_predictor(uri).predict(IMAGE)
    assert torch.equal(found.scores, logits[0].softmax(dim=0))
    assert int(found.scores.argmax()) == int(task.predict(logits)[0])
    assert torch.equal(found.sr, to_bytes(sr)[0])
    assert found.size == (112, 144)
    assert (found.mask, found.boxes) == (None, None)


def test_segmentation_is_the_adapters(published):
    uri, modules = published("drawn_seg/edsr-x4/sr4ir")
    task, logits = outputs(uri, modules, super_resolved(modules))
    found = make_predictor(uri, images=False).predict(IMAGE)
    assert torch.equal(found.mask, task.predict(logits)[0])
    assert len(found.mask.unique()) > 1  # a hard case
    assert found.mask.shape == found.size
    assert found.sr is None


def test_detection_is_the_adapters(published):
    uri, modules = published("drawn_det/edsr-x4/sr4ir")
    task, detections = outputs(uri, modules, super_resolved(modules))
    expected = task.predict(detections)[0]
    found = make_predictor(uri).predict(IMAGE)
    assert len(expected["boxes"]) > 1
    assert {name: value.tolist() for name, value in found.boxes.items()} == {
        name: value.tolist() for name, value in expected.items()
    }


def test_the_task_network_gets_what_its_recipe_is_judged_on(published):
    for name, image in {
        "drawn_cls/x4/l2t": enlarge_bilinear(LR, 4),
        "drawn_cls/h2t": LR,
    }.items():
        uri, modules = published(name)
        task, logits = outputs(uri, modules, image)
        found = make_predictor(uri, ("task",), images=False).predict(IMAGE)
        assert torch.equal(found.scores, logits[0].softmax(dim=0))
        assert found.size == tuple(image.shape[-2:])
        assert found.sr is None


def test_a_task_network_that_also_scores_is_run_without_its_score(published):
    uri, modules = published("drawn_cls/edsr-x4/sod-mtgan")
    with torch.inference_mode():
        logits, _ = forward_scored(adapter(uri), modules["task"].eval(), super_resolved(modules))
    assert torch.equal(make_predictor(uri).predict(IMAGE).scores, logits[0].softmax(dim=0))


def test_an_sr_network_alone_gives_images_alone(published):
    uri, modules = published("drawn_cls/edsr-x4/pretrain")
    whole = to_bytes(super_resolved(modules))[0]
    found = make_predictor(uri, ("sr",)).predict(IMAGE)
    assert torch.equal(found.sr, whole)
    assert (found.scores, found.mask, found.boxes) == (None, None, None)
    tiled = make_predictor(uri, ("sr",), tiling=Tiling(9, 6)).predict(IMAGE).sr
    # Sums of float32 in another order may round to the other of two neighbouring bytes.
    assert (tiled.int() - whole.int()).abs().max() <= 1


def test_a_task_network_in_tiles_sees_the_same_image(published):
    uri, _ = published("drawn_cls/edsr-x4/sr4ir")
    whole, tiled = (make_predictor(uri, tiling=t).predict(IMAGE) for t in (NEVER, Tiling(9, 6)))
    assert torch.allclose(tiled.scores, whole.scores, atol=1e-5)


def test_an_image_that_would_be_too_large_is_refused(published):
    uri, _ = published("drawn_cls/edsr-x4/sr4ir")
    predictor = make_predictor(uri, most_pixels=112 * 144 - 1)
    message = "28x36 pixels become 112x144, more than --most-pixels 16127"
    with pytest.raises(PredictionError, match=message):
        predictor.predict(IMAGE)
    assert predictor.predict(IMAGE[:, :, 1:]).size == (112, 140)


def test_bytes_are_clamped_and_rounded():
    values = torch.tensor([-0.1, 0.0, 0.4 / 255, 0.6 / 255, 1.0, 1.2])
    assert to_bytes(values).tolist() == [0, 0, 0, 1, 255, 255]
    assert torch.equal(to_bytes(to_bytes(values)), to_bytes(values))
