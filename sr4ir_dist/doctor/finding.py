"""What a check found, and how long it may take to find it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warn", "fail", "skipped"]


@dataclass(frozen=True)
class Finding:
    """The outcome of one check.

    Attributes:
        name: what was looked at.
        status: `fail` where training would fail, `warn` where it may suffer, `skipped` where the
            check has no ground or no object.
        told: what was seen; never a secret.
        mend: what to do about it; empty where there is nothing to do.
    """

    name: str
    status: Status
    told: str
    mend: str = ""


def probe(name: str, action: Callable[[], str], *, mend: str = "", limit_s: float = 60) -> Finding:
    """Try something; an exception, or no answer in time, is a failure.

    Args:
        name: what is looked at.
        action: does it and tells what it saw.
        mend: what to do when it fails.
        limit_s: seconds after which it has failed; what it hangs in is left behind.
    """
    outcome: list[Finding] = []

    def act() -> None:
        try:
            outcome.append(Finding(name, "ok", action()))
        except Exception as error:
            told = str(error).strip() or type(error).__name__
            outcome.append(Finding(name, "fail", told, mend))

    # A daemon, because what hangs in a library cannot be interrupted and must not keep the program.
    thread = threading.Thread(target=act, name=f"doctor: {name}", daemon=True)
    thread.start()
    thread.join(limit_s)
    # A copy: the thread may yet add its outcome.
    found = list(outcome)
    return found[0] if found else Finding(name, "fail", f"no answer in {limit_s:.0f} s", mend)
