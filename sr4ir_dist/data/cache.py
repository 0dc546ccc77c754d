"""Whole shards on the node: mapped in place when local, else fetched once into a shared cache.

The cache is a directory that all ranks of a node, and later runs, share without talking to each
other. A shard's file is named by its digest, so equal shards of two datasets are one file.

- One process fetches a shard (a lock file); the others wait and find it. The file appears by a
  rename, after its bytes and digest were checked; a shard that is wrong is fetched once more.
- A shard in use is marked by a shared lock on its open file, which the kernel drops when the
  process ends, however it ends. What carries no mark may be removed, the longest unused first.
"""

import contextlib
import fcntl
import itertools
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock, Timeout

from sr4ir_dist import storage
from sr4ir_dist.data.schema import DatasetError
from sr4ir_dist.data.shards import ShardReader, verify_shard
from sr4ir_dist.data.splits import Split

log = logging.getLogger(__name__)

DEFAULT_CACHE_BYTES = 16 << 30
"""How much disk a node's cache may take."""


def default_cache_dir() -> Path:
    """The node's cache: SR4IR_CACHE_DIR, or a folder of this user's among temporary files."""
    named = os.environ.get("SR4IR_CACHE_DIR")
    return Path(named) if named else Path(tempfile.gettempdir()) / f"sr4ir-cache-{os.getuid()}"


class OpenShard:
    """A shard that is open for reading and, in a cache, safe from removal until closed.

    Attributes:
        reader: reads its rows; must not be kept beyond the close.
    """

    def __init__(self, reader: ShardReader, mark: int | None) -> None:
        self.reader = reader
        self._mark = mark

    def close(self) -> None:
        """Ends the use; may be called again."""
        if self._mark is not None:
            os.close(self._mark)
            self._mark = None

    def __enter__(self) -> "OpenShard":
        """The shard itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Closes the shard."""
        self.close()


# (path, digest, size, change time) of what this process has checked: a shard is opened many
# times, by every epoch, and read in full for its digest once.
_checked: set[tuple[str, str, int, int]] = set()


class ShardCache:
    """Opens the shards of one split, fetching those that are not on this machine.

    Safe to use from several threads, and with the same directory from several processes.

    Args:
        split: whose shards they are.
        columns: what the readers read of a row; everything by default.
        directory: the cache; `default_cache_dir()` by default. Local datasets need none.
        max_bytes: how much the cache may hold. Shards in use are never removed, so these alone
            may exceed it.

    Raises:
        ValueError: max_bytes is below 1.
    """

    def __init__(
        self,
        split: Split,
        *,
        columns: Sequence[str] | None = None,
        directory: Path | None = None,
        max_bytes: int = DEFAULT_CACHE_BYTES,
    ) -> None:
        if max_bytes < 1:
            raise ValueError(f"cache_bytes must be 1 or more, got {max_bytes}")
        self._uri = split.shard_uri
        self._shards = split.manifest.shards
        self._columns = columns
        self._starts = [0, *itertools.accumulate(shard.rows for shard in self._shards)]
        self._directory = directory or default_cache_dir()
        self._max_bytes = max_bytes

    def describe(self, shard: int) -> str:
        """A shard's name for people: its URI and its row range in the split."""
        first, end = self._starts[shard : shard + 2]
        return f"shard {self._uri(shard)} (rows {first} to {end - 1} of the split)"

    def open(self, shard: int) -> OpenShard:
        """Opens a shard, fetching it first if it is not here; may take as long as that takes.

        Args:
            shard: the shard's index in the split.

        Raises:
            DatasetError: the shard cannot be fetched, or its bytes are not those that the
                manifest names; says which shard and which rows.
        """
        try:
            uri = self._uri(shard)
            if storage.is_local(uri):
                path = storage.local_path(uri)
                self._check(path, shard)
                return OpenShard(self._reader(path, shard), None)
            return self._open_cached(shard)
        except DatasetError:
            raise
        except (OSError, ValueError) as error:
            raise DatasetError(f"{self.describe(shard)} cannot be read: {error}") from error

    def _check(self, path: Path, shard: int) -> None:
        expected = self._shards[shard]
        try:
            found = path.stat()
        except FileNotFoundError:
            raise DatasetError(f"{self.describe(shard)} is not there") from None
        key = (str(path), expected.sha256, found.st_size, found.st_mtime_ns)
        if key not in _checked:
            verify_shard(path, expected, self._starts[shard])
            _checked.add(key)

    def _reader(self, path: Path, shard: int) -> ShardReader:
        reader = ShardReader(path, self._columns)
        if reader.batch_rows != self._shards[shard].batch_rows:
            raise DatasetError(f"{self.describe(shard)} has other rows than the manifest says")
        return reader

    def _open_cached(self, shard: int) -> OpenShard:
        path = self._directory / f"{self._shards[shard].sha256}.arrow"
        with self._lock(path.stem):
            mark = _mark_used(path)
            if mark is not None:
                try:
                    self._check(path, shard)
                except DatasetError:
                    # A damaged copy says nothing about the dataset: fetch it again.
                    path.unlink(missing_ok=True)
                    os.close(mark)
                    mark = None
            while mark is None:  # again if another process removes it right after the fetch
                self._fetch(shard, path)
                mark = _mark_used(path)
        try:
            # Only the time of use: the content's time tells whether the copy was checked.
            os.utime(path, ns=(time.time_ns(), os.fstat(mark).st_mtime_ns))
            return OpenShard(self._reader(path, shard), mark)
        except BaseException:
            os.close(mark)
            raise

    def _fetch(self, shard: int, path: Path) -> None:
        """Brings a shard into the cache; the caller holds the shard's lock."""
        incoming = self._directory / "incoming" / path.stem
        self._make_room(self._shards[shard].bytes, incoming)
        try:
            fetched = incoming / path.name
            try:
                self._download(shard, fetched)
            except DatasetError as error:
                # Bytes may have changed on their way; those that do so twice lie there like that.
                log.warning("fetching once more: %s", error)
                self._download(shard, fetched)
            # Before it can be seen: from then on another process may remove it.
            found = fetched.stat()
            os.replace(fetched, path)
            _checked.add((str(path), path.stem, found.st_size, found.st_mtime_ns))
        finally:
            shutil.rmtree(incoming, ignore_errors=True)

    def _download(self, shard: int, path: Path) -> None:
        storage.download(self._uri(shard), path)
        verify_shard(path, self._shards[shard], self._starts[shard])

    def _make_room(self, wanted: int, incoming: Path) -> None:
        """Makes a folder for a fetch and removes what was longest unused until it fits.

        Where all that is left is in use, the fetch goes ahead: waiting could be for ever.
        """
        with self._lock("room"):
            for other in incoming.parent.glob("*"):
                if other != incoming:  # whose lock the caller holds
                    self._remove_abandoned(other)
            shutil.rmtree(incoming, ignore_errors=True)
            incoming.mkdir(parents=True)
            (incoming / _SIZE).write_text(str(wanted))
            coming = (_read_size(other / _SIZE) for other in incoming.parent.glob("*"))
            excess = sum(coming) - self._max_bytes
            files = []
            for path in self._directory.glob("*.arrow"):
                with contextlib.suppress(FileNotFoundError):
                    found = path.stat()
                    files.append((found.st_atime_ns, found.st_size, path))
                    excess += found.st_size
            for _, size, path in sorted(files):
                if excess <= 0:
                    break
                if _remove_unused(path):
                    excess -= size

    def _remove_abandoned(self, incoming: Path) -> None:
        try:
            with self._lock(incoming.name, timeout=0):
                shutil.rmtree(incoming, ignore_errors=True)
        except Timeout:
            pass  # someone is fetching it

    def _lock(self, name: str, timeout: float = -1) -> FileLock:
        locks = self._directory / "locks"
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        locks.mkdir(exist_ok=True)
        return FileLock(locks / f"{name}.lock", timeout=timeout)


# How many bytes a fetch will take, beside what has come so far.
_SIZE = "size"


def _read_size(path: Path) -> int:
    try:
        return int(path.read_text())
    except (FileNotFoundError, ValueError):
        return 0  # that fetch has just ended


def _mark_used(path: Path) -> int | None:
    """Marks a cached file as used; None when it is not there (any more)."""
    try:
        mark = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    fcntl.flock(mark, fcntl.LOCK_SH)
    if os.fstat(mark).st_nlink == 0:  # removed between the two calls
        os.close(mark)
        return None
    return mark


def _remove_unused(path: Path) -> bool:
    """Removes a cached file unless someone uses it; says whether it did."""
    try:
        mark = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(mark)
