import io

import pytest
import torch
from PIL import Image
from random_runs import drawn_images, randomise
from torch.nn import functional as F

from sr4ir_dist.analysis.comparison import compare
from sr4ir_dist.analysis.gradcam import class_of, heat_map, write_gradcam
from sr4ir_dist.tasks.classification import Classification
from sr4ir_dist.tasks.segmentation import Segmentation


@pytest.fixture(scope="module", params=[Classification, Segmentation])
def frozen(request):
    task = request.param(5)
    torch.manual_seed(0)
    network = task.build()
    randomise(network)
    return task, network.eval().requires_grad_(False)


def test_the_map_is_grad_cams_formula(frozen):
    task, network = frozen
    images = drawn_images(2, 64, 64)
    targets = torch.tensor([3, 3])
    if task.target == "mask":
        targets = torch.zeros(2, 64, 64, dtype=torch.uint8)
        targets[:, 10:30, 20:50] = 3
    heat = heat_map(task, network, images, targets, 3)

    kept = {}

    def keep(module, inputs, output):
        (kept["features"],) = task.select(output).values()

    handle = task.backbone(network).register_forward_hook(keep)
    outputs = task.forward(network, images.clone().requires_grad_())
    handle.remove()
    if task.target == "mask":
        score = outputs["out"][:, 3, 10:30, 20:50].mean(dim=(1, 2)).sum()
    else:
        score = outputs[:, 3].sum()
    (gradient,) = torch.autograd.grad(score, kept["features"])
    weights = gradient.mean(dim=(2, 3), keepdim=True)
    expected = (weights * kept["features"]).sum(dim=1, keepdim=True).relu()
    expected = F.interpolate(expected, size=(64, 64), mode="bilinear")
    assert heat.shape == (2, 1, 64, 64)
    assert heat.max() > 0
    torch.testing.assert_close(heat, expected.detach(), rtol=1e-4, atol=1e-6)


def test_it_works_where_no_gradients_are_kept(frozen):
    task, network = frozen
    images = drawn_images(1, 64, 64)
    targets = torch.ones((1, 64, 64) if task.target == "mask" else 1, dtype=torch.int64)
    with torch.no_grad():
        inside = heat_map(task, network, images, targets, 1)
    torch.testing.assert_close(inside, heat_map(task, network, images, targets, 1))


def test_the_class_of_a_mask_is_its_largest_object():
    mask = torch.zeros(1, 8, 8, dtype=torch.uint8)
    assert class_of(mask, Segmentation(5)) is None
    mask[0, 0, :3] = 2
    mask[0, 1, :5] = 4
    mask[0, 2:6] = 255
    assert class_of(mask, Segmentation(5)) == 4


@pytest.mark.parametrize("task", ["cls", "seg"])
def test_a_picture_of_two_checkpoints(published, tmp_path, task):
    runs = {
        "CQMix": published(f"drawn_{task}/edsr-x4/sr4ir"),
        "none": published(f"drawn_{task}/edsr-x4/sr4ir-no-cqmix"),
    }
    out = tmp_path / "cam.png"
    compared = compare(runs)
    said = write_gradcam(compared, str(out), count=2)
    assert Image.open(io.BytesIO(out.read_bytes())).width == 3 * (192 + 6) + 6
    assert [set(each["evidence"]) for each in said] == [set(runs)] * 2
    assert all(each["class"] in compared.names for each in said)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("drawn_det/edsr-x4/sr4ir", "x is for detection"),
        ("drawn_cls/edsr-x4/s", "x has no task network"),
    ],
)
def test_what_has_no_attention_to_show(published, tmp_path, name, message):
    with pytest.raises(ValueError, match=message):
        write_gradcam(compare({"x": published(name)}), str(tmp_path / "cam.png"))
