"""The same images in each contender's own format, below one folder or bucket prefix."""

from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path

from sr4ir_dist import storage
from sr4ir_dist.data.convert.source import Converter, ImageFile, file_source
from sr4ir_dist.data.convert.write import convert

# What MosaicML's writer does by default too; small sets still get a few shards of each format.
_SHARD_BYTES = 64 << 20


def write_formats(images: Sequence[str], folder: Path, formats: Iterable[str]) -> None:
    """Write images in formats of `FORMATS`, each below a folder of its name.

    Formats whose library is not installed are left out.

    Args:
        images: URIs of JPEG files.
        folder: what they are written below.
        formats: which.

    Raises:
        DatasetError: an image cannot be read.
    """
    for name in formats:
        library, write = FORMATS[name]
        if library is None or find_spec(library) is not None:
            write(images, folder / name)


def upload_formats(folder: Path, uri: str) -> None:
    """Copy all formats to a bucket prefix."""
    for path in storage.list_files(folder):
        storage.upload(folder / path, storage.join(uri, path))


def _as_files(images: Sequence[str], folder: Path) -> None:
    (folder / "all").mkdir(parents=True)
    for number, image in enumerate(images):
        (folder / "all" / f"{number:06d}.jpg").write_bytes(storage.read_bytes(image))


def _as_shards(images: Sequence[str], folder: Path) -> None:
    files = [ImageFile(image, f"{number:06d}", 0) for number, image in enumerate(images)]
    source = file_source(("all",), {"train": files}, {})
    converter = Converter("benchmark", ("images", "classification"), "", lambda: source)
    convert(converter, source, str(folder), shard_bytes=_SHARD_BYTES)


def _as_mds(images: Sequence[str], folder: Path) -> None:
    from streaming import MDSWriter  # pyright: ignore[reportMissingImports]

    columns = {"image": "bytes", "label": "int"}
    with MDSWriter(out=str(folder), columns=columns, size_limit=_SHARD_BYTES) as writer:
        for image in images:
            writer.write({"image": storage.read_bytes(image), "label": 0})


def _as_tars(images: Sequence[str], folder: Path) -> None:
    import webdataset  # pyright: ignore[reportMissingImports]

    folder.mkdir(parents=True)
    pattern = str(folder / "%04d.tar")
    with webdataset.ShardWriter(pattern, maxsize=_SHARD_BYTES, verbose=0) as writer:
        for number, image in enumerate(images):
            writer.write(
                {"__key__": f"{number:06d}", "jpg": storage.read_bytes(image), "cls": b"0"}
            )


FORMATS: dict[str, tuple[str | None, Callable[[Sequence[str], Path], None]]] = {
    "files": (None, _as_files),
    "shards": (None, _as_shards),
    "mds": ("streaming", _as_mds),
    "tars": ("webdataset", _as_tars),
}
"""Name -> the library that it needs besides ours, and what writes it into a folder."""
