"""What is exported computes what the network computes, without this package."""

import dataclasses
import hashlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from random_runs import drawn_images, publish_random
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

from sr4ir_dist import checkpoint, experiments, storage
from sr4ir_dist.config import ExperimentError
from sr4ir_dist.data.convert.drawn import DRAWN, open_drawn
from sr4ir_dist.data.convert.write import convert
from sr4ir_dist.data.schema import DatasetError
from sr4ir_dist.data.synthetic import CLASS_NAMES
from sr4ir_dist.export import graph
from sr4ir_dist.export.graph import TOLERANCE, ExportError, make_graph
from sr4ir_dist.export.write import export
from sr4ir_dist.hub import versions
from sr4ir_dist.tasks.scored import Scored

NAMES = tuple(CLASS_NAMES)
SMALL_EDSR = ("sr.blocks=1", "sr.features=8")
SMALL_SWINIR = ("sr.blocks=1", "sr.features=12", "sr.depth=2", "sr.heads=2", "sr.window=4")
SMALL_DETECTOR = ("task.min_size=128", "task.max_size=192")
HISTORY = ({"epoch": 1, "step": 3, "top1": 10.0}, {"epoch": 2, "step": 6, "top1": 50.0})
JOB = Path(storage.__file__).parents[1] / "jobs" / "export.py"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    uri = str(tmp_path_factory.mktemp("drawn") / "data")
    convert(DRAWN, open_drawn(train_count=2, val_count=2, size=32), uri, threads=1)
    return uri


@pytest.fixture(scope="module")
def published(tmp_path_factory, data):
    """A function that publishes a run with random weights and returns its URI and networks."""

    def publish(name, *settings, step=6, data=data):
        run = str(tmp_path_factory.mktemp("run") / "a-run-0123abcd")
        if experiments.make(name).task is not None:
            settings = (*settings, f"task.classes={len(NAMES)}")
        return run, publish_random(run, name, *settings, data=data, step=step, history=HISTORY)

    return publish


@pytest.fixture(scope="module")
def classified(published, tmp_path_factory):
    """Where EDSR and ResNet18 were exported, and the networks."""
    run, modules = published("drawn_cls/edsr-x4/sr4ir", *SMALL_EDSR)
    out = tmp_path_factory.mktemp("exported")
    export(run, str(out))
    return out, modules


def ours(modules, name, images):
    """The network's own outputs, in torchvision's arithmetic: normalised, then run."""
    with torch.no_grad():
        if name == "sr":
            return modules["sr"].eval()(images)
        mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
        std = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
        network = modules["task"].eval()
        network = network.network if isinstance(network, Scored) else network
        outputs = network((images - mean) / std)
        return outputs if isinstance(outputs, torch.Tensor) else outputs["out"]


def run_onnx(path, images):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (taken,) = session.get_inputs()
    found = session.run(None, {taken.name: images.numpy()})
    return {
        output.name: torch.from_numpy(value)
        for output, value in zip(session.get_outputs(), found, strict=True)
    }


def assert_same(found, expected):
    assert found.shape == expected.shape
    allowed = TOLERANCE * float(expected.abs().max())
    assert float(expected.std()) > 20 * allowed
    assert float((found - expected).abs().max()) <= allowed


def read(out, name):
    return json.loads((Path(out) / name).read_text())


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 6, 23), (2, 33, 17)])
def test_graphs_of_edsr_and_resnet18_take_any_size(classified, shape):
    out, modules = classified
    lr = drawn_images(*shape, seed=5)
    sr = run_onnx(out / "sr.onnx", lr)["sr"]
    assert_same(sr, ours(modules, "sr", lr))
    logits = run_onnx(out / "task.onnx", sr)["logits"]
    assert_same(logits, ours(modules, "task", sr))
    both = run_onnx(out / "pipeline.onnx", lr)
    assert_same(both["sr"], sr)
    assert_same(both["logits"], logits)


def test_graph_of_swinir_pads_any_size_to_its_windows(published, tmp_path):
    run, modules = published("folder_sr/swinir-x2/pretrain", *SMALL_SWINIR)
    assert export(run, str(tmp_path / "out"))["onnx"].keys() == {"sr.onnx"}
    for shape in [(1, 1, 1), (2, 4, 8), (1, 3, 30), (3, 17, 9)]:
        lr = drawn_images(*shape, seed=5)
        sr = run_onnx(tmp_path / "out" / "sr.onnx", lr)["sr"]
        assert_same(sr, ours(modules, "sr", lr))


@pytest.mark.slow
def test_graphs_of_deeplab_on_bilinear_enlargements(published, tmp_path):
    run, modules = published("drawn_seg/x4/l2t")
    assert export(run, str(tmp_path / "out"))["onnx"].keys() == {"task.onnx", "pipeline.onnx"}
    for shape in [(1, 5, 8), (2, 16, 12)]:
        lr = drawn_images(*shape, seed=5)
        size = [4 * side for side in shape[1:]]
        both = run_onnx(tmp_path / "out" / "pipeline.onnx", lr)
        assert_same(both["sr"], F.interpolate(lr, size, mode="bilinear", align_corners=True))
        assert both["logits"].shape == (shape[0], 1 + len(NAMES), *size)
        assert_same(both["logits"], ours(modules, "task", both["sr"]))
        logits = run_onnx(tmp_path / "out" / "task.onnx", both["sr"])["logits"]
        assert_same(logits, both["logits"])
    assert read(tmp_path / "out", "task.json")["classes"] == ["background", *NAMES]


def test_what_is_there_says_what_it_is(classified, data):
    out, modules = classified
    listed = read(out, "export.json")
    names = {
        f"{role}.{kind}" for role in ("sr", "task") for kind in ("json", "safetensors", "onnx")
    }
    assert listed["files"].keys() == names | {"pipeline.onnx"}
    assert {path.name for path in out.iterdir()} == {*listed["files"], "export.json"}
    for name, file in listed["files"].items():
        content = (out / name).read_bytes()
        assert file == {
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
    assert listed["notes"] == []
    assert listed["onnx"]["sr.onnx"]["inputs"] == {"lr": ["batch", 3, "lr_height", "lr_width"]}
    assert listed["onnx"]["pipeline.onnx"]["outputs"]["logits"] == ["batch", len(NAMES)]
    for about in listed["onnx"].values():
        differences = [d for one in about["checked"] for d in one["difference"].values()]
        assert 0 < max(differences) < about["tolerance"]
    for role, module in modules.items():
        weights = load_file(out / f"{role}.safetensors")
        state = module.state_dict()
        assert weights.keys() == state.keys()
        assert all(torch.equal(weights[name], state[name]) for name in state)
        about = read(out, f"{role}.json")
        assert about["metrics"] == HISTORY[1]
        assert about["run"] == "a-run-0123abcd"
        saved = checkpoint.load(about["checkpoint"]["uri"])
        assert about["checkpoint"]["sha256"] == {n: d for n, (_, d) in saved.files.items()}
        assert about["experiment"] == saved.json("experiment.json")
    assert read(out, "sr.json")["scale"] == 4
    assert read(out, "task.json")["classes"] == list(NAMES)
    model = onnx.load(out / "pipeline.onnx")
    onnx.checker.check_model(model, full_check=True)
    properties = {item.key: json.loads(item.value) for item in model.metadata_props}
    assert properties["classes"] == list(NAMES)
    for path in out.glob("*.onnx"):
        # Neither where the code lay nor where the dataset and the run are.
        content = path.read_bytes()
        assert not any(text.encode() in content for text in (str(JOB.parents[1]), "torch/", data))


def test_json_and_safetensors_rebuild_every_network_without_this_package(published, tmp_path):
    cases = {
        "drawn_cls/edsr-x4/sod-mtgan": (SMALL_EDSR, {"sr": (2, 9, 12), "task": (2, 33, 50)}),
        "folder_sr/swinir-x4/pretrain": (SMALL_SWINIR, {"sr": (2, 9, 14)}),
        "drawn_seg/x4/l2t": ((), {"task": (2, 40, 33)}),
        "drawn_det/h2t": (SMALL_DETECTOR, {"task": (2, 128, 144)}),
    }
    places, expected = [], []
    for number, (name, (settings, roles)) in enumerate(cases.items()):
        run, modules = published(name, *settings)
        for role, shape in roles.items():
            out = tmp_path / f"{number}-{role}"
            export(run, str(out), formats=["safetensors"])
            images = drawn_images(*shape)
            save_file({"images": images}, out / "images.safetensors")
            places.append(out / role)
            expected.append((modules, role, images))
    script = Path(__file__).with_name("rebuild.py")
    subprocess.run([sys.executable, script, *places], check=True, cwd=tmp_path)
    for place, (modules, role, images) in zip(places, expected, strict=True):
        found = load_file(place.with_name(f"{role}-outputs.safetensors"))
        if "det" in read(place.parent, "task.json" if role == "task" else "sr.json").get(
            "task", ""
        ):
            with torch.no_grad():
                boxes = modules["task"].eval()(list(images))
            assert sum(len(one["boxes"]) for one in boxes) > 10
            for i, one in enumerate(boxes):
                for key, value in one.items():
                    torch.testing.assert_close(found[f"{i}.{key}"], value, rtol=1e-3, atol=1e-3)
            continue
        plain = {**modules, "task": getattr(modules.get("task"), "network", modules.get("task"))}
        torch.testing.assert_close(
            found["outputs"], ours(plain, role, images), rtol=1e-5, atol=1e-5
        )


class Untrue(nn.Module):
    """A network of which the trace differs from what it computes."""

    def __init__(self, change):
        super().__init__()
        self.change = change

    def forward(self, images):
        return self.change(images) if torch.compiler.is_exporting() else images


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x * 1.01, r"by 0\.01 of its magnitude for lr \(2, 3, 24, 20\)"),
        (lambda x: x * float("nan"), "by nan of its magnitude"),
        (lambda x: x[:, :, :5], r"sr \(2, 3, 5, 20\) differs from the network's \(2, 3, 24, 20\)"),
    ],
)
def test_a_graph_that_computes_something_else_is_refused(change, message):
    with pytest.raises(ExportError, match=message):
        make_graph(Untrue(change), "lr", "sr", {})


def test_a_detector_has_no_graph_and_the_reason_is_told(published, tmp_path):
    run, _ = published("drawn_det/h2t", *SMALL_DETECTOR)
    with pytest.raises(ExportError, match="nothing to write: no ONNX of the detector: how many"):
        export(run, str(tmp_path / "out"), formats=["onnx"])
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []
    found = export(run, str(tmp_path / "out"))
    assert found["files"].keys() == {"task.json", "task.safetensors"}
    assert found["onnx"] == {}
    assert found["notes"][0].startswith("no ONNX of the detector")


def test_what_cannot_be_exported_is_refused_by_name(
    classified, published, data, tmp_path, monkeypatch
):
    run, _ = published("drawn_cls/h2t", data="nowhere")
    out = str(tmp_path / "out")
    with pytest.raises(
        ExportError, match=r"formats is \['onnx', 'pt'\]; allowed: safetensors, onnx"
    ):
        export(run, out, formats=["onnx", "pt"])
    with pytest.raises(ExportError, match="there is an export already"):
        export(run, str(classified[0]))
    with pytest.raises(checkpoint.CheckpointError, match="neither a checkpoint nor a run"):
        export(out, out)
    with pytest.raises(DatasetError, match="elsewhere"):
        export(run, out, data=f"{out}/elsewhere")
    other = str(tmp_path / "other")
    convert(DRAWN, nine_classes(), other, threads=1)
    with pytest.raises(ExperimentError, match="other has 9 classes, not 8"):
        export(run, out, data=other)
    monkeypatch.setattr(graph, "_LIBRARIES", ("onnx", "no_such_library"))
    with pytest.raises(ExportError, match=r"needs no_such_library: pip install -e '.\[export"):
        export(run, out)
    assert not Path(out).exists()


def nine_classes():
    return dataclasses.replace(open_drawn(2, 2, 32), class_names=(*NAMES, "more"))


def test_classes_and_figures_are_told_where_they_are_known(published, data, tmp_path):
    run, _ = published("drawn_cls/h2t", data="nowhere", step=5)
    found = export(run, str(tmp_path / "a"), formats=["safetensors"])
    assert found["notes"][0].startswith("no names of classes")
    about = read(tmp_path / "a", "task.json")
    assert about["classes"] is None
    assert about["metrics"] is None  # other steps were judged
    found = export(run, str(tmp_path / "b"), formats=["safetensors"], data=data)
    assert found["notes"] == []
    assert read(tmp_path / "b", "task.json")["classes"] == list(NAMES)


def test_an_interrupted_export_is_none(published, tmp_path, monkeypatch):
    run, _ = published("drawn_cls/h2t")
    write, out = storage.write_bytes, str(tmp_path / "out")
    for calls in range(3):
        left = [None] * (calls + 1)  # the probe, and what comes before the manifest

        def write_some(uri, content, left=left):
            if not left:
                raise KeyboardInterrupt
            left.pop()
            write(uri, content)

        monkeypatch.setattr(storage, "write_bytes", write_some)
        with pytest.raises(KeyboardInterrupt):
            export(run, out, formats=["safetensors"])
        assert not (tmp_path / "out" / "export.json").exists()
    monkeypatch.setattr(storage, "write_bytes", write)
    assert export(run, out, formats=["safetensors"])["files"].keys() == {
        "task.json",
        "task.safetensors",
    }


def test_job_exports_a_hubs_version_into_a_bucket(published, s3, monkeypatch):
    spec = importlib.util.spec_from_file_location("export_job", JOB)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    run, _ = published("drawn_cls/edsr-x4/sr4ir", *SMALL_EDSR)
    bucket = s3()
    monkeypatch.setenv("SR4IR_HUB", f"{bucket}/hub")
    versions.publish(run, "team/net", hub=f"{bucket}/hub")
    arguments = ["hub://team/net", "--out", f"{bucket}/out", "--formats", "safetensors", "--json"]
    result = CliRunner().invoke(module.app, [*arguments, f"{bucket}/result.json"])
    assert result.exit_code == 0, result.output
    assert "task.safetensors" in result.stdout
    listed = storage.read_json(f"{bucket}/out/export.json")
    assert storage.read_json(f"{bucket}/result.json") == {"out": f"{bucket}/out", **listed}
    assert set(storage.list_files(f"{bucket}/out")) == {*listed["files"], "export.json"}
    result = CliRunner().invoke(module.app, [*arguments, f"{bucket}/result.json"])
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: {bucket}/out: there is an export already")
    assert result.stderr.count("\n") == 1
