"""Files of every kind that is read, spoilt at random: `python tests/mutations.py --help`.

Each is read twice: as it was published, so that digests see the change, and `resealed`, as someone
would publish it who means harm, so that the parsers alone must stand it.
"""

import argparse
import hashlib
import io
import json
import random
import resource
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from sr4ir_dist import checkpoint, experiments
from sr4ir_dist.checkpoint import CheckpointError
from sr4ir_dist.config import ExperimentError
from sr4ir_dist.data.cache import ShardCache
from sr4ir_dist.data.convert.source import Converter, Source
from sr4ir_dist.data.convert.write import convert
from sr4ir_dist.data.schema import DatasetError
from sr4ir_dist.data.shards import load_manifest
from sr4ir_dist.data.splits import open_split
from sr4ir_dist.hub import versions
from sr4ir_dist.hub.cards import load_card
from sr4ir_dist.hub.names import HubError, Name
from sr4ir_dist.networks.edsr import EDSR
from sr4ir_dist.networks.pretrained import WeightsError, load_weights
from sr4ir_dist.training import state

NETWORK = EDSR(2, blocks=1, features=2)
PROGRESS = {
    "epoch": 2, "step_in_epoch": 1, "step": 13, "seconds": 1.5, "bad_rows": [3, 9],
    "history": [{"epoch": 1, "step": 12, "psnr": 21.5, "top1": 50.0, "images": 16}],
}  # fmt: skip
CLASSES = ("cat", "dog")


@dataclass(frozen=True)
class Kind:
    """A file, how it is read, and the errors that may come of that.

    Attributes:
        make: publishes it in an empty folder.
        read: reads it there.
        errors: what may be raised.
        reseal: publishes it again with whatever it holds now; None where nothing seals it.
    """

    make: Callable[[Path], Path]
    read: Callable[[Path], Any]
    errors: tuple[type[Exception], ...]
    reseal: Callable[[Path], Any] | None = None


def _publish(folder: Path, name: str = checkpoint.MANIFEST) -> Path:
    experiment = experiments.make("drawn_cls/edsr-x4/sr4ir")
    files = {
        "experiment.json": experiment.model_dump_json(indent=2).encode(),
        "progress.json": json.dumps(PROGRESS, indent=2).encode(),
        "run.json": json.dumps({"run": "one", "data": "s3://bucket/drawn"}).encode(),
        "sr.safetensors": safetensors.torch.save(NETWORK.state_dict()),
    }
    return Path(checkpoint.publish(str(folder), 13, files)) / name


def _reseal_checkpoint(path: Path) -> None:
    folder = path.parent
    files = {p.name: p.read_bytes() for p in folder.iterdir() if p.name != checkpoint.MANIFEST}
    checkpoint.write(str(folder), files.items())


def _row(row: int) -> dict[str, Any]:
    count = row % 3
    boxes = {"boxes": [[1, 2, 3, 9]] * count, "box_labels": [1] * count, "crowd": [False] * count}
    image = {"id": f"row {row}", "image": bytes(range(40)), "height": 20, "width": 20}
    return image | {"label": row % 2} | boxes


def _write_dataset(folder: Path, pattern: str = "manifest.json") -> Path:
    tasks = ("images", "classification", "detection")
    source = Source(CLASSES, {"train": 6}, lambda _: [_row(i) for i in range(6)], dict)
    convert(Converter("x", tasks, "", lambda: source), source, str(folder), min_batches=3)
    (path,) = (folder / "train").glob(pattern)
    return path


def _reseal_shard(path: Path) -> None:
    manifest = path.with_name("manifest.json")
    value = load_manifest(str(path.parents[1]), "train").to_json()
    data = path.read_bytes()
    value["shards"][0] |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest.write_text(json.dumps(value))


def _unseal_manifest(path: Path) -> None:
    content, sealed, _ = path.read_bytes().rpartition(b',\n "sha256": "')
    if sealed:
        path.write_bytes(content + b"\n}")


def _read_shard(path: Path) -> Any:
    with ShardCache(open_split(str(path.parents[1]), "train")).open(0) as shard:
        return shard.reader.rows(range(len(shard.reader)))


def _save_weights(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def _pickled() -> bytes:
    content = io.BytesIO()
    torch.save(NETWORK.state_dict(), content)
    return content.getvalue()


def _share(folder: Path, file: str) -> Path:
    """A file of a hub with one version, which a tag names."""
    source = str(_publish(folder / "run").parent)
    versions.publish(source, "team/x", hub=str(folder), note="a note", tag="best")
    (path,) = (folder / "team" / "x").glob(file)
    return path


def _load_weights(path: Path) -> Any:
    network = EDSR(2, blocks=1, features=2)
    load_weights(network, str(path))
    return {name: value.tolist() for name, value in network.state_dict().items()}


def _load(path: Path) -> checkpoint.Checkpoint:
    return checkpoint.load(str(path.parent))


def _tensors(path: Path) -> Any:
    found = _load(path).tensors(path.name, NETWORK.state_dict())
    return {name: value.tolist() for name, value in found.items()}


KINDS = {
    "checkpoint manifest": Kind(
        _publish, lambda path: checkpoint.verify(str(path.parent)), (CheckpointError,)
    ),
    "safetensors of a checkpoint": Kind(
        lambda folder: _publish(folder, "sr.safetensors"),
        _tensors,
        (CheckpointError,),
        _reseal_checkpoint,
    ),
    "experiment.json": Kind(
        lambda folder: _publish(folder, "experiment.json"),
        lambda path: state.load_experiment(_load(path)),
        (CheckpointError, ExperimentError),
        _reseal_checkpoint,
    ),
    "progress.json": Kind(
        lambda folder: _publish(folder, "progress.json"),
        lambda path: state.load_progress(_load(path)),
        (CheckpointError,),
        _reseal_checkpoint,
    ),
    "dataset manifest": Kind(
        _write_dataset,
        lambda path: load_manifest(str(path.parents[1]), "train"),
        (DatasetError,),
        _unseal_manifest,
    ),
    "shard": Kind(
        lambda folder: _write_dataset(folder, "*.arrow"),
        _read_shard,
        (DatasetError,),
        _reseal_shard,
    ),
    "hub's card": Kind(
        lambda folder: _share(folder, "versions/*/card.json"),
        lambda path: load_card(_load(path)),
        (CheckpointError,),
        _reseal_checkpoint,
    ),
    "hub's tag": Kind(
        lambda folder: _share(folder, "tags/best.json"),
        lambda path: versions.find(Name("team/x", path.stem), str(path.parents[3])),
        (HubError,),
    ),
    "weights.safetensors": Kind(
        lambda folder: _save_weights(
            folder / "w.safetensors", safetensors.torch.save(NETWORK.state_dict())
        ),
        _load_weights,
        (WeightsError,),
    ),
    "weights.pt": Kind(
        lambda folder: _save_weights(folder / "w.pt", _pickled()), _load_weights, (WeightsError,)
    ),
}

_NUMBERS = [value.to_bytes(8, "little", signed=True) for value in (-1, 2**31 - 1, 2**62, -(2**63))]
_WORDS = [
    *(b"null", b"[]", b"{}", b'""', b"-1", b"1e999", b"NaN", b"true", b"0.5", b'"../x"', b"9" * 30),
    *(b"9" * 5000, b"[" * 3000, b'{"a":' * 3000, b'"\\ud800"', b'"\\u0000"', b"\xff\xfe"),
]


def mutate(data: bytes, draw: random.Random) -> bytes:
    """The bytes with one to three random changes."""
    for _ in range(draw.choice((1, 1, 2, 3))):
        at = draw.randrange(len(data) + 1)
        size = min(len(data) - at, draw.choice((1, 1, 2, 4, 8, 64)))
        kind = draw.randrange(8)
        part = data[at : at + size]
        if kind == 0:
            part = bytes(byte ^ 1 << draw.randrange(8) for byte in part)
        elif kind == 1:
            part = draw.randbytes(size)
        elif kind == 2:
            part = b""
        elif kind == 3:
            part *= 2
        elif kind == 4:
            part = draw.choice(_NUMBERS)[: draw.choice((1, 2, 4, 8))]
            size = len(part)
        elif kind == 5:
            part, size = draw.choice(_WORDS), draw.choice((0, size))
        elif kind == 6:
            part, size = b"", (len(data) - at) * draw.randrange(2)  # cut off, or left as it is
        else:
            words = [at for at, byte in enumerate(data[:20_000]) if byte in b":,[{"]
            at = draw.choice(words) + 1 if words else at
            ends = [data.find(end, at) for end in (b",", b"}", b"]", b"\n")]
            size = min([end - at for end in ends if end >= at] or [0])
            part = draw.choice(_WORDS)
        data = data[:at] + part + data[at + size :]
    return data


def spoil(name: str, count: int, folder: Path, *, resealed: bool, seed: int = 0) -> Counter[str]:
    """Read a file of a kind with so many random changes.

    Returns:
        How many were refused by a named error, gave the same value, or another one.

    Raises:
        Exception: reading raised an error that is not a named one.
    """
    kind = KINDS[name]
    folder.mkdir(parents=True)
    path = kind.make(folder)
    sound = {file: file.read_bytes() for file in path.parent.iterdir()}
    expected = kind.read(path)
    draw = random.Random(f"{seed}/{name}/{resealed}")
    outcomes: Counter[str] = Counter()
    for _ in range(count):
        while (data := mutate(sound[path], draw)) == sound[path]:
            pass
        path.write_bytes(data)
        if resealed:
            assert kind.reseal is not None
            kind.reseal(path)
        try:
            found = kind.read(path)
        except kind.errors as error:
            outcomes["refused" if len(str(error)) < 5000 else "refused at great length"] += 1
        else:
            outcomes["the same" if found == expected else "another value"] += 1
        for file, data in sound.items():
            file.write_bytes(data)
    return outcomes


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", type=int, help="changes of each kind")
    parser.add_argument("--json", type=Path, help="write the outcomes there")
    options = parser.parse_args()
    results = {}
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for name, kind in KINDS.items():
            for resealed in (False, True) if kind.reseal else (False,):
                what = f"{name}, resealed" if resealed else name
                place = Path(folder) / what.replace(" ", "-")
                results[what] = dict(spoil(name, options.count, place, resealed=resealed))
                print(what, results[what], flush=True)
    content = {
        "command": f"python tests/mutations.py {options.count} --json {options.json}",
        "seconds": round(time.monotonic() - started),
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "outcomes": results,
    }
    if options.json:
        options.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    _main()
