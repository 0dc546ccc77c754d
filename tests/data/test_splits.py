"""Mixes: several datasets as one split, without writing any of them again."""

import dataclasses

import pytest
import torch

from sr4ir_dist import storage
from sr4ir_dist.data.loader import Loader
from sr4ir_dist.data.schema import DatasetError, Manifest
from sr4ir_dist.data.splits import dataset_uris, open_split
from sr4ir_dist.data.transforms import Flip, ResizeCrop

CLASSIFICATION = ("images", "classification")


def read(split, **changes):
    settings = {
        "transform": ResizeCrop(16, 12, train=True),
        "batch_size": 8,
        "seed": 5,
        "rank": 0,
        "world_size": 1,
        "shuffle": True,
        "target": "label",
        "threads": 2,
    }
    with Loader(split, **(settings | changes)) as loader:
        return list(loader.epoch(1))


def save(uri: str, manifest: Manifest, split: str = "train") -> None:
    manifest = dataclasses.replace(manifest, split=split)
    storage.write_bytes(storage.join(uri, split, "manifest.json"), manifest.to_bytes())


@pytest.fixture
def two(write, tmp_path) -> tuple[str, str]:
    """Datasets of 37 and 20 rows whose ids are r000, r001 and so on."""
    uris = str(tmp_path / "a"), str(tmp_path / "b")
    for uri, rows in zip(uris, (37, 20), strict=True):
        write(uri, rows)
    return uris


def test_a_mix_is_its_parts_one_after_the_other(two):
    a, b = two
    still = {"shuffle": False, "transform": ResizeCrop(16, 12), "batch_size": 57}
    (together,) = read(open_split(two, "train"), **still)
    (first,), (second,) = (read(open_split(uri, "train"), **still) for uri in two)
    assert together.keys.tolist() == list(range(57))
    assert together.ids == first.ids + second.ids
    assert torch.equal(together.hr, torch.cat([first.hr, second.hr]))
    assert torch.equal(together.targets, torch.cat([first.targets, second.targets]))
    (turned,) = read(open_split([b, a], "train"), **still)
    assert turned.ids == second.ids + first.ids


def test_a_mix_is_shuffled_as_a_whole_at_any_number_of_ranks(two, s3, write, tmp_path):
    # The second part lies in a bucket: shards come from where their dataset is.
    remote = storage.join(s3(), "b")
    write(remote, 20)
    split = open_split([two[0], remote], "train")
    settings = {"cache_dir": tmp_path / "cache"}
    whole = read(split, **settings)
    assert sorted(torch.cat([batch.keys for batch in whole]).tolist()) == list(range(57))
    # Rows of both parts meet in a step.
    assert sum(0 < (batch.keys < 37).sum() < len(batch.keys) for batch in whole) > 3
    for batch in whole:
        rows = torch.where(batch.keys < 37, batch.keys, batch.keys - 37)
        assert batch.ids == tuple(f"r{row:03d}" for row in rows)
        assert torch.equal(batch.hr[:, 0, 5, 5].long(), rows)
    shares = [read(split, rank=rank, world_size=3, **settings) for rank in range(3)]
    for batch, parts in zip(whole, zip(*shares, strict=True), strict=True):
        assert torch.equal(torch.cat([part.hr for part in parts]), batch.hr)
    cached = {path.stem for path in (tmp_path / "cache").glob("*.arrow")}
    assert cached == {shard.sha256 for shard in open_split(remote, "train").manifest.shards}


def test_groups_of_a_mix(write, tmp_path):
    uris = [str(tmp_path / name) for name in "ab"]
    for uri, size in zip(uris, ((20, 40), (20, 21)), strict=True):
        write(uri, 40, tasks=("images", "detection"), size=lambda row, size=size: size)
    split = open_split(uris, "train")
    batches = read(split, transform=Flip(train=True), target="boxes", grouped=True)
    assert len(batches) == 10
    assert {tuple(map(tuple, batch.sizes.tolist())) for batch in batches} == {
        ((20, 40),) * 8,
        ((20, 21),) * 8,
    }


def test_one_dataset_is_no_mix(two):
    one = open_split(two[0], "train")
    ((uri, manifest),) = one.parts
    assert uri == two[0]
    assert one.manifest is manifest
    assert open_split([two[0]], "train") == one


def test_a_digest_covers_all_parts_in_their_order(two, write, tmp_path):
    a, b = two
    other = str(tmp_path / "other")
    write(other, 20, image=lambda row, h, w: write.__globals__["numbered_image"](row + 1, h, w))
    mixes = [[a], [b], [a, b], [b, a], [a, other], [a, a], [a, b, b]]
    digests = [open_split(mix, "train").manifest.digest for mix in mixes]
    assert len(set(digests)) == len(mixes)
    write(storage.join(str(tmp_path), "elsewhere"), 20)
    moved = open_split([a, str(tmp_path / "elsewhere")], "train").manifest
    assert moved.digest == digests[2]


def test_a_mix_is_for_the_tasks_that_all_parts_share(write, tmp_path):
    both, masks = str(tmp_path / "both"), str(tmp_path / "masks")
    write(both, 9, tasks=(*CLASSIFICATION, "segmentation"))
    write(masks, 9, tasks=("images", "segmentation"))
    mix = open_split([both, masks], "train")
    assert mix.manifest.tasks == ("images", "segmentation")
    assert mix.manifest.class_names == ("auk", "bat", "cat")
    with pytest.raises(DatasetError, match=f"{both}, {masks} has no labels: it is made for images"):
        read(mix)
    assert len(read(mix, target="mask")) == 3


def test_labels_of_other_classes_do_not_mix(two):
    a, b = two
    manifest = open_split(b, "train").manifest
    save(b, dataclasses.replace(manifest, class_names=("auk", "cat", "bat")))
    mix = open_split([a, b], "train")
    assert (mix.manifest.tasks, mix.manifest.class_names) == (("images",), ())
    with pytest.raises(DatasetError, match="has no labels"):
        read(mix)
    assert sum(len(batch.ids) for batch in read(mix, target=None)) == 57


def test_every_part_must_be_there_but_for_its_val_split(two, tmp_path):
    a, b = two
    save(a, open_split(a, "train").manifest, "test")
    with pytest.raises(DatasetError, match=rf"{b}/test/.*no split 'test'.*found: train\."):
        open_split([a, b], "test")
    with pytest.raises(DatasetError, match=rf"{a}/val/.*no split 'val'"):
        open_split([a, b], "val")
    save(b, open_split(b, "train").manifest, "val")
    split = open_split([a, b], "val")
    assert [uri for uri, _ in split.parts] == [b]
    assert split.absent == (a,)
    with pytest.raises(DatasetError, match=r"nothing/val/.*splits found: none"):
        open_split([b, str(tmp_path / "nothing")], "val")
    with pytest.raises(DatasetError, match="data names no dataset"):
        dataset_uris([])


@pytest.mark.parametrize(("other", "policy"), [("skip", "skip"), ("fail", "fail"), (None, "fail")])
def test_bad_images_are_left_out_where_all_parts_say_so(two, other, policy):
    for uri, said in zip(two, ("skip", other), strict=True):
        source = {"on_bad_row": said} if said else {}
        save(uri, dataclasses.replace(open_split(uri, "train").manifest, source=source))
    assert open_split(two, "train").manifest.on_bad_row == policy
    assert open_split(two[::-1], "train").manifest.on_bad_row == policy
