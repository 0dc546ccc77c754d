"""What ranks decide together between steps."""

import time

import pytest
import torch.multiprocessing as multiprocessing

from sr4ir_dist.training import agreement as module
from sr4ir_dist.training.agreement import Agreement, Wish


def wishes(count, pause_s=0.0, **settings):
    with Agreement(1, **{"every_minutes": None, "notice": lambda: None} | settings) as agreement:
        found = []
        for _ in range(count):
            time.sleep(pause_s)
            found.append(agreement.after_step())
    return found


def test_nothing_is_wished_for_while_there_is_time():
    assert wishes(50, every_minutes=10) == [Wish.NONE] * 50


def test_a_checkpoint_is_wished_for_once_in_each_interval():
    found = wishes(60, pause_s=0.01, every_minutes=0.2 / 60)
    saves = [step for step, wish in enumerate(found) if wish is Wish.SAVE]
    assert 2 <= len(saves) <= 3
    assert all(later - earlier >= 10 for earlier, later in zip(saves, saves[1:], strict=False))


def test_a_checkpoint_for_another_reason_begins_the_interval_anew():
    with Agreement(1, every_minutes=0.2 / 60, notice=lambda: None) as agreement:
        for _ in range(30):
            time.sleep(0.01)
            agreement.saved()
            assert agreement.after_step() is Wish.NONE


def test_a_notice_is_asked_for_now_and_then_and_stays(monkeypatch):
    monkeypatch.setattr(module, "_NOTICE_EVERY_S", 0.05)
    asked = []

    def notice():
        asked.append(time.monotonic())
        return ["node"] if len(asked) == 3 else None

    with Agreement(1, every_minutes=None, notice=notice) as agreement:
        found = []
        for _ in range(40):
            time.sleep(0.01)
            found.append(agreement.after_step())
        assert agreement.left == ["node"]
    assert len(asked) == 3
    assert all(later - earlier >= 0.04 for earlier, later in zip(asked, asked[1:], strict=False))
    first = found.index(Wish.LEAVE)
    assert found == [Wish.NONE] * first + [Wish.LEAVE] * (40 - first)


def test_room_for_more_ranks_ends_this_many(monkeypatch):
    monkeypatch.setattr(module, "_GROW_EVERY_S", 0.05)
    asked = []

    def grow():
        asked.append(1)
        return len(asked) == 3

    with Agreement(1, every_minutes=None, notice=lambda: None, grow=grow) as agreement:
        found = []
        for _ in range(40):
            time.sleep(0.01)
            found.append(agreement.after_step())
        assert agreement.left == ()
    first = found.index(Wish.LEAVE)
    assert found == [Wish.NONE] * first + [Wish.LEAVE] * (40 - first)


def rank(number, ranks, folder, queue):
    import torch.distributed as dist

    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=number, world_size=ranks
    )
    # Only rank 0's clock counts: the others' intervals are of another length.
    minutes = (0.1 if number == 0 else 0.001) / 60
    module._NOTICE_EVERY_S = 0.2 if number == 0 else 0.0
    calls = []

    def notice():
        calls.append(len(found))
        dist.barrier()  # as Ray's: every rank has to come
        return "node" if len(calls) == 2 else None

    found = []
    with Agreement(ranks, every_minutes=minutes, notice=notice) as agreement:
        while agreement.left is None:
            time.sleep(0.01 * (1 + number))
            found.append(int(agreement.after_step()))
    queue.put((number, found, calls))
    dist.destroy_process_group()


@pytest.mark.timeout(120)
def test_every_rank_learns_the_same_at_the_same_step(tmp_path):
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    processes = [context.Process(target=rank, args=(n, 3, str(tmp_path), queue)) for n in range(3)]
    for process in processes:
        process.start()
    results = dict((number, rest) for number, *rest in (queue.get() for _ in processes))
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert results[0] == results[1] == results[2]
    found, calls = results[0]
    assert Wish.SAVE in found
    assert found[-1] == Wish.LEAVE
    assert len(calls) == 2
