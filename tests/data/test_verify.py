import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sr4ir_dist import storage
from sr4ir_dist.data.schema import DatasetError, Manifest
from sr4ir_dist.data.verify import VerifiedSplit, verify

TASKS = ("images", "classification", "segmentation", "detection")
Write = Callable[..., Manifest]


@pytest.fixture(params=["path", "s3"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "set") if request.param == "path" else request.getfixturevalue("s3")()


def verified(uri: str) -> VerifiedSplit:
    found = verify(uri, threads=2)
    assert [*found] == ["train"]
    return found["train"]


def test_a_good_dataset(uri: str, write: Write):
    manifest = write(uri, 30, tasks=TASKS)
    assert len(manifest.shards) > 5
    calls: list[tuple[str, int, int]] = []
    found = verify(uri, progress=lambda *call: calls.append(call))
    size = sum(shard.bytes for shard in manifest.shards)
    assert found == {"train": VerifiedSplit(30, len(manifest.shards), size, ())}
    assert calls[0] == ("train", 0, 30)
    assert calls[-1] == ("train", 30, 30)
    assert len(calls) == len(manifest.shards) + 1


@pytest.mark.parametrize("how", ["altered", "truncated", "gone"])
def test_damaged_shards(uri: str, write: Write, how: str):
    manifest = write(uri, 30)
    damaged = {1: 1, 4: -9}
    for number, at in damaged.items():
        place = storage.join(uri, "train", manifest.shards[number].path)
        content = bytearray(storage.read_bytes(place))
        content[at * len(content) // 10] ^= 4
        storage.delete(place)
        if how != "gone":
            storage.write_bytes(place, bytes(content[: -8 if how == "truncated" else None]))
    found = verified(uri).problems
    assert [problem.shard for problem in found] == [manifest.shards[n].path for n in damaged]
    said = {"altered": "is altered", "truncated": "is truncated", "gone": "No such|nothing there"}
    for problem in found:
        assert any(words in problem.what for words in said[how].split("|"))


def first_shard(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda manifest: manifest["shards"][0].update(changes)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (first_shard(sha256="0" * 64), "is altered: expected sha256 000"),
        (first_shard(bytes=3), "expected 3 bytes, found"),
        (first_shard(batch_rows=[1, 1, 2]), "has record batches [2, 2], the manifest says [1, 1"),
        (lambda manifest: manifest["tasks"].remove("segmentation"), "has columns ['id'"),
        (lambda manifest: manifest["class_names"].pop(), "label is 2, expected 0 to 1"),
        (lambda manifest: manifest.pop("shards"), "missing keys ['shards']"),
    ],
)
def test_a_manifest_that_says_otherwise(
    tmp_path: Path, write: Write, change: Callable[[dict[str, Any]], None], said: str
):
    write(str(tmp_path), 12, tasks=TASKS[:3])
    place = tmp_path / "train" / "manifest.json"
    manifest = json.loads(place.read_text())
    del manifest["sha256"]  # or any change is that of a damaged manifest
    assert manifest["shards"][0]["batch_rows"] == [2, 2]
    change(manifest)
    place.write_text(json.dumps(manifest))
    found = [str(problem) for problem in verified(str(tmp_path)).problems]
    assert said in found[0]


def test_a_wrong_group(tmp_path: Path, write: Write):
    write(str(tmp_path), 3, tasks=TASKS, size=lambda row: (24, 24))
    place = tmp_path / "train" / "manifest.json"
    manifest = json.loads(place.read_text())
    del manifest["sha256"]  # or any change is that of a damaged manifest
    groups = manifest["shards"][0]["batch_groups"]
    assert set(groups) == {4}
    groups[-1] = 5
    place.write_text(json.dumps(manifest))
    (problem,) = verified(str(tmp_path)).problems
    assert (problem.row, problem.id) == (2, "r002")
    assert problem.what == "in a record batch of group 5, of 24x24 pixels"


def picture(mode: str, size: tuple[int, int], value: int = 0) -> bytes:
    sink = io.BytesIO()
    Image.new(mode, size, value).save(sink, "PNG")
    return sink.getvalue()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"image": b"no image"}, "no readable image"),
        ({"image": picture("RGB", (20, 24))[:-30]}, "no readable image"),
        ({"image": picture("RGB", (21, 24))}, "image of 24x21 pixels, expected 24x20"),
        ({"mask": b"no mask"}, "no readable mask"),
        ({"mask": picture("L", (24, 20))}, "mask of 20x24 pixels, expected 24x20"),
        ({"mask": picture("L", (20, 24), 3)}, "mask has class numbers [3], expected 0 to 2 or 255"),
    ],
)
def test_bad_rows_are_named(uri: str, write_given: Write, change: dict[str, bytes], said: str):
    columns = {"height": 24, "width": 20, "label": 1, "mask": picture("L", (20, 24), 2)}
    row = {"image": picture("RGB", (20, 24)), **columns}
    rows = [{"id": f"r{i}", **row, **(change if i in (3, 7) else {})} for i in range(9)]
    tasks = ("images", "classification", "segmentation")
    size = 3 * (len(row["image"]) + len(row["mask"]))
    manifest = write_given(uri, rows, tasks=tasks, class_names=("a", "b"), shard_bytes=size)
    assert len(manifest.shards) == 3
    found = verified(uri).problems
    for problem, number, shard in zip(found, (3, 7), manifest.shards[1:], strict=True):
        assert (problem.shard, problem.row, problem.id) == (shard.path, number, f"r{number}")
        assert said in problem.what
        assert str(problem).startswith(f"train, shard {shard.path}, row {number}, sample r{number}")


def test_splits(uri: str, write: Write):
    with pytest.raises(DatasetError, match="no dataset here"):
        verify(uri)
    write(uri, 3)
    (problem,) = verify(uri, ["val"])["val"].problems
    assert "no split 'val'" in str(problem)
