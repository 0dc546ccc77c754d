"""The drawn dataset as a source: no files needed."""

from sr4ir_dist.data import synthetic
from sr4ir_dist.data.convert.source import Converter, Source
from sr4ir_dist.data.schema import DatasetError


def open_drawn(
    train_count: int = 1024, val_count: int = 256, size: int = 64, seed: int = 0
) -> Source:
    """Draw a dataset with labels, masks and boxes.

    Args:
        train_count: images of the train split.
        val_count: images of the val split.
        size: height and width in pixels.
        seed: another seed, other images.

    Raises:
        DatasetError: a count is below one, the size below ``synthetic.MIN_SIZE``, or the seed
            negative.
    """
    limits = (
        ("train-count", train_count, 1),
        ("val-count", val_count, 1),
        ("size", size, synthetic.MIN_SIZE),
    )
    for name, value, least in (*limits, ("seed", seed, 0)):
        if value < least:
            raise DatasetError(f"--{name} {value}: expected at least {least}")
    counts = {"train": train_count, "val": val_count}
    return Source(
        class_names=tuple(synthetic.CLASS_NAMES),
        counts=counts,
        items=lambda split: [(split, index) for index in range(counts[split])],
        read=lambda item: synthetic.row(item[0], item[1], size, seed),
        facts={"layout": "drawn", "size": size, "seed": seed, "counts": counts},
    )


DRAWN = Converter(
    name="drawn",
    tasks=("images", "classification", "segmentation", "detection"),
    help="A dataset that the project draws itself: labels, masks and boxes, no download.",
    open=open_drawn,
    options={
        "train_count": "Images of the train split.",
        "val_count": "Images of the val split.",
        "size": "Height and width in pixels.",
        "seed": "Another seed, other images.",
    },
)
