"""Versions appear whole, never change, and go whole."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from mortal_storage import Killed, dying
from small_runs import DATA, EXPERIMENT, NAME, flip, ids, publish_run

from sr4ir_dist import checkpoint, storage
from sr4ir_dist.checkpoint import CheckpointError
from sr4ir_dist.hub import listing, versions
from sr4ir_dist.hub.cards import load_card
from sr4ir_dist.hub.names import HubError, Name, parse


def test_a_version_is_a_checkpoint_with_a_card(run, hub):
    name = versions.publish(run, NAME, hub=hub, note="a first try", tag="best")
    assert name.path == NAME
    saved = checkpoint.load(versions.resolve(f"hub://{name}", hub))
    original = checkpoint.load(checkpoint.resolve(run))
    assert saved.uri == f"{hub}/{NAME}/versions/{name.which}"
    assert list(saved.files) == [*original.files, "card.json", "readme.md"]
    assert {file: saved.files[file] for file in original.files} == original.files
    card = load_card(saved)
    assert (card.experiment, card.dataset, card.recipe) == (EXPERIMENT, "drawn_cls", "sr4ir")
    assert (card.task, card.sr, card.scale, card.step) == ("classification", "edsr", 4, 12)
    assert card.metrics == {"top1": 91.75, "psnr": 19.5}
    assert (card.note, card.data, card.source) == (
        "a first try",
        (DATA,),
        original.uri,
    )
    text = saved.read("readme.md").decode()
    assert f"# hub://{name}\n\na first try\n" in text
    assert "| top1 | 91.75 |" in text
    assert f"--set sr.weights=hub://{name}" in text
    assert f"--set task.weights=hub://{name}" in text
    assert versions.verify(name, hub) == []


def test_a_note_is_one_line_without_control_characters(run, tmp_path):
    for note in ("two\nlines", "\x1b[31mred", "x" * 2001):
        with pytest.raises(HubError, match=r"card of .*note: "):
            versions.publish(run, NAME, hub=str(tmp_path / "hub"), note=note)
    assert listing.entries(str(tmp_path / "hub")) == ([], [])


def test_figures_are_those_of_the_published_step(tmp_path):
    hub = str(tmp_path / "hub")
    publish_run(tmp_path / "later", judged=8, top1=50.0)
    publish_run(tmp_path / "never")
    publish_run(tmp_path / "odd", top1=float("nan"), psnr=20.0)
    publish_run(tmp_path / "oracle", experiment="drawn_cls/h2t", top1=99.0)
    found = {}
    for name in ("later", "never", "odd", "oracle"):
        version = versions.publish(str(tmp_path / name), name, hub=hub)
        found[name] = listing.entry(version, hub).card
    assert found["later"].metrics == found["never"].metrics == {}
    assert found["odd"].metrics == {"psnr": 20.0}
    assert (found["oracle"].sr, found["oracle"].scale) == (None, None)


def test_all_who_publish_at_once_get_versions_of_their_own(tmp_path, hub):
    runs = [tmp_path / f"run{i}" for i in range(8)]
    for i, each in enumerate(runs):
        publish_run(each, weight=float(i))
    with ThreadPoolExecutor(8) as pool:
        names = list(pool.map(lambda r: versions.publish(str(r), NAME, hub=hub), runs))
    assert sorted(ids(hub)) == sorted(name.which for name in names)
    assert len(ids(hub)) == 8
    for i, name in enumerate(names):
        weights = checkpoint.load(versions.uri_of(name, hub)).tensors("sr.safetensors")
        assert torch.equal(weights["conv.weight"], torch.full((3, 3), float(i)))


def test_a_version_that_a_tag_names_is_not_deleted(run, hub):
    first, second = (versions.publish(run, NAME, hub=hub) for _ in range(2))
    versions.promote(first, "best", hub=hub)
    for text in (NAME, f"{NAME}@best", f"{NAME}@latest"):
        with pytest.raises(HubError, match="name one version by its id"):
            versions.delete(parse(text), hub=hub, force=True)
    with pytest.raises(HubError, match="is best: promote another version first, or use --force"):
        versions.delete(first, hub=hub)
    assert len(ids(hub)) == 2
    versions.delete(second, hub=hub)
    assert ids(hub) == [first.which]
    versions.delete(first, hub=hub, force=True)
    assert (ids(hub), versions.tags(NAME, hub)) == ([], {})
    assert listing.entries(hub) == ([], [])
    with pytest.raises(HubError, match="no such version"):
        versions.delete(first, hub=hub)


@pytest.mark.parametrize(
    ("doing", "operations", "expected"),
    [
        # The reference; five files, card and readme; the manifest; no reference; the tag.
        ("publish", 11, {(True, 1): 17, (True, 2): 5, (False, 2): 1}),
        # The tag; the manifest; the rest.
        ("delete", 3, {(True, 2): 3, (True, 1): 3, (False, 1): 1}),
    ],
)
def test_whoever_is_killed_leaves_whole_versions_only(doing, operations, expected, run, tmp_path):
    """At every write and deletion: the earlier version stays, the other is there whole or not."""
    outcomes = Counter()
    for at in range(100):
        hub = str(tmp_path / f"hub{at}")
        earlier = versions.publish(run, NAME, hub=hub, tag="best")
        other = None if doing == "publish" else versions.publish(run, NAME, hub=hub, tag="good")
        with pytest.MonkeyPatch.context() as patch:
            counted = dying(patch, at)
            try:
                if other is None:
                    versions.publish(run, NAME, hub=hub, tag="good")
                else:
                    versions.delete(other, hub=hub, force=True)
                killed = False
            except Killed:
                killed = True
        found, problems = listing.entries(hub)
        assert problems == []
        assert earlier in [entry.name for entry in found]
        assert versions.resolve(f"hub://{NAME}@best", hub) == versions.uri_of(earlier, hub)
        for entry in found:
            assert versions.verify(entry.name, hub) == []
        for version in versions.tags(NAME, hub).values():
            assert Name(NAME, version) in [entry.name for entry in found]
        outcomes[killed, len(found)] += 1
        for name in versions.versions(NAME, hub)[1]:
            versions.delete(name, hub=hub)  # what is left can be cleared away
        assert versions.versions(NAME, hub)[1] == []
        if not killed:
            assert counted["operations"] == operations
            break
    # By whether it was killed, and how many versions there are then.
    assert outcomes == expected


def test_verify_names_every_damaged_file(run, tmp_path):
    hub = str(tmp_path / "hub")
    name = versions.publish(run, NAME, hub=hub)
    folder = Path(versions.uri_of(name, hub))
    files = [path for path in folder.iterdir() if path.name != "manifest.json"]
    assert len(files) == 7
    for path in files:
        flip(path)
        (problem,) = versions.verify(name, hub)
        assert path.name in problem
        assert str(folder) in problem
        flip(path)
    assert versions.verify(name, hub) == []
    flip(folder / "sr.safetensors")
    (folder / "task.safetensors").unlink()
    assert len(versions.verify(name, hub)) == 2


def test_a_damaged_checkpoint_is_not_published(run, tmp_path):
    flip(Path(checkpoint.resolve(run)) / "task.safetensors")
    with pytest.raises(CheckpointError, match="task.safetensors of checkpoint .* is not what was"):
        versions.publish(run, NAME, hub=str(tmp_path / "hub"))
    assert listing.entries(str(tmp_path / "hub")) == ([], [])


def test_a_store_that_alters_what_it_is_given_is_found_out(run, tmp_path, monkeypatch):
    write = storage.write_bytes
    monkeypatch.setattr(
        storage, "write_bytes", lambda uri, data: write(uri, b"3;framed\r\n" + data)
    )
    with pytest.raises(CheckpointError, match="reads back differently .*=when_required"):
        versions.publish(run, NAME, hub=str(tmp_path / "hub"))
    assert listing.entries(str(tmp_path / "hub")) == ([], [])


def test_a_checkpoint_is_held_while_it_is_copied(run, hub, monkeypatch):
    write, seen = checkpoint.write, []

    def watched(uri, files):
        seen.append(storage.list_names(f"{run}/references"))
        return write(uri, files)

    monkeypatch.setattr(checkpoint, "write", watched)
    versions.publish(run, NAME, hub=hub)
    ((reference,),) = seen
    assert reference.startswith(Path(checkpoint.resolve(run)).name)
    assert storage.list_names(f"{run}/references") == []
