"""Stanford Cars as folders of images, the copy that the published results used."""

from dataclasses import replace

from sr4ir_dist import storage
from sr4ir_dist.data.convert.image_folder import open_image_folder
from sr4ir_dist.data.convert.source import Converter, Source
from sr4ir_dist.data.schema import DatasetError

# The archive of the copy wraps its folders in one or two of this name.
_WRAPPERS = ((), ("car_data",), ("car_data", "car_data"))
_CLASSES = 196


def open_cars(root: str) -> Source:
    """Open ``car_data/train/<class>/*.jpg`` and ``car_data/test/<class>/*.jpg``.

    Args:
        root: the folder with ``train`` and ``test`` in it, or one that holds it as ``car_data``.

    Returns:
        A source with the splits ``train`` and ``val``; ``val`` is the official test split.
        Classes are the sorted names of the folders.

    Raises:
        DatasetError: the layout is not as expected; for the original one with ``.mat`` files it
            says how to get class folders.
    """
    names: list[str] = []
    for wrapper in _WRAPPERS:
        folder = storage.join(root, *wrapper)
        found = storage.list_names(folder)
        names = names or found
        if "train" in found and ("test" in found or "val" in found):
            source = open_image_folder(folder)
            count = len(source.class_names)
            notes = () if count == _CLASSES else (f"{count} classes; the whole set has {_CLASSES}",)
            facts = {**source.facts, "layout": "Stanford Cars, class folders"}
            return replace(source, facts=facts, notes=(*source.notes, *notes))
    if any(name.endswith(".mat") or name in ("devkit", "cars_train") for name in names):
        raise DatasetError(
            f"{root}: this is the original layout with MATLAB annotations; expected folders train "
            "and test with one folder a class: get the copy that is published so (Kaggle's "
            "stanford-car-dataset-by-classes-folder), or copy each image of cars_train and "
            "cars_test into a folder named after its class"
        )
    raise DatasetError(
        f"{root}: expected folders train and test with one folder a class, or car_data with them; "
        f"found {', '.join(names[:10]) or 'nothing'}"
    )


CARS = Converter(
    name="cars",
    tasks=("images", "classification"),
    help="Stanford Cars as class folders (car_data/train, car_data/test).\n\n"
    "--root is the folder with train/ and test/ (one folder a class in each), or the one with "
    "car_data/ in it. The official test split becomes val.",
    open=open_cars,
    options={"root": "The source's folder."},
)
