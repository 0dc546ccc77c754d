import pytest
import torch

from sr4ir_dist import storage
from sr4ir_dist.batch import Batch
from sr4ir_dist.data.groups import aspect_group
from sr4ir_dist.data.loader import Loader
from sr4ir_dist.data.schema import DatasetError
from sr4ir_dist.data.splits import open_split
from sr4ir_dist.data.transforms import Flip, PatchCrop, ResizeCrop

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
    return Loader(open_split(str(uri), "train"), **(settings | changes))


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


@pytest.mark.parametrize("world_size", [2, 3, 4, 8, 11])
def test_ranks_together_read_what_one_rank_reads(write, tmp_path, world_size):
    write(str(tmp_path), 37)
    whole = batches(tmp_path)
    shares = [batches(tmp_path, rank=rank, world_size=world_size) for rank in range(world_size)]
    for step, batch in enumerate(whole):
        parts = [share[step] for share in shares]
        for name in ("hr", "sizes", "targets", "keys"):
            together = torch.cat([getattr(part, name) for part in parts])
            assert torch.equal(together, getattr(batch, name))
        assert sum((part.ids for part in parts), ()) == batch.ids
        assert {part.global_size for part in parts} == {batch.global_size}


@pytest.mark.parametrize(("before", "after"), [(1, 3), (4, 2), (3, 8)])
def test_other_ranks_take_over_at_any_step(write, tmp_path, before, after):
    write(str(tmp_path), 37)
    whole = batches(tmp_path, 2)
    first = [batches(tmp_path, 2, rank=rank, world_size=before) for rank in range(before)]
    for cut in range(6):
        rest = [batches(tmp_path, 2, cut, rank=r, world_size=after) for r in range(after)]
        done = [share[:cut] for share in first]
        applied = [*zip(*done, strict=True), *zip(*rest, strict=True)]
        assert len(applied) == len(whole)
        for parts, batch in zip(applied, whole, strict=True):
            assert torch.equal(torch.cat([part.hr for part in parts]), batch.hr)
        keys = torch.cat([part.keys for parts in applied for part in parts])
        assert sorted(keys.tolist()) == list(range(37))


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
    write(str(tmp_path), 37)
    whole = batches(tmp_path, 3, transform=transform)
    for start in range(6):
        rest = batches(
            tmp_path,
            3,
            start,
            transform=transform,
            threads=1 + start,
            prefetch_steps=1 + start,
        )
        assert len(rest) == 5 - start
        assert all(same(a, b) for a, b in zip(rest, whole[start:], strict=True))


def test_augmentation_changes_with_epoch_and_seed_only(write, tmp_path):
    write(str(tmp_path), 37)

    def pictures(epoch, **changes):
        read = batches(tmp_path, epoch, shuffle=False, **changes)
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
    with pytest.raises(DatasetError, match="has no masks: it is made for images"):
        make(tmp_path, target="mask")
    with pytest.raises(DatasetError, match="has no boxes: it is made for images"):
        make(tmp_path, target="boxes", transform=Flip())
    with pytest.raises(DatasetError, match="has no aspect-ratio groups: it is made for images"):
        make(tmp_path, target=None, grouped=True)


SEG = {"tasks": ("images", "segmentation")}
DET = {"tasks": ("images", "detection")}


def test_masks_of_whole_images_are_padded_with_void(write, tmp_path):
    write(str(tmp_path), 20, **SEG)
    whole = ResizeCrop(20, 12, center_crop=False)
    batch = batches(tmp_path, transform=whole, target="mask", shuffle=False)[0]
    assert batch.targets.dtype == torch.uint8
    assert batch.targets.shape == (8, *batch.hr.shape[-2:])
    assert batch.sizes[0].tolist() == [20, 30]
    assert len(set(map(tuple, batch.sizes.tolist()))) > 3
    for mask, (height, width), key in zip(
        batch.targets, batch.sizes.tolist(), batch.keys.tolist(), strict=True
    ):
        inside = mask[:height, :width]
        assert (mask == 255).sum() == mask.numel() - (inside != 255).sum()
        assert set(inside[:-2].unique().tolist()) == {0, key % 3 + 1}
        assert (inside[-1] == 255).all()
    assert torch.equal(batch.to("cpu").targets, batch.targets)


def test_cropped_masks_stay_with_their_images(write, tmp_path):
    write(str(tmp_path), 37, **SEG)
    train = ResizeCrop(20, 16, train=True)
    for batch in batches(tmp_path, transform=train, target="mask"):
        assert batch.targets.shape == (batch.global_size, 16, 16)
    # Rows of 20 lines are not resized: the green channel is the line, the blue one the column.
    found = [
        (image, mask)
        for batch in batches(tmp_path, 2, transform=train, target="mask")
        for image, mask, key in zip(batch.hr, batch.targets, batch.keys, strict=True)
        if key % 5 == 0
    ]
    assert len(found) == 8
    for image, mask in found:
        row = image[0, 0, 0]
        expected = torch.where((image[1] < 5) & (image[2] < 7), row % 3 + 1, 0)
        expected[image[1] == 19] = 255
        assert torch.equal(mask, expected.to(torch.uint8))


def test_boxes_come_as_dicts(write, tmp_path):
    write(str(tmp_path), 37, **DET)
    seen, mirrored = set(), 0
    for batch in batches(tmp_path, transform=Flip(train=True), target="boxes"):
        assert isinstance(batch.targets, tuple)
        assert len(batch.targets) == len(batch.ids) == 8 or batch.global_size == 5
        for target, image, key, (_, width) in zip(
            batch.targets, batch.hr, batch.keys.tolist(), batch.sizes.tolist(), strict=True
        ):
            row = int(image[0, 0, 0])
            assert batch.ids[batch.keys.tolist().index(key)] == f"r{row:03d}"
            assert target["image_id"].tolist() == [key]
            flipped = bool(image[2, 0, 0] > 0)
            x0 = [k if not flipped else width - k - 4 for k in range(row % 3)]
            y0 = row % 9
            assert target["boxes"].tolist() == [[x, y0, x + 4, y0 + 5] for x in x0]
            assert target["labels"].tolist() == [(row + k) % 3 + 1 for k in range(row % 3)]
            assert target["crowd"].tolist() == [k == 1 for k in range(row % 3)]
            seen.add(row)
            mirrored += flipped
    assert seen == set(range(37))
    assert 8 < mirrored < 29


def test_nested_targets_move(write, tmp_path):
    write(str(tmp_path), 9, **DET)
    batch = batches(tmp_path, transform=Flip(), target="boxes")[0]
    moved = batch.to("meta")
    assert isinstance(moved.targets, tuple)
    for target, original in zip(moved.targets, batch.targets, strict=True):
        assert target.keys() == original.keys()
        assert {value.device.type for value in target.values()} == {"meta"}
        assert target["boxes"].shape == original["boxes"].shape


def test_grouped_steps_hold_one_shape(write, tmp_path):
    sizes = ((24, 20), (20, 24), (20, 40), (20, 21))
    write(str(tmp_path), 100, **DET, size=lambda row: sizes[row * row % 7 % 4])
    settings = {"transform": Flip(train=True), "target": "boxes", "grouped": True}
    whole = batches(tmp_path, **settings)
    assert len(whole) == 100 // 8
    groups = set()
    for batch in whole:
        assert (len(batch.ids), batch.global_size) == (8, 8)
        (group,) = {aspect_group(height, width) for height, width in batch.sizes.tolist()}
        groups.add(group)
    assert len(groups) > 2
    for start in (3, 11):
        rest = batches(tmp_path, 1, start, threads=1, **settings)
        assert [batch.ids for batch in rest] == [batch.ids for batch in whole[start:]]
    halves = [batches(tmp_path, rank=rank, world_size=2, **settings) for rank in (0, 1)]
    for first, second, batch in zip(*halves, whole, strict=True):
        assert first.ids + second.ids == batch.ids
        together = first.targets + second.targets
        for target, expected in zip(together, batch.targets, strict=True):
            assert all(torch.equal(target[name], expected[name]) for name in expected)


@pytest.mark.parametrize(("target", "kind"), [("mask", SEG), ("boxes", DET)])
def test_an_empty_share_has_empty_targets(write, tmp_path, target, kind):
    write(str(tmp_path), 33, **kind)
    transform = Flip(train=True) if target == "boxes" else ResizeCrop(16, 12, train=True)
    settings = {"target": target, "transform": transform, "rank": 0, "world_size": 4}
    empty = batches(tmp_path, **settings)[-1]
    assert len(empty.hr) == len(empty.targets) == 0
    assert empty.hr.shape[1] == 3
    if target == "mask":
        assert empty.targets.shape == (0, 12, 12)
    else:
        assert empty.targets == ()


def test_targets_that_a_transform_does_not_know(write, tmp_path):
    write(str(tmp_path), 9, tasks=("images", "segmentation", "detection"))
    for transform, target, known in (
        (TRAIN, "boxes", "label, mask"),
        (Flip(), "mask", "label, boxes"),
        (PatchCrop(8, 4), "mask", "label"),
    ):
        name = type(transform).__name__
        with pytest.raises(ValueError, match=f"{name} cannot transform target '{target}', only "):
            make(tmp_path, transform=transform, target=target)
        assert ", ".join(transform.targets) == known
    with pytest.raises(ValueError, match="target must be one of label, mask, boxes or None"):
        make(tmp_path, target="masks")
    with pytest.raises(ValueError, match="groups need shuffle"):
        make(tmp_path, target=None, grouped=True, shuffle=False)
    with pytest.raises(ValueError, match="9 rows has no step of 10 samples in groups"):
        make(tmp_path, target=None, grouped=True, batch_size=10)


def test_a_mask_of_another_size_is_named(write, tmp_path):
    manifest = write(str(tmp_path / "good"), 9, **SEG)
    assert manifest.rows == 9

    def image(row, height, width):
        return write.__globals__["numbered_image"](row, height, width + (row == 5))

    write(str(tmp_path / "bad"), 9, **SEG, image=image)
    with pytest.raises(DatasetError, match="sample 'r005'.*mask has size"):
        batches(tmp_path / "bad", target="mask")


def test_reads_from_s3_what_it_reads_from_disk(s3, write, tmp_path):
    uri = storage.join(s3(), "set")
    write(uri, 37)
    write(str(tmp_path / "set"), 37)
    remote = batches(uri, cache_dir=tmp_path / "cache")
    local = batches(tmp_path / "set")
    assert all(same(a, b) for a, b in zip(remote, local, strict=True))
    assert list((tmp_path / "cache").glob("*.arrow"))


def test_bad_settings(write, tmp_path):
    write(str(tmp_path), 9)
    with pytest.raises(ValueError, match="threads must be 1 or more, got 0"):
        make(tmp_path, threads=0)
    with pytest.raises(ValueError, match="prefetch_steps must be 1 or more, got 0"):
        make(tmp_path, prefetch_steps=0)
    with pytest.raises(ValueError, match=r"rank must be in 0\.\.1, got 2"):
        make(tmp_path, rank=2, world_size=2)
    with pytest.raises(DatasetError, match="manifest"):
        make(tmp_path / "nowhere")
    with make(tmp_path) as loader:
        with pytest.raises(ValueError, match="epoch must be 1 or more, got 0"):
            loader.epoch(0)
        with pytest.raises(ValueError, match=r"start_step must be in 0\.\.2, got 3"):
            loader.epoch(1, 3)
