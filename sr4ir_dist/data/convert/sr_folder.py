"""A plain folder of images, to train SR networks on."""

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


def open_sr_folder(root: str, val_count: int | None = None) -> Source:
    """Open a folder of images, at any depth.

    Args:
        root: the folder. With sub-folders ``train`` and ``val``, or DIV2K's ``..._train_HR`` and
            ``..._valid_HR``, these are the splits and all else is left out. Otherwise evenly
            spaced images, in the order of their names, are held out as ``val`` and all others are
            ``train``.
        val_count: how many to hold out; a tenth, and at least one, by default. Not allowed when
            the folder has its own split.

    Returns:
        A source without classes; ids are paths relative to the folder.

    Raises:
        DatasetError: no images, too few to hold some out, or ``val_count`` does not fit.
    """
    folders = _split_folders(storage.list_names(root))
    if folders:
        if val_count is not None:
            raise DatasetError(
                f"--val-count {val_count}: {root} has its own {folders['val']} folder"
            )
        listed = {split: list_images(storage.join(root, name)) for split, name in folders.items()}
        paths = {
            split: [f"{name}/{path}" for path in listed[split][0]]
            for split, name in folders.items()
        }
        left_out = sum(count for _, count in listed.values())
        note = f"splits are the folders {folders['train']} and {folders['val']}, others left out"
    else:
        everything, left_out = list_images(root)
        paths = _hold_out(root, everything, val_count)
        note = f"no train and val folders: held out {len(paths['val'])} evenly spaced images as val"
    for split, found in paths.items():
        if not found:
            raise DatasetError(f"{storage.join(root, split)}: no images")
    files = {
        split: [ImageFile(storage.join(root, path), path) for path in found]
        for split, found in paths.items()
    }
    facts = {"layout": "sr-folder", "root": root}
    return file_source((), files, facts, (note, *left_out_notes(left_out)))


def _split_folders(names: list[str]) -> dict[str, str]:
    """Which folder is which split, where the folders themselves say so."""
    if "train" in names and "val" in names:
        return {"train": "train", "val": "val"}
    train, val = (
        [name for name in names if name.endswith(end)] for end in ("_train_HR", "_valid_HR")
    )
    return {"train": train[0], "val": val[0]} if len(train) == len(val) == 1 else {}


def _hold_out(root: str, paths: list[str], val_count: int | None) -> dict[str, list[str]]:
    if len(paths) < 2:
        raise DatasetError(f"{root}: {len(paths)} images, expected at least 2")
    count = max(1, len(paths) // 10) if val_count is None else val_count
    if not 1 <= count < len(paths):
        raise DatasetError(f"--val-count {count}: expected 1 to {len(paths) - 1} in {root}")
    held_out = {(2 * i + 1) * len(paths) // (2 * count) for i in range(count)}
    return {
        "train": [path for i, path in enumerate(paths) if i not in held_out],
        "val": [paths[i] for i in sorted(held_out)],
    }


SR_FOLDER = Converter(
    name="sr-folder",
    tasks=("images",),
    help="A plain folder of images for super-resolution (DIV2K, Flickr2K, T91, photos).",
    open=open_sr_folder,
    options={
        "root": "The folder, with images at any depth.",
        "val_count": "Evenly spaced images to hold out as val, without train and val folders; a "
        "tenth, at least 1, by default.",
    },
)
