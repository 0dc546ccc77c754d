"""Ranks as plain processes of this machine, without Ray."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_LIMIT_S = 3600.0


class RankError(RuntimeError):
    """A rank failed or took too long; the message has the end of what it said."""


def run_ranks(
    module: str, request: str, *, ranks: int, threads: int, folder: str, gpus: bool = False
) -> list[dict[str, Any]]:
    """Start `python -m MODULE REQUEST RANK` for each rank and return what each recorded.

    Args:
        module: a program that writes FOLDER/rank-RANK.json.
        request: what all ranks do.
        ranks: how many.
        threads: of each.
        folder: for their results and logs.
        gpus: they see the machine's; otherwise none.

    Raises:
        RankError: one failed; the others are ended.
    """
    command = [sys.executable, "-m", module, request]
    run_together(command, ranks=ranks, threads=threads, folder=folder, gpus=gpus)
    return [json.loads(Path(folder, f"rank-{rank}.json").read_text()) for rank in range(ranks)]


def run_together(
    command: Sequence[str],
    *,
    ranks: int,
    threads: int,
    folder: str,
    gpus: bool = False,
    limit_s: float = _LIMIT_S,
) -> None:
    """Start a command for each rank, with the rank after its arguments, and wait for all.

    Args:
        command: the program and the arguments that all ranks share.
        ranks: how many.
        threads: of each.
        folder: for their logs.
        gpus: they see the machine's; otherwise none.
        limit_s: how long they may take.

    Raises:
        RankError: one failed, or they took too long; all are ended.
    """
    logs = [Path(folder, f"log-{rank}.txt") for rank in range(ranks)]
    processes, deadline = [], time.monotonic() + limit_s
    try:
        for rank, log in enumerate(logs):
            environment = os.environ | ({} if gpus else {"CUDA_VISIBLE_DEVICES": ""})
            environment |= {
                "GLOO_SOCKET_IFNAME": "lo",
                "LOCAL_RANK": str(rank),
                "OMP_NUM_THREADS": str(threads),
            }
            with log.open("wb") as sink:
                processes.append(
                    subprocess.Popen(
                        [*command, str(rank)],
                        env=environment,
                        stdout=sink,
                        stderr=subprocess.STDOUT,
                    )
                )
        # A rank that failed leaves the others waiting for it.
        while {process.poll() for process in processes} in ({None}, {None, 0}):
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)
        codes = [process.poll() for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for code, log in zip(codes, logs, strict=True):
        if code:
            raise RankError(f"a rank ended with code {code}: {log.read_text()[-3000:]}")
    if None in codes:
        log = logs[codes.index(None)].read_text()[-3000:]
        raise RankError(f"a rank did not end in {limit_s:.0f} s: {log}")
