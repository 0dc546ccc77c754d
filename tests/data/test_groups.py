import bisect

import numpy as np
import pytest

from sr4ir_dist.data.groups import EDGES, GROUPS, aspect_group, steps_of_groups


def test_edges_are_the_published_ones():
    # torchvision's detection references, with factor 3.
    published = (2 ** np.linspace(-1, 1, 2 * 3 + 1)).tolist()
    assert pytest.approx(published, abs=1e-15) == EDGES
    assert GROUPS == 8
    rng = np.random.default_rng(0)
    for height, width in rng.integers(8, 2000, (500, 2)).tolist():
        assert aspect_group(height, width) == bisect.bisect_right(published, width / height)


@pytest.mark.parametrize(
    ("height", "width", "group"),
    [(500, 100, 0), (500, 250, 1), (500, 333, 2), (500, 375, 2), (500, 400, 3), (500, 500, 4),
     (375, 500, 5), (333, 500, 5), (281, 500, 6), (100, 200, 7)],
)  # fmt: skip
def test_groups_of_common_sizes(height, width, group):
    assert aspect_group(height, width) == group


SIZES = [
    [37, 3, 100, 1],
    [160],
    [16, 16, 16],
    [100, 3],
    [15, 15, 15, 15],
    [1, 2, 3, 4, 5, 6, 7, 8],
    [4000, 130, 60, 30, 11, 9, 2, 1],
    [17, 1],
]


@pytest.mark.parametrize("rows", SIZES, ids=str)
def test_an_epoch_has_as_many_steps_as_fit(rows):
    for epoch in range(1, 30):
        counts = steps_of_groups(rows, 16, epoch)
        assert sum(counts) == sum(rows) // 16
        assert all(0 <= c <= -(-r // 16) for c, r in zip(counts, rows, strict=True))


@pytest.mark.parametrize("rows", SIZES, ids=str)
def test_first_epoch_is_the_published_rule(rows):
    counts = [count // 16 for count in rows]
    missing = sum(rows) // 16 - sum(counts)
    by_leftover = sorted(range(len(rows)), key=lambda group: -(rows[group] % 16))
    for group in by_leftover[:missing]:
        counts[group] += 1
    assert list(steps_of_groups(rows, 16, 1)) == counts


@pytest.mark.parametrize("rows", SIZES, ids=str)
def test_groups_are_trained_on_in_proportion_to_their_rows(rows):
    epochs, steps = 200, sum(rows) // 16
    given = np.sum([steps_of_groups(rows, 16, epoch) for epoch in range(1, epochs + 1)], axis=0)
    expected = np.array(rows) * steps / sum(rows) * epochs
    # Never off by more than about one step, after however many epochs.
    assert np.abs(given - expected).max() < 2


def test_epoch_zero_is_like_the_first():
    assert steps_of_groups([100, 3], 16, 0) == steps_of_groups([100, 3], 16, 1) == (6, 0)
