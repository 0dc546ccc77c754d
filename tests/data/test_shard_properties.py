"""Any rows come back, and any damage gives an error that names the file."""

import dataclasses
import hashlib
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sr4ir_dist import storage
from sr4ir_dist.data.cache import ShardCache
from sr4ir_dist.data.groups import aspect_group
from sr4ir_dist.data.schema import TASKS, DatasetError, Manifest
from sr4ir_dist.data.shards import load_manifest
from sr4ir_dist.data.splits import Split, open_split

CLASSES = ("a", "b", "c")
labels = st.integers(0, len(CLASSES) - 1)


@st.composite
def box(draw: st.DrawFn, height: int, width: int) -> list[float]:
    """A box inside an image, on a grid of eighths of a pixel that float32 holds exactly."""
    x0, y0 = draw(st.integers(0, 8 * width - 1)), draw(st.integers(0, 8 * height - 1))
    x1, y1 = draw(st.integers(x0 + 1, 8 * width)), draw(st.integers(y0 + 1, 8 * height))
    return [x0 / 8, y0 / 8, x1 / 8, y1 / 8]


@st.composite
def row(draw: st.DrawFn, tasks: tuple[str, ...]) -> dict[str, Any]:
    height, width = draw(st.integers(1, 5000)), draw(st.integers(1, 5000))
    drawn: dict[str, Any] = {
        "id": draw(st.text(st.characters(exclude_categories=["Cs"]), max_size=8)),
        "image": draw(st.binary(min_size=1, max_size=200)),
        "height": height,
        "width": width,
    }
    if "classification" in tasks:
        drawn["label"] = draw(labels)
    if "segmentation" in tasks:
        drawn["mask"] = draw(st.binary(min_size=1, max_size=50))
    if "detection" in tasks:
        boxes = draw(st.lists(box(height, width), max_size=3))
        drawn["boxes"] = boxes
        drawn["box_labels"] = [draw(labels) for _ in boxes]
        drawn["crowd"] = [draw(st.booleans()) for _ in boxes]
    return drawn


@st.composite
def dataset(draw: st.DrawFn) -> tuple[tuple[str, ...], list[dict[str, Any]]]:
    others = draw(st.sets(st.sampled_from(TASKS[1:])))
    tasks = tuple(task for task in TASKS if task == "images" or task in others)
    return tasks, draw(st.lists(row(tasks), min_size=1, max_size=12))


@given(dataset(), st.integers(1, 1500), st.integers(1, 400), st.integers(1, 64))
def test_any_rows_come_back(write_given, made, shard_bytes, batch_bytes, min_batches):
    tasks, rows = made
    with tempfile.TemporaryDirectory() as uri:
        limits = {"shard_bytes": shard_bytes, "batch_bytes": batch_bytes}
        made = {"tasks": tasks, "class_names": CLASSES, "min_batches": min_batches}
        write_given(uri, rows, **made, **limits)
        split = open_split(uri, "train")
        cache, found = ShardCache(split), []
        for number, shard in enumerate(split.manifest.shards):
            with cache.open(number) as opened:
                assert opened.reader.batch_rows == shard.batch_rows
                found.append(opened.reader.rows(range(shard.rows)))
    flat = [item for part in found for item in part]
    if "detection" not in tasks:
        assert flat == rows
        return

    def group(item: dict[str, Any]) -> int:
        return aspect_group(item["height"], item["width"])

    for part, shard in zip(found, split.manifest.shards, strict=True):
        groups = zip(shard.batch_groups, shard.batch_rows, strict=True)
        assert [group(item) for item in part] == [g for g, count in groups for _ in range(count)]
    # Rows keep their order within their group, and sorting is stable.
    assert sorted(flat, key=group) == sorted(rows, key=group)


@pytest.fixture(scope="module")
def sound(tmp_path_factory, write_given) -> tuple[Path, Manifest]:
    """A train split in a shard, and its manifest; a new file for each who damages it."""
    uri = tmp_path_factory.mktemp("sound")
    tasks = ("images", "classification", "detection")
    rows = [
        {"id": f"r{i}", "image": bytes([i]) * 40, "height": 9, "width": 9 + 3 * i}
        | {"label": i % 3, "boxes": [[0, 0, 5, 5]], "box_labels": [1], "crowd": [False]}
        for i in range(5)
    ]
    return uri, write_given(str(uri), rows, tasks=tasks, class_names=CLASSES)


def refused(sound: tuple[Path, Manifest], content: bytes) -> None:
    """A shard of such content must be refused by its name."""
    uri, manifest = sound
    (shard,) = manifest.shards
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train" / shard.path
        path.parent.mkdir()
        path.write_bytes(content)
        cache = ShardCache(Split(((folder, manifest),)))
        with pytest.raises(DatasetError, match=re.escape(str(path))):
            cache.open(0)


def shard_content(sound: tuple[Path, Manifest]) -> bytes:
    uri, manifest = sound
    return (uri / "train" / manifest.shards[0].path).read_bytes()


@settings(max_examples=300)
@given(data=st.data())
def test_a_shard_with_any_bit_flipped_is_refused(sound, data):
    content = bytearray(shard_content(sound))
    bit = data.draw(st.integers(0, 8 * len(content) - 1))
    content[bit // 8] ^= 1 << bit % 8
    refused(sound, content)


@given(data=st.data())
def test_a_shard_cut_or_extended_anywhere_is_refused(sound, data):
    content = shard_content(sound)
    end = data.draw(st.integers(0, len(content) - 1))
    refused(sound, content[:end])
    refused(sound, content + content[end:])


@pytest.mark.parametrize("version", ["1", "3", None])
def test_a_shard_of_another_version_is_refused(sound, version, tmp_path):
    uri, manifest = sound
    (shard,) = manifest.shards
    with pa.memory_map(str(uri / "train" / shard.path)) as source, pa.ipc.open_file(source) as file:
        table = file.read_all()
    metadata = {} if version is None else {"format_version": version}
    path = tmp_path / "train" / shard.path
    path.parent.mkdir()
    with pa.ipc.new_file(str(path), table.schema.with_metadata(metadata)) as sink:
        sink.write_table(table.replace_schema_metadata(metadata))
    content = path.read_bytes()
    # Even where its manifest names it so.
    shard = dataclasses.replace(
        shard, bytes=len(content), sha256=hashlib.sha256(content).hexdigest()
    )
    split = Split(((str(tmp_path), dataclasses.replace(manifest, shards=(shard,))),))
    told = "none" if version is None else version
    with pytest.raises(DatasetError, match=f"{re.escape(str(path))}: format_version is {told}, "):
        ShardCache(split).open(0)


def test_a_manifest_with_any_bit_flipped_or_cut_anywhere_is_refused(sound):
    _, manifest = sound
    content = manifest.to_bytes()
    assert Manifest.from_bytes(content, "here") == manifest
    for bit in range(8 * len(content)):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(DatasetError, match="^here: "):
            Manifest.from_bytes(bytes(damaged), "here")
    for end in range(len(content)):
        with pytest.raises(DatasetError, match="^here: "):
            Manifest.from_bytes(content[:end], "here")


def test_the_manifest_of_a_split_is_read_like_that(sound, tmp_path):
    uri, manifest = sound
    shutil.copytree(uri, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "train" / "manifest.json"
    assert path.read_bytes() == manifest.to_bytes()
    path.write_bytes(path.read_bytes().replace(b'"b"', b'"d"'))
    with pytest.raises(DatasetError, match=f"^{re.escape(str(path))}: truncated or altered"):
        load_manifest(str(tmp_path), "train")
    # One that does not hold its digest, such as one from before there was any.
    storage.write_json(path, manifest.to_json())
    assert load_manifest(str(tmp_path), "train") == manifest
