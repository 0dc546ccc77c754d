"""What holds for a cache whatever is opened in it: its size, its content, and who goes first."""

import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sr4ir_dist import storage
from sr4ir_dist.data.cache import OpenShard, ShardCache
from sr4ir_dist.data.splits import Split, open_split

OPENERS = 3


@pytest.fixture(scope="module")
def remote(s3, write) -> Split:
    """A split of a bucket in shards of different sizes."""
    uri = storage.join(s3(), "set")
    write(uri, 80)
    return open_split(uri, "train")


class Model:
    """What a cache must hold: shards from the longest unused to the last used."""

    def __init__(self, sizes: list[int], limit: int) -> None:
        self.sizes, self.limit = sizes, limit
        self.used: list[int] = []

    def open(self, shard: int, in_use: set[int], damaged: set[int]) -> None:
        fetched = shard not in self.used or shard in damaged
        self.used = [other for other in self.used if other != shard]
        if fetched:
            excess = self.bytes(self.used) + self.sizes[shard] - self.limit
            for other in list(self.used):
                if excess > 0 and other not in in_use:
                    self.used.remove(other)
                    excess -= self.sizes[other]
        self.used.append(shard)
        # Within its limit but for what is in use, whenever something was brought in.
        if fetched:
            assert self.bytes(self.used) <= max(self.limit, self.bytes(in_use | {shard}))

    def bytes(self, shards: Iterable[int]) -> int:
        return sum(self.sizes[shard] for shard in shards)


def damage(path: Path) -> None:
    found = path.stat()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(found.st_atime_ns, time.time_ns()))


actions = st.tuples(
    st.sampled_from(("open", "open", "open", "keep", "keep", "close", "damage")),
    st.integers(0, OPENERS - 1),
    st.integers(0, 11),
)


@settings(max_examples=25)
@given(st.lists(actions, min_size=8, max_size=20), st.floats(0.01, 0.8))
def test_the_longest_unused_goes_first_and_what_is_opened_is_right(remote, done, part):
    shards = remote.manifest.shards
    sizes = [shard.bytes for shard in shards]
    model = Model(sizes, int(sum(sizes) * part) + 1)
    kept: dict[int, tuple[int, OpenShard]] = {}  # what each opener has open
    damaged: set[int] = set()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        directory = Path(folder)
        paths = [directory / f"{shard.sha256}.arrow" for shard in shards]
        caches = [
            ShardCache(remote, directory=directory, max_bytes=model.limit) for _ in range(OPENERS)
        ]
        for action, opener, number in done:
            shard = number % len(shards)
            in_use = {of for of, _ in kept.values()}
            if action == "damage" and shard in model.used and shard not in in_use:
                damage(paths[shard])
                damaged.add(shard)
            if action in ("keep", "close") and opener in kept:
                kept.pop(opener)[1].close()
            if action in ("open", "keep"):
                in_use = {of for of, _ in kept.values()}
                model.open(shard, in_use, damaged)
                damaged.discard(shard)
                opened = stack.enter_context(caches[opener].open(shard))
                assert hashlib.sha256(paths[shard].read_bytes()).hexdigest() == paths[shard].stem
                assert opened.reader.row(0)["id"] == f"r{sum(s.rows for s in shards[:shard]):03d}"
                if action == "keep":
                    kept[opener] = (shard, opened)
                else:
                    opened.close()
            damaged &= set(model.used)
            assert set(directory.glob("*.arrow")) == {paths[used] for used in model.used}


READ = """
import json, random, sys, threading
from pathlib import Path
from sr4ir_dist.data.cache import ShardCache
from sr4ir_dist.data.splits import open_split

uri, directory, limit, seed = sys.argv[1:]
split = open_split(uri, "train")
wrong, opened = [], []

def read(thread):
    cache = ShardCache(split, directory=Path(directory), max_bytes=int(limit))
    draw = random.Random(f"{seed} {thread}")
    for _ in range(15):
        shard = draw.randrange(len(split.manifest.shards))
        first = sum(entry.rows for entry in split.manifest.shards[:shard])
        with cache.open(shard) as held:
            ids = [row["id"] for row in held.reader.rows(range(len(held.reader)))]
        if ids != [f"r{first + i:03d}" for i in range(split.manifest.shards[shard].rows)]:
            wrong.append((shard, ids))
        opened.append(shard)

threads = [threading.Thread(target=read, args=(number,)) for number in range(2)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(json.dumps([wrong, len(opened)]))
"""


def test_processes_and_threads_in_too_small_a_cache(remote, tmp_path):
    sizes = sorted(shard.bytes for shard in remote.manifest.shards)
    limit = sum(sizes[-2:])
    ((uri, _),) = remote.parts
    arguments = [sys.executable, "-c", READ, uri, str(tmp_path), str(limit)]
    readers = [
        subprocess.Popen([*arguments, str(seed)], stdout=subprocess.PIPE, text=True)
        for seed in range(3)
    ]
    most = 0
    while any(reader.poll() is None for reader in readers):
        found = []
        for path in tmp_path.glob("*.arrow"):
            try:
                found.append(path.stat().st_size)
            except FileNotFoundError:
                pass
        most = max(most, sum(found))
        time.sleep(0.002)
    told = [json.loads(reader.communicate(timeout=60)[0]) for reader in readers]
    assert told == [[[], 30]] * 3
    # Six shards may be in use at once, on top of what fits.
    assert sizes[-1] < most <= limit + sum(sizes[-6:])
    # When nothing is in use any more, the next fetch brings it back below its limit.
    cache = ShardCache(remote, directory=tmp_path, max_bytes=limit)
    present = {path.stem for path in tmp_path.glob("*.arrow")}
    missing = [i for i, s in enumerate(remote.manifest.shards) if s.sha256 not in present]
    cache.open(random.Random(0).choice(missing)).close()
    assert sum(path.stat().st_size for path in tmp_path.glob("*.arrow")) <= limit
    assert not list((tmp_path / "incoming").iterdir())
