"""Checkpoints appear whole or not at all, and are what was published."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import safetensors.torch
import torch

from sr4ir_dist import checkpoint
from sr4ir_dist.checkpoint import CheckpointError
from sr4ir_dist.training.worker import _newest_sound

WEIGHTS = {"conv.weight": torch.arange(6.0).reshape(2, 3), "step": torch.tensor(3)}


def files(step):
    return {
        "sr.safetensors": safetensors.torch.save(WEIGHTS),
        "progress.json": json.dumps({"step": step}).encode(),
    }


def publish(run, *steps):
    return [checkpoint.publish(run, step, files(step)) for step in steps]


def entry(**changes):
    return {"bytes": 1, "sha256": "0" * 64} | changes


class Interrupted(Mapping):
    """Files of which the second cannot be made: the process dies between two writes."""

    def __init__(self, step):
        self.files = files(step)

    def __getitem__(self, name):
        return self.files[name]

    def __len__(self):
        return len(self.files)

    def __iter__(self):
        yield next(iter(self.files))
        raise KeyboardInterrupt


@pytest.fixture
def run(tmp_path):
    return str(tmp_path / "run")


def test_round_trip(run):
    (uri,) = publish(run, 12)
    saved = checkpoint.load(uri)
    assert list(saved.files) == list(files(12))
    assert saved.json("progress.json") == {"step": 12}
    tensors = saved.tensors("sr.safetensors")
    assert tensors.keys() == WEIGHTS.keys()
    assert all(torch.equal(value, WEIGHTS[name]) for name, value in tensors.items())
    assert {path.name for path in Path(uri).iterdir()} == {*files(12), "manifest.json"}


def test_round_trip_in_a_bucket(s3):
    run = f"{s3()}/runs/one"
    uris = publish(run, 1, 2, 3)
    checkpoint.delete(uris[0])
    assert checkpoint.newest_first(run) == [uris[2], uris[1]]
    assert checkpoint.load(checkpoint.resolve(run)).json("progress.json") == {"step": 3}
    assert checkpoint.verify(uris[1]).files == checkpoint.load(uris[1]).files


def test_a_half_written_checkpoint_is_invisible(run):
    with pytest.raises(KeyboardInterrupt):
        checkpoint.publish(run, 1, Interrupted(1))
    left = list(Path(run).rglob("*"))
    assert [path.name for path in left if path.is_file()] == ["sr.safetensors"]
    assert checkpoint.newest_first(run) == []
    with pytest.raises(CheckpointError, match="neither a checkpoint nor a run"):
        checkpoint.resolve(run)
    with pytest.raises(CheckpointError, match="no checkpoint at .*step-000000001"):
        checkpoint.load(str(Path(run) / "checkpoints" / "step-000000001"))
    publish(run, 1)
    assert len(checkpoint.newest_first(run)) == 1


def test_writing_a_step_anew_hides_the_old_one_first(run):
    first, second = publish(run, 1, 2)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.publish(run, 2, Interrupted(2))
    assert checkpoint.newest_first(run) == [first]
    assert publish(run, 2) == [second]
    assert checkpoint.load(second).json("progress.json") == {"step": 2}


@pytest.mark.parametrize("name", [*files(0), "manifest.json"])
@pytest.mark.parametrize("flip", [0x01, 0x08, 0x20, 0xFF])
def test_every_altered_byte_is_found_and_refused_by_name(run, name, flip):
    (uri,) = publish(run, 1)
    path = Path(uri) / name
    sound = path.read_bytes()
    what = "step-000000001" if name == "manifest.json" else f"{name} of checkpoint .* is not what"
    for where in range(len(sound)):
        data = bytearray(sound)
        data[where] ^= flip
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=what):
            checkpoint.verify(uri)
        with pytest.raises(CheckpointError, match=what):
            checkpoint.load(uri).read(name)
    path.write_bytes(sound)
    assert checkpoint.verify(uri).read("progress.json") == files(1)["progress.json"]


def test_a_manifest_is_refused_for_changes_that_json_forgives(run):
    (uri,) = publish(run, 1)
    path = Path(uri) / "manifest.json"
    sound = path.read_bytes()
    for data in (sound[:-1], sound.replace(b"\n", b"\t"), json.dumps(json.loads(sound)).encode()):
        assert json.loads(data) == json.loads(sound)
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=r"manifest\.json of checkpoint .* is not what"):
            checkpoint.load(uri)


def test_a_truncated_or_lost_file_is_refused_by_name(run):
    (uri,) = publish(run, 1)
    path = Path(uri) / "sr.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    longer = files(1)["sr.safetensors"] + b"more"
    for data in (path.read_bytes(), longer):
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match="sr.safetensors of checkpoint .* is not what"):
            checkpoint.load(uri).tensors("sr.safetensors")
    path.unlink()
    with pytest.raises(CheckpointError, match="has lost sr.safetensors"):
        checkpoint.load(uri).tensors("sr.safetensors")
    with pytest.raises(CheckpointError, match="has lost sr.safetensors"):
        checkpoint.verify(uri)
    with pytest.raises(CheckpointError, match="has no other.json; it has"):
        checkpoint.load(uri).read("other.json")


def test_a_file_that_is_not_safetensors_is_refused(run):
    uri = checkpoint.publish(run, 1, {"sr.safetensors": b"no tensors here"})
    with pytest.raises(CheckpointError, match="sr.safetensors of checkpoint"):
        checkpoint.load(uri).tensors("sr.safetensors")


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ({"format_version": 1, "files": {}}, "has format_version 1; this package reads 2"),
        ([], "has format_version None"),
        ({"format_version": 2}, "manifest.json of checkpoint .* is malformed"),
        ({"format_version": 2, "files": {"a": {"bytes": 1}}}, "is malformed: KeyError"),
        ({"format_version": 2, "files": {"a": 1}}, "is malformed: TypeError"),
        ({"format_version": 2, "files": {"a": entry(bytes="1")}}, "says of a that it has '1' byte"),
        ({"format_version": 2, "files": {"a": entry(bytes=1e999)}}, "that it has inf bytes"),
        ({"format_version": 2, "files": {"a": entry(sha256="x")}}, "with SHA-256 'x'"),
        ({"format_version": 2, "files": {"a": entry()}}, "manifest.json .* is not what"),
        ({"format_version": 2, "files": {"../a": entry()}}, r"lists a file named '\.\./a'"),
        ({"format_version": 2, "files": {"/a": entry()}}, r"lists a file named '/a'"),
        ({"format_version": 2, "files": {"a/b": entry()}}, r"lists a file named 'a/b'"),
    ],
)
def test_a_manifest_that_cannot_be_used_is_refused(run, manifest, message):
    (uri,) = publish(run, 1)
    (Path(uri) / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(uri)


def test_newest_first_counts_steps_and_ignores_what_is_no_checkpoint(run):
    uris = publish(run, 9, 20, 100)
    (Path(run) / "checkpoints" / "notes").mkdir()
    assert checkpoint.newest_first(run) == [uris[2], uris[1], uris[0]]
    assert checkpoint.newest_first(f"{run}-that-is-not-there") == []


def test_resolve(run):
    uris = publish(run, 1, 2)
    assert checkpoint.resolve(run) == uris[1]
    assert checkpoint.resolve(uris[0]) == uris[0]
    with pytest.raises(CheckpointError, match="elsewhere is neither a checkpoint nor a run"):
        checkpoint.resolve(f"{run}/elsewhere")


def damage(uri, name="sr.safetensors"):
    path = Path(uri) / name
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def newest_sound(run):
    said = []
    saved = _newest_sound(run, said.append)
    return saved and saved.uri, said


def test_a_run_goes_back_from_a_damaged_manifest_too(run):
    uris = publish(run, 1, 2)
    damage(uris[1], "manifest.json")
    uri, said = newest_sound(run)
    assert uri == uris[0]
    assert said[0].startswith(
        f"going back to the checkpoint before: manifest.json of checkpoint {uris[1]}"
    )


def test_a_run_goes_back_to_its_newest_sound_checkpoint_and_says_so(run):
    uris = publish(run, 1, 2, 3)
    assert newest_sound(run) == (uris[2], [])
    damage(uris[2])
    uri, said = newest_sound(run)
    assert uri == uris[1]
    assert len(said) == 1
    assert said[0].startswith("going back to the checkpoint before: sr.safetensors of checkpoint")
    assert uris[2] in said[0]
    damage(uris[0])
    damage(uris[1])
    with pytest.raises(checkpoint.CheckpointError, match="none of the 3 checkpoints"):
        newest_sound(run)
    assert newest_sound(f"{run}-that-is-not-there") == (None, [])


def test_what_a_run_publishes_after_it_went_back_outlives_the_damaged_checkpoint(run):
    uris = publish(run, 2, 4)
    damage(uris[1])
    assert newest_sound(run)[0] == uris[0]
    (again,) = publish(run, 3)
    assert newest_sound(run) == (again, [])
    assert checkpoint.resolve(run) == again
