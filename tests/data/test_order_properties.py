"""What holds for the order of any dataset: shares, resume at every step, how far rows are apart."""

from collections import Counter

import numpy as np
from hypothesis import assume, example, given
from hypothesis import strategies as st

from sr4ir_dist.data.order import Order

RANKS = (1, 2, 3, 4, 8)

# Record batches of each shard: their rows, or their rows and groups.
rows = st.integers(1, 40)
shards = st.lists(st.lists(rows, min_size=1, max_size=6), min_size=1, max_size=6)
grouped_shards = st.lists(
    st.lists(st.tuples(rows, st.integers(0, 7)), min_size=1, max_size=6), min_size=1, max_size=6
)


@st.composite
def arguments(draw: st.DrawFn) -> dict:
    """Arguments of an order, in groups or not, that has a step but no more than 100."""
    if draw(st.booleans()):
        drawn = draw(grouped_shards)
        batch_rows = [[count for count, _ in shard] for shard in drawn]
        kind = {"batch_groups": [[group for _, group in shard] for shard in drawn]}
    else:
        batch_rows = draw(shards)
        kind = {"shuffle": draw(st.booleans()), "drop_last": draw(st.booleans())}
    total = sum(map(sum, batch_rows))
    return {
        "batch_rows": batch_rows,
        "seed": draw(st.integers(0, 2**40)),
        "batch_size": draw(st.integers(-(-total // 100), total)),
        "window_rows": draw(st.none() | st.integers(1, total)),
        "shuffle": True,
        **kind,
    }


@given(arguments(), st.integers(1, 30), st.data())
def test_every_step_is_the_same_whoever_asks_for_it_and_when(made, epoch, data):
    order = Order(**made)
    steps = range(order.steps_per_epoch)
    batches = [order.global_batch(epoch, step).tolist() for step in steps]
    assert [len(batch) for batch in batches] == [order.global_size(step) for step in steps]
    if "batch_groups" not in made:
        seen = sorted(row for batch in batches for row in batch)
        dropped = order.total % order.batch_size if made["drop_last"] else 0
        assert len(set(seen)) == len(seen) == order.total - dropped
        assert dropped or seen == list(range(order.total))
    # Whoever starts at a step, after whatever else, gets the very step.
    for step in data.draw(st.permutations(steps)):
        assert Order(**made).global_batch(epoch, step).tolist() == batches[step]
        assert order.global_batch(epoch, step).tolist() == batches[step]


@given(arguments(), st.integers(1, 5))
def test_any_number_of_ranks_may_take_over_at_any_step(made, epoch):
    order = Order(**made)
    steps = range(order.steps_per_epoch)
    whole = [order.global_batch(epoch, step).tolist() for step in steps]
    applied = {}
    for ranks in RANKS:
        shares = [[order.share(epoch, step, r, ranks) for r in range(ranks)] for step in steps]
        for parts in shares:
            sizes = [len(part) for part in parts]
            assert max(sizes) - min(sizes) <= 1
        applied[ranks] = [np.concatenate(parts).tolist() for parts in shares]
    for cut in range(len(steps) + 1):
        for before in RANKS:
            for after in RANKS:
                assert applied[before][:cut] + applied[after][cut:] == whole


@st.composite
def sizes(draw: st.DrawFn) -> list[list[int]]:
    """Uneven record batches of up to 2 or up to 150 shards: from one row to some 100,000."""
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    count = draw(st.integers(1, draw(st.sampled_from((2, 150)))))
    batches = draw(st.integers(1, 12))
    most = draw(st.sampled_from((1, 2, 20, 100, 30_000 // count)))
    return [
        random.integers(1, most + 1, random.integers(1, batches + 1)).tolist() for _ in range(count)
    ]


def apart(order: Order, epochs: int) -> float:
    """How many rows lie between two rows that are neighbours in the split, on average."""
    distances = []
    for epoch in range(1, epochs + 1):
        batches = [order.global_batch(epoch, step) for step in range(order.steps_per_epoch)]
        place = np.full(order.total, np.nan)
        line = np.concatenate(batches)
        place[line] = np.arange(len(line))
        distances.append(np.abs(np.diff(place)))
    return float(np.nanmean(distances))


def enough(order: Order) -> float:
    return min(order.total / 10, 1000)


# A step's rows are used together, so nothing is apart in an epoch that is hardly more than a step.
@given(sizes(), st.integers(0, 1000), st.floats(0.003, 0.5))
@example([[64] * 256] * 4, 0, 0.25)  # a step of 16,384 rows: would be a window of its own
def test_neighbours_are_far_apart(batch_rows, seed, step):
    total = sum(map(sum, batch_rows))
    assume(total > 1)
    order = Order(batch_rows, seed=seed, batch_size=max(1, int(total * step)), shuffle=True)
    assert apart(order, epochs=4 if total < 1000 else 1) >= enough(order)


@given(sizes(), st.integers(0, 1000), st.integers(1, 8), st.floats(0.003, 0.5))
@example([[64] * 256] * 4, 0, 8, 0.25)
def test_neighbours_in_groups_are_far_apart(batch_rows, seed, groups, step):
    batch_groups = [[i % groups for i in range(len(shard))] for shard in batch_rows]
    rows_of = Counter()
    for shard in zip(batch_groups, batch_rows, strict=True):
        for group, count in zip(*shard, strict=True):
            rows_of[group] += count
    # Two steps of each group, for the same reason.
    batch_size = int(min(rows_of.values()) * step)
    assume(batch_size > 0 and rows_of.total() // batch_size < 3000)
    order = Order(
        batch_rows, batch_groups=batch_groups, seed=seed, batch_size=batch_size, shuffle=True
    )
    assert apart(order, epochs=4 if order.total < 1000 else 1) >= enough(order)
