"""Ranks as plain processes of this machine, without Ray."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


class RankError(RuntimeError):
    """A rank failed; the message has the end of what it said."""


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
    logs = [Path(folder, f"log-{rank}.txt") for rank in range(ranks)]
    processes = []
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
                        [sys.executable, "-m", module, request, str(rank)],
                        env=environment,
                        stdout=sink,
                        stderr=subprocess.STDOUT,
                    )
                )
        # A rank that failed leaves the others waiting for it.
        while {process.poll() for process in processes} in ({None}, {None, 0}):
            time.sleep(0.1)
        codes = [process.poll() for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for code, log in zip(codes, logs, strict=True):
        if code not in (0, None):
            raise RankError(f"a rank ended with code {code}: {log.read_text()[-2000:]}")
    return [json.loads(Path(folder, f"rank-{rank}.json").read_text()) for rank in range(ranks)]
