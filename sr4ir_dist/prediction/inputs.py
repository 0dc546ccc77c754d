"""What is to be predicted on: a folder's images, a list's, or one; and what each result is named.

Results mirror the folders of the images, so that images of one name in two folders stay apart.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import PurePosixPath

import torch
from PIL import ExifTags, Image
from torch import Tensor

from sr4ir_dist import storage
from sr4ir_dist.data.convert.source import (
    IMAGE_SUFFIXES,
    left_out_notes,
    list_image_marks,
    read_file,
)
from sr4ir_dist.data.schema import DatasetError
from sr4ir_dist.data.transforms import decode

SUFFIXES = (*IMAGE_SUFFIXES, ".gif")
LIST_SUFFIX = ".txt"
_AT_ONCE = 32  # files of a list that the storage is asked about side by side


class PredictionError(ValueError):
    """A prediction that cannot be made; the message says what to change."""


@dataclass(frozen=True, slots=True)
class InputImage:
    """An image to predict on.

    Attributes:
        uri: where it is.
        path: what it is called in tables: its path below the input.
        name: the same as the name of results: without its suffix where that leaves it unique.
        mark: what tells it from another image at the same place.
    """

    uri: str
    path: str
    name: str
    mark: storage.Mark = (None, None)


def list_inputs(uri: str) -> tuple[list[InputImage], tuple[str, ...]]:
    """The images that an input names, in order.

    Args:
        uri: a folder or bucket prefix, whose images come sorted by path; a list (`.txt`) of paths
            and URIs, one a line, relative ones from the list's folder, in the order of the list;
            or one image.

    Returns:
        The images, and what a user should be told.

    Raises:
        PredictionError: there is no image.
        DatasetError: there is no such folder.
        StorageError: the storage did not answer.
    """
    uri = plain(uri)
    notes: tuple[str, ...] = ()
    marks: list[storage.Mark] | None = None
    if uri.lower().endswith(LIST_SUFFIX):
        uris, notes = _read_list(uri)
        paths = _below_common_folder(uris)
    elif uri.lower().endswith(SUFFIXES):
        uris, paths = [uri], [PurePosixPath(uri).name]
    else:
        found, others = list_image_marks(uri, SUFFIXES)
        paths, marks = list(found), list(found.values())
        uris, notes = [storage.join(uri, path) for path in paths], left_out_notes(others)
    if not uris:
        raise PredictionError(f"{uri} names no images ({', '.join(SUFFIXES)})")
    for path in paths:
        # Results lie at these paths, and must not leave their folder.
        if not {"", ".", ".."}.isdisjoint(path.split("/")):
            raise PredictionError(f"{path} in {uri}: '.', '..' or nothing between slashes")
    if marks is None:
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            marks = list(pool.map(storage.mark, uris))
    names = _unique_names(paths)
    return [InputImage(*each) for each in zip(uris, paths, names, marks, strict=True)], notes


def plain(uri: str) -> str:
    """A local URI as an absolute path; others as they are, without slashes at their end.

    Raises:
        StorageError: the URI is malformed.
    """
    return str(storage.local_path(uri)) if storage.is_local(uri) else uri.rstrip("/")


def read_image(uri: str) -> Tensor:
    """An image's pixels as people see them, its orientation tag applied: uint8 3,H,W.

    Raises:
        DatasetError: there is no such file, or it is no readable image; names it.
        StorageError: the storage did not answer.
    """
    data = read_file(uri)
    try:
        pixels = decode(data)
    except ValueError as error:
        # Without the address in memory that Pillow's message ends in.
        raise DatasetError(f"{uri}: {str(error).split(' <')[0]}") from error
    return _ORIENTATIONS.get(_orientation(data), torch.clone)(pixels).contiguous()


# From how the pixels are stored to how they are to be seen (EXIF 2.32, tag 0x0112).
_ORIENTATIONS: dict[int, Callable[[Tensor], Tensor]] = {
    2: lambda pixels: pixels.flip(2),
    3: lambda pixels: pixels.flip(1, 2),
    4: lambda pixels: pixels.flip(1),
    5: lambda pixels: pixels.transpose(1, 2),
    6: lambda pixels: pixels.transpose(1, 2).flip(2),
    7: lambda pixels: pixels.transpose(1, 2).flip(1, 2),
    8: lambda pixels: pixels.transpose(1, 2).flip(1),
}


def _orientation(data: bytes) -> int:
    # What is wrong with a tag is no reason to leave out an image that could be decoded.
    with suppress(Exception), Image.open(io.BytesIO(data)) as picture:
        if picture.format != "TIFF":  # which Pillow turns by itself
            return int(picture.getexif().get(ExifTags.Base.Orientation, 1))
    return 1


def _read_list(uri: str) -> tuple[list[str], tuple[str, ...]]:
    try:
        lines = storage.read_bytes(uri).decode().splitlines()
    except UnicodeDecodeError as error:
        raise PredictionError(f"{uri}: not a text file: {error}") from error
    folder = uri.rpartition("/")[0]
    entries = [line.strip() for line in lines if line.strip()]
    uris = [_from_folder(entry, folder) for entry in entries]
    unique = list(dict.fromkeys(uris))
    again = len(uris) - len(unique)
    return unique, (f"{again} lines that name an image again were left out",) if again else ()


def _from_folder(entry: str, folder: str) -> str:
    elsewhere = "://" in entry or entry.startswith(("/", "~"))
    return plain(entry if elsewhere else storage.join(folder, entry))


def _below_common_folder(uris: Sequence[str]) -> list[str]:
    """The paths of images below the deepest folder that holds all of them."""
    parts = [tuple(uri.split("://")[-1].strip("/").split("/")) for uri in uris]
    shared = 0
    if parts:
        shared = min(len(each) for each in parts) - 1
        first = parts[0]
        while any(each[:shared] != first[:shared] for each in parts):
            shared -= 1
    return ["/".join(each[shared:]) for each in parts]


def _unique_names(paths: Sequence[str]) -> list[str]:
    """The paths without suffixes, but with them where two would be the same."""
    names = [str(PurePosixPath(path).with_suffix("")) for path in paths]
    while True:
        counts = Counter(names)
        clashing = [i for i, name in enumerate(names) if counts[name] > 1 and name != paths[i]]
        if not clashing:
            return names
        for index in clashing:
            names[index] = paths[index]
