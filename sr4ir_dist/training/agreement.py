"""What ranks do together between two steps without being told beforehand: save, or leave."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from enum import IntEnum
from typing import Any

import torch
import torch.distributed as dist

_NOTICE_EVERY_S = 3.0


class Wish(IntEnum):
    """What the ranks are to do before the next step."""

    NONE = 0
    SAVE = 1
    LEAVE = 2
    """Save and end: a node is about to be taken away."""


class Agreement:
    """Rank 0's decisions, which every rank learns at the same step; a context manager.

    Rank 0 alone reads a clock. What a step learns was sent while it was computed, so that nobody
    waits for it; a decision takes effect one step later.

    Args:
        world_size: how many ranks train together.
        every_minutes: wish for a checkpoint when so much time has passed since the last; None never
            does.
        notice: asked every few seconds, on every rank at the same step; what it returns must be the
            same on all of them: None, or why a node has to be left.
        patience_s: how long ranks wait for one another.
    """

    def __init__(
        self,
        world_size: int,
        *,
        every_minutes: float | None,
        notice: Callable[[], Any],
        patience_s: float = 600,
    ) -> None:
        self.left: Any = None
        """What `notice` returned when it first returned something."""
        self._notice = notice
        self._every_s = None if every_minutes is None else 60 * every_minutes
        self._saved_at = self._asked_at = time.monotonic()
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
        """What to do before the next step; every rank must call it after every step."""
        save, ask = self._read()
        self._send()
        if ask and self.left is None:
            self.left = self._notice()
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
        message = torch.tensor([save, ask], dtype=torch.uint8)
        work = None
        if self._group is not None:
            work = dist.broadcast(message, 0, group=self._group, async_op=True)
        self._sent = message, work

    def _read(self) -> tuple[bool, bool]:
        if self._sent is None:
            return False, False
        (message, work), self._sent = self._sent, None
        if work is not None:
            work.wait()
        save, ask = message.tolist()
        return bool(save), bool(ask)
