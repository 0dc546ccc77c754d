"""Whole predictions in this process: what is written, again after a kill, and what is refused."""

import contextlib
import csv
import importlib.util
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from predicted_folders import contents
from pycocotools.coco import COCO
from typer.testing import CliRunner

from sr4ir_dist import checkpoint, storage
from sr4ir_dist.data.synthetic import CLASS_NAMES
from sr4ir_dist.hub import versions
from sr4ir_dist.prediction.inputs import PredictionError, read_image
from sr4ir_dist.prediction.parts import PartWorker
from sr4ir_dist.prediction.plan import cut_into_parts, make_plan
from sr4ir_dist.prediction.predictor import Predictor
from sr4ir_dist.prediction.run import here, predict
from sr4ir_dist.prediction.tiles import Tiling
from sr4ir_dist.tasks.palette import voc_palette

NAMES = tuple(CLASS_NAMES)
JOB = Path(storage.__file__).parents[1] / "jobs" / "predict.py"
PATHS = [f"{folder}/{n}.png" for folder, count in (("a", 5), ("b", 4)) for n in range(count)]
REASON = "b/broken.png: no readable image: cannot identify image file"


def predict_here(uri, source, out, say=lambda text: None, **options):
    plan, parts = make_plan(uri, str(source), str(out), **options)
    return predict(plan, parts, here(threads=1), say)


def each_alone(uri, roles, photos):
    """What the predictor finds in each photo."""
    saved = checkpoint.resolve(uri)
    one = Predictor(saved, roles, images=True, tiling=Tiling(0, 0), most_pixels=1 << 24)
    return {path: one.predict(read_image(str(photos / path))) for path in PATHS}


def pixels(path):
    with Image.open(path) as picture:
        return np.array(picture)


@pytest.fixture(scope="module")
def job():
    spec = importlib.util.spec_from_file_location("predict_job", JOB)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return lambda *words: CliRunner().invoke(module.app, [str(word) for word in words])


def test_classification(published, photos, tmp_path):
    uri, _ = published("drawn_cls/edsr-x4/sr4ir")
    told = []
    summary = predict_here(uri, photos, tmp_path, told.append)
    found = each_alone(uri, ("sr", "task"), photos)
    with (tmp_path / "scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["image", "class", "name", *NAMES]
    assert [row["image"] for row in rows] == PATHS
    for row in rows:
        scores = found[row["image"]].scores
        assert int(row["class"]) == int(scores.argmax())
        assert row["name"] == NAMES[int(row["class"])]
        given = torch.tensor([float(row[name]) for name in NAMES])
        assert torch.allclose(given, scores, rtol=0, atol=1e-6)
    for path in PATHS:
        assert (pixels(tmp_path / "sr" / path) == found[path].sr.permute(1, 2, 0).numpy()).all()
    assert (tmp_path / "skipped.csv").read_text() == (
        f"image,reason\nb/broken.png,{photos}/{REASON}\n"
    )
    counts = {"images": 10, "predicted": 9, "skipped": 1}
    assert {key: summary[key] for key in counts} == counts
    assert storage.read_json(tmp_path / "summary.json").items() <= summary.items()
    assert f"skipped b/broken.png: {photos}/{REASON}" in told
    assert told[-1].startswith("10 of 10 images, ")
    assert told[-1].endswith(" images/s, 1 skipped")
    files = {"prediction.json", "scores.csv", "skipped.csv", "summary.json"}
    assert set(contents(tmp_path)) == files | {f"sr/{path}" for path in PATHS}


def test_segmentation(published, photos, tmp_path):
    uri, _ = published("drawn_seg/edsr-x4/sr4ir")
    summary = predict_here(uri, photos, tmp_path, images=False)
    found = each_alone(uri, ("sr", "task"), photos)
    assert not (tmp_path / "sr").exists()
    assert summary["files"] == ["skipped.csv"]
    for path in PATHS:
        mask = found[path].mask.numpy()
        # Whoever reads the palette's indices has class numbers; whoever looks sees VOC's colours.
        assert (pixels(tmp_path / "masks" / path) == mask).all()
        with Image.open(tmp_path / "masks" / path) as picture:
            seen = np.array(picture.convert("RGB"))
        assert (seen == np.array(voc_palette(), np.uint8)[mask]).all()


def test_detection(published, photos, tmp_path):
    uri, _ = published("drawn_det/edsr-x4/sr4ir")
    predict_here(uri, photos, tmp_path)
    found = each_alone(uri, ("sr", "task"), photos)
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(tmp_path / "boxes.json"))
        # Also as detections next to the objects of someone else's file.
        again = coco.loadRes(coco.dataset["annotations"])
    assert [each["name"] for each in coco.loadCats(coco.getCatIds())] == list(NAMES)
    assert [each["file_name"] for each in coco.dataset["images"]] == PATHS
    total = 0
    for image in coco.dataset["images"]:
        expected = found[image["file_name"]]
        assert (image["height"], image["width"]) == expected.size
        objects = coco.loadAnns(coco.getAnnIds(image["id"]))
        boxes = torch.tensor([each["bbox"] for each in objects]).view(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        assert torch.allclose(boxes, expected.boxes["boxes"], atol=2e-3)
        assert [each["category_id"] for each in objects] == expected.boxes["labels"].tolist()
        scores = torch.tensor([each["score"] for each in objects])
        assert torch.allclose(scores, expected.boxes["scores"], atol=1e-6)
        total += len(objects)
    assert total == len(again.anns) > 9


def test_an_sr_network_alone(published, photos, tmp_path):
    uri, _ = published("drawn_cls/edsr-x4/pretrain")
    summary = predict_here(uri, photos / "a", tmp_path)
    assert (summary["predicted"], summary["files"]) == (5, [])
    found = each_alone(uri, ("sr",), photos)
    names = {f"sr/{n}.png": f"a/{n}.png" for n in range(5)}
    assert set(contents(tmp_path)) == {"prediction.json", "summary.json", *names}
    for name, path in names.items():
        assert (pixels(tmp_path / name) == found[path].sr.permute(1, 2, 0).numpy()).all()


def test_networks_without_an_sr_network(published, photos, tmp_path):
    for name, scale in (("drawn_seg/x4/l2t", 4), ("drawn_seg/h2t", 1)):
        uri, _ = published(name)
        out = tmp_path / str(scale)
        predict_here(uri, photos, out)
        assert not (out / "sr").exists()
        assert pixels(out / "masks" / "a" / "0.png").shape == (24 * scale, 40 * scale)


def test_from_bucket_to_bucket(published, photos, tmp_path, s3):
    uri, _ = published("drawn_det/edsr-x4/sr4ir")
    bucket = s3()
    for path in photos.rglob("*.png"):
        name = path.relative_to(photos).as_posix()
        storage.write_bytes(f"{bucket}/in/{name}", path.read_bytes())
    for file in storage.list_files(uri):
        storage.write_bytes(f"{bucket}/run/{file}", Path(uri, file).read_bytes())
    predict_here(uri, photos, tmp_path)
    summary = predict_here(f"{bucket}/run", f"{bucket}/in/", f"{bucket}/out")
    assert summary["predicted"] == 9
    assert storage.read_json(f"{bucket}/out/boxes.json")["images"]
    there = {name: storage.read_bytes(f"{bucket}/out/{name}") for name in contents(tmp_path)}
    assert set(storage.list_files(f"{bucket}/out")) == set(there)
    here_ = contents(tmp_path)
    for name in sorted(there):
        if name.endswith(".png"):
            assert there[name] == here_[name], name
    boxes, remote = (json.loads(each["boxes.json"]) for each in (here_, there))
    assert boxes["annotations"] == remote["annotations"]


def test_a_checkpoint_may_be_named(published, photos, tmp_path, monkeypatch):
    uri, _ = published("drawn_cls/x4/l2t")
    monkeypatch.setenv("SR4IR_HUB", str(tmp_path / "hub"))
    name = versions.publish(uri, "team/l2t", hub=str(tmp_path / "hub"))
    plan, _ = make_plan("hub://team/l2t", str(photos), str(tmp_path / "out"))
    assert plan.checkpoint == versions.uri_of(name, str(tmp_path / "hub"))
    # What the run itself holds is the same.
    assert make_plan(uri, str(photos), str(tmp_path / "out"))[0].checkpoint != plan.checkpoint


def test_a_killed_prediction_goes_on_where_it_was(published, photos, tmp_path):
    uri, _ = published("drawn_cls/edsr-x4/sr4ir")
    command = [sys.executable, str(JOB), uri, str(photos), "--cpus", "1", "--cpu", "--out"]
    # Small tiles take a while.
    command += [str(tmp_path / "out"), "--tile", "1", "--overlap", "3"]
    environment = os.environ | {"PYTHONPATH": str(JOB.parents[1])}
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while not (first := set((tmp_path / "out").glob("parts/*.json"))):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    finished = {path: (path.stat().st_ino, path.read_bytes()) for path in first}
    assert 0 < len(finished) < 10
    assert not (tmp_path / "out" / "summary.json").exists()
    # As writers leave them that are killed in mid-writing.
    left = [f"{name}.{'0' * 32}.tmp" for name in ("sr/b/.1.png", ".scores.csv", "parts/.1.json")]
    for name in left:
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).touch()
    told, options = [], {"tile": 1, "overlap": 3}
    plan, parts = make_plan(uri, str(photos), str(tmp_path / "out"), **options)
    run, asked = here(threads=1), []

    def watched(plan, missing):
        asked.extend(missing)
        yield from run(plan, missing)
        for path, (inode, data) in finished.items():
            assert (path.stat().st_ino, path.read_bytes()) == (inode, data)

    summary = predict(plan, parts, watched, told.append)
    done = summary["done_before"]
    assert told[0] == f"continuing: {done} of 10 images were done before"
    assert len(finished) <= done == 10 - sum(len(part.images) for part in asked)
    predict_here(uri, photos, tmp_path / "whole", **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_finished_prediction_is_left_alone(published, photos, tmp_path):
    uri, _ = published("drawn_cls/x4/l2t")
    first = predict_here(uri, photos, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    told = []
    second = predict_here(uri, photos, tmp_path, told.append)
    assert told == [f"{tmp_path} is finished: nothing is left to predict"]
    assert before.items() == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}.items()
    assert (second["predicted"], second["done_before"]) == (first["predicted"], 10)


def test_a_part_that_another_worker_finished_is_not_done_again(published, photos, tmp_path):
    uri, _ = published("drawn_cls/x4/l2t")
    plan, parts = make_plan(uri, str(photos), str(tmp_path))
    place = parts[0].record_uri(plan.out)
    storage.write_json(place, {"images": [{"path": "done before"}]})
    assert PartWorker(plan).predict(parts[0]) == {"images": [{"path": "done before"}]}


def test_another_checkpoint_input_or_option_is_refused(published, photos, tmp_path):
    uri, _ = published("drawn_cls/edsr-x4/sr4ir")
    other, _ = published("drawn_cls/edsr-x4/sod-mtgan")
    out = tmp_path / "out"
    make_plan(uri, str(photos), str(out))
    copy = tmp_path / "copy"
    for file in storage.list_files(uri):
        storage.write_bytes(copy / file, Path(uri, file).read_bytes())
    make_plan(str(copy), str(photos), str(out))  # it has the same networks
    for changed, message in (
        ({"uri": other}, "checkpoint_sha256='.*', not '.*'; checkpoint .*, not "),
        ({"source": str(photos / "a")}, "images=10, not 5; .*input .*, not "),
        ({"tile": 8}, "tile=256, not 8. Name another place"),
        ({"overlap": 8}, "overlap=6, not 8"),
        ({"images": False}, "sr_images=True, not False"),
        ({"predictions": False}, "predictions=True, not False"),
        ({"most_pixels": 5}, "most_pixels=8388608, not 5"),
    ):
        options = {"uri": uri, "source": str(photos), "out": str(out)} | changed
        with pytest.raises(PredictionError, match=f"has predictions of another kind: .*{message}"):
            make_plan(**options)


def test_other_images_of_the_same_names_are_another_input(published, photos, tmp_path):
    uri, _ = published("drawn_cls/x4/l2t")
    days = [tmp_path / "day1", tmp_path / "day2"]
    for day in days:
        shutil.copytree(photos, day)
    (tmp_path / "listed.txt").write_text("day1/a/0.png")
    sources = [*map(str, days), str(tmp_path / "listed.txt"), str(days[0] / "a" / "0.png")]
    for number, source in enumerate(sources):
        make_plan(uri, source, str(tmp_path / f"out{number}"))
        make_plan(uri, source, str(tmp_path / f"out{number}"))
    with pytest.raises(PredictionError, match=r"another kind: .*input .*day1, not .*day2\."):
        make_plan(uri, sources[1], str(tmp_path / "out0"))
    # Of equal size: the time at which it was written tells.
    image = days[0] / "a" / "0.png"
    image.write_bytes(image.read_bytes()[::-1])
    for number in (0, 2, 3):
        with pytest.raises(PredictionError, match=r"input .* has changed since\."):
            make_plan(uri, sources[number], str(tmp_path / f"out{number}"))


def test_what_can_never_be_is_refused_before_anything_is_written(published, photos, tmp_path):
    sr, _ = published("drawn_cls/edsr-x4/pretrain")
    task, _ = published("drawn_cls/x4/l2t")
    out = tmp_path / "out"
    for uri, source, where, options, message in (
        (
            sr,
            photos,
            out,
            {"images": False},
            "nothing to write: .*pretrain has an SR network, whose results",
        ),
        (
            task,
            photos,
            out,
            {"predictions": False},
            "nothing to write: .*l2t has a task network, whose results",
        ),
        (sr, photos, photos / "out", {}, "must lie apart"),
        (sr, photos, photos, {}, "must lie apart"),
        (sr, photos / "a", f"file://{photos}", {}, "must lie apart"),
        (sr, photos, out, {"most_pixels": 0}, "most_pixels=0: expected at least 1"),
        (sr, photos, out, {"tile": -1}, "tile=-1"),
        (task, photos, out, {"data": str(photos)}, "no manifest"),
        (str(tmp_path), photos, out, {}, "neither a checkpoint nor a run"),
    ):
        with pytest.raises(ValueError, match=message):
            make_plan(uri, str(source), str(where), **options)
    assert not out.exists()


def test_classes_without_names_are_numbered(published, photos, tmp_path, drawn_data):
    uri, _ = published("drawn_cls/x4/l2t")
    hidden = Path(f"{drawn_data}-hidden")
    Path(drawn_data).rename(hidden)
    try:
        told = []
        predict_here(uri, photos, tmp_path / "a", told.append)
        plan, _ = make_plan(uri, str(photos), str(tmp_path / "b"), data=str(hidden))
    finally:
        hidden.rename(drawn_data)
    header = (tmp_path / "a" / "scores.csv").read_text().splitlines()[0]
    assert header == "image,class,name," + ",".join(f"class {n}" for n in range(8))
    assert plan.classes == NAMES


def test_where_no_image_can_be_read_the_tables_are_there_and_empty(published, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "broken.png").write_bytes(b"not an image")
    for name, table in (("drawn_cls/x4/l2t", "scores.csv"), ("drawn_det/edsr-x4/sr4ir", None)):
        uri, _ = published(name)
        summary = predict_here(uri, tmp_path / "in", out := tmp_path / name)
        assert (summary["predicted"], summary["skipped"]) == (0, 1)
        if table is None:
            boxes = json.loads((out / "boxes.json").read_text())
            assert (boxes["images"], boxes["annotations"]) == ([], [])
        else:
            header = "image,class,name," + ",".join(NAMES)
            assert (out / table).read_text() == f"{header}\n"


def test_parts_depend_on_the_images_alone():
    assert [len(part.images) for part in cut_into_parts(list(range(10)))] == [1] * 10
    assert [len(part.images) for part in cut_into_parts(list(range(130)))] == [3] * 43 + [1]
    many = cut_into_parts(list(range(5000)))
    assert [image for part in many for image in part.images] == list(range(5000))
    assert max(len(part.images) for part in many) == 32


def test_storage_that_fails_is_no_bad_image(published, photos, tmp_path):
    uri, _ = published("drawn_cls/x4/l2t")
    plan, parts = make_plan(uri, str(photos), str(tmp_path))
    (tmp_path / "parts").write_text("where a folder should be")
    with pytest.raises(storage.StorageError):
        list(here(threads=1)(plan, parts))


def test_the_job(job, published, photos, tmp_path):
    uri, _ = published("drawn_cls/edsr-x4/sr4ir")
    result = job(uri, photos, "--out", tmp_path / "out", "--cpu", "--json", tmp_path / "r.json")
    assert result.exit_code == 0, result.output
    assert "skipped b/broken.png" in result.stderr
    assert "images_per_second" in result.stdout
    summary = storage.read_json(tmp_path / "r.json")
    assert (summary["predicted"], summary["skipped"]) == (9, 1)
    again = job(uri, photos, "--out", tmp_path / "out", "--on-bad-image", "fail")
    assert again.exit_code == 1
    assert "1 images were skipped, see" in again.stderr
    assert job(uri, photos / "a", "--out", tmp_path / "a", "--on-bad-image", "fail").exit_code == 0
    refused = job(uri, photos, "--out", tmp_path / "out", "--tile", "8")
    assert refused.exit_code == 1
    assert "error: --out" in refused.stderr
