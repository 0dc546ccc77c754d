import dataclasses

import pytest
import torch

from sr4ir_dist import storage
from sr4ir_dist.batch import Batch
from sr4ir_dist.data.loader import Loader
from sr4ir_dist.data.schema import DatasetError
from sr4ir_dist.data.transforms import PatchCrop, ResizeCrop

TRAIN = ResizeCrop(16, 12, train=True)


def make(uri, **changes) -> Loader:
    settings = {
        "transform": TRAIN,
        "batch_size": 8,
        "seed": 5,
        "rank": 0,
        "world_size": 1,
        "shuffle": True,
        "target": "label",
        "threads": 2,
    }
    return Loader(str(uri), "train", **(settings | changes))


def batches(uri, epoch=1, start_step=0, **changes) -> list[Batch]:
    with make(uri, **changes) as loader:
        return list(loader.epoch(epoch, start_step))


def same(a: Batch, b: Batch) -> bool:
    tensors = all(
        torch.equal(getattr(a, name), getattr(b, name)) for name in ("hr", "sizes", "keys")
    )
    targets = a.targets is b.targets or torch.equal(a.targets, b.targets)
    return tensors and targets and (a.ids, a.global_size) == (b.ids, b.global_size)


def test_a_batch_says_what_it_is(write, tmp_path):
    write(str(tmp_path), 37)
    epoch = batches(tmp_path)
    assert [batch.global_size for batch in epoch] == [8, 8, 8, 8, 5]
    for batch in epoch:
        assert batch.hr.shape == (batch.global_size, 3, 12, 12)
        assert batch.hr.dtype == torch.uint8
        assert batch.sizes.tolist() == [[12, 12]] * batch.global_size
        assert batch.ids == tuple(f"r{key:03d}" for key in batch.keys)
        assert torch.equal(batch.targets, batch.keys % 3)
        assert torch.equal(batch.hr[:, 0, 5, 5].long(), batch.keys)
    assert sorted(torch.cat([batch.keys for batch in epoch]).tolist()) == list(range(37))


def test_to_makes_floats(write, tmp_path):
    write(str(tmp_path), 9)
    batch = batches(tmp_path)[0]
    moved = batch.to("cpu")
    assert moved.hr.dtype == torch.float32
    assert torch.equal((moved.hr * 255).round().to(torch.uint8), batch.hr)
    assert moved.hr.max() <= 1
    assert same(moved.to("cpu"), moved)
    assert torch.equal(moved.targets, batch.targets)


@pytest.mark.parametrize("world_size", [2, 3, 4, 11])
def test_ranks_together_read_what_one_rank_reads(write, tmp_path, world_size):
    manifest = write(str(tmp_path), 37)
    whole = batches(tmp_path, manifest=manifest)
    shares = [
        batches(tmp_path, manifest=manifest, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    for step, batch in enumerate(whole):
        parts = [share[step] for share in shares]
        for name in ("hr", "sizes", "targets", "keys"):
            together = torch.cat([getattr(part, name) for part in parts])
            assert torch.equal(together, getattr(batch, name))
        assert sum((part.ids for part in parts), ()) == batch.ids
        assert {part.global_size for part in parts} == {batch.global_size}


def test_an_empty_share_is_a_batch(write, tmp_path):
    write(str(tmp_path), 33)
    empty = batches(tmp_path, rank=0, world_size=4)[-1]
    assert empty.hr.shape == (0, 3, 12, 12)
    assert empty.sizes.shape == (0, 2)
    assert empty.targets.shape == empty.keys.shape == (0,)
    assert empty.targets.dtype == torch.int64
    assert (empty.ids, empty.global_size) == ((), 1)
    assert empty.to("cpu").hr.dtype == torch.float32


@pytest.mark.parametrize("transform", [TRAIN, PatchCrop(8, 4, train=True)])
def test_resume_threads_and_prefetch_change_nothing(write, tmp_path, transform):
    manifest = write(str(tmp_path), 37)
    whole = batches(tmp_path, 3, manifest=manifest, transform=transform)
    for start in range(6):
        rest = batches(
            tmp_path,
            3,
            start,
            manifest=manifest,
            transform=transform,
            threads=1 + start,
            prefetch_steps=1 + start,
        )
        assert len(rest) == 5 - start
        assert all(same(a, b) for a, b in zip(rest, whole[start:], strict=True))


def test_augmentation_changes_with_epoch_and_seed_only(write, tmp_path):
    manifest = write(str(tmp_path), 37)

    def pictures(epoch, **changes):
        read = batches(tmp_path, epoch, manifest=manifest, shuffle=False, **changes)
        return torch.cat([batch.hr for batch in read])

    first = pictures(1)
    assert torch.equal(pictures(1), first)
    assert torch.equal(pictures(1, batch_size=5), first)
    assert not torch.equal(pictures(2), first)
    assert not torch.equal(pictures(1, seed=6), first)
    still = ResizeCrop(16, 12)
    assert torch.equal(pictures(1, transform=still), pictures(2, transform=still, seed=6))


def test_images_of_different_sizes_are_extended(write, tmp_path):
    write(str(tmp_path), 20)
    batch = batches(tmp_path, transform=PatchCrop(8, 4), shuffle=False)[0]
    expected = [[(20 + row % 5) // 4 * 4, (30 - row % 7) // 4 * 4] for row in range(8)]
    assert batch.sizes.tolist() == expected
    assert batch.hr.shape == (8, 3, 24, 28)
    for image, (height, width) in zip(batch.hr, expected, strict=True):
        assert image[1, :, 0].tolist() == [min(y, height - 1) for y in range(24)]
        assert image[2, 0].tolist() == [min(x, width - 1) for x in range(28)]


def test_drop_last(write, tmp_path):
    write(str(tmp_path), 37)
    with make(tmp_path, drop_last=True) as loader:
        assert loader.steps_per_epoch == 4
        assert [len(batch.ids) for batch in loader.epoch(1)] == [8] * 4


def test_several_epochs_and_an_abandoned_one(write, tmp_path):
    write(str(tmp_path), 37)
    with make(tmp_path) as loader:
        abandoned = loader.epoch(1)
        first = next(abandoned)
        second = list(loader.epoch(2))
        again = list(loader.epoch(1))
        assert same(again[0], first)
        assert [batch.ids for batch in second] != [batch.ids for batch in again]
        # An epoch that was left in the middle goes on where it was.
        assert all(same(a, b) for a, b in zip(abandoned, again[1:], strict=True))


def test_a_dataset_without_labels(write, tmp_path):
    write(str(tmp_path), 9, tasks=("images",))
    batch = batches(tmp_path, target=None)[0]
    assert batch.targets is None
    assert batch.to("cpu").targets is None
    with pytest.raises(DatasetError, match="has no labels: it is made for images"):
        make(tmp_path)


def test_reads_from_s3_what_it_reads_from_disk(s3, write, tmp_path):
    uri = storage.join(s3(), "set")
    write(uri, 37)
    write(str(tmp_path / "set"), 37)
    remote = batches(uri, cache_dir=tmp_path / "cache")
    local = batches(tmp_path / "set")
    assert all(same(a, b) for a, b in zip(remote, local, strict=True))
    assert list((tmp_path / "cache").glob("*.arrow"))


def test_bad_settings(write, tmp_path):
    manifest = write(str(tmp_path), 9)
    with pytest.raises(ValueError, match="threads must be 1 or more, got 0"):
        make(tmp_path, threads=0)
    with pytest.raises(ValueError, match="prefetch_steps must be 1 or more, got 0"):
        make(tmp_path, prefetch_steps=0)
    with pytest.raises(ValueError, match=r"rank must be in 0\.\.1, got 2"):
        make(tmp_path, rank=2, world_size=2)
    with pytest.raises(DatasetError, match="manifest is of split 'val', expected 'train'"):
        make(tmp_path, manifest=dataclasses.replace(manifest, split="val"))
    with pytest.raises(DatasetError, match="manifest"):
        make(tmp_path / "nowhere")
    with make(tmp_path) as loader:
        with pytest.raises(ValueError, match="epoch must be 1 or more, got 0"):
            loader.epoch(0)
        with pytest.raises(ValueError, match=r"start_step must be in 0\.\.2, got 3"):
            loader.epoch(1, 3)
