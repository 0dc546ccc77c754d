"""What a converter is, and the checks that every converter's rows pass."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from sr4ir_dist import storage
from sr4ir_dist.data.schema import DatasetError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
MIN_SIDE = 8
"""Images with a smaller side are bad: the largest scale would leave nothing of them."""
Row = dict[str, Any]
TALLY = "tally"
"""A key that a row may have beside its columns: how often something was found in it that a user
should be told of, as a dict from what to a number. Conversion adds it up and takes it out."""


@dataclass(frozen=True)
class ImageFile:
    """A source image: enough to make its row anywhere.

    Attributes:
        uri: where the file is.
        id: the sample's id, unique in its split.
        label: its class, when there are classes.
    """

    uri: str
    id: str
    label: int | None = None


@dataclass(frozen=True)
class Source:
    """An opened source dataset.

    Attributes:
        class_names: the classes that labels index; empty without any.
        counts: how many items each split has; its keys are the splits.
        items: gives a split's items in source order: small values, cheap to list, whose ``repr``
            tells one from another.
        read: makes an item's row, maybe with a ``TALLY``; a pure function that reads and checks
            one sample, in any process. It raises ``DatasetError`` naming the file.
        facts: what the manifest shall say about the source, for people.
        notes: what a user should be told about how the source was understood.
    """

    class_names: tuple[str, ...]
    counts: dict[str, int]
    items: Callable[[str], Iterable[Any]]
    read: Callable[[Any], Row]
    facts: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def splits(self) -> tuple[str, ...]:
        """The names of the splits."""
        return tuple(self.counts)

    def rows(self, split: str) -> Iterator[Row]:
        """The rows of a split, one after the other.

        Raises:
            DatasetError: a sample is bad; names the file.
        """
        return map(self.read, self.items(split))


@dataclass(frozen=True)
class Converter:
    """A kind of source dataset.

    Attributes:
        name: the name by which it is asked for.
        tasks: what its rows are for, of ``schema.TASKS``.
        help: one line for people; after an empty one, what else they should know.
        open: opens a source: ``open(root, **options) -> Source``, without reading images. It
            raises ``DatasetError`` when the layout is not as expected.
        options: help for each parameter of ``open``. A parameter that is a text is a place, a
            path or URI.
    """

    name: str
    tasks: tuple[str, ...]
    help: str
    open: Callable[..., Source]
    options: dict[str, str] = field(default_factory=dict, hash=False)


def file_source(
    class_names: Sequence[str],
    files: dict[str, list[ImageFile]],
    facts: dict[str, Any],
    notes: Sequence[str] = (),
) -> Source:
    """A source whose items are image files.

    Args:
        class_names: the classes.
        files: each split's files in order.
        facts: for the manifest.
        notes: for the user.
    """
    return Source(
        class_names=tuple(class_names),
        counts={split: len(items) for split, items in files.items()},
        items=files.__getitem__,
        read=read_image_file,
        facts=facts,
        notes=tuple(notes),
    )


def read_image_file(item: ImageFile) -> Row:
    """The row of an image file: its bytes as they are, its decoded size, its label if it has one.

    Raises:
        DatasetError: the file is missing, does not decode or is too small; names it.
        StorageError: the storage did not answer.
    """
    # Here, because torch takes seconds to import: a job's --help and refusals come without it.
    from sr4ir_dist.data.transforms import decode

    data = read_file(item.uri)
    try:
        _, height, width = decode(data).shape
    except ValueError as error:
        # Without the address in memory that Pillow's message ends in.
        raise DatasetError(f"{item.uri}: {str(error).split(' <')[0]}") from error
    if min(height, width) < MIN_SIDE:
        raise DatasetError(
            f"{item.uri}: image of {height}x{width} pixels, expected {MIN_SIDE} or more a side"
        )
    row: Row = {"id": item.id, "image": data, "height": height, "width": width}
    return row if item.label is None else {**row, "label": item.label}


def read_lines(uri: str, missing: str) -> list[str]:
    """The lines of a list that belongs to a source.

    Args:
        uri: the list's file.
        missing: what to tell a user who has no such file.

    Raises:
        DatasetError: the file is not there, or holds no text.
    """
    try:
        return storage.read_bytes(uri).decode().splitlines()
    except storage.MissingError as error:
        raise DatasetError(f"{uri}: not found; {missing}") from error
    except UnicodeDecodeError as error:
        raise DatasetError(f"{uri}: not a text file: {error}") from error


def read_file(uri: str) -> bytes:
    """The bytes of a sample's file.

    Raises:
        DatasetError: there is no such file; names it.
        StorageError: the storage did not answer: that is no bad row, which might be skipped.
    """
    try:
        return storage.read_bytes(uri)
    except storage.MissingError as error:
        raise DatasetError(str(error)) from error


def list_images(root: str, suffixes: tuple[str, ...] = IMAGE_SUFFIXES) -> tuple[list[str], int]:
    """The image files below a folder.

    Args:
        root: the folder.
        suffixes: of what is an image, in lower case.

    Returns:
        Their sorted paths relative to the folder, and how many other files were left out. Hidden
        files and folders are neither.

    Raises:
        DatasetError: the folder is not there.
    """
    marks, others = list_image_marks(root, suffixes)
    return list(marks), others


def list_image_marks(
    root: str, suffixes: tuple[str, ...] = IMAGE_SUFFIXES
) -> tuple[dict[str, storage.Mark], int]:
    """As `list_images`, with the mark of each file by its path.

    Raises:
        DatasetError: the folder is not there.
    """
    if not storage.exists(root):
        raise DatasetError(f"{root}: no such folder")
    visible = {
        path: mark
        for path, mark in storage.list_marks(root).items()
        if not any(part.startswith(".") for part in PurePosixPath(path).parts)
    }
    images = {path: mark for path, mark in visible.items() if path.lower().endswith(suffixes)}
    return images, len(visible) - len(images)


def left_out_notes(count: int) -> tuple[str, ...]:
    """What to tell a user about files that are no images."""
    return (f"{count} files that are no images were left out",) if count else ()
