import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from sr4ir_dist import storage
from sr4ir_dist.networks.edsr import EDSR
from sr4ir_dist.networks.pretrained import WeightsError, load_weights
from sr4ir_dist.tasks import TASKS


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
    source, target = TASKS["classification"](7).build(), TASKS["classification"](5).build()
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


def test_partial_resnet18_weights(real_data: Path) -> None:
    network = TASKS["classification"](40).build()
    uri = str(real_data / "weights" / "resnet18_imagenet_partial.pth")
    report = load_weights(network, uri, partial=True)
    assert len(report.loaded) == 96
    assert report.unexpected == ()
    assert all(name.startswith(("layer4.", "fc.")) for name in report.missing)
    with pytest.raises(WeightsError, match="missing: layer4"):
        load_weights(network, uri)
