import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torchvision.models import mobilenet_v3_large, resnet18
from torchvision.models.detection.backbone_utils import mobilenet_backbone
from torchvision.models.detection.faster_rcnn import FasterRCNN
from torchvision.models.segmentation import deeplabv3_mobilenet_v3_large

from sr4ir_dist import storage
from sr4ir_dist.networks.edsr import EDSR
from sr4ir_dist.networks.pretrained import (
    Backbone,
    LoadReport,
    WeightsError,
    load_state,
    load_weights,
)
from sr4ir_dist.networks.swinir import SwinIR


def small(scale: int = 4, seed: int = 0) -> EDSR:
    torch.manual_seed(seed)
    return EDSR(scale, blocks=1, features=4)


def equal(one: nn.Module, other: nn.Module) -> bool:
    state = other.state_dict()
    return all(torch.equal(value, state[name]) for name, value in one.state_dict().items())


def save(state: object, path: Path) -> str:
    if path.suffix == ".safetensors":
        assert isinstance(state, dict)
        safetensors.torch.save_file(state, path)
    else:
        torch.save(state, path)
    return str(path)


def prefixed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"module.{name}": value for name, value in state.items()}


def trained(state: dict[str, Tensor]) -> dict[str, object]:
    return {"state_dict": prefixed(state), "epoch": 3}


@pytest.mark.parametrize(
    ("suffix", "wrap"),
    [
        (".pt", dict),
        (".pth", lambda state: {"params": state}),
        (".pth", trained),
        (".safetensors", dict),
        (".safetensors", prefixed),
    ],
)
def test_loads_every_layout(
    tmp_path: Path, suffix: str, wrap: Callable[[dict[str, Tensor]], dict[str, object]]
) -> None:
    source, target = small(seed=1), small(seed=2)
    assert not equal(target, source)
    report = load_weights(target, save(wrap(source.state_dict()), tmp_path / f"w{suffix}"))
    assert equal(target, source)
    assert report.complete
    assert set(report.loaded) == set(source.state_dict())
    assert report.summary().endswith(f"{len(report.loaded)} tensors loaded")


def test_converts_to_the_networks_dtype(tmp_path: Path) -> None:
    source, target = small(seed=1), small(seed=2).double()
    load_weights(target, save(source.state_dict(), tmp_path / "w.pt"))
    assert target.head[0].weight.dtype == torch.float64
    assert equal(target, source.double())


def test_reads_from_a_bucket(s3: Callable[[], str]) -> None:
    source, target = small(seed=1), small(seed=2)
    uri = f"{s3()}/weights/edsr.safetensors"
    storage.write_bytes(uri, safetensors.torch.save(source.state_dict()))
    load_weights(target, uri)
    assert equal(target, source)


def test_strict_names_every_difference_and_changes_nothing(tmp_path: Path) -> None:
    state = small(seed=1).state_dict()
    del state["head.0.bias"]
    state["extra.weight"] = torch.zeros(2)
    state["tail.1.weight"] = torch.zeros(3, 5, 3, 3)
    uri = save(state, tmp_path / "w.pt")
    target = small(seed=2)
    with pytest.raises(WeightsError) as caught:
        load_weights(target, uri)
    message = str(caught.value)
    assert uri in message
    assert "missing: head.0.bias" in message
    assert "unexpected: extra.weight" in message
    assert "tail.1.weight is [3, 5, 3, 3] there, [3, 4, 3, 3] here" in message
    assert equal(target, small(seed=2))


def test_partial_loads_what_fits_and_says_the_rest(tmp_path: Path) -> None:
    target, start, source = small(8, seed=2), small(8, seed=2), small(4, seed=1)
    report = load_weights(target, save(source.state_dict(), tmp_path / "x4.pt"), partial=True)
    assert report.missing == ("tail.0.4.weight", "tail.0.4.bias")
    assert (report.unexpected, report.mismatched) == ((), ())
    for name, value in target.state_dict().items():
        origin = start if name in report.missing else source
        assert torch.equal(value, origin.state_dict()[name])
    assert "2 keep their start (tail.0.4.weight, tail.0.4.bias)" in report.summary()
    assert "\n" not in report.summary()


def test_another_class_count_is_a_mismatch(tmp_path: Path) -> None:
    source, target = resnet18(num_classes=7), resnet18(num_classes=5)
    head = {name: value.clone() for name, value in target.state_dict().items() if "fc" in name}
    uri = save(source.state_dict(), tmp_path / "w.pt")
    with pytest.raises(WeightsError, match=r"fc.weight is \[7, 512\] there, \[5, 512\] here"):
        load_weights(target, uri)
    report = load_weights(target, uri, partial=True)
    assert report.mismatched == (("fc.weight", (7, 512), (5, 512)), ("fc.bias", (7,), (5,)))
    assert "2 of another shape, left at their start (fc.weight [7, 512] ->" in report.summary()
    state = target.state_dict()
    assert torch.equal(state["conv1.weight"], source.state_dict()["conv1.weight"])
    assert all(torch.equal(state[name], value) for name, value in head.items())


def test_batch_norm_counters_may_be_absent(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    state = {k: v for k, v in network.state_dict().items() if "num_batches" not in k}
    assert load_weights(network, save(state, tmp_path / "w.pt")).complete


class Payload:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, ("raise SystemExit('executed')",))


def test_refuses_files_that_are_not_weights(tmp_path: Path) -> None:
    target = small()
    broken = tmp_path / "broken.pt"
    for suffix in (".pt", ".safetensors"):
        path = broken.with_suffix(suffix)
        path.write_bytes(b"not weights at all")
        with pytest.raises(WeightsError, match=f"broken{suffix} cannot be read"):
            load_weights(target, str(path))
    broken.write_bytes(pickle.dumps({"head.0.weight": Payload()}))
    with pytest.raises(WeightsError, match="cannot be read"):
        load_weights(target, str(broken))
    with pytest.raises(WeightsError, match="entry 'epoch' is int, not a tensor"):
        load_weights(target, save({"epoch": 3}, tmp_path / "w.pt"))
    with pytest.raises(WeightsError, match="holds list"):
        load_weights(target, save([torch.zeros(1)], tmp_path / "w.pt"))
    with pytest.raises(WeightsError, match=r"expected .pt, .pth or .safetensors"):
        load_weights(target, str(tmp_path / "w.onnx"))
    with pytest.raises(storage.StorageError, match="absent.pt"):
        load_weights(target, str(tmp_path / "absent.pt"))


def test_partial_refuses_a_file_of_which_nothing_fits(tmp_path: Path) -> None:
    uri = save({"conv.weight": torch.zeros(1)}, tmp_path / "w.pt")
    with pytest.raises(WeightsError, match="unexpected: conv.weight"):
        load_weights(small(), uri, partial=True)


RESNET = Backbone("", "", ("fc.",))
DEEPLAB = Backbone("features.", "backbone.", ("classifier.",))
DETECTOR = Backbone("features.", "backbone.body.", ("classifier.",))


def deeplab() -> nn.Module:
    return deeplabv3_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=5, aux_loss=True
    )


def detector() -> nn.Module:
    body = mobilenet_backbone(
        backbone_name="mobilenet_v3_large", weights=None, fpn=True, trainable_layers=3
    )  # its batch norm is frozen, without counters
    return FasterRCNN(body, num_classes=5)


def filled(
    build: Callable[[], nn.Module], source: nn.Module, backbone: Backbone
) -> tuple[nn.Module, LoadReport]:
    """A network after loading a classification network; checks that the rest kept its start."""
    torch.manual_seed(7)
    target = build()
    start = {name: value.clone() for name, value in target.state_dict().items()}
    report = load_state(target, source.state_dict(), what="file", backbone=backbone)
    for name, value in target.state_dict().items():
        kept = name not in report.loaded
        assert torch.equal(value, start[name]) or not kept, name
        assert kept == (not name.startswith(backbone.target) or name.startswith("fc.")) or (
            name.endswith("num_batches_tracked")
        ), name
    return target, report


@pytest.mark.parametrize(("build", "backbone"), [(deeplab, DEEPLAB), (detector, DETECTOR)])
def test_a_classification_network_fills_the_backbone_alone(
    build: Callable[[], nn.Module], backbone: Backbone
) -> None:
    source = mobilenet_v3_large(num_classes=3)
    for module in source.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            module.running_mean.normal_()
    target, report = filled(build, source, backbone)
    assert report.backbone
    assert not report.complete
    assert set(report.unexpected) == {n for n in source.state_dict() if "classifier" in n}
    assert len(report.missing) > 10
    assert not any(name.startswith(backbone.target) for name in report.missing)
    for name, value in source.features.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(target.state_dict()[backbone.target + name], value), name
    assert "tensors loaded into the backbone; " in report.summary()
    assert "4 not used (classifier.0.weight, " in report.summary()


def test_a_resnets_head_of_other_classes_keeps_its_start() -> None:
    source = resnet18(num_classes=7)
    _, report = filled(lambda: resnet18(num_classes=5), source, RESNET)
    assert report.missing == report.unexpected == ("fc.weight", "fc.bias")
    same = resnet18(num_classes=7)
    report = load_state(same, source.state_dict(), what="file", backbone=RESNET)
    assert report.complete  # a file that fits exactly is loaded whole
    assert not report.backbone
    assert equal(same, source)


def test_a_backbone_that_is_not_filled_is_refused_with_every_name() -> None:
    state = mobilenet_v3_large(num_classes=3).state_dict()
    del state["features.16.1.running_var"], state["features.3.block.0.0.weight"]
    state["features.17.weight"] = state["other"] = torch.zeros(1)
    state["features.0.0.weight"] = torch.zeros(16, 1, 3, 3)
    target = deeplab()
    before = {name: value.clone() for name, value in target.state_dict().items()}
    with pytest.raises(WeightsError) as caught:
        load_state(target, state, what="file.pth", backbone=DEEPLAB)
    message = str(caught.value).splitlines()
    assert message[0] == "weights file.pth do not fill the backbone of DeepLabV3:"
    assert message[1] == ("  missing: backbone.3.block.0.0.weight, backbone.16.1.running_var")
    assert message[2] == "  unexpected: features.17.weight, other"
    assert "backbone.0.0.weight is [16, 1, 3, 3] there, [16, 3, 3, 3] here" in message[3]
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())
    report = load_state(target, state, what="file.pth", backbone=DEEPLAB, partial=True)
    assert report.unexpected[:2] == ("classifier.0.weight", "classifier.0.bias")
    assert "backbone.16.1.running_var" in report.missing
    key = "features.1.block.0.0.weight"
    assert torch.equal(target.state_dict()["backbone.1.block.0.0.weight"], state[key])


def test_a_whole_network_of_other_classes_is_no_backbone() -> None:
    source, target = deeplab().state_dict(), deeplab()
    source["classifier.4.weight"] = torch.zeros(9, 256, 1, 1)
    with pytest.raises(WeightsError, match="do not fit DeepLabV3:\n  other shape: classifier.4"):
        load_state(target, source, what="file", backbone=DEEPLAB)
    report = load_state(target, source, what="file", backbone=DEEPLAB, partial=True)
    assert [name for name, _, _ in report.mismatched] == ["classifier.4.weight"]
    assert not report.backbone


def test_frozen_batch_norm_takes_files_with_counters() -> None:
    source, target = detector(), detector()
    state = source.state_dict() | {"backbone.body.0.1.num_batches_tracked": torch.tensor(3)}
    assert load_state(target, state, what="file").complete
    assert equal(target, source)


def swinir(scale: int = 2, image_size: int = 16) -> SwinIR:
    return SwinIR(scale, blocks=1, features=6, depth=2, reconstruction=2, image_size=image_size)


@pytest.mark.parametrize("kept", [True, False])
def test_swinirs_derived_buffers_may_be_absent_or_of_another_size(kept: bool) -> None:
    source, target = swinir(image_size=24), swinir(image_size=16)
    state = source.state_dict()
    derived = [name for name in state if name.endswith(("attn_mask", "position_index"))]
    assert len(derived) == 3
    if not kept:
        for name in derived:
            del state[name]
    (mask,) = (name for name in derived if name.endswith("attn_mask"))
    built = target.state_dict()[mask].clone()
    report = load_state(target, state, what="file")
    assert report.complete
    own = target.state_dict()
    assert torch.equal(own[mask], built)
    assert all(torch.equal(own[name], state[name]) for name in state if name not in derived)
    del state["conv_last.bias"]
    with pytest.raises(WeightsError, match="missing: conv_last.bias\n"):
        load_state(target, state, what="file")


def test_swinir_of_another_scale_is_a_partial_start(tmp_path: Path) -> None:
    source, target = swinir(2), swinir(4)
    uri = save({"params": source.state_dict()}, tmp_path / "x2.pth")
    report = load_weights(target, uri, partial=True)
    assert report.missing == ("upsample.2.weight", "upsample.2.bias")


def test_partial_resnet18_weights(real_data: Path) -> None:
    network = resnet18(num_classes=40)
    uri = str(real_data / "weights" / "resnet18_imagenet_partial.pth")
    report = load_weights(network, uri, partial=True)
    assert len(report.loaded) == 96
    assert report.unexpected == ()
    assert all(name.startswith(("layer4.", "fc.")) for name in report.missing)
    with pytest.raises(WeightsError, match="missing: layer4"):
        load_weights(network, uri)
