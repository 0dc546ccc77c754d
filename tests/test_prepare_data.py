import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from sr4ir_dist import storage
from sr4ir_dist.data.convert import CONVERTERS
from sr4ir_dist.data.shards import load_manifest

REPOSITORY = Path(storage.__file__).parents[1]
JOB = REPOSITORY / "jobs" / "prepare_data.py"


@pytest.fixture(scope="module")
def run() -> Callable[..., Result]:
    """Runs the job in this process with some arguments."""
    spec = importlib.util.spec_from_file_location("prepare_data_job", JOB)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda *arguments: CliRunner().invoke(module.app, [str(item) for item in arguments])


def test_drawn_into_a_bucket_with_json(run: Callable[..., Result], s3: Callable[[], str]):
    bucket = s3()
    summary = f"{bucket}/summary.json"
    result = run(
        *("drawn", "--out", f"{bucket}/drawn", "--json", summary),
        *("--train-count", 20, "--val-count", 8, "--size", 32),
    )
    assert result.exit_code == 0, result.output
    assert "drawn: images, classification, segmentation, detection" in result.stdout
    found = storage.read_json(summary)
    assert found["out"] == f"{bucket}/drawn"
    manifest = load_manifest(f"{bucket}/drawn", "train")
    assert found["splits"]["train"] == {
        "rows": 20,
        "classes": 8,
        "shards": 1,
        "record_batches": 20,
        "bytes": manifest.shards[0].bytes,
        "skipped": [],
        "resumed": 0,
        "tally": {},
        "digest": manifest.digest,
    }
    assert found["splits"]["val"]["rows"] == 8


def test_refuses_to_overwrite(run: Callable[..., Result], sr_folder: Path, tmp_path: Path):
    arguments = ("sr-folder", "--root", sr_folder, "--out", tmp_path / "out", "--val-count", 3)
    assert run(*arguments).exit_code == 0
    assert load_manifest(str(tmp_path / "out"), "val").rows == 3
    again = run(*arguments)
    assert again.exit_code == 0
    assert "this conversion is finished already" in again.stderr
    other = run(*arguments, "--name", "plain")
    assert other.exit_code == 1
    assert "pass --overwrite to replace it" in other.stderr
    assert other.stdout == ""
    assert run(*arguments, "--overwrite", "--name", "plain").exit_code == 0
    assert load_manifest(str(tmp_path / "out"), "val").name == "plain"


def test_bad_images(run: Callable[..., Result], image_folder: Path, tmp_path: Path):
    (image_folder / "val" / "cat" / "0.jpg").write_text("no image")
    arguments = ("image-folder", "--root", image_folder, "--out", tmp_path / "out")
    failed = run(*arguments)
    assert failed.exit_code == 1
    assert "cat/0.jpg: no readable image" in failed.stderr
    assert not (tmp_path / "out").exists()
    skipped = run(*arguments, "--on-bad-row", "skip", "--json", tmp_path / "summary.json")
    assert skipped.exit_code == 0
    assert "skipped in val: " in skipped.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["splits"]["val"]["rows"] == 5
    assert len(summary["splits"]["val"]["skipped"]) == 1


@pytest.fixture
def coco_places(tmp_path: Path) -> list[str]:
    """Options for one image a split in COCO's format; in train one of two boxes is empty."""
    options = []
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        Image.new("RGB", (20, 24)).save(tmp_path / split / "one.png")
        boxes = [[1, 2, 3, 4], [30, 2, 5, 5]] if split == "train" else [[0, 0, 20, 24]]
        annotations = [
            {"id": i, "image_id": 5, "category_id": 3, "bbox": box} for i, box in enumerate(boxes)
        ]
        content = {
            "images": [{"id": 5, "file_name": "one.png", "height": 24, "width": 20}],
            "annotations": annotations,
            "categories": [{"id": 3, "name": "kite"}],
        }
        path = tmp_path / f"{split}.json"
        path.write_text(json.dumps(content))
        options += [f"--{split}-annotations", str(path)]
        options += [f"--{split}-images", str(tmp_path / split)]
    return options


def test_what_was_dropped_is_told(
    run: Callable[..., Result], coco_places: list[str], tmp_path: Path
):
    out, summary = tmp_path / "out", tmp_path / "summary.json"
    result = run("coco_det", *coco_places, "--out", out, "--json", summary)
    assert result.exit_code == 0, result.output
    assert "train: boxes dropped (empty or outside their image): 1" in result.stderr
    assert "val: boxes dropped" not in result.stderr
    splits = json.loads(summary.read_text())["splits"]
    assert splits["train"]["tally"]["boxes"] == splits["val"]["tally"]["boxes"] == 1
    assert splits["train"]["tally"]["boxes dropped (empty or outside their image)"] == 1
    source = load_manifest(str(out), "train").source
    assert source["tally"] == splits["train"]["tally"]


def test_coco_without_a_place(run: Callable[..., Result], coco_places: list[str], tmp_path: Path):
    result = run("coco_seg", *coco_places[2:], "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "--train-annotations is missing: it is needed where there is no --root" in result.stderr


@pytest.mark.parametrize("name", ["voc_seg", "voc_det", "cars"])
def test_another_folder_is_refused(run: Callable[..., Result], tmp_path: Path, name: str):
    result = run(name, "--root", tmp_path, "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert f"error: {tmp_path}: expected " in result.stderr
    assert not (tmp_path / "out").exists()


def test_help_of_every_converter(run: Callable[..., Result]):
    overview = run("--help")
    assert overview.exit_code == 0
    for name in CONVERTERS:
        assert name in overview.stdout
        text = run(name, "--help")
        assert text.exit_code == 0
        assert "--out" in text.stdout
        assert CONVERTERS[name].help[:30] in text.stdout


@pytest.mark.parametrize("name", CONVERTERS)
def test_a_command_has_its_converters_options(run: Callable[..., Result], name: str):
    text = run(name, "--help").stdout
    for option in CONVERTERS[name].options:
        assert f"--{option.replace('_', '-')}"[:12] in text
    for option in ("--out", "--name", "--on-bad-row", "--overwrite", "--threads", "--address"):
        assert option in text


def test_verify(run: Callable[..., Result], s3: Callable[[], str], tmp_path: Path):
    bucket, summary = s3(), tmp_path / "found.json"
    sizes = ("--train-count", 20, "--val-count", 8, "--size", 32)
    assert run("drawn", "--out", bucket, *sizes).exit_code == 0
    good = run("verify", bucket)
    assert good.exit_code == 0, good.output
    assert "problem" not in good.stderr
    (shard,) = load_manifest(bucket, "val").shards
    place = f"{bucket}/val/{shard.path}"
    content = bytearray(storage.read_bytes(place))
    content[len(content) // 2] ^= 1
    storage.write_bytes(place, bytes(content))
    assert run("verify", bucket, "--split", "train").exit_code == 0
    bad = run("verify", bucket, "--json", summary)
    assert bad.exit_code == 1
    assert f"problem: val, shard {shard.path}: shard {shard.path} (rows 0 to 7 of" in bad.stderr
    found = json.loads(summary.read_text())["splits"]
    assert found["train"]["problems"] == []
    assert [problem["shard"] for problem in found["val"]["problems"]] == [shard.path]
    assert "no dataset here" in run("verify", f"{bucket}/nothing").stderr


def test_the_job_as_a_program(tmp_path: Path):
    (tmp_path / "file").touch()
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    result = subprocess.run(
        [sys.executable, str(JOB), "drawn", "--out", "file/below"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert "error: " in result.stderr
    assert "Traceback" not in result.stderr
    assert "cannot be written: " in result.stderr
