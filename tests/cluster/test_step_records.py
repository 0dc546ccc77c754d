import pytest
from step_records import Step, applied, read, recorded, samples


def attempt(name, numbers, *, ranks=2, ids="{number}.{rank}"):
    """The steps of one attempt, each rank with one sample of its own in each."""
    return [
        Step(name, rank, ranks, number, (ids.format(number=number, rank=rank),), time=number)
        for number in numbers
        for rank in range(ranks)
    ]


def told(steps):
    return {number: [each.attempt for each in ranks] for number, ranks in applied(steps).items()}


def test_a_later_attempt_replaces_all_from_its_first_step_on():
    steps = attempt("1", range(1, 8)) + attempt("2", range(4, 6), ranks=3)
    assert told(steps) == {n: ["1"] * 2 if n < 4 else ["2"] * 3 for n in range(1, 6)}
    assert told(steps[::-1]) == told(steps)


def test_an_attempt_without_a_step_or_from_the_beginning():
    steps = attempt("1", range(1, 4)) + attempt("2", range(1, 3)) + attempt("3", [])
    assert told(steps) == {1: ["2", "2"], 2: ["2", "2"]}
    assert applied([]) == {}


def test_a_step_that_was_begun_by_some_ranks_is_told_unless_it_was_replaced():
    first = attempt("1", range(1, 4))[:-1]  # rank 1 died in step 3
    with pytest.raises(ValueError, match=r"step 3 has ranks \[0\] of 2"):
        [samples(ranks) for ranks in applied(first).values()]
    healed = applied(first + attempt("2", [3]))
    assert [samples(ranks) for ranks in healed.values()] == [
        [f"{number}.0", f"{number}.1"] for number in (1, 2, 3)
    ]


def test_a_step_that_two_attempts_did_counts_for_the_later_alone():
    steps = attempt("1", [1, 2], ids="old{number}.{rank}") + attempt("2", [2], ranks=1)
    assert [samples(ranks) for ranks in applied(steps).values()] == [["old1.0", "old1.1"], ["2.0"]]


def test_a_gap_between_attempts_shows():
    steps = attempt("1", [1, 2]) + attempt("2", [5])
    assert list(applied(steps)) == [1, 2, 5]


def test_lines_are_read_back_and_half_a_line_is_left_out(tmp_path, monkeypatch):
    from sr4ir_dist.training import loop, saving

    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 1)
    monkeypatch.setattr(saving, "shared", lambda read, rank: read())
    monkeypatch.setattr(loop.LossLog, "add", lambda *arguments: None)

    def worker(config):
        for step in (4, 5):
            loop.LossLog.add(None, step, (f"name {step}",), {})  # type: ignore[arg-type]
        return config

    assert recorded(worker, str(tmp_path))({"job": 1}) == {"job": 1}
    (path,) = tmp_path.iterdir()
    with path.open("a") as file:
        file.write('{"attempt": "1')
    steps = read(tmp_path)
    assert [(each.step, each.ids, each.rank, each.ranks) for each in steps] == [
        (4, ("name 4",), 0, 1),
        (5, ("name 5",), 0, 1),
    ]
    assert len({each.attempt for each in steps}) == 1
