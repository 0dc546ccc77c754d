"""Which of many runs is next: each waits for those that it starts from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sr4ir_dist.config import Experiment


@dataclass(frozen=True)
class Order:
    """A run that is wanted.

    Attributes:
        experiment: what to train.
        data: URI of its dataset.
        needs: places in the list of orders of the runs that it starts from.
    """

    experiment: Experiment
    data: str
    needs: tuple[int, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What became of an order.

    Attributes:
        kind: it was `done`; what it needs is `missing` (data or weights); or it `failed`.
        result: of a run that is done, as `launch.train` gives it.
        why: of one that is not, in words.
        lpips: VGG16's weights, of a run that was judged before they were at hand.
    """

    kind: Literal["done", "missing", "failed"]
    result: dict[str, Any] | None = None
    why: str = ""
    lpips: str | None = None


class RunQueue:
    """Gives out orders in their sequence, as soon as the runs that they need are done.

    Args:
        orders: each needs only orders before it.
        max_failures: how often a run whose workers died is given out again.
    """

    def __init__(self, orders: Sequence[Order], max_failures: int) -> None:
        """Nothing is done yet."""
        self._orders = orders
        self._max_failures = max_failures
        self._taken: dict[int, int] = {}
        self._failures = [0] * len(orders)
        self._settled: dict[int, Outcome] = {}

    def take(self, lane: int) -> int | None:
        """The next order for a lane, None while all that are left wait for others or are taken.

        A lane gets the order that it has not settled again.
        """
        for number, taker in self._taken.items():
            if taker == lane:
                return number
        for number, order in enumerate(self._orders):
            free = number not in self._taken and number not in self._settled
            if free and all(need in self._settled for need in order.needs):
                self._taken[number] = lane
                return number
        return None

    def is_open(self) -> bool:
        """Whether a lane may still get an order: one is neither taken nor settled."""
        return len(self._taken) + len(self._settled) < len(self._orders)

    def settle(self, number: int, outcome: Outcome) -> None:
        """Keep what became of an order, and with it of those that need it and cannot have it."""
        self._taken.pop(number, None)
        self._settled.setdefault(number, outcome)
        if outcome.kind == "done":
            return
        name = self._orders[number].experiment.name
        for other, order in enumerate(self._orders):
            if number in order.needs and other not in self._settled:
                self.settle(other, Outcome(outcome.kind, why=f"it needs {name}: {outcome.why}"))

    def lost(self, lane: int, why: str, *, counts: bool = True) -> None:
        """Take back the order of a lane whose workers ended, unless that happened too often.

        Args:
            lane: the lane.
            why: how its workers ended.
            counts: they ended by a failure, and not because their node was announced to go.
        """
        for number, taker in list(self._taken.items()):
            if taker != lane:
                continue
            del self._taken[number]
            self._failures[number] += counts
            if self._failures[number] > self._max_failures:
                self.settle(number, Outcome("failed", why=why))

    def outcomes(self) -> dict[int, Outcome]:
        """What became of the orders that are settled, in the sequence in which they were."""
        return dict(self._settled)
