"""Ways to bring the same images to a training process: ours, its limits, and other libraries.

Each contender runs in a process of its own (``python -m sr4ir_dist.benchmark.contenders``), so
that neither its memory nor its threads are another's. It prints one JSON line an epoch.

All peers decode with Pillow and transform with torchvision, as their own documentation shows; what
they yield is what ours yields: uint8 batches N,3,crop,crop of RGB images in a random order, resized
to a short side, cropped and mirrored at random.
"""

import argparse
import io
import json
import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from sr4ir_dist import s3, storage
from sr4ir_dist.data.loader import Loader
from sr4ir_dist.data.shards import ShardReader, load_manifest
from sr4ir_dist.data.splits import open_split
from sr4ir_dist.data.transforms import Flip, ResizeCrop, Transform, decode

Where = Literal["disk", "s3"]
_URL_S = 3600


@dataclass(frozen=True)
class Work:
    """What is measured.

    Attributes:
        place: the folder or bucket prefix with one folder a format in it.
        scratch: a local folder for caches.
        batch_size: images of a batch.
        resize: pixels of the short side after the resize.
        crop: height and width of the result.
        workers: threads of ours, processes of the peers.
        epochs: how often all images are read, one epoch after the other.
    """

    place: str
    scratch: str
    batch_size: int = 32
    resize: int = 256
    crop: int = 224
    workers: int = 2
    epochs: int = 3


Epochs = Iterator[Iterator[int]]
"""For each epoch an iterator of how many images each batch held."""


def ours(work: Work) -> Epochs:
    """This system's loader with its training transform."""
    with _loader(work, ResizeCrop(work.resize, work.crop, train=True)) as loader:
        for epoch in range(1, work.epochs + 1):
            yield (len(batch.ids) for batch in loader.epoch(epoch))


def ours_padded(work: Work) -> Epochs:
    """This system's loader without a transform: whole images, padded to the batch's largest."""
    with _loader(work, Flip()) as loader:
        for epoch in range(1, work.epochs + 1):
            yield (len(batch.ids) for batch in loader.epoch(epoch))


def ours_decoded(work: Work) -> Epochs:
    """This system's loader without a transform, before images of unlike size become one batch."""
    with _loader(work, Flip()) as loader:
        for epoch in range(1, work.epochs + 1):
            yield (len(samples) for _, samples in loader.samples(epoch))


def _loader(work: Work, transform: Transform) -> Loader:
    return Loader(
        open_split(storage.join(work.place, "shards"), "train"),
        transform=transform,
        batch_size=work.batch_size,
        seed=0,
        rank=0,
        world_size=1,
        shuffle=True,
        target="label",
        threads=work.workers,
        cache_dir=Path(work.scratch, "cache"),
    )


def decode_only(work: Work) -> Epochs:
    """The limit: the same images, in memory before the clock starts, decoded and thrown away."""
    uri = storage.join(work.place, "shards")
    images = [
        image
        for shard in load_manifest(uri, "train").shards
        for reader in (
            ShardReader(storage.local_path(storage.join(uri, "train", shard.path)), ["image"]),
        )
        for image in reader.rows(range(shard.rows))
    ]

    def one(image: dict[str, bytes]) -> int:
        decode(image["image"])
        return 1

    with ThreadPoolExecutor(work.workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for _ in range(work.epochs):
            yield iter(pool.map(one, images, chunksize=work.batch_size))


def get_only(work: Work) -> Epochs:
    """The limit of a bucket: the shards' objects, fetched whole and thrown away."""
    uri = storage.join(work.place, "shards")
    manifest = load_manifest(uri, "train")

    def one(shard: Any) -> int:
        storage.read_bytes(storage.join(uri, "train", shard.path))
        return shard.rows

    with ThreadPoolExecutor(work.workers) as pool:
        for _ in range(work.epochs):
            yield iter(pool.map(one, manifest.shards))


def _peer_transform(work: Work) -> Callable[[Any], torch.Tensor]:
    from torchvision.transforms import v2

    return v2.Compose(
        [
            v2.Resize(work.resize),
            v2.RandomCrop(work.crop),
            v2.RandomHorizontalFlip(),
            v2.PILToTensor(),
        ]
    )


def image_folder(work: Work) -> Epochs:
    """ImageFolder of torchvision behind torch's DataLoader."""
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder

    loader = DataLoader(
        ImageFolder(storage.join(work.place, "files"), _peer_transform(work)),
        batch_size=work.batch_size,
        shuffle=True,
        num_workers=work.workers,
        persistent_workers=True,
    )
    for _ in range(work.epochs):
        yield (len(images) for images, _ in loader)


def mosaicml_streaming(work: Work) -> Epochs:
    """MosaicML's streaming: MDS shards."""
    from streaming import StreamingDataset  # pyright: ignore[reportMissingImports]
    from torch.utils.data import DataLoader

    transform = _peer_transform(work)

    class Images(StreamingDataset):
        def __getitem__(self, at: Any) -> tuple[torch.Tensor, int]:
            row = super().__getitem__(at)
            return transform(_pillow(row["image"])), row["label"]

    local, remote = storage.join(work.place, "mds"), None
    if not storage.is_local(work.place):
        local, remote = str(Path(work.scratch, "mds")), local
    dataset = Images(
        remote=remote, local=local, shuffle=True, batch_size=work.batch_size, shuffle_seed=0
    )
    loader = DataLoader(
        dataset, batch_size=work.batch_size, num_workers=work.workers, persistent_workers=True
    )
    for _ in range(work.epochs):
        yield (len(images) for images, _ in loader)


def webdataset(work: Work) -> Epochs:
    """webdataset: tar files."""
    import webdataset as wds  # pyright: ignore[reportMissingImports]

    uri = storage.join(work.place, "tars")
    names = [name for name in storage.list_names(uri) if name.endswith(".tar")]
    if storage.is_local(uri):
        urls = [storage.join(uri, name) for name in names]
    else:
        with s3.client(signature_version="s3v4") as client:
            signed = [s3.signed_url(client, storage.join(uri, name), _URL_S) for name in names]
        urls = [f"pipe:curl --silent --fail '{url}'" for url in signed]
    dataset = (
        wds.WebDataset(urls, shardshuffle=len(urls), empty_check=False)
        .shuffle(1000)
        .decode("pil")
        .to_tuple("jpg", "cls")
        .map_tuple(_peer_transform(work), int)
        .batched(work.batch_size)
    )
    loader = wds.WebLoader(
        dataset, batch_size=None, num_workers=work.workers, persistent_workers=True
    )
    for _ in range(work.epochs):
        yield (len(images) for images, _ in loader)


def ray_data(work: Work) -> Epochs:
    """Ray Data: files read, decoded and transformed by its tasks."""
    import ray
    import ray.data

    ray.init(num_cpus=work.workers, include_dashboard=False, logging_level=logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    transform = _peer_transform(work)

    def prepare(row: dict[str, Any]) -> dict[str, Any]:
        return {"image": transform(_pillow(row["bytes"])).numpy()}

    filesystem, path = storage.filesystem(storage.join(work.place, "files"))
    dataset = ray.data.read_binary_files(path, filesystem=filesystem, shuffle="files").map(prepare)
    for _ in range(work.epochs):
        batches = dataset.iter_torch_batches(
            batch_size=work.batch_size, local_shuffle_buffer_size=16 * work.batch_size
        )
        yield (len(batch["image"]) for batch in batches)
    ray.shutdown()


def _pillow(data: bytes) -> Any:
    from PIL import Image

    return Image.open(io.BytesIO(data)).convert("RGB")


@dataclass(frozen=True)
class Contender:
    """A way to read images.

    Attributes:
        run: reads them.
        format: the images' format that it reads, of `formats.FORMATS`.
        places: from where it can.
    """

    run: Callable[[Work], Epochs]
    format: str
    places: tuple[Where, ...] = ("disk", "s3")


CONTENDERS = {
    "decode only": Contender(decode_only, "shards", ("disk",)),
    "raw GET": Contender(get_only, "shards", ("s3",)),
    "sr4ir_dist, decoded": Contender(ours_decoded, "shards"),
    "sr4ir_dist, padded": Contender(ours_padded, "shards", ("disk",)),
    "sr4ir_dist": Contender(ours, "shards"),
    "ImageFolder": Contender(image_folder, "files", ("disk",)),
    "mosaicml-streaming": Contender(mosaicml_streaming, "mds"),
    "webdataset": Contender(webdataset, "tars"),
    "Ray Data": Contender(ray_data, "files"),
}
"""By name."""


def main() -> None:
    """Run one contender: a name and its work as JSON; prints images and seconds of each epoch."""
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=CONTENDERS)
    parser.add_argument("work", type=json.loads)
    arguments = parser.parse_args()
    epochs = CONTENDERS[arguments.name].run(Work(**arguments.work))
    while True:
        start = time.perf_counter()
        batches = next(epochs, None)
        if batches is None:
            return
        images = sum(batches)
        seconds = time.perf_counter() - start
        print(json.dumps({"images": images, "seconds": seconds}), flush=True)


def command(name: str, work: Work) -> list[str]:
    """The arguments of Python that run a contender."""
    return ["-m", "sr4ir_dist.benchmark.contenders", name, json.dumps(asdict(work))]


if __name__ == "__main__":
    main()
