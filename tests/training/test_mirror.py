"""Files that grow are copied to the storage, and nothing that fails there ends a run."""

import os
import subprocess
import sys
import time

from sr4ir_dist.training import mirror as module
from sr4ir_dist.training.mirror import Mirror


def test_what_was_written_last_is_copied_too(tmp_path):
    path, copy = tmp_path / "rank-0.out", tmp_path / "copies" / "rank-0.out"
    with Mirror(print) as mirror, path.open("w") as file:
        mirror.add(path, str(copy))
        file.write("first\n")
        file.flush()
        assert not copy.exists()  # not at once
        file.write("last\n")
    assert copy.read_text() == "first\nlast\n"
    assert not mirror.folder.exists()


def test_a_growing_file_is_copied_meanwhile(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_EVERY_S", 0.02)
    path, copy = tmp_path / "a", tmp_path / "b"
    path.write_text("1")
    with Mirror(print) as mirror:
        mirror.add(path, str(copy))
        for content in ("1", "12", "123"):
            path.write_text(content)
            deadline = time.monotonic() + 10
            while not copy.exists() or copy.read_text() != content:
                assert time.monotonic() < deadline
                time.sleep(0.01)


def test_of_a_long_file_the_end_is_copied(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_MOST_BYTES", 10)
    path, copy = tmp_path / "a", tmp_path / "b"
    path.write_bytes(bytes(range(100)))
    with Mirror(print) as mirror:
        mirror.add(path, str(copy))
    assert copy.read_bytes() == bytes(range(90, 100))


def test_storage_that_fails_is_told_of_once(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_EVERY_S", 0.01)
    path, told = tmp_path / "a", []
    path.write_text("text")
    (tmp_path / "file").write_text("")
    with Mirror(told.append) as mirror:
        mirror.add(path, str(tmp_path / "file" / "below"))
        mirror.add(tmp_path / "absent", str(tmp_path / "b"))
        time.sleep(0.2)
    assert len(told) == 1
    assert str(tmp_path / "file") in told[0]


def test_the_files_of_a_processs_output(tmp_path):
    out = tmp_path / "worker.out"
    program = "from sr4ir_dist.training.mirror import own_output; print(own_output())"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with out.open("w") as file:
        subprocess.run(
            [sys.executable, "-c", program],
            stdout=file,
            stderr=subprocess.PIPE,
            env=environment,
            check=True,
        )
    # A pipe or a terminal has no content to copy.
    assert out.read_text().strip() == f"{{'out': PosixPath('{out}')}}"
