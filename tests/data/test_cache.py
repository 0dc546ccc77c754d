import os
import subprocess
import sys
from pathlib import Path

import pytest

from sr4ir_dist import storage
from sr4ir_dist.data.cache import ShardCache, default_cache_dir
from sr4ir_dist.data.schema import DatasetError, Manifest
from sr4ir_dist.data.splits import Split


def cached(directory: Path) -> set[str]:
    return {path.stem for path in directory.glob("*.arrow")}


def first_ids(cache: ShardCache, manifest: Manifest) -> list[str]:
    ids = []
    for shard in range(len(manifest.shards)):
        with cache.open(shard) as opened:
            ids.append(opened.reader.row(0)["id"])
    return ids


def row_range(manifest: Manifest, shard: int) -> str:
    first = sum(other.rows for other in manifest.shards[:shard])
    last = first + manifest.shards[shard].rows - 1
    return rf"{manifest.shards[shard].path} \(rows {first} to {last} of"


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "truncated":
        del data[-10:]
    else:
        data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_local_shards_are_opened_in_place(write, tmp_path):
    manifest = write(str(tmp_path / "set"), 40)
    assert len(manifest.shards) > 3
    cache = ShardCache(Split(((str(tmp_path / "set"), manifest),)), directory=tmp_path / "cache")
    ids = first_ids(cache, manifest)
    assert ids[0] == "r000"
    assert ids[-1] == f"r{40 - manifest.shards[-1].rows:03d}"
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("how", ["truncated", "altered"])
def test_damaged_local_shard_is_named(write, tmp_path, how):
    manifest = write(str(tmp_path / "set"), 40)
    damage(tmp_path / "set" / "train" / manifest.shards[2].path, how)
    cache = ShardCache(Split(((str(tmp_path / "set"), manifest),)))
    cache.open(1).close()
    with pytest.raises(DatasetError, match=f"{row_range(manifest, 2)} .*{how}"):
        cache.open(2)


def test_damage_after_the_first_use_is_noticed(write, tmp_path):
    manifest = write(str(tmp_path / "set"), 40)
    cache = ShardCache(Split(((str(tmp_path / "set"), manifest),)))
    cache.open(2).close()
    damage(tmp_path / "set" / "train" / manifest.shards[2].path, "altered")
    with pytest.raises(DatasetError, match="altered"):
        cache.open(2)


def test_missing_local_shard_is_named(write, tmp_path):
    manifest = write(str(tmp_path / "set"), 40)
    (tmp_path / "set" / "train" / manifest.shards[1].path).unlink()
    with pytest.raises(DatasetError, match=f"{row_range(manifest, 1)} the split\\) is not there"):
        ShardCache(Split(((str(tmp_path / "set"), manifest),))).open(1)


def test_remote_shards_are_fetched_once(s3, write, tmp_path):
    uri = storage.join(s3(), "set")
    manifest = write(uri, 40)
    cache = ShardCache(Split(((uri, manifest),)), directory=tmp_path)
    ids = first_ids(cache, manifest)
    assert ids[0] == "r000"
    assert cached(tmp_path) == {shard.sha256 for shard in manifest.shards}
    storage.delete(uri)
    assert first_ids(cache, manifest) == ids
    assert first_ids(ShardCache(Split(((uri, manifest),)), directory=tmp_path), manifest) == ids
    assert not list((tmp_path / "incoming").iterdir())


@pytest.mark.parametrize("how", ["truncated", "altered"])
def test_damaged_remote_shard_is_named_and_never_cached(s3, write, tmp_path, how):
    uri = storage.join(s3(), "set")
    manifest = write(uri, 40)
    shard_uri = storage.join(uri, "train", manifest.shards[2].path)
    storage.download(shard_uri, tmp_path / "shard")
    damage(tmp_path / "shard", how)
    storage.upload(tmp_path / "shard", shard_uri)
    cache = ShardCache(Split(((uri, manifest),)), directory=tmp_path / "cache")
    with pytest.raises(DatasetError, match=f"{row_range(manifest, 2)} .*{how}"):
        cache.open(2)
    assert cached(tmp_path / "cache") == set()
    assert not list((tmp_path / "cache" / "incoming").iterdir())


def test_missing_remote_shard_is_named(s3, write, tmp_path):
    uri = storage.join(s3(), "set")
    manifest = write(uri, 40)
    storage.delete(storage.join(uri, "train", manifest.shards[1].path))
    with pytest.raises(DatasetError, match=f"s3://.*{row_range(manifest, 1)}.*cannot be read"):
        ShardCache(Split(((uri, manifest),)), directory=tmp_path).open(1)


@pytest.mark.parametrize("how", ["truncated", "altered"])
def test_damaged_copy_is_fetched_again(s3, write, tmp_path, how):
    uri = storage.join(s3(), "set")
    manifest = write(uri, 40)
    cache = ShardCache(Split(((uri, manifest),)), directory=tmp_path)
    cache.open(2).close()
    copy = tmp_path / f"{manifest.shards[2].sha256}.arrow"
    whole = copy.read_bytes()
    damage(copy, how)
    with cache.open(2) as opened:
        assert len(opened.reader) == manifest.shards[2].rows
    assert copy.read_bytes() == whole


def test_a_shard_in_use_stays(s3, write, tmp_path):
    uri = storage.join(s3(), "set")
    manifest = write(uri, 60)
    digests = [shard.sha256 for shard in manifest.shards]
    cache = ShardCache(Split(((uri, manifest),)), directory=tmp_path, max_bytes=1)
    held = cache.open(0)
    # Another process's cache knows of the use as well.
    script = (
        "import sys; from pathlib import Path; from sr4ir_dist.data.cache import ShardCache\n"
        "from sr4ir_dist.data.splits import open_split\n"
        "split = open_split(sys.argv[1], 'train')\n"
        "cache = ShardCache(split, directory=Path(sys.argv[2]), max_bytes=1)\n"
        "cache.open(1).close(); cache.open(2).close()\n"
    )
    subprocess.run([sys.executable, "-c", script, uri, str(tmp_path)], check=True, timeout=60)
    assert cached(tmp_path) == {digests[0], digests[2]}
    assert held.reader.row(0)["id"] == "r000"
    held.close()
    cache.open(3).close()
    assert cached(tmp_path) == {digests[3]}


def test_what_a_killed_fetch_left_is_removed(s3, write, tmp_path):
    uri = storage.join(s3(), "set")
    manifest = write(uri, 20)
    for name in (manifest.shards[0].sha256, "f" * 64):
        left = tmp_path / "incoming" / name
        left.mkdir(parents=True)
        (left / f"{name}.arrow").write_bytes(b"half")
    ShardCache(Split(((uri, manifest),)), directory=tmp_path).open(0).close()
    assert not list((tmp_path / "incoming").iterdir())


RACE = """
import sys
from pathlib import Path
from sr4ir_dist import storage
from sr4ir_dist.data.cache import ShardCache
from sr4ir_dist.data.splits import open_split

uri, directory, log = sys.argv[1:]
split = open_split(uri, "train")
download = storage.download
def logged(source, path):
    with open(log, "a") as sink:
        sink.write(source + "\\n")
    download(source, path)
storage.download = logged
cache = ShardCache(split, directory=Path(directory))
print("ready", flush=True)
sys.stdin.readline()
for shard, entry in enumerate(split.manifest.shards):
    with cache.open(shard) as opened:
        assert len(opened.reader) == entry.rows
"""


def test_processes_that_want_the_same_shards_fetch_each_once(s3, write, tmp_path):
    uri = storage.join(s3(), "set")
    manifest = write(uri, 60)
    log = tmp_path / "log"
    arguments = [sys.executable, "-c", RACE, uri, str(tmp_path / "cache"), str(log)]
    racers = [
        subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    for racer in racers:
        assert racer.stdout is not None
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        racer.communicate("\n", timeout=60)
    assert [racer.returncode for racer in racers] == [0, 0, 0]
    fetched = log.read_text().split()
    assert len(fetched) == len(manifest.shards) == len(set(fetched))


def test_the_environment_names_the_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("SR4IR_CACHE_DIR", str(tmp_path))
    assert default_cache_dir() == tmp_path
    monkeypatch.delenv("SR4IR_CACHE_DIR")
    assert str(os.getuid()) in default_cache_dir().name


def test_refuses_no_room(write, tmp_path):
    manifest = write(str(tmp_path), 5)
    with pytest.raises(ValueError, match="cache_bytes must be 1 or more, got 0"):
        ShardCache(Split(((str(tmp_path), manifest),)), max_bytes=0)
