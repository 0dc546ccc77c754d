"""What becomes of images that cannot be read, by the dataset's policy."""

import json

import pytest
import torch

from sr4ir_dist.data.groups import aspect_group
from sr4ir_dist.data.loader import Loader
from sr4ir_dist.data.schema import MANIFEST_NAME, DatasetError
from sr4ir_dist.data.shards import load_manifest
from sr4ir_dist.data.splits import open_split
from sr4ir_dist.data.transforms import Flip, PatchCrop

BAD = {5, 17, 18, 29}
ROWS = 45


@pytest.fixture
def flawed(write, tmp_path):
    """Writes a dataset whose rows of BAD, or others, are no images."""
    numbered = write.__globals__["numbered_image"]

    def make(bad=frozenset(BAD), name="set", **settings) -> str:
        def image(row, height, width):
            data = numbered(row, height, width)
            return b"no image" + data[8:] if row in bad else data  # as long, for equal shards

        write(str(tmp_path / name), ROWS, image=image, **({"on_bad_row": "skip"} | settings))
        return str(tmp_path / name)

    return make


def read(uri, epoch=1, start_step=0, **changes):
    """The batches of an epoch and the bad rows."""
    settings = {
        "transform": PatchCrop(8, 4, train=True),
        "batch_size": 8,
        "seed": 5,
        "rank": 0,
        "world_size": 1,
        "shuffle": True,
        "target": "label",
        "threads": 2,
    }
    with Loader(open_split(uri, "train"), **(settings | changes)) as loader:
        return list(loader.epoch(epoch, start_step)), loader.bad_rows


def keys(batches):
    return torch.cat([batch.keys for batch in batches]).tolist()


@pytest.mark.parametrize("shuffle", [True, False])
def test_fail_ends_the_epoch_and_names_the_sample(flawed, shuffle):
    uri = flawed({17}, on_bad_row="fail")
    with pytest.raises(DatasetError, match=r"sample 'r017', row 17, in shard .*part-.*\(rows "):
        read(uri, shuffle=shuffle)


def test_a_row_near_it_stands_in_the_same_on_any_number_of_ranks(flawed, caplog):
    uri = flawed()
    with Loader(
        open_split(uri, "train"),
        transform=Flip(),
        batch_size=8,
        seed=5,
        rank=0,
        world_size=1,
        shuffle=True,
        threads=1,
    ) as loader:
        order = loader.order
    whole, bad = read(uri)
    assert bad == BAD
    wanted = [row for step in range(order.steps_per_epoch) for row in order.global_batch(1, step)]
    firsts = [0, *(shard.rows for shard in load_manifest(uri, "train").shards)]
    firsts = torch.tensor(firsts).cumsum(0).tolist()
    for row, key in zip(wanted, keys(whole), strict=True):
        if row not in BAD:
            assert key == row
        else:
            first, end = next(p for p in zip(firsts, firsts[1:], strict=False) if p[1] > row)
            after, before = range(row + 1, end), range(first, row)
            assert key == next(r for r in (*after, *before) if r not in BAD)
    for batch in whole:
        assert len(batch.ids) == batch.global_size
        assert batch.ids == tuple(f"r{key:03d}" for key in batch.keys)
        assert torch.equal(batch.hr[:, 0, 5, 5].long(), batch.keys)
        assert torch.equal(batch.targets, batch.keys % 3)
    named = {message.split("'")[1] for message in caplog.messages if "skipped sample" in message}
    assert named == {f"r{row:03d}" for row in BAD}

    for world_size in (2, 3):
        shares = [read(uri, rank=rank, world_size=world_size) for rank in range(world_size)]
        assert frozenset().union(*(rows for _, rows in shares)) == BAD
        assert sum(len(rows) for _, rows in shares) == len(BAD)
        for step, batch in enumerate(whole):
            parts = [batches[step] for batches, _ in shares]
            assert sum((part.ids for part in parts), ()) == batch.ids
            for name in ("hr", "keys", "targets"):
                together = torch.cat([getattr(part, name) for part in parts])
                assert torch.equal(together, getattr(batch, name))
    rest, _ = read(uri, start_step=3, threads=1, prefetch_steps=1)
    assert keys(rest) == keys(whole[3:])
    assert all(torch.equal(a.hr, b.hr) for a, b in zip(rest, whole[3:], strict=True))


def test_sound_images_are_those_of_a_dataset_without_bad_ones(flawed):
    found, _ = read(flawed())
    expected, bad = read(flawed(frozenset(), "sound", on_bad_row="fail"))
    assert bad == frozenset()
    for one, other in zip(found, expected, strict=True):
        same = one.keys == other.keys
        assert torch.equal(one.hr[same], other.hr[same])
    assert sum((a.keys != b.keys).sum() for a, b in zip(found, expected, strict=True)) == len(BAD)


def test_stand_ins_are_of_the_rows_group(flawed, write):
    size = write.__globals__["size_of"]
    uri = flawed(tasks=("images", "detection"))
    seen = set()
    for epoch in (1, 2, 3):
        batches, bad = read(uri, epoch, transform=Flip(), target="boxes", grouped=True)
        seen |= bad
        for batch in batches:
            assert len(batch.ids) == 8
            rows = {int(name.removeprefix("r")) for name in batch.ids}  # before they were grouped
            assert len({aspect_group(*size(row)) for row in rows}) == 1
            assert not BAD & rows
    assert len(seen) == len(BAD)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_in_the_splits_own_order_they_are_left_out(flawed, world_size):
    uri = flawed({*BAD, *range(40, 45)})  # the last step is empty
    shares = [
        read(uri, shuffle=False, rank=rank, world_size=world_size) for rank in range(world_size)
    ]
    found = [key for batches, _ in shares for key in keys(batches)]
    assert sorted(found) == [row for row in range(40) if row not in BAD]
    assert frozenset().union(*(bad for _, bad in shares)) == {*BAD, *range(40, 45)}
    for batches, _ in shares:
        assert len(batches) == 6
        assert len(batches[-1].ids) == 0
        for batch in batches:
            assert len(batch.hr) == len(batch.targets) == len(batch.sizes) == len(batch.ids)
            assert torch.equal(batch.hr[:, 0, 5, 5].long(), batch.keys)


def test_bad_rows_are_those_of_the_last_epoch_and_few_are_named(flawed, caplog):
    bad = set(range(0, 40, 4))
    uri = flawed(bad)
    with Loader(
        open_split(uri, "train"),
        transform=PatchCrop(8, 4),
        batch_size=4,
        seed=0,
        rank=0,
        world_size=1,
        shuffle=False,
        threads=1,
    ) as loader:
        for _ in range(2):
            batches = loader.epoch(1)
            next(batches)
            assert loader.bad_rows == {0}
            next(batches)
            assert loader.bad_rows == {0, 4}
            assert len(list(batches)) == 10
            assert loader.bad_rows == bad
    named = [message.split("'")[1] for message in caplog.messages]
    assert named == ["r000", "r004", "r008", "r012", "r016"]


def test_a_shard_without_a_good_row_ends_training(flawed):
    first = load_manifest(flawed(), "train").shards[0].rows
    with pytest.raises(DatasetError, match="can stand in for sample 'r00.', row ., in shard"):
        read(flawed(set(range(first)), "without"))


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_damaged_shard_is_no_bad_image(flawed, tmp_path, shuffle):
    uri = flawed()
    shard = load_manifest(uri, "train").shards[1]
    path = tmp_path / "set" / "train" / shard.path
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(DatasetError, match=f"{shard.path} .*altered"):
        read(uri, shuffle=shuffle)


def test_an_unknown_policy_is_refused(flawed, tmp_path):
    uri = flawed()
    path = tmp_path / "set" / "train" / MANIFEST_NAME
    value = json.loads(path.read_text())
    value["source"]["on_bad_row"] = "ignore"
    del value["sha256"]
    path.write_text(json.dumps(value))
    with pytest.raises(DatasetError, match="on_bad_row is 'ignore': expected one of fail, skip"):
        load_manifest(uri, "train")
