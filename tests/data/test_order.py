import numpy as np
import pytest

from sr4ir_dist.data.order import Order

# 7 shards of uneven record batches, 523 rows.
ROWS = [[13, 20, 7], [31], [40, 40], [25] * 6, [1, 1, 1], [64, 64, 64], [27]]
TOTAL = sum(map(sum, ROWS))


def make(**changes) -> Order:
    settings = {"seed": 3, "batch_size": 32, "shuffle": True, "window_rows": 100}
    return Order(ROWS, **(settings | changes))


def epoch_rows(order: Order, epoch: int = 1) -> np.ndarray:
    return np.concatenate([order.global_batch(epoch, s) for s in range(order.steps_per_epoch)])


def test_only_the_last_step_is_short():
    order = make()
    sizes = [len(order.global_batch(1, step)) for step in range(order.steps_per_epoch)]
    assert sizes == [32] * 16 + [TOTAL - 512]
    assert [order.global_size(step) for step in range(17)] == sizes
    dropping = make(drop_last=True)
    assert dropping.steps_per_epoch == 16
    assert epoch_rows(dropping).tolist() == epoch_rows(order)[:512].tolist()


def test_epochs_and_seeds_differ():
    first = epoch_rows(make())
    for other in (epoch_rows(make(), 2), epoch_rows(make(seed=4)), epoch_rows(make(seed=4), 2)):
        assert (first == other).mean() < 0.05
    assert (epoch_rows(make(), 2) == epoch_rows(make(seed=2), 3)).mean() < 0.05


def test_the_order_is_this_for_ever():
    # Golden: a run that resumes with another version must go on with the same samples.
    order = make(batch_size=8)
    assert order.global_batch(1, 0).tolist() == [206, 221, 291, 297, 299, 236, 248, 250]
    assert order.global_batch(2, 50).tolist() == [368, 369, 386, 408, 418, 304, 346, 360]


def test_a_step_holds_rows_from_all_over_the_split():
    # One shard of 20,000 rows sorted by class, in 200 record batches: the worst source.
    order = Order([[100] * 200], seed=0, batch_size=100, shuffle=True, window_rows=5000)
    stretch = [np.ptp(order.global_batch(1, step)) for step in range(order.steps_per_epoch)]
    assert min(stretch) > 10000


def test_a_window_bounds_the_shards_in_use():
    order = Order([[50] * 4] * 100, seed=1, batch_size=64, shuffle=True, window_rows=1000)
    steps_of: dict[int, set[int]] = {}
    for step in range(order.steps_per_epoch):
        for shard in order.locate(order.global_batch(1, step))[0].tolist():
            steps_of.setdefault(shard, set()).add(step)
    assert len(steps_of) == 100
    # A window is 16 steps; a shard may lie across two of them.
    assert max(max(steps) - min(steps) for steps in steps_of.values()) <= 33


def test_a_rank_keeps_to_its_own_shards():
    order = Order([[50] * 4] * 100, seed=1, batch_size=64, shuffle=True, window_rows=4000)
    per_rank = [
        {
            int(shard)
            for step in range(60)
            for shard in order.locate(order.share(1, step, rank, 4))[0]
        }
        for rank in range(4)
    ]
    # 20 shards a window: a rank reads about its quarter of them, not all.
    assert max(map(len, per_rank)) <= 12
    assert len(set.union(*per_rank)) >= 20


def test_unshuffled_is_the_splits_own_order():
    order = make(shuffle=False)
    assert epoch_rows(order, 1).tolist() == list(range(TOTAL))
    assert epoch_rows(order, 5).tolist() == list(range(TOTAL))


def test_locate_finds_shard_and_row():
    order = make()
    shards, local = order.locate(np.arange(TOTAL))
    expected = [(shard, row) for shard, rows in enumerate(ROWS) for row in range(sum(rows))]
    assert list(zip(shards.tolist(), local.tolist(), strict=True)) == expected
    assert [order.shard_start(shard) for shard in range(3)] == [0, 40, 71]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": -1}, "seed must be 0 or more, got -1"),
        ({"batch_size": 0}, "batch_size must be 1 or more, got 0"),
        ({"window_rows": 0}, "window_rows must be 1 or more, got 0"),
        ({"batch_size": 600, "drop_last": True}, "523 rows has no step of 600 samples"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_bad_questions():
    order = make()
    with pytest.raises(ValueError, match=r"step must be in 0\.\.16, got 17"):
        order.global_batch(1, 17)
    with pytest.raises(ValueError, match=r"rank must be in 0\.\.1, got 2"):
        order.share(1, 0, 2, 2)
    with pytest.raises(ValueError, match="epoch must be 0 or more, got -1"):
        order.global_batch(-1, 0)
    with pytest.raises(ValueError, match="has no step"):
        Order([], seed=0, batch_size=4, shuffle=True)
    with pytest.raises(ValueError, match="no empty record batch"):
        Order([[3, 0]], seed=0, batch_size=4, shuffle=True)
