"""Which of a run's checkpoints stay: the newest, the best, and those that someone refers to.

A reference is a small JSON file in the run's folder `references`, written before the checkpoint is
read. It says who needs it and until when. Storage knows no locks: a checkpoint that is pruned in
the very moment of a reference is missed at once, by its name.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sr4ir_dist import checkpoint, storage

log = logging.getLogger(__name__)

_FOLDER = "references"
_DAY_S = 24 * 3600


def hold(uri: str, *, by: str, days: float, until: str | None = None) -> None:
    """Keep a checkpoint from being pruned; again, for longer.

    Where the storage may only be read there is a warning and no reference.

    Args:
        uri: a run's checkpoint; what is none needs no reference, and gets none.
        by: who needs it.
        days: how long the reference counts at most.
        until: a URI; the reference ends when there is something.

    Raises:
        CheckpointError: the checkpoint is not there (any more).
        StorageError: the storage does not answer.
    """
    place = _place(uri, by)
    if place is None:
        return
    now = time.time()
    value = {"by": by, "since": now, "expires": now + days * _DAY_S, "until": until}
    try:
        storage.write_json(place, value)
    except storage.StorageError as error:
        log.warning("%s may be pruned while it is needed: %s", uri, error)
    checkpoint.load(uri)


@contextmanager
def held(uri: str, *, by: str, days: float) -> Iterator[None]:
    """Keeps a checkpoint from being pruned meanwhile; see `hold`."""
    hold(uri, by=by, days=days)
    try:
        yield
    finally:
        release(uri, by=by)


def release(uri: str, *, by: str) -> None:
    """Take back what `hold` wrote, if it did."""
    place = _place(uri, by)
    if place is not None:
        try:
            storage.delete(place)
        except storage.StorageError as error:
            log.warning("%s stays until it expires: %s", place, error)


def prune(
    run_uri: str,
    *,
    newest: int,
    best: int,
    score: Callable[[checkpoint.Checkpoint], float | None],
) -> None:
    """Delete the checkpoints of a run that nobody needs; each disappears whole.

    What interrupted saves and deletions left behind the newest one goes too.

    Args:
        run_uri: the run.
        newest: how many stay because they are the newest.
        best: how many stay because they have the highest scores, of equal ones the newer.
        score: of a checkpoint; None for one that was not judged.

    Raises:
        StorageError: the storage does not answer.
    """
    uris, broken = checkpoint.published_and_not(run_uri)
    for uri in broken:
        if uris and uri < uris[0]:
            storage.delete(uri)
    if len(uris) <= newest:
        return
    scores = {uri: found for uri in uris if (found := _score(uri, score)) is not None}
    kept = {*uris[:newest], *sorted(scores, key=lambda uri: -scores[uri])[:best]}
    doomed = [uri for uri in uris if uri not in kept]
    referred = _referred(run_uri) if doomed else set()
    for uri in doomed:
        if uri.rpartition("/")[2] not in referred:
            checkpoint.delete(uri)


def _score(uri: str, score: Callable[[checkpoint.Checkpoint], float | None]) -> float | None:
    try:
        return score(checkpoint.load(uri))
    except checkpoint.CheckpointError:
        return None


def _referred(run_uri: str) -> set[str]:
    """The names of the checkpoints that someone needs; references that have ended are deleted."""
    folder = storage.join(run_uri, _FOLDER)
    found = set()
    for file in storage.list_names(folder):
        place = storage.join(folder, file)
        if _ended(place):
            storage.delete(place)
        else:
            found.add(file.partition(".")[0])
    return found


def _ended(place: str) -> bool:
    try:
        value = storage.read_json(place)
        if value["expires"] < time.time():
            return True
        return value["until"] is not None and storage.exists(value["until"])
    except storage.MissingError:
        return True  # taken back meanwhile
    except (storage.StorageError, KeyError, TypeError):
        # Damaged, or what ends it is where only others may look: better one checkpoint too many.
        return False


def _place(uri: str, by: str) -> str | None:
    """Where a reference to a checkpoint lies; None for what is no run's checkpoint."""
    run = checkpoint.run_of(uri)
    if run is None:
        return None
    name, digest = uri.rstrip("/").rpartition("/")[2], hashlib.sha256(by.encode()).hexdigest()[:16]
    return storage.join(run, _FOLDER, f"{name}.{digest}.json")
