"""Files made to do harm are refused by a named error, in little memory, and run nothing."""

import dataclasses
import hashlib
import io
import json
import os
import pickle
import re
import struct
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from mutations import KINDS, NETWORK, PROGRESS, spoil
from PIL import Image
from pyarrow import ipc

from sr4ir_dist import checkpoint, experiments, untrusted
from sr4ir_dist.checkpoint import CheckpointError
from sr4ir_dist.config import ExperimentError, from_json
from sr4ir_dist.data.cache import ShardCache
from sr4ir_dist.data.schema import COLUMN_TYPES, DatasetError
from sr4ir_dist.data.shards import load_manifest
from sr4ir_dist.data.splits import Split
from sr4ir_dist.data.transforms import decode
from sr4ir_dist.networks.pretrained import WeightsError, load_weights, read_tensors
from sr4ir_dist.training import state
from sr4ir_dist.untrusted import parse_json

MUTATIONS = 60
MEMORY = 600 << 20
"""What refusing may take. The libraries take less than 400 MiB, so a process stays below 1 GiB."""


@pytest.fixture(autouse=True)
def _little_memory():
    def kib(name):
        return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1])

    Path("/proc/self/clear_refs").write_text("5")  # sets the peak to what is in use now
    before = kib("VmRSS")
    yield
    assert (kib("VmHWM") - before) << 10 < MEMORY


@pytest.mark.parametrize(
    ("name", "resealed"),
    [(name, False) for name in KINDS] + [(n, True) for n, kind in KINDS.items() if kind.reseal],
)
def test_random_changes_give_named_errors_alone(tmp_path, name, resealed):
    outcomes = spoil(name, MUTATIONS, tmp_path / "files", resealed=resealed)
    assert set(outcomes) <= {"refused", "the same", "another value"}
    assert outcomes["refused"] > MUTATIONS / 2
    sealed = KINDS[name].reseal is not None or name == "checkpoint manifest"
    if sealed and not resealed:
        assert outcomes == {"refused": MUTATIONS}


DEEP = b"[" * 100_000 + b"]" * 100_000
TOO_MANY = b"[" + b"1," * 6_000_000 + b"1]"
LONG = b'"' + b"a" * (65 << 20) + b'"'
JSON = {"deep": DEEP, "too many": TOO_MANY, "long": LONG}


@pytest.fixture
def saved(tmp_path):
    """A checkpoint of files whose content is given."""

    def publish(**content):
        files = {name.replace("__", "."): data for name, data in content.items()}
        return checkpoint.load(checkpoint.publish(str(tmp_path), 1, files))

    return publish


@pytest.mark.parametrize("kind", JSON)
def test_json_that_fills_memory(tmp_path, saved, kind):
    data = JSON[kind]
    found = saved(progress__json=data, run__json=data, experiment__json=data)
    for load in (state.load_progress, state.load_run):
        with pytest.raises(CheckpointError, match=r"\.json of checkpoint"):
            load(found)
    with pytest.raises((CheckpointError, ExperimentError)):
        state.load_experiment(found)
    (Path(found.uri) / checkpoint.MANIFEST).write_bytes(data)
    with pytest.raises(CheckpointError):
        checkpoint.load(found.uri)
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "manifest.json").write_bytes(data)
    with pytest.raises(DatasetError, match=r"manifest\.json: "):
        load_manifest(str(tmp_path), "train")


@pytest.mark.parametrize(
    ("value", "count"), [(b'{"a":1}', 1_000_000), (b"[]", 2_400_000), (b'"\xc4\x80"', 5_000_000)]
)
def test_as_many_values_as_are_parsed(value, count):
    found = len(parse_json(b"[" + (value + b",") * count + b"{}]"))
    assert found == count + 1
    with pytest.raises(ValueError, match="so many values"):
        parse_json(b"[" + (value + b",") * (count + count // 10) + b"{}]")


def test_as_long_a_text_as_is_parsed():
    found = len(parse_json(b'"\xf0\x9f\x98\x80' + b"a" * (untrusted.MOST_BYTES - 6) + b'"'))
    assert found == untrusted.MOST_BYTES - 5


def test_sizes_that_are_claimed_but_not_there_or_there_but_not_claimed(saved):
    found = saved(sr__safetensors=b"12345678", run__json=b"{}")
    size = 1 << 40
    lying = dataclasses.replace(found, files={n: (size, d) for n, (_, d) in found.files.items()})
    with pytest.raises(CheckpointError, match=r"sr\.safetensors .* is not what was published"):
        lying.read("sr.safetensors")
    like = NETWORK.state_dict()
    with pytest.raises(CheckpointError, match=f"has {size} bytes, expected at most"):
        lying.tensors("sr.safetensors", like)
    with pytest.raises(CheckpointError, match=f"has {size} bytes, expected at most"):
        lying.json("run.json")
    for name in found.files:
        os.truncate(Path(found.uri) / name, size)  # a hole, which takes no disk
        with pytest.raises(CheckpointError, match="is not what was published"):
            found.read(name)
    with pytest.raises(CheckpointError, match="expected at most"):
        lying.tensors("sr.safetensors", like)


def header(text: bytes, length: int | None = None) -> bytes:
    return (len(text) if length is None else length).to_bytes(8, "little") + text


def tensor(name: str, *shape: int, dtype: str = "F32", begin: int = 0, end: int = 0) -> str:
    return f'"{name}":{{"dtype":"{dtype}","shape":{list(shape)},"data_offsets":[{begin},{end}]}}'


HEADERS = {
    "empty": b"",
    "no header": b"{}",
    "claimed": header(b"{}", 1 << 62),
    "too long": header(b'{"a":"' + b"a" * (5 << 20) + b'"}'),
    "of many": header(f"{{{','.join(tensor(str(i), 0) for i in range(60_000))}}}".encode()),
    "of many dimensions": header(f"{{{tensor('a', *[1] * 1_000_000, end=4)}}}".encode()) + b"1234",
    "of a huge tensor": header(f"{{{tensor('a', 1 << 40, end=1 << 42)}}}".encode()),
    "that overflows": header(f"{{{tensor('a', 1 << 33, 1 << 33)}}}".encode()),
    "of overlaps": header(f"{{{tensor('a', 1, end=4)},{tensor('b', 1, end=4)}}}".encode())
    + b"1234",
    "of unknown types": header(f"{{{tensor('a', 1, dtype='F4', end=1)}}}".encode()) + b"1",
    "deep": header(b'{"__metadata__":' + DEEP + b"}"),
    "of a pickle": pickle.dumps({"a": 1}),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_safetensors_headers(tmp_path, saved, kind):
    found = saved(sr__safetensors=HEADERS[kind])
    with pytest.raises(CheckpointError, match=r"sr\.safetensors of checkpoint"):
        found.tensors("sr.safetensors", NETWORK.state_dict())
    path = tmp_path / "w.safetensors"
    path.write_bytes(HEADERS[kind])
    with pytest.raises(WeightsError, match=r"weights .*w\.safetensors"):
        load_weights(NETWORK, str(path))


def run_code(path):
    class Code:
        def __reduce__(self):
            return os.system, (f"touch {path}.ran",)

    return Code()


def zipped(path, compress=zipfile.ZIP_STORED, **records):
    with zipfile.ZipFile(path, "w", compress) as archive:
        for name, data in records.items():
            archive.writestr(f"archive/{name.replace('__', '/')}", data)


def bomb(path):
    """A pickle for torch's own reader that asks for as much memory as it says."""
    size = pickle.dumps(1 << 34, 2)[2:-1]
    zipped(path, data__pkl=b"", version=b"3")
    zipped(
        path, **{"data.pkl": b"\x80\x02cbuiltins\nbytearray\n" + size + b"\x85R.", "version": b"3"}
    )


def deflated(path):
    torch.save({"a": torch.zeros(64 << 20, dtype=torch.uint8)}, path)
    with zipfile.ZipFile(path) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in records.items():
            archive.writestr(name, data)
    assert path.stat().st_size < 1 << 20


def meta(path):
    rebuild = torch._utils._rebuild_meta_tensor_no_storage
    content = io.BytesIO()
    torch.save({name: value.to("meta") for name, value in NETWORK.state_dict().items()}, content)
    assert rebuild.__name__.encode() in content.getvalue()
    path.write_bytes(content.getvalue())


def dense(convert):
    return lambda path: torch.save(
        OrderedDict({name: convert(value) for name, value in NETWORK.state_dict().items()}), path
    )


PICKLES = {
    "code": lambda path: torch.save({"a": run_code(path)}, path),
    "code of old": lambda path: torch.save(
        {"a": run_code(path)}, path, _use_new_zipfile_serialization=False
    ),
    "code alone": lambda path: path.write_bytes(pickle.dumps(run_code(path))),
    "a bomb": bomb,
    "compressed": deflated,
    "a hole": lambda path: (path.touch(), os.truncate(path, 1 << 40)),
    "no values": meta,
    "sparse": dense(lambda value: value.to_sparse()),
    "complex": dense(lambda value: value.to(torch.complex64)),
    "deep": lambda path: path.write_bytes(b"\x80\x02" + b"]" * 300_000 + b"a" * 299_999 + b"."),
    "a number": lambda path: torch.save(3, path),
    "no end": lambda path: path.write_bytes(b"PK\x03\x04"),
}


@pytest.mark.parametrize("kind", PICKLES)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_pickles(tmp_path, kind, suffix):
    path = tmp_path / f"w{suffix}"
    PICKLES[kind](path)
    with pytest.raises(WeightsError, match=r"weights .*/w\."):
        read_tensors(str(path))
    assert not Path(f"{path}.ran").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sr": {"features": 10**9}}, "sr.features=1000000000"),
        ({"sr": {"blocks": 10**9}}, "sr.blocks=1000000000"),
        ({"sr": {"blocks": 256, "features": 1024}}, "too many together"),
        ({"sr": {"network": "swinir", "blocks": 256, "depth": 64}}, "too many together"),
        ({"sr": {"window": 10**6}}, "sr.window"),
        ({"task": {"classes": 10**9}}, "task.classes=1000000000"),
        ({f"unknown {i}": 1 for i in range(50_000)}, "unknown key 'unknown 0'"),
        ({"sr": {"weights": 3 * "../" * 100_000}, "epochs": 0}, "epochs=0"),
        ({"x" * 500_000: 1}, "unknown key"),
    ],
)
def test_experiments(saved, change, message):
    tree = experiments.make("drawn_cls/edsr-x4/sr4ir").model_dump(mode="json")
    for name, value in change.items():
        tree[name] = tree[name] | value if isinstance(tree.get(name), dict) else value
    with pytest.raises(ExperimentError, match=message) as caught:
        state.load_experiment(saved(experiment__json=json.dumps(tree).encode()))
    assert len(str(caught.value)) < 5000


def test_experiments_of_the_largest_published_networks_are_taken():
    tree = experiments.make("drawn_cls/swinir-x4/sr4ir").model_dump(mode="json")
    for sr in (
        {"network": "edsr", "blocks": 32, "features": 256},
        {"network": "swinir", "blocks": 9, "depth": 6, "features": 240, "heads": 8, "window": 16},
    ):
        assert from_json(json.dumps(tree | {"sr": tree["sr"] | sr})).sr.blocks == sr["blocks"]


@pytest.fixture
def dataset(tmp_path):
    return KINDS["dataset manifest"].make(tmp_path).parent


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": 10**30, "batch_rows": [10**30]}, r"rows is 1000"),
        ({"rows": 1 << 39, "batch_rows": [1 << 39]}, "integers from 1 to 1048576 that sum"),
        ({"bytes": 1 << 62}, r"shards\[0\]\.bytes is"),
        ({"path": "../../x.arrow"}, r"shards\[0\]\.path"),
    ],
)
def test_dataset_manifests(dataset, changes, message):
    manifest = dataset / "manifest.json"
    value = load_manifest(str(dataset.parent), "train").to_json()
    value["shards"][0] |= changes
    manifest.write_text(json.dumps(value))
    with pytest.raises(DatasetError, match=message):
        load_manifest(str(dataset.parent), "train")


def open_shard(dataset, data=None):
    """Opens the shard with other bytes that the manifest claims to be the right ones."""
    manifest = load_manifest(str(dataset.parent), "train")
    (shard,) = manifest.shards
    if data is not None:
        (dataset / shard.path).write_bytes(data)
        digest = hashlib.sha256(data).hexdigest()
        shard = dataclasses.replace(shard, bytes=len(data), sha256=digest)
    manifest = dataclasses.replace(manifest, shards=(shard,))
    with ShardCache(Split(((str(dataset.parent), manifest),))).open(0) as opened:
        return opened.reader.rows(range(len(opened.reader)))


def written(batches, **options):
    sink = io.BytesIO()
    with ipc.new_file(sink, batches[0].schema, options=ipc.IpcWriteOptions(**options)) as writer:
        for batch in batches:
            writer.write_batch(batch)
    return sink.getvalue()


@pytest.fixture
def batches(dataset):
    (path,) = dataset.glob("*.arrow")
    with ipc.open_file(path.read_bytes()) as reader:
        return [reader.get_batch(i) for i in range(reader.num_record_batches)]


def in_old_framing(batches):
    return written(batches, compression="zstd", use_legacy_format=True)


def replaced(batches, name, array):
    place = batches[0].schema.get_field_index(name)
    return [batch.set_column(place, name, array(batch.column(place))) for batch in batches]


def far_offsets(data):
    offsets = struct.pack("<3i", 0, 40, 80)  # of images of 40 bytes
    assert offsets in data
    return data.replace(offsets, struct.pack("<3i", 0, 40, 2**31 - 1))


def one_word(column):
    return pa.DictionaryArray.from_arrays([0] * len(column), ["a"])


def bad_text(column):
    offsets = pa.array(range(len(column) + 1), pa.int32()).buffers()[1]
    data = pa.py_buffer(b"\xff" * len(column))
    return pa.Array.from_buffers(pa.string(), len(column), [None, offsets, data])


SHARDS = {
    "compressed": (lambda batches: written(batches, compression="zstd"), "it is compressed"),
    "lz4": (lambda batches: written(batches[::-1], compression="lz4"), "it is compressed"),
    "old framing": (in_old_framing, "framing of Arrow before"),
    "far offsets": (lambda b: far_offsets(written(b)), "not a readable shard"),
    "bad text": (lambda b: written(replaced(b, "id", bad_text)), "not a readable shard"),
    "missing": (
        lambda b: written(replaced(b, "image", lambda c: pa.nulls(len(c), c.type))),
        "column image lacks values",
    ),
    "a missing corner": (
        lambda b: written(
            replaced(b, "boxes", lambda c: pa.array([[[None, 1, 2, 3]]] * len(c), c.type))
        ),
        "column boxes lacks values",
    ),
    "another type": (
        lambda b: written(replaced(b, "image", lambda c: c.cast(pa.large_binary()))),
        "its columns are",
    ),
    "a dictionary": (
        lambda b: written(replaced(b, "id", one_word)),
        "its columns are",
    ),
    "another column": (
        lambda b: written([batch.append_column("x", batch["label"]) for batch in b]),
        "its columns are",
    ),
    "the same column twice": (
        lambda b: written([batch.append_column("label", batch["label"]) for batch in b]),
        "its columns are",
    ),
    "fewer rows": (lambda b: written([b[0].slice(1), *b[1:]]), "has other rows than"),
    "no batch": (lambda b: written([b[0].slice(0, 0)]), "has other rows than"),
    "a stream": (lambda b: written(b)[8:], "not a readable shard"),
    "a pickle": (lambda b: pickle.dumps(run_code("x")), "not a readable shard"),
}


@pytest.mark.parametrize("kind", SHARDS)
def test_shards(dataset, batches, kind):
    spoilt, message = SHARDS[kind]
    assert open_shard(dataset, written(batches)) == open_shard(dataset)
    with pytest.raises(DatasetError, match=message):
        open_shard(dataset, spoilt(batches))


def claims(width, height, kind):
    """A small image file that claims to be a large one."""
    sink = io.BytesIO()
    Image.new("RGB", (8, 8)).save(sink, kind)
    data = bytearray(sink.getvalue())
    if kind == "PNG":
        data[16:24] = struct.pack(">II", width, height)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    else:
        at = data.index(b"\xff\xc0")
        data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_images_that_claim_billions_of_pixels(kind):
    assert decode(claims(8, 8, kind)).shape == (3, 8, 8)
    with pytest.raises(ValueError, match="30000 x 20000 pixels, more than the 134,217,728"):
        decode(claims(30_000, 20_000, kind))


def test_column_types_are_those_of_the_files(batches):
    assert {field.name: field.type for field in batches[0].schema}.items() <= COLUMN_TYPES.items()


def test_progress_is_read_as_it_was_written(saved):
    found = state.load_progress(saved(progress__json=json.dumps(PROGRESS).encode()))
    assert dataclasses.asdict(found) == PROGRESS | {
        "history": tuple(PROGRESS["history"]),
        "bad_rows": tuple(PROGRESS["bad_rows"]),
    }
