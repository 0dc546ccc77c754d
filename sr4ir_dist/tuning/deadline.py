"""When a search ends, whatever its trials are at."""

from __future__ import annotations

import contextlib
import time

import ray.tune

from sr4ir_dist import storage

_LOOK_S = 5.0


class Deadline(ray.tune.Stopper):
    """Ends a search at the time that a file says, so that a resumed search has a time of its own.

    What Ray Tune keeps of a search, this one included, is that of its first start.

    Args:
        uri: the file, written by `set_deadline`.
    """

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._looked = 0.0
        self._until: float | None = None

    def __call__(self, trial_id: str, result: dict[str, object]) -> bool:
        """Whether one trial ends: never by itself."""
        return False

    def stop_all(self) -> bool:
        """Whether the time has come."""
        now = time.time()
        if now - self._looked > _LOOK_S:
            self._looked = now
            with contextlib.suppress(storage.StorageError):
                self._until = storage.read_json(self._uri)["until"]
        return self._until is not None and now > self._until


def set_deadline(uri: str, hours: float | None) -> None:
    """Write when a search that starts or goes on now ends; None for never.

    Raises:
        StorageError: the storage cannot be written.
    """
    until = None if hours is None else time.time() + hours * 3600
    storage.write_json(uri, {"until": until})
