"""The queue of runs: each after those that it needs, once, whatever becomes of lanes."""

from hypothesis import given
from hypothesis import strategies as st

from sr4ir_dist import experiments
from sr4ir_dist.training.run_queue import Order, Outcome, RunQueue

EXPERIMENT = experiments.make("drawn_cls/h2t")
DONE = Outcome("done", {"metrics": {}})


def orders(*needs):
    return [Order(EXPERIMENT, "data", tuple(each)) for each in needs]


@st.composite
def graphs(draw):
    count = draw(st.integers(1, 12))
    earlier = [st.sets(st.integers(0, n - 1)) if n else st.just(set()) for n in range(count)]
    return orders(*[sorted(draw(each)) for each in earlier])


@given(graphs(), st.integers(1, 4), st.randoms())
def test_every_order_is_given_once_and_after_what_it_needs(graph, lanes, random):
    queue = RunQueue(graph, max_failures=0)
    given_out, working = [], {}
    while len(given_out) < len(graph) or working:
        lane = random.randrange(lanes)
        if lane in working:
            queue.settle(working.pop(lane), DONE)
            continue
        number = queue.take(lane)
        if number is None:
            assert working or not queue.is_open()  # somebody works, or it would stand still
            continue
        settled = queue.outcomes()
        assert all(need in settled for need in graph[number].needs)
        given_out.append(number)
        working[lane] = number
    assert sorted(given_out) == list(range(len(graph)))
    assert not queue.is_open()


def test_what_needs_a_run_that_failed_fails_too_and_says_why():
    queue = RunQueue(orders([], [0], [1], []), max_failures=0)
    queue.settle(queue.take(0), Outcome("missing", why="there are no weights"))
    outcomes = queue.outcomes()
    assert [outcomes[n].kind for n in range(3)] == ["missing"] * 3
    assert outcomes[2].why == "it needs drawn_cls/h2t: it needs drawn_cls/h2t: there are no weights"
    assert queue.take(0) == 3


def test_a_lane_that_ends_gives_its_order_back_until_it_did_so_too_often():
    queue = RunQueue(orders([]), max_failures=1)
    assert queue.take(0) == 0
    assert queue.take(0) == 0  # its workers were started again in time
    assert queue.take(1) is None
    assert not queue.is_open()
    queue.lost(0, "killed")
    assert queue.is_open()
    assert queue.take(1) == 0
    queue.lost(1, "its node goes", counts=False)
    assert queue.take(1) == 0
    queue.lost(0, "killed while it had nothing")
    queue.lost(1, "killed again")
    assert queue.outcomes() == {0: Outcome("failed", why="killed again")}
