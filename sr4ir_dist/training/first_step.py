"""What a run's start is made of, from the user's command to the end of the first step."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from sr4ir_dist.training.throughput import DATA, PHASES

_LINE = re.compile(r"first step after ([\d.]+) s: (.*)")


@dataclass(frozen=True)
class Marks:
    """When the parts of a start ended, in seconds of the epoch; they travel to rank 0.

    Attributes:
        began: when the first part began.
        ends: names of parts and when they ended, in order.
    """

    began: float
    ends: tuple[tuple[str, float], ...] = ()

    def after(self, part: str) -> Marks:
        """The same and a part that ends now, having begun with the end of the one before."""
        return replace(self, ends=(*self.ends, (part, time.time())))

    @property
    def parts(self) -> dict[str, float]:
        """Seconds of each part."""
        begins = [self.began, *(end for _, end in self.ends)]
        return {name: end - begins[n] for n, (name, end) in enumerate(self.ends)}

    def told(self) -> str:
        """A line for people, which `read` understands."""
        parts = self.parts
        each = ", ".join(f"{name} {seconds:.2f}" for name, seconds in parts.items())
        return f"first step after {sum(parts.values()):.2f} s: {each}"


def read(line: str) -> dict[str, float] | None:
    """The seconds of each part of a line that `Marks.told` made, or None for any other."""
    found = _LINE.search(line)
    if found is None:
        return None
    pairs = (part.rpartition(" ") for part in found[2].split(", "))
    return {name: float(seconds) for name, _, seconds in pairs}


def process_began() -> float:
    """When this process began, before its interpreter did anything, to 10 ms."""
    # By the clock that started with the machine: Linux tells the epoch's only to a second.
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.time() - age


class FirstStep:
    """Tells once what the start was made of; without marks it tells nothing.

    Args:
        marks: what went before.
        say: is told at the end of the first step.
    """

    def __init__(self, marks: Marks | None, say: Callable[[str], None]) -> None:
        self._marks, self._say = marks, say
        self._has_batch = False

    def after(self, part: str) -> None:
        """A part ends now."""
        if self._marks is not None:
            self._marks = self._marks.after(part)

    def entered(self, doing: str) -> None:
        """Note what the loop does now, which has a batch in a phase; one that trains tells."""
        if doing in PHASES and not self._has_batch:
            self._has_batch = True
            self.after("first batch")
        elif doing != DATA and doing not in PHASES:
            self._marks = None

    def ended(self) -> None:
        """A step ends now."""
        if self._marks is not None:
            self._say(self._marks.after("first step").told())
            self._marks = None
