import io
import time

import numpy as np
import pytest
from PIL import Image

from sr4ir_dist.data import synthetic
from sr4ir_dist.data.schema import VOID


def draw(split="train", count=16, size=64, seed=0):
    return list(synthetic.rows(split, count, size, seed))


def pixels(png):
    return np.array(Image.open(io.BytesIO(png)))


@pytest.fixture(scope="module")
def drawn():
    return draw(count=96)


def test_a_row_depends_on_seed_split_and_index_alone(drawn):
    assert draw(count=5) == drawn[:5]
    images = {row["image"] for row in drawn}
    for other in (draw("val", 8), draw(seed=1, count=8)):
        assert images.isdisjoint(row["image"] for row in other)
    assert len(images) == len(drawn)


def test_the_dataset_is_the_one_that_figures_were_measured_on(drawn):
    labels = [row["label"] for row in drawn[:8]]
    brightness = [pixels(row["image"]).mean() for row in drawn[:4]]
    assert labels == [4, 3, 6, 7, 0, 2, 1, 5]
    assert brightness == pytest.approx([158.27, 94.51, 154.19, 106.09], abs=0.05)
    assert drawn[0]["boxes"] == [[18.0, 9.0, 61.0, 56.0]]


def test_ids_are_unique_and_in_order(drawn):
    ids = [row["id"] for row in drawn]
    assert ids[:2] == ["train-000000", "train-000001"]
    assert sorted(set(ids)) == ids


@pytest.mark.parametrize("size", [32, 64, 97])
def test_sizes_and_formats(size):
    for row in draw(size=size, count=8):
        image, mask = pixels(row["image"]), pixels(row["mask"])
        assert (row["height"], row["width"]) == (size, size)
        assert image.shape == (size, size, 3)
        assert mask.shape == (size, size)
        assert image.dtype == mask.dtype == np.uint8


def test_every_class_equally_often(drawn):
    counts = np.bincount([row["label"] for row in drawn], minlength=len(synthetic.CLASS_NAMES))
    assert counts.tolist() == [12] * 8
    # Not in the same order in every block, so that no batch sees a fixed pattern.
    assert [r["label"] for r in drawn[:8]] != [r["label"] for r in drawn[8:16]]


def test_mask_boxes_and_label_tell_one_story(drawn):
    for row in drawn:
        mask = pixels(row["mask"])
        assert set(np.unique(mask)) == {0, row["label"] + 1, VOID}
        assert row["box_labels"] == [row["label"]] * len(row["boxes"])
        inside = np.zeros(mask.shape, bool)
        for x0, y0, x1, y1 in row["boxes"]:
            assert 0 <= x0 < x1 <= row["width"]
            assert 0 <= y0 < y1 <= row["height"]
            box = mask[int(y0) : int(y1), int(x0) : int(x1)]
            assert all(side.any() for side in (box[0], box[-1], box[:, 0], box[:, -1]))
            inside[int(y0) : int(y1), int(x0) : int(x1)] = True
        assert not mask[~inside].any()


def test_the_void_ring_is_about_one_pixel_wide(drawn):
    for row in drawn:
        mask = pixels(row["mask"])
        objects = (mask > 0) & (mask < VOID)
        near = np.pad(objects, 1)
        near = near[:-2, 1:-1] | near[2:, 1:-1] | near[1:-1, :-2] | near[1:-1, 2:]
        # Nothing of an object touches the background, and the ring holds little more than edges.
        assert not (near & (mask == 0)).any()
        assert ((mask == VOID) & ~near).mean() < 0.02


def test_some_images_hold_two_objects(drawn):
    counts = np.bincount([len(row["boxes"]) for row in drawn], minlength=3)
    assert counts.sum() == counts[1] + counts[2]
    assert 3 <= counts[2] <= counts[1]


def test_colours_do_not_betray_the_class():
    """The mean colours of classes differ by no more than those of equally large random groups."""
    rows = [row for seed in range(1, 5) for row in draw(count=200, size=32, seed=seed)]
    means = np.array([pixels(row["image"]).mean((0, 1)) for row in rows])
    labels = np.array([row["label"] for row in rows])

    def spread(labels):
        return max(np.ptp([means[labels == c].mean(0) for c in range(8)], axis=0))

    rng = np.random.default_rng(0)
    chance = [spread(rng.permutation(labels)) for _ in range(200)]
    assert spread(labels) <= max(chance)


def test_low_resolution_loses_the_texture_and_keeps_the_shape():
    """Energy of single-pixel differences inside the object falls by much, overall contrast not."""
    fine, coarse = [], []
    for row in draw(count=32):
        image = pixels(row["image"]).astype(float).mean(2)
        small = image.reshape(16, 4, 16, 4).mean((1, 3)).repeat(4, 0).repeat(4, 1)
        inside = pixels(row["mask"]) == row["label"] + 1
        fine.append(np.var((image - small)[inside]) / np.var(image[inside]))
        coarse.append(np.var(small) / np.var(image))
    assert np.mean(fine) > 0.5
    assert np.mean(coarse) > 0.5


def test_rows_are_drawn_as_they_are_asked_for():
    endless = synthetic.rows("train", 10**9, 64, 0)
    start = time.monotonic()
    assert next(endless)["id"] == "train-000000"
    assert time.monotonic() - start < 1


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("training", 1, 64, 0), "'training'.*train, val, test"),
        (("train", -1, 64, 0), "count is -1"),
        (("train", 1, 31, 0), "size is 31.*32"),
        (("train", 1, 64, -1), "seed is -1"),
    ],
)
def test_wrong_arguments_are_named_at_the_call(arguments, named):
    with pytest.raises(ValueError, match=named):
        synthetic.rows(*arguments)
