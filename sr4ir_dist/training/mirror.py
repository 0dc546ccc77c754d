"""Files that grow while a run goes on, copied to its storage again and again."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

from sr4ir_dist import storage

_EVERY_S = 30.0
_MOST_BYTES = 64 << 20


class Mirror:
    """Copies local files to URIs when they have changed, and when it is left; a context manager.

    Object storage cannot append, so a file is written whole each time: of one over 64 MiB the last
    64 MiB. Storage that fails is told of once and tried again.

    Args:
        say: is told of failures.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._folder = tempfile.TemporaryDirectory()
        self._files: dict[Path, str] = {}
        self._copied: dict[Path, tuple[int, int]] = {}
        self._failed = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)

    def __enter__(self) -> Mirror:
        """Begins to copy."""
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Copies a last time."""
        self._ended.set()
        self._thread.join()
        self._copy()
        self._folder.cleanup()

    @property
    def folder(self) -> Path:
        """A local folder for such files, which goes when this is left."""
        return Path(self._folder.name)

    def add(self, path: Path, uri: str) -> None:
        """Copy a file from now on."""
        self._files[path] = uri

    def _run(self) -> None:
        while not self._ended.wait(_EVERY_S):
            self._copy()

    def _copy(self) -> None:
        for path, uri in list(self._files.items()):
            try:
                state = path.stat()
                version = state.st_size, state.st_mtime_ns
                if self._copied.get(path) == version:
                    continue
                with path.open("rb") as file:
                    file.seek(max(0, state.st_size - _MOST_BYTES))
                    content = file.read(_MOST_BYTES)
                storage.write_bytes(uri, content)
                self._copied[path] = version
            except (OSError, storage.StorageError) as error:
                if not self._failed:
                    self._say(f"{uri} could not be written: {error}")
                self._failed = True


def own_output() -> dict[str, Path]:
    """The files that this process's output goes to, by `out` and `err`; none of a terminal's."""
    found = {}
    for number, name in ((1, "out"), (2, "err")):
        path = Path(os.readlink(f"/proc/self/fd/{number}"))
        if path.is_file():
            found[name] = path
    return found
