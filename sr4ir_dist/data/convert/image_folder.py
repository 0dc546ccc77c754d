"""A folder of images a class: the layout of ImageNet and of many classification sets."""

from sr4ir_dist import storage
from sr4ir_dist.data.convert.source import (
    Converter,
    ImageFile,
    Source,
    file_source,
    left_out_notes,
    list_images,
)
from sr4ir_dist.data.schema import DatasetError


def open_image_folder(root: str) -> Source:
    """Open ``root/train/<class>/...`` and ``root/val/<class>/...`` (or ``root/test``).

    Args:
        root: the folder with ``train`` and ``val`` or ``test``.

    Returns:
        A source with the splits ``train`` and ``val``; classes are the sorted names of the folders
        in ``train``; ids are paths relative to the split's folder.

    Raises:
        DatasetError: a split is missing or empty, an image lies outside a class's folder, or
            ``val`` has a class that ``train`` has not.
    """
    names = storage.list_names(root)
    held_out = next((name for name in ("val", "test") if name in names), None)
    if "train" not in names or held_out is None:
        raise DatasetError(
            f"{root}: expected folders train and val (or test) with one folder a class; "
            f"found {', '.join(names[:10]) or 'nothing'}"
        )
    listed = {split: list_images(storage.join(root, split)) for split in ("train", held_out)}
    for split, (paths, _) in listed.items():
        outside = [path for path in paths if "/" not in path]
        if outside or not paths:
            problem = f"{outside[0]} is in no class's folder" if outside else "no images"
            raise DatasetError(f"{storage.join(root, split)}: {problem}")
    classes = sorted({path.split("/", 1)[0] for path in listed["train"][0]})
    labels = {name: label for label, name in enumerate(classes)}
    unknown = {path.split("/", 1)[0] for path in listed[held_out][0]} - labels.keys()
    if unknown:
        raise DatasetError(
            f"{storage.join(root, held_out)}: classes {sorted(unknown)[:5]} are not in train"
        )
    files = {
        split: [
            ImageFile(storage.join(root, folder, path), path, labels[path.split("/", 1)[0]])
            for path in listed[folder][0]
        ]
        for split, folder in (("train", "train"), ("val", held_out))
    }
    left_out = sum(count for _, count in listed.values())
    notes = [*left_out_notes(left_out), f"val is the folder {held_out}"]
    return file_source(classes, files, {"layout": "image-folder", "root": root}, notes)


IMAGE_FOLDER = Converter(
    name="image-folder",
    tasks=("images", "classification"),
    help="A folder of images a class, in train and val (or test).",
    open=open_image_folder,
    options={"root": "The folder with train and val (or test) in it."},
)
