"""Who keeps the others waiting is named, by itself too."""

import os
import re
import time
from datetime import timedelta

import pytest
import torch.multiprocessing as multiprocessing
from ray.train.v2._internal.exceptions import BroadcastCollectiveTimeoutError

from sr4ir_dist.training.watchdog import LostRankError, Watchdog, from_collective

LIMIT_S = 4.0


def rank(number, folder, queue):
    import torch
    import torch.distributed as dist

    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=number,
        world_size=3,
        timeout=timedelta(seconds=LIMIT_S),
    )

    def say(text):
        queue.put((number, "said", text))

    queue.put((number, "process", os.getpid()))
    try:
        with Watchdog(number, 3, address="127.0.0.1", limit_s=LIMIT_S, say=say) as watchdog:
            watchdog.entered("phase 1", 7)
            dist.all_reduce(torch.ones(1))
            if number == 2:
                watchdog.entered("data", 8)
                time.sleep(600)
            watchdog.entered("phase 1", 8)
            dist.all_reduce(torch.ones(1))
    except LostRankError as error:
        queue.put((number, "raised", str(error)))
        time.sleep(LIMIT_S)  # the list of all is in rank 0's process


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What three ranks tell, of which the last hangs, and how they end."""
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    folder = str(tmp_path_factory.mktemp("ranks"))
    processes = [context.Process(target=rank, args=(n, folder, queue)) for n in range(3)]
    for process in processes:
        process.start()
    messages = []
    wanted = {(0, "raised"), (1, "raised"), (2, "said")}
    while not wanted <= {message[:2] for message in messages}:
        messages.append(queue.get())
    time.sleep(LIMIT_S)  # in which it would say so again
    while not queue.empty():
        messages.append(queue.get())
    processes[2].kill()
    for process in processes:
        process.join(60)
    return messages, [process.exitcode for process in processes]


@pytest.mark.timeout(200)
def test_ranks_that_wait_name_the_one_that_is_missing(told):
    messages, codes = told
    pids = {number: text for number, kind, text in messages if kind == "process"}
    raised = {number: text for number, kind, text in messages if kind == "raised"}
    assert sorted(raised) == [0, 1]
    for number, text in raised.items():
        who = f"rank {number} at step 8 \\(phase 1\\) waited in vain for rank 2 "
        assert re.search(rf"{who}\(127\.0\.0\.1, process {pids[2]}\)", text)
        # The other one that waits may give up a moment before or after.
        assert re.search(r"rank 2 [^;]*at step 8, data for \d+ s", text)
    assert codes[:2] == [0, 0]


@pytest.mark.timeout(200)
def test_a_rank_that_hangs_says_so_once(told):
    messages, _ = told
    (text,) = [text for number, kind, text in messages if (number, kind) == (2, "said")]
    assert re.search(r"rank 2 \(127.0.0.1, process \d+\), step 8: data for [456] s", text)
    assert re.search(r"meanwhile rank 0 \([^)]*\), .* at step 8, phase 1 for \d s; rank 1 ", text)


@pytest.mark.timeout(200)
def test_those_who_wait_name_it_before_they_give_up(told):
    messages, _ = told
    for waiting in (0, 1):
        kinds = [kind for number, kind, _ in messages if number == waiting]
        assert kinds == ["process", "said", "raised"]
        (text,) = [text for number, kind, text in messages if (number, kind) == (waiting, "said")]
        assert re.search(r"step 8: phase 1 for 4 s; meanwhile rank 2 .*, data for \d s", text)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (LostRankError("rank 1"), True),
        (RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer"), True),
        (RuntimeError("NCCL error: unhandled system error"), True),
        (
            BroadcastCollectiveTimeoutError(1.0, [1], 1.0),
            True,
        ),
        (RuntimeError("shape mismatch"), False),
        (ValueError("gloo"), False),
        (ValueError("Default process group has not been initialized, please"), True),
        (OSError("Connection closed by peer"), False),
    ],
)
def test_errors_of_collectives_are_told_from_others(error, expected):
    assert from_collective(error) is expected


def test_one_rank_needs_no_others():
    with Watchdog(0, 1, address="127.0.0.1", limit_s=60, say=print) as watchdog:
        watchdog.entered("phase 1", 1)
    with (
        pytest.raises(ValueError, match="bad"),
        Watchdog(0, 1, address="127.0.0.1", limit_s=60, say=print),
    ):
        raise ValueError("bad")
