"""Aspect-ratio groups: images of about one shape share a detection batch, so little is padding.

The edges are the published ones, seven powers of two from 1/2 to 2 (torchvision's detection
references with `--aspect-ratio-group-factor 3`).
"""

from bisect import bisect_right
from collections.abc import Sequence

EDGES: tuple[float, ...] = tuple(2.0 ** (third / 3) for third in range(-3, 4))
"""Where one group of width / height ends and the next begins; an edge belongs to the next."""
GROUPS = len(EDGES) + 1


def aspect_group(height: int, width: int) -> int:
    """The group of an image, 0 (narrowest) to `GROUPS` - 1 (widest), by width / height."""
    return bisect_right(EDGES, width / height)


def steps_of_groups(rows: Sequence[int], batch_size: int, epoch: int) -> tuple[int, ...]:
    """How many of an epoch's steps each group gets; floor(all rows / batch_size) together.

    In the first epoch these are the published ones: each group's full batches, then one more for
    the groups with the largest leftovers, to be completed by repeats. What a group was denied or
    given beyond its part of all rows counts in the epochs that follow. So no group is left out
    for ever, however small: on average every row is seen equally often.

    Args:
        rows: each group's size.
        batch_size: samples of a step.
        epoch: counts from 1.

    Returns:
        For each group a number from 0 to ceil(its rows / batch_size).
    """
    total = sum(rows)
    steps = total // batch_size
    # Whole numbers throughout, in units of 1/total sample: a run on another machine agrees.
    owed = [0] * len(rows)
    counts: list[int] = []
    for _ in range(max(epoch, 1)):
        due = [o + r * total for o, r in zip(owed, rows, strict=True)]
        counts = _share_out(due, rows, batch_size, steps)
        owed = [
            o + (r * steps - count * total) * batch_size
            for o, r, count in zip(owed, rows, counts, strict=True)
        ]
    return tuple(counts)


def _share_out(due: list[int], rows: Sequence[int], batch_size: int, steps: int) -> list[int]:
    """Gives the steps away one by one, each to the group that is due most."""
    batch = batch_size * sum(rows)
    counts = [count // batch_size for count in rows]
    most = [-(-count // batch_size) for count in rows]

    def left(group: int) -> int:
        return due[group] - counts[group] * batch

    while True:
        waiting = [group for group in range(len(rows)) if counts[group] < most[group]]
        if not waiting:
            return counts
        best = max(waiting, key=left)
        if sum(counts) == steps:
            # A group that is owed more than another's last batch is worth takes its place.
            last = min((group for group in range(len(rows)) if counts[group]), key=left)
            if left(best) <= left(last) + batch:
                return counts
            counts[last] -= 1
        counts[best] += 1
