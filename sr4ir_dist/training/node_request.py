"""What an autoscaler is asked for while a run waits for nodes, or has fewer workers than it may."""

from __future__ import annotations

import threading
from contextlib import suppress
from types import TracebackType

from ray.exceptions import RayError

_EVERY_S = 60.0


class NodeRequest:
    """Nodes that the cluster's autoscaler is asked for, until the context ends.

    Ray keeps one such request for the whole cluster, for ever, and the last one wins. So it is made
    again and again while there is a wish for nodes, and withdrawn at the end: what was asked for
    would be kept running. Without an autoscaler it has no effect.
    """

    def __init__(self) -> None:
        """Begin with no wish."""
        self._wish: tuple[dict[str, float], list[int]] = {}, [0]
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> NodeRequest:
        """The request itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Withdraws what was asked for."""
        self.withdraw()

    def ask(self, each: dict[str, float], *, most: int, least: int, others: int) -> None:
        """Ask that the cluster have room for `most` workers, or as many as it can, beside others.

        Asked again, the new wish takes the place of the one before within a minute.

        Args:
            each: what a worker takes, as Ray counts it.
            most: workers that are wanted.
            least: workers below which nothing begins.
            others: rooms of that size that others use. A request says how large the cluster is to
                be, whoever uses it.
        """
        self._wish = each, [count + others for count in sizes(most, least)]
        if self._thread is None:
            self._ended.clear()
            self._thread = threading.Thread(target=self._repeat, name="node request", daemon=True)
            self._thread.start()

    def withdraw(self) -> None:
        """End what was asked for, if anything was."""
        if self._thread is None:
            return
        self._ended.set()
        self._thread.join()
        self._thread = None
        _request({}, 0)

    def _repeat(self) -> None:
        turn = 0
        while True:
            each, counts = self._wish
            _request(each, counts[turn % len(counts)])
            turn += 1
            if self._ended.wait(_EVERY_S):
                return


def sizes(most: int, least: int) -> list[int]:
    """How many workers are asked for, one after the other: `most`, its half, and so on to `least`.

    Ray's autoscaler (v2) launches nothing for a request of which a part exceeds its limits, so that
    what it can launch has to be found. Nodes that a larger request started are kept by a smaller
    one until they were idle for long, which those that the run then uses are not.
    """
    found = []
    while most > least:
        found.append(most)
        most //= 2
    return [*found, least]


def _request(each: dict[str, float], count: int) -> None:
    from ray.autoscaler.sdk import request_resources

    # A head that does not answer now is asked again; a cluster that has gone has no nodes to end.
    with suppress(RayError, RuntimeError, OSError):
        request_resources(bundles=[each] * count)
