from collections import Counter

import numpy as np
import pytest

from sr4ir_dist.data.order import Order

# 6 shards of record batches in 4 groups: of 223, 60, 21 and 3 rows, 307 together.
ROWS = [[20, 9, 7], [31, 8], [40, 1, 40], [25, 25, 5, 2], [13, 20], [30, 10, 21]]
GROUPS = [[4, 5, 4], [4, 5], [4, 1, 4], [5, 4, 5, 1], [5, 4], [4, 4, 3]]
GROUP_OF_ROW = np.repeat(
    [group for groups in GROUPS for group in groups], [count for rows in ROWS for count in rows]
)
TOTAL = len(GROUP_OF_ROW)


def make(**changes) -> Order:
    settings = {"seed": 3, "batch_size": 16, "shuffle": True, "window_rows": 100}
    return Order(ROWS, batch_groups=GROUPS, **(settings | changes))


def epoch_batches(order: Order, epoch: int) -> list[np.ndarray]:
    return [order.global_batch(epoch, step) for step in range(order.steps_per_epoch)]


@pytest.mark.parametrize("batch_size", [1, 7, 16, 100, 307])
@pytest.mark.parametrize("window_rows", [1, 100, 10**6])
def test_every_step_is_full_and_holds_one_group(batch_size, window_rows):
    order = make(batch_size=batch_size, window_rows=window_rows)
    assert order.steps_per_epoch == TOTAL // batch_size
    for epoch in range(1, 5):
        batches = epoch_batches(order, epoch)
        assert [len(batch) for batch in batches] == [batch_size] * (TOTAL // batch_size)
        assert all(len(set(GROUP_OF_ROW[batch])) == 1 for batch in batches)
        assert [order.global_size(step) for step in range(len(batches))] == [batch_size] * len(
            batches
        )


def test_rows_repeat_only_to_complete_a_groups_last_step():
    order = make()
    sizes = Counter(GROUP_OF_ROW.tolist())
    completed = 0
    for epoch in range(1, 20):
        rows_of: dict[int, list[int]] = {}
        steps_of: Counter[int] = Counter()
        for batch in epoch_batches(order, epoch):
            group = int(GROUP_OF_ROW[batch[0]])
            rows_of.setdefault(group, []).extend(batch.tolist())
            steps_of[group] += 1
        for group, rows in rows_of.items():
            surplus = max(0, 16 * steps_of[group] - sizes[group])
            assert surplus < 16
            completed += surplus > 0
            # All that are beyond the group's rows, and none else: each row comes as often as any
            # other, or once more.
            assert len(rows) - len(set(rows)) == surplus
            assert max(Counter(rows).values()) <= -(-16 // min(16, sizes[group])) + 1
    assert completed > 10


def test_everything_is_seen_within_a_few_epochs():
    order = make()
    seen: set[int] = set()
    for epoch in range(1, 8):
        seen.update(np.concatenate(epoch_batches(order, epoch)).tolist())
    assert seen == set(range(TOTAL))


def test_epochs_and_seeds_differ():
    first = np.concatenate(epoch_batches(make(), 1))
    for order, epoch in ((make(), 2), (make(seed=4), 1)):
        assert (np.concatenate(epoch_batches(order, epoch)) == first).mean() < 0.1


def test_the_order_is_this_for_ever():
    # Golden: a run that resumes with another version must go on with the same samples.
    order = make(batch_size=4)
    assert order.global_batch(3, 0).tolist() == [40, 42, 231, 232]
    assert order.global_batch(3, 1).tolist() == [59, 60, 31, 227]
    assert order.global_batch(3, 40).tolist() == [196, 203, 122, 144]


def test_steps_of_the_groups_alternate():
    order = Order(
        [[50] * 8] * 20,
        batch_groups=[[5, 2] * 3 + [5, 5]] * 20,
        **{"seed": 0, "batch_size": 10, "shuffle": True},
    )
    narrow = [
        step for step in range(order.steps_per_epoch)
        if order.locate(order.global_batch(1, step))[1][0] // 50 in (1, 3, 5)
    ]  # fmt: skip
    assert len(narrow) == 300
    # 300 of 800 steps: one at random in each 300th part of the epoch.
    assert all(abs(step - 800 * (i + 0.5) / 300) <= 5 for i, step in enumerate(narrow))
    assert len(set(np.diff(narrow).tolist())) >= 3


def test_a_window_bounds_the_shards_in_use():
    groups = [[2, 5, 5, 5]] * 100
    order = Order(
        [[50] * 4] * 100, batch_groups=groups, seed=1, batch_size=50, shuffle=True, window_rows=1000
    )
    steps_of: dict[int, set[int]] = {}
    for step in range(order.steps_per_epoch):
        for shard in order.locate(order.global_batch(1, step))[0].tolist():
            steps_of.setdefault(shard, set()).add(step)
    assert len(steps_of) == 100
    # A window is 20 steps of 400; a shard may lie across two of them, and both lines pass it at
    # about the same time.
    assert max(max(steps) - min(steps) for steps in steps_of.values()) <= 50


def test_bad_settings():
    with pytest.raises(ValueError, match="307 rows has no step of 308 samples in groups"):
        make(batch_size=308)
    with pytest.raises(ValueError, match="groups need shuffle"):
        make(shuffle=False)
    with pytest.raises(ValueError, match="batch_groups must name one group for each"):
        Order(ROWS, batch_groups=GROUPS[:-1], seed=0, batch_size=4, shuffle=True)
