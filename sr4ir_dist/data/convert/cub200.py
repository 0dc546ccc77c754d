"""CUB-200-2011 in its official layout."""

from pathlib import PurePosixPath

from sr4ir_dist import storage
from sr4ir_dist.data.convert.source import Converter, ImageFile, Source, file_source, read_lines
from sr4ir_dist.data.schema import DatasetError


def open_cub200(root: str) -> Source:
    """Open ``CUB_200_2011``: its lists of images, classes, and the official split.

    Args:
        root: the folder with ``images.txt``, ``image_class_labels.txt``, ``train_test_split.txt``,
            ``classes.txt`` and ``images/``.

    Returns:
        A source with the splits ``train`` and ``val``; ``val`` is the official test split. Classes
        are in the order of ``classes.txt``, so that label 0 is its first line.

    Raises:
        DatasetError: a list is missing or malformed, or the lists disagree.
    """
    paths = _table(root, "images.txt")
    labels = _numbers(root, "image_class_labels.txt")
    is_train = _numbers(root, "train_test_split.txt")
    classes = {
        _number(key, f"{root}/classes.txt"): name
        for key, name in _table(root, "classes.txt").items()
    }
    for name, table in (("image_class_labels.txt", labels), ("train_test_split.txt", is_train)):
        if table.keys() != paths.keys():
            odd = sorted(table.keys() ^ paths.keys())[:5]
            raise DatasetError(f"{storage.join(root, name)}: ids {odd} are not in both this list "
                               "and images.txt")  # fmt: skip
    if sorted(classes) != list(range(1, len(classes) + 1)):
        raise DatasetError(f"{root}/classes.txt: class numbers are not 1 to {len(classes)}")
    files: dict[str, list[ImageFile]] = {"train": [], "val": []}
    for key, path in paths.items():
        if labels[key] not in classes:
            raise DatasetError(
                f"{root}/image_class_labels.txt: image {key} has class {labels[key]}, "
                f"expected 1 to {len(classes)}"
            )
        if is_train[key] not in (0, 1):
            raise DatasetError(
                f"{root}/train_test_split.txt: image {key} has {is_train[key]}, expected 0 or 1"
            )
        if path.startswith("/") or ".." in PurePosixPath(path).parts:
            raise DatasetError(f"{root}/images.txt: image {key}: {path} leaves the images folder")
        split = "train" if is_train[key] else "val"
        uri = storage.join(root, "images", path)
        files[split].append(ImageFile(uri, path, labels[key] - 1))
    for split, items in files.items():
        if not items:
            raise DatasetError(f"{root}/train_test_split.txt: no image in the {split} split")
    return file_source(
        [classes[number] for number in sorted(classes)],
        files,
        {"layout": "CUB-200-2011", "root": root},
        ("val is the official test split",),
    )


def _table(root: str, name: str) -> dict[str, str]:
    """The lines ``key value`` of a list; values may hold blanks."""
    uri = storage.join(root, name)
    table: dict[str, str] = {}
    lines = read_lines(uri, "--root must be the CUB_200_2011 folder")
    for number, line in enumerate(lines, 1):
        key, _, value = line.strip().partition(" ")
        if not key:
            continue
        if not value or key in table:
            raise DatasetError(f"{uri}: line {number} is {line!r}, expected a new id and a value")
        table[key] = value.strip()
    return table


def _numbers(root: str, name: str) -> dict[str, int]:
    where = storage.join(root, name)
    return {key: _number(value, f"{where}: {key}") for key, value in _table(root, name).items()}


def _number(text: str, where: str) -> int:
    if not text.isdecimal():
        raise DatasetError(f"{where}: {text!r} is not a number")
    return int(text)


CUB200 = Converter(
    name="cub200",
    tasks=("images", "classification"),
    help="CUB-200-2011 (birds) in its official layout.",
    open=open_cub200,
    options={"root": "The folder CUB_200_2011, with images.txt in it."},
)
