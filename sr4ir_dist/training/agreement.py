"""What ranks do together between two steps without being told beforehand: save, or leave."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from enum import IntEnum
from typing import Any

import torch
import torch.distributed as dist

_NOTICE_EVERY_S, _GROW_EVERY_S = 3.0, 60.0


class Wish(IntEnum):
    """What the ranks are to do before the next step."""

    NONE = 0
    SAVE = 1
    LEAVE = 2
    """Save and end, to go on with other workers: a node is about to be taken away, or more came."""


class Agreement:
    """Rank 0's decisions, which every rank learns at the same step; a context manager.

    Rank 0 alone reads a clock. What a step learns was sent while it was computed, so that nobody
    waits for it; a decision takes effect one step later.

    Args:
        world_size: how many ranks train together.
        every_minutes: wish for a checkpoint when so much time has passed since the last; None never
            does.
        notice: asked every few seconds, on every rank at the same step; what it returns must be the
            same on all of them: None, or the nodes that have to be left.
        grow: asked every minute, on rank 0: whether there is room for more ranks.
        patience_s: how long ranks wait for one another.
    """

    def __init__(
        self,
        world_size: int,
        *,
        every_minutes: float | None,
        notice: Callable[[], Sequence[str] | None],
        grow: Callable[[], bool] = lambda: False,
        patience_s: float = 600,
    ) -> None:
        self.left: Sequence[str] | None = None
        """The nodes that have to be left; none of them where the ranks end to become more."""
        self._notice, self._grow = notice, grow
        self._rank = dist.get_rank() if world_size > 1 else 0
        self._every_s = None if every_minutes is None else 60 * every_minutes
        self._saved_at = self._asked_at = self._looked_at = time.monotonic()
        self._sent: tuple[torch.Tensor, Any] | None = None
        self._group: Any = None
        if world_size > 1:
            # Of its own: on a GPU the other group's messages would wait for kernels.
            timeout = timedelta(seconds=patience_s)
            self._group = dist.new_group(backend="gloo", timeout=timeout)

    def __enter__(self) -> Agreement:
        """The agreement itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """Waits for what was sent last, where nothing went wrong."""
        if kind is None and self._sent is not None:
            self._read()

    def saved(self) -> None:
        """Note that a checkpoint is being published; the time until the next begins anew."""
        self._saved_at = time.monotonic()

    def after_step(self) -> Wish:
        """What to do before the next step.

        Every rank must call it after every step, and after every batch of an evaluation.
        """
        save, ask, grow = self._read()
        self._send()
        if ask and self.left is None:
            self.left = self._notice()
        if grow and self.left is None:
            self.left = ()
        if self.left is not None:
            return Wish.LEAVE
        return Wish.SAVE if save else Wish.NONE

    def _send(self) -> None:
        now = time.monotonic()
        save = self._every_s is not None and now - self._saved_at >= self._every_s
        ask = now - self._asked_at >= _NOTICE_EVERY_S
        if save:
            self._saved_at = now
        if ask:
            self._asked_at = now
        grow = self._rank == 0 and now - self._looked_at >= _GROW_EVERY_S and self._grow()
        if now - self._looked_at >= _GROW_EVERY_S:
            self._looked_at = now
        message = torch.tensor([save, ask, grow], dtype=torch.uint8)
        work = None
        if self._group is not None:
            work = dist.broadcast(message, 0, group=self._group, async_op=True)
        self._sent = message, work

    def _read(self) -> tuple[bool, bool, bool]:
        if self._sent is None:
            return False, False, False
        (message, work), self._sent = self._sent, None
        if work is not None:
            work.wait()
        save, ask, grow = message.tolist()
        return bool(save), bool(ask), bool(grow)
