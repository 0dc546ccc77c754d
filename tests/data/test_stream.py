import gc
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

from sr4ir_dist import storage
from sr4ir_dist.data.cache import ShardCache
from sr4ir_dist.data.order import Order
from sr4ir_dist.data.pools import Pools
from sr4ir_dist.data.schema import DatasetError, Manifest
from sr4ir_dist.data.splits import Split
from sr4ir_dist.data.stream import Stream
from sr4ir_dist.data.transforms import PatchCrop


@pytest.fixture
def pools():
    made = Pools(2)
    yield made
    made.close()


class Opened(ShardCache):
    """A cache that tells how many shards are open and how many ever were."""

    now = ever = most = 0

    def open(self, shard: int):
        opened = super().open(shard)
        self.now += 1
        self.ever += 1
        self.most = max(self.most, self.now)
        close = opened.close

        def closing() -> None:
            self.now -= 1
            close()

        opened.close = closing  # type: ignore[method-assign]
        return opened


class Slow(PatchCrop):
    """A transform that takes its time and counts its calls."""

    called: ClassVar[list[int]] = []

    def __call__(self, image, target, draws):
        self.called.append(target)
        time.sleep(0.05)
        return super().__call__(image, target, draws)


def make(uri: str, manifest: Manifest, pools: Pools, cache: ShardCache | None = None, **changes):
    order = Order(
        [shard.batch_rows for shard in manifest.shards],
        seed=1,
        batch_size=changes.pop("batch_size", 8),
        shuffle=changes.pop("shuffle", True),
        window_rows=changes.pop("window_rows", 20),
    )
    settings = {
        "epoch": 1,
        "start_step": 0,
        "rank": 0,
        "world_size": 1,
        "prefetch_steps": 3,
        "ahead_bytes": 1 << 20,
    }
    return order, Stream(
        order,
        cache or ShardCache(Split(((uri, manifest),))),
        tuple(shard.bytes for shard in manifest.shards),
        changes.pop("transform", PatchCrop(8, 4, train=True)),
        "label",
        pools,
        **(settings | changes),
    )


def test_steps_come_in_order_with_their_samples(write, tmp_path, pools):
    manifest = write(str(tmp_path), 60)
    order, stream = make(str(tmp_path), manifest, pools)
    steps = list(stream)
    assert len(steps) == order.steps_per_epoch == 8
    for number, (rows, samples) in enumerate(steps):
        assert rows.tolist() == order.global_batch(1, number).tolist()
        assert [sample.id for sample in samples] == [f"r{row:03d}" for row in rows]
        assert [sample.target for sample in samples] == [row % 3 for row in rows]
        # The red channel of every pixel is the row.
        assert [set(sample.image[0].flatten().tolist()) for sample in samples] == [
            {row} for row in rows
        ]


def test_samples_hold_no_more_than_their_crop(write, tmp_path, pools):
    manifest = write(str(tmp_path), 10)
    _, stream = make(str(tmp_path), manifest, pools)
    _, samples = next(stream)
    stream.close()
    assert {sample.image.untyped_storage().nbytes() for sample in samples} == {3 * 8 * 8}


@pytest.mark.parametrize("ahead_bytes", [1, 3000, 1 << 20])
def test_shards_are_closed_when_done(write, tmp_path, pools, ahead_bytes):
    manifest = write(str(tmp_path), 120)
    shards = len(manifest.shards)
    assert shards > 12
    cache = Opened(Split(((str(tmp_path), manifest),)))
    _, stream = make(
        str(tmp_path), manifest, pools, cache, ahead_bytes=ahead_bytes, prefetch_steps=1
    )
    steps = list(stream)
    assert sum(len(rows) for rows, _ in steps) == 120
    assert cache.now == 0
    if ahead_bytes == 1 << 20:
        assert cache.ever == shards  # each once: a window's shards stay open until it is over
    # A window of 20 rows, one being fetched and the step between them: not all of the split.
    assert cache.most < shards


def test_next_windows_shards_are_opened_ahead(write, tmp_path, pools):
    manifest = write(str(tmp_path), 60)
    cache = Opened(Split(((str(tmp_path), manifest),)))
    order, stream = make(
        str(tmp_path), manifest, pools, cache, shuffle=False, batch_size=4, prefetch_steps=1
    )
    next(stream)
    # One step of 4 rows was asked for; the shards of a window of 20 rows are on their way.
    wanted = int(order.locate(np.array([19]))[0][0]) + 1
    deadline = time.monotonic() + 10
    while cache.ever < wanted and time.monotonic() < deadline:
        time.sleep(0.01)
    stream.close()
    assert wanted > int(order.locate(np.array([8]))[0][0]) + 1
    assert wanted <= cache.ever < len(manifest.shards)


def test_later_samples_are_decoded_while_a_step_waits_for_a_shard(write, tmp_path, pools):
    manifest = write(str(tmp_path), 60)
    arrived = threading.Event()

    class Late(ShardCache):
        def open(self, shard: int):
            if shard == 1:
                arrived.wait(60)
            return super().open(shard)

    class Counting(PatchCrop):
        calls = 0

        def __call__(self, image, target, draws):
            Counting.calls += 1
            return super().__call__(image, target, draws)

    _, stream = make(
        *(str(tmp_path), manifest, pools, Late(Split(((str(tmp_path), manifest),)))),
        **{"shuffle": False, "batch_size": 8, "prefetch_steps": 1, "transform": Counting(8, 4)},
    )
    there = manifest.shards[0].rows
    assert there < 8  # the first step needs the second shard too
    steps: list[list[int]] = []
    waiting = threading.Thread(target=lambda: steps.append(next(stream)[0].tolist()))
    waiting.start()
    deadline = time.monotonic() + 20
    while Counting.calls <= there and time.monotonic() < deadline:
        time.sleep(0.01)
    decoded = Counting.calls
    arrived.set()
    waiting.join(60)
    stream.close()
    assert decoded > there
    assert steps == [list(range(8))]


@pytest.mark.parametrize("how", ["truncated", "altered"])
def test_damaged_shard_surfaces_where_it_is_needed(write, tmp_path, pools, how):
    manifest = write(str(tmp_path), 60)
    damaged = len(manifest.shards) // 2
    shard = manifest.shards[damaged]
    path = tmp_path / "train" / shard.path
    data = bytearray(path.read_bytes())
    if how == "altered":
        data[len(data) // 3] ^= 16
    else:
        del data[-1]
    path.write_bytes(data)
    start = sum(other.rows for other in manifest.shards[:damaged])
    cache = Opened(Split(((str(tmp_path), manifest),)))
    _, stream = make(str(tmp_path), manifest, pools, cache, shuffle=False)
    seen: list[int] = []

    def read() -> None:
        for rows, _ in stream:
            seen.extend(rows.tolist())

    named = rf"{shard.path} \(rows {start} to {start + shard.rows - 1} of the split\).*{how}"
    with pytest.raises(DatasetError, match=named):
        read()
    assert seen == list(range(start // 8 * 8))  # all steps before the damage came
    pools.close()
    assert cache.now == 0
    assert list(stream) == []


def test_closing_early_starts_nothing_more(write, tmp_path, pools):
    manifest = write(str(tmp_path), 120)
    cache = Opened(Split(((str(tmp_path), manifest),)))
    slow = Slow(8, 4)
    _, stream = make(str(tmp_path), manifest, pools, cache, transform=slow)
    next(stream)
    stream.close()
    pools.close()
    # 8 samples of the first step, and 4 that each thread had in hand at the close, of 24.
    assert 8 <= len(slow.called) <= 16
    assert cache.now == 0
    assert list(stream) == []


def test_decoding_is_single_threaded_and_leaves_other_threads_alone():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        pools = Pools(3)
        inside = {pools.decode.submit(torch.get_num_threads).result() for _ in range(9)}
        pools.close()
        later: list[int] = []
        thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert inside == {1}
        assert torch.get_num_threads() == 2
        assert later == [2]
    finally:
        torch.set_num_threads(before)


def test_pools_end_their_threads():
    gc.collect()
    before = threading.active_count()
    pools = Pools(3)
    assert threading.active_count() >= before + 3
    pools.close()
    pools.close()
    assert threading.active_count() == before


def test_a_process_that_forgets_to_close_ends(write, tmp_path):
    write(str(tmp_path), 60)
    script = (
        "import sys; from sr4ir_dist.data.loader import Loader\n"
        "from sr4ir_dist.data.splits import open_split\n"
        "from sr4ir_dist.data.transforms import PatchCrop\n"
        "loader = Loader(open_split(sys.argv[1], 'train'), transform=PatchCrop(8, 4, train=True),\n"
        "    seed=0, batch_size=4, rank=0, world_size=1, shuffle=True, threads=2)\n"
        "batches = loader.epoch(1); next(batches); print('read', flush=True)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "read\n", "")


def test_remote_shards_through_a_tiny_cache(s3, write, tmp_path, pools):
    uri = storage.join(s3(), "set")
    manifest = write(uri, 60)
    cache = ShardCache(Split(((uri, manifest),)), directory=Path(tmp_path), max_bytes=5000)
    order, stream = make(uri, manifest, pools, cache, ahead_bytes=2500)
    seen = [row for rows, _ in stream for row in rows.tolist()]
    assert sorted(seen) == list(range(60))
