"""A conversion that is killed, fails or is changed on the way: what stays, and what comes of it."""

import hashlib
import itertools
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import boto3
import pytest

from sr4ir_dist import storage
from sr4ir_dist.data.convert import CONVERTERS
from sr4ir_dist.data.convert.parts import OnBadRow
from sr4ir_dist.data.convert.source import Source
from sr4ir_dist.data.convert.write import ConvertedSplit, convert
from sr4ir_dist.data.schema import DatasetError
from sr4ir_dist.data.shards import has_split, load_manifest, verify_shard
from sr4ir_dist.parallel import Run, on_threads

# About two images a part.
SHARD_BYTES = 9000
# It waits before its sixth part's record: it can be killed at any moment, and has never ended.
PROGRAM = f"""
import sys, time
from sr4ir_dist import storage
from sr4ir_dist.data.convert import CONVERTERS
from sr4ir_dist.data.convert.write import convert
write_json, written = storage.write_json, []
def write_five(uri, value):
    if len(written) >= 5:
        time.sleep(600)
    written.append(uri)
    write_json(uri, value)
storage.write_json = write_five
source = CONVERTERS["drawn"].open(train_count=int(sys.argv[2]), val_count=8, size=32)
print("opened", flush=True)
convert(CONVERTERS["drawn"], source, sys.argv[1], threads=1, shard_bytes={SHARD_BYTES})
"""
Folder = Callable[[], str]


def convert_drawn(uri: str, *, train_count: int = 60, **settings: Any) -> dict[str, ConvertedSplit]:
    """What `PROGRAM` does, in this process and to its end."""
    source = CONVERTERS["drawn"].open(train_count=train_count, val_count=8, size=32)
    return convert(CONVERTERS["drawn"], source, uri, threads=1, shard_bytes=SHARD_BYTES, **settings)


def contents(uri: str) -> dict[str, str]:
    """The digest of each file below a URI, hidden and unfinished ones too; "" for folders."""
    if storage.is_local(uri):
        return {
            path.relative_to(uri).as_posix(): digest(path.read_bytes()) if path.is_file() else ""
            for path in Path(uri).rglob("*")
        }
    return {
        path: digest(storage.read_bytes(storage.join(uri, path)))
        for path in storage.list_files(uri)
    }


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def records(uri: str) -> list[str]:
    """The records of finished parts."""
    folders = [name for name in storage.list_names(uri) if name.startswith(".converting-")]
    return [
        storage.join(uri, folder, name)
        for folder in folders
        for name in storage.list_names(storage.join(uri, folder))
        if name.endswith(".json")
    ]


def finished_shards(uri: str) -> set[str]:
    """The shards of finished parts, such as train/part-00000-0123456789ab.arrow."""
    found = set()
    for each in records(uri):
        record = storage.read_json(each)
        found |= {f"{record['split']}/{shard['path']}" for shard in record["shards"]}
    return found


def writes(uri: str) -> dict[str, Any]:
    """What changes when a file is written again: its time, or how many versions a bucket has."""
    if storage.is_local(uri):
        return {
            path.relative_to(uri).as_posix(): path.stat().st_mtime_ns
            for path in Path(uri).rglob("*.arrow")
        }
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    found: dict[str, Any] = {}
    pages = boto3.client("s3").get_paginator("list_object_versions")
    for page in pages.paginate(Bucket=bucket, Prefix=prefix):
        for version in page.get("Versions", []):
            key = version["Key"].removeprefix(f"{prefix}/")
            found[key] = found.get(key, 0) + 1
    return found


@pytest.fixture(params=["path", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    """Gives a new place for a dataset; in a bucket that keeps all versions of its objects."""
    numbers = itertools.count()
    if request.param == "path":
        return lambda: str(tmp_path / f"set{next(numbers)}")
    bucket = request.getfixturevalue("s3")()
    boto3.client("s3").put_bucket_versioning(
        Bucket=bucket.removeprefix("s3://"), VersioningConfiguration={"Status": "Enabled"}
    )
    return lambda: f"{bucket}/set{next(numbers)}"


def kill_after(uri: str, train_count: int, parts: int, seconds: float) -> None:
    """Begins a conversion in another process and kills it after so many parts and seconds."""
    command = [sys.executable, "-c", PROGRAM, uri, str(train_count)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "opened\n"
        deadline = time.monotonic() + 60
        found = 0
        while found < parts:
            assert process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline
            with suppress(storage.MissingError):  # of a folder that is made while it is listed
                found = len(records(uri))
        time.sleep(seconds)
        process.kill()
    assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("kills", [3, pytest.param(10, marks=pytest.mark.proof)])
def test_killed_at_random_moments(folder: Folder, request: pytest.FixtureRequest, kills: int):
    moments = random.Random(request.node.name)
    undisturbed, uri, count = folder(), folder(), 20 * kills
    whole = convert_drawn(undisturbed, train_count=count)
    parts = sum(len(each.manifest.shards) for each in whole.values())
    finished: dict[str, Any] = {}
    for _ in range(kills):
        kill_after(uri, count, len(records(uri)) + 1, moments.uniform(0, 0.03))
        shards, now = finished_shards(uri), writes(uri)
        assert finished.keys() < shards
        finished = {name: now[name] for name in shards} | finished
    assert not any(has_split(uri, split) for split in ("train", "val"))
    told: list[str] = []
    result = convert_drawn(uri, train_count=count, say=told.append)
    assert told == [f"continuing: {len(finished)} of {parts} parts are there"]
    assert sum(each.resumed for each in result.values()) >= len(finished)
    assert contents(uri) == contents(undisturbed)
    now = writes(uri)
    assert {name: now[name] for name in finished} == finished


class Stopped(BaseException):
    """What ends a conversion as a kill does: nothing of it goes on."""


@pytest.mark.parametrize("overwrite", [False, True])
def test_stopped_before_every_single_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
):
    undisturbed, old = tmp_path / "undisturbed", tmp_path / "old"
    convert_drawn(str(undisturbed), train_count=6)
    convert_drawn(str(old), train_count=9)
    expected = contents(str(undisturbed))
    left = [10**9]

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise Stopped
            return function(*arguments)

        return run

    for name in ("write_bytes", "delete", "delete_unfinished"):
        monkeypatch.setattr(storage, name, counted(getattr(storage, name)))
    stopped = True
    for before in itertools.count():
        place = tmp_path / f"set{before}"
        if overwrite:
            shutil.copytree(old, place)
        left[0] = before
        try:
            convert_drawn(str(place), train_count=6, overwrite=overwrite)
            stopped = False
        except Stopped:
            pass
        left[0] = 10**9
        for split in ("train", "val"):
            readable = has_split(str(place), split)
            assert readable or not overwrite
            for shard in load_manifest(str(place), split).shards if readable else ():
                verify_shard(place / split / shard.path, shard, 0)
        convert_drawn(str(place), train_count=6, overwrite=overwrite)
        assert contents(str(place)) == expected, before
        if not stopped:
            break
    assert before > 10


def giving_up_after(parts: int) -> Run:
    """Makes so many parts and then fails."""

    def run(function: Callable[[Any], Any], jobs: Iterable[Any]) -> Iterator[Any]:
        yield from (function(job) for job in itertools.islice(jobs, parts))
        raise DatasetError("given up")

    return run


def test_an_old_dataset_is_readable_until_the_new_one_is_there(folder: Folder, tmp_path: Path):
    uri, fresh = folder(), folder()
    convert_drawn(uri, train_count=30)
    before = contents(uri)
    with pytest.raises(DatasetError, match="given up"):
        convert_drawn(uri, overwrite=True, run=giving_up_after(12))
    assert len(records(uri)) == 12
    assert before.items() < contents(uri).items()
    convert_drawn(uri, overwrite=True)
    convert_drawn(fresh)
    assert contents(uri) == contents(fresh)


def test_parts_may_be_made_in_any_order(tmp_path: Path):
    def backwards(function: Callable[[Any], Any], jobs: Iterable[Any]) -> Iterator[Any]:
        return map(function, reversed(list(jobs)))

    for name, run in (("one", on_threads(1)), ("five", on_threads(5)), ("back", backwards)):
        convert_drawn(str(tmp_path / name), run=run)
    expected = contents(str(tmp_path / "one"))
    assert contents(str(tmp_path / "five")) == contents(str(tmp_path / "back")) == expected


@pytest.mark.parametrize("change", ["source", "options"])
def test_another_conversion_begins_anew(tmp_path: Path, image_folder: Path, change: str):
    converter, out, fresh = CONVERTERS["image-folder"], tmp_path / "out", tmp_path / "fresh"
    settings: dict[str, Any] = {"threads": 1, "shard_bytes": 2000, "name": "birds"}
    source = converter.open(root=str(image_folder))
    with pytest.raises(DatasetError, match="given up"):
        convert(converter, source, str(out), **settings, run=giving_up_after(3))
    assert len(records(str(out))) == 3
    if change == "source":
        shutil.copy(image_folder / "val/cat/0.jpg", image_folder / "train/cat/another.jpg")
    else:
        settings["name"] = "other birds"
    told: list[str] = []
    for uri in (out, fresh):
        source = converter.open(root=str(image_folder))
        convert(converter, source, str(uri), **settings, say=told.append)
    assert told == []
    assert contents(str(out)) == contents(str(fresh))


def test_what_an_interrupted_cleanup_left_goes(tmp_path: Path):
    uri = str(tmp_path)
    convert_drawn(uri)
    expected = contents(uri)
    own = load_manifest(uri, "val").source["conversion"][:16]
    for left in (
        f".converting-{own}/train-00000.json",
        ".converting-0123456789abcdef/train-00000.json",
        "train/part-00000-0123456789ab.arrow",
        f"val/.part-00001-0123456789ab.arrow.{'0' * 32}.tmp",
    ):
        storage.write_bytes(storage.join(uri, left), b"{}")
    told: list[str] = []
    convert_drawn(uri, say=told.append)
    assert told == ["this conversion is finished already; --overwrite would do it again"]
    assert contents(uri) == expected


def test_a_bad_row_costs_no_finished_part(tmp_path: Path):
    probed = {(2 * n + 1) * 100 // 128 for n in range(64)}
    bad = max({*range(100)} - probed)
    opened = CONVERTERS["drawn"].open(train_count=100, val_count=8, size=32)

    def read(item: Any) -> dict[str, Any]:
        if item == ("train", bad):
            raise DatasetError(f"image {bad} is bad")
        return opened.read(item)

    def run(uri: Path, on_bad_row: OnBadRow, **more: Any) -> dict[str, ConvertedSplit]:
        source, drawn = replace(opened, read=read), CONVERTERS["drawn"]
        limits = {"threads": 1, "shard_bytes": SHARD_BYTES}
        return convert(drawn, source, str(uri), on_bad_row=on_bad_row, **limits, **more)

    with pytest.raises(DatasetError, match=f"image {bad} is bad"):
        run(tmp_path / "a", "fail")
    there = len(records(str(tmp_path / "a")))
    told: list[str] = []
    result = run(tmp_path / "a", "skip", say=told.append)
    assert told[0].startswith(f"continuing: {there} of ")
    assert there > 10
    assert result["train"].skipped == (f"image {bad} is bad",)
    assert result["train"].manifest.rows == 99
    with pytest.raises(DatasetError, match="given up"):
        run(tmp_path / "b", "skip", run=giving_up_after(1000))
    with pytest.raises(DatasetError, match=f"image {bad} is bad"):
        run(tmp_path / "b", "fail")
    run(tmp_path / "b", "skip")
    assert contents(str(tmp_path / "a")) == contents(str(tmp_path / "b"))
    with pytest.raises(DatasetError, match="already .splits train, val.; pass --overwrite"):
        run(tmp_path / "b", "fail")


def test_a_split_of_bad_rows_alone_is_refused(tmp_path: Path):
    def read(item: Any) -> dict[str, Any]:
        raise DatasetError("no image")

    source = Source((), {"train": 3}, lambda _: range(3), read)
    with pytest.raises(DatasetError, match="train: no row could be written: no image"):
        convert(CONVERTERS["sr-folder"], source, str(tmp_path), on_bad_row="skip")


def test_storage_that_does_not_answer_is_no_bad_row(tmp_path: Path):
    def read(item: Any) -> dict[str, Any]:
        raise storage.StorageError("no answer")

    source = Source((), {"train": 3}, lambda _: range(3), read)
    with pytest.raises(storage.StorageError, match="no answer"):
        convert(CONVERTERS["sr-folder"], source, str(tmp_path), on_bad_row="skip")
