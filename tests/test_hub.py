"""The hub: versions appear whole, never change, and are found, shared and deleted by name."""

import json
import os
import re
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from fault_proxy import FaultProxy
from small_runs import DATA, EXPERIMENT, publish_run

from sr4ir_dist import checkpoint, faults, storage
from sr4ir_dist.checkpoint import CheckpointError
from sr4ir_dist.hub import listing, sharing, versions
from sr4ir_dist.hub.cards import load_card
from sr4ir_dist.hub.names import HubError, Name, parse, root

NAME = "team/drawn_cls-edsr-x4"


@pytest.fixture
def run(tmp_path):
    """A run that was judged at its newest checkpoint."""
    publish_run(tmp_path / "run", top1=91.75, psnr=19.5)
    return str(tmp_path / "run")


@pytest.fixture(params=["folder", "s3", "s3rver"])
def hub(request, tmp_path):
    """The root of an empty hub of each kind."""
    if request.param == "folder":
        return str(tmp_path / "hub")
    return request.getfixturevalue(request.param)() + "/hub"


def ids(hub, path=NAME):
    return [name.which for name in versions.versions(path, hub)[0]]


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


def test_names_mean_the_newest_version_an_id_or_a_tag(run, hub):
    first = versions.publish(run, NAME, hub=hub, tag="best")
    second = versions.publish(run, NAME, hub=hub)
    first, second = sorted((first, second), key=str)  # in one second, either is the newest
    versions.promote(first, "best", hub=hub)
    for text, expected in {
        f"hub://{NAME}": second,
        f"hub://{NAME}@latest": second,
        f"hub://{NAME}@best": first,
        f"hub://{first}": first,
    }.items():
        assert versions.find(parse(text), hub) == expected
        assert versions.resolve(text, hub).endswith(str(expected.which))
    assert ids(hub) == [second.which, first.which]
    # Whatever else a user may give means what it meant before.
    assert versions.resolve(run, hub) == checkpoint.resolve(run)
    assert versions.resolve(checkpoint.resolve(run)) == checkpoint.resolve(run)


def test_the_newest_version_is_that_of_the_latest_second(run, tmp_path, monkeypatch):
    published = []
    for moment in ("20260101-000001", "20260102-000000", "20251231-235959"):
        monkeypatch.setattr(versions, "new_version", lambda: f"{moment}-{len(published):08x}")  # noqa: B023
        published.append(versions.publish(run, NAME, hub=str(tmp_path)))
    assert versions.find(parse(NAME), str(tmp_path)) == published[1]


def test_what_is_not_there_is_refused_by_name(run, hub):
    name = versions.publish(run, NAME, hub=hub, tag="best")
    for text, message in {
        "hub://team/other": "hub://team/other: nothing is published under this name in ",
        f"hub://{NAME}@good": "has no tag 'good'; it has latest, best",
        f"hub://{NAME}@20260101-000000-00000000": "has no such version",
    }.items():
        with pytest.raises(HubError, match=re.escape(message)):
            versions.resolve(text, hub)
    with pytest.raises(CheckpointError, match="neither a checkpoint nor a run"):
        versions.publish(f"{run}-that-is-not-there", NAME, hub=hub)
    assert ids(hub) == [name.which]


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "hub://",
            "/a",
            "a/",
            "a//b",
            "..",
            "../a",
            "a/../b",
            "a/./b",
            "Team/a",
            "a b",
            "a\n",
        ),
        *("é", "a/versions", "tags/a", "a/shares/b", "-a", "_a", "a" * 101, "a\\b", "a?b", "a\x1b"),
        *(
            "a@",
            "a@b@c",
            "a@../b",
            "a@Best",
            "a@1",
            "a@20260101-000000",
            "a@20260101-000000-XXXXXXXX",
        ),
    ],
)
def test_malformed_names_are_refused(text, run, tmp_path):
    with pytest.raises(HubError, match="no name of a hub|after the @ goes"):
        parse(text)
    with pytest.raises(HubError):
        versions.publish(run, text, hub=str(tmp_path / "hub"))
    assert not (tmp_path / "hub").exists()


@pytest.mark.parametrize(
    "tag", ["", "latest", "Best", "1st", "../best", "a/b", "20260101-000000-00000000"]
)
def test_malformed_tags_are_refused_before_anything_is_written(tag, run, tmp_path):
    hub = str(tmp_path / "hub")
    with pytest.raises(HubError, match="is no tag"):
        versions.publish(run, NAME, hub=hub, tag=tag)
    assert storage.list_files(hub) == []


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


def test_a_promotion_keeps_what_the_tag_named_before(run, hub):
    names = [versions.publish(run, NAME, hub=hub) for _ in range(3)]
    for name in names:
        assert versions.promote(name, "best", hub=hub) == name
    assert versions.tags(NAME, hub) == {"best": names[2].which}
    history = storage.read_json(f"{hub}/{NAME}/tags/best.json")["targets"]
    assert [target["version"] for target in history] == [n.which for n in reversed(names)]
    versions.promote(parse(f"{NAME}@best"), "good", hub=hub)
    assert versions.tags(NAME, hub) == {"best": names[2].which, "good": names[2].which}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"targets": []}',
        '{"targets": [{"version": "../../other", "when": "", "by": ""}]}',
    ],
)
def test_a_damaged_tag_is_refused_by_name_and_mended_by_a_promotion(content, run, tmp_path):
    hub = str(tmp_path / "hub")
    name = versions.publish(run, NAME, hub=hub, tag="best")
    (Path(hub) / NAME / "tags" / "best.json").write_text(content)
    with pytest.raises(HubError, match=r"tags/best\.json is malformed: promote"):
        versions.resolve(f"hub://{NAME}@best", hub)
    found, problems = listing.entries(hub)
    assert [entry.name for entry in found] == [name]
    assert len(problems) == 1
    versions.promote(name, "best", hub=hub)
    assert versions.find(parse(f"{NAME}@best"), hub) == name


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


def test_a_tag_whose_version_is_gone_says_so(run, tmp_path):
    hub = str(tmp_path / "hub")
    name = versions.publish(run, NAME, hub=hub, tag="best")
    checkpoint.delete(versions.uri_of(name, hub))
    with pytest.raises(HubError, match=f"the tag names {name.which}, which was deleted"):
        versions.resolve(f"hub://{NAME}@best", hub)


class Killed(BaseException):
    """The process ends here: nothing in the package may catch it."""


def dying(monkeypatch, at):
    """Lets the process die before (even) or after (odd) a write or deletion; counts them."""
    counted = Counter()

    def mortal(operation):
        def operate(*arguments):
            number = counted["operations"]
            counted["operations"] += 1
            if number == at // 2 and at % 2 == 0:
                raise Killed
            operation(*arguments)
            if number == at // 2:
                raise Killed

        return operate

    monkeypatch.setattr(storage, "write_bytes", mortal(storage.write_bytes))
    monkeypatch.setattr(storage, "delete", mortal(storage.delete))
    return counted


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


def flip(path: Path, where: int = -2) -> None:
    data = bytearray(path.read_bytes())
    data[where] ^= 1
    path.write_bytes(data)


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


@pytest.fixture(scope="module")
def several(tmp_path_factory) -> list[listing.Entry]:
    """Four versions of three names, the newest first."""
    folder = tmp_path_factory.mktemp("several")
    hub = str(folder / "hub")
    for number, (name, experiment, figures) in enumerate(
        [
            ("team/a", "voc_seg/edsr-x8/sr4ir", {"miou": 60.5, "lpips": 0.3}),
            ("team/a", "voc_seg/edsr-x8/sr4ir", {"miou": 62.0, "lpips": 0.4}),
            ("team/b", "voc_seg/swinir-x4/s2t", {"miou": 59.0}),
            ("cub", "cub200/h2t", {"top1": 83.5}),
        ]
    ):
        publish_run(folder / str(number), experiment=experiment, **figures)
        version = f"2026010{number + 1}-000000-0000000{number}"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(versions, "new_version", lambda: version)  # noqa: B023
            versions.publish(str(folder / str(number)), name, hub=hub)
    versions.promote(parse("team/a"), "best", hub=hub)
    (folder / "hub" / "notes.txt").write_text("not of the hub")
    found, problems = listing.entries(hub)
    assert problems == []
    assert listing.entries(hub, "team/")[0] == found[1:]
    assert [entry.tags for entry in found] == [(), (), ("best",), ()]
    return found


@pytest.mark.parametrize(
    ("wanted", "conditions", "sort", "expected"),
    [
        ({}, [], "newest", [4, 3, 2, 1]),
        ({}, [], "miou", [2, 1, 3, 4]),
        ({}, [], "lpips", [1, 2, 4, 3]),
        ({"data": "voc_seg"}, [], "newest", [3, 2, 1]),
        ({"task": "segmentation", "sr": "edsr"}, [], "newest", [2, 1]),
        ({"scale": 8, "recipe": "sr4ir"}, [], "miou", [2, 1]),
        ({"task": "classification", "scale": 8}, [], "newest", []),
        ({"task": None}, ["miou>60"], "newest", [2, 1]),
        ({}, ["miou>60.5"], "newest", [2]),
        ({}, [" miou >= 60.5 ", "lpips<0.4"], "newest", [1]),
        ({}, ["miou<=59"], "newest", [3]),
        ({}, ["top1=83.5"], "newest", [4]),
    ],
)
def test_versions_are_found_by_what_they_are_and_can(several, wanted, conditions, sort, expected):
    found = listing.select(several, wanted, conditions, sort)
    assert [int(str(entry.name.which)[7]) for entry in found] == expected


@pytest.mark.parametrize(
    ("wanted", "conditions", "sort", "message"),
    [
        ({"task": "segment"}, [], "newest", "task=segment: .*there are: classification, segment"),
        ({"scale": 2}, [], "newest", "scale=2: no version has it; there are: 4, 8"),
        ({}, ["iou>3"], "newest", "metric 'iou>3': .*there are: lpips, miou, top1"),
        ({}, ["miou"], "newest", "metric 'miou': expected such as miou>60"),
        ({}, ["miou>x"], "newest", "metric 'miou>x': expected such as"),
        ({}, [], "date", "sort=date: .*there are: lpips, miou, newest, top1"),
    ],
)
def test_a_search_for_what_no_version_has_says_what_there_is(
    several, wanted, conditions, sort, message
):
    with pytest.raises(HubError, match=message):
        listing.select(several, wanted, conditions, sort)


@pytest.mark.parametrize("card", ["[]", "{", '{"note": "\\u001b[2J"}', "[" * 100_000])
def test_a_hostile_card_hides_no_other_version(card, run, tmp_path):
    hub = str(tmp_path / "hub")
    name = versions.publish(run, NAME, hub=hub)
    checkpoint.write(
        f"{hub}/team/evil/versions/20260101-000000-00000000", [("card.json", card.encode())]
    )
    found, problems = listing.entries(hub)
    assert [entry.name for entry in found] == [name]
    assert len(problems) == 1
    assert problems[0].startswith("card.json of ")
    assert problems[0].isprintable()


def test_pull_fetches_what_is_missing_and_what_is_damaged(run, hub, tmp_path):
    name = versions.publish(run, NAME, hub=hub)
    target, said = tmp_path / "pulled", []
    files = list(checkpoint.load(versions.uri_of(name, hub)).files)

    with pytest.MonkeyPatch.context() as patch:
        dying(patch, 5)  # after the third file
        with pytest.raises(Killed):
            sharing.pull(f"hub://{NAME}", str(target), hub=hub, say=said.append)
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        checkpoint.load(str(target))
    flip(target / files[1])
    said.clear()
    saved = sharing.pull(f"hub://{NAME}", str(target), hub=hub, say=said.append)
    assert [text.endswith("is there already") for text in said] == [True, False, True] + [False] * 4
    assert {path.name for path in target.iterdir()} == {*files, "manifest.json"}
    for file in saved.files:
        assert saved.read(file)
    said.clear()
    sharing.pull(str(target), f"{hub}-copy", say=said.append)
    assert len(said) == len(files)
    assert checkpoint.load(f"{hub}-copy").files == saved.files


def test_pull_refuses_a_folder_with_another_checkpoint(run, tmp_path):
    hub, target = str(tmp_path / "hub"), str(tmp_path / "pulled")
    first, second = (versions.publish(run, NAME, hub=hub) for _ in range(2))
    sharing.pull(f"hub://{first}", target, hub=hub, say=print)
    with pytest.raises(HubError, match="has another checkpoint"):
        sharing.pull(f"hub://{second}", target, hub=hub, say=print)
    assert checkpoint.load(target).files == checkpoint.load(versions.uri_of(first, hub)).files


def test_pull_refuses_a_damaged_file_by_name(run, tmp_path):
    hub = str(tmp_path / "hub")
    name = versions.publish(run, NAME, hub=hub)
    flip(Path(versions.uri_of(name, hub)) / "task.safetensors")
    with pytest.raises(CheckpointError, match="task.safetensors did not arrive as it was"):
        sharing.pull(f"hub://{NAME}", str(tmp_path / "pulled"), hub=hub, say=print)
    assert not (tmp_path / "pulled" / "manifest.json").exists()


def test_a_file_that_is_larger_than_its_manifest_says_is_damaged(run, tmp_path):
    hub = str(tmp_path / "hub")
    name = versions.publish(run, NAME, hub=hub)
    with Path(versions.uri_of(name, hub), "task.safetensors").open("ab") as file:
        file.write(b"more")
    (problem,) = versions.verify(name, hub)
    assert "task.safetensors" in problem
    with pytest.raises((CheckpointError, storage.ContentError), match="task.safetensors"):
        sharing.pull(f"hub://{NAME}", str(tmp_path / "pulled"), hub=hub, say=print)
    assert not (tmp_path / "pulled" / "manifest.json").exists()


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


def without_credentials(patch):
    for name in list(os.environ):
        if name.startswith("AWS_"):
            patch.delenv(name)


def test_a_shared_url_needs_no_credentials_and_nothing_else_gets_in(s3, run, tmp_path):
    hub = s3() + "/hub"
    name = versions.publish(run, NAME, hub=hub)
    said: list[str] = []
    url = sharing.share(parse(NAME), hub=hub, expires=60, say=said.append)
    assert said == []
    with pytest.MonkeyPatch.context() as patch:
        without_credentials(patch)
        saved = sharing.pull(url, str(tmp_path / "pulled"), say=said.append)
        assert len(said) == 7
        for other in (url.partition("?")[0], url[:-1] + ("0" if url[-1] != "0" else "1")):
            with pytest.raises(HubError, match=r"refused \(403\)") as refused:
                sharing.pull(other, str(tmp_path / "not"), say=said.append)
            assert "Signature" not in str(refused.value)
        (index,) = [file for file in index_files(url).values() if "manifest.json" in file]
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(index.partition("?")[0]).close()
    assert not (tmp_path / "not").exists()
    assert saved.files == checkpoint.load(versions.uri_of(name, hub)).files
    # The pulled folder is a checkpoint that can be published again.
    again = versions.publish(str(tmp_path / "pulled"), "other", hub=hub)
    assert versions.verify(again, hub) == []


def index_files(url: str) -> dict[str, str]:
    with urllib.request.urlopen(url) as response:
        return json.load(response)["files"]


def test_a_shared_url_expires_and_its_index_is_cleared_away(s3, run, tmp_path):
    hub = s3() + "/hub"
    versions.publish(run, NAME, hub=hub)
    url = sharing.share(parse(NAME), hub=hub, expires=1, say=print)
    inner = index_files(url)["sr.safetensors"]
    time.sleep(2.1)
    with pytest.raises(HubError, match=r"refused \(403\): the URL has expired"):
        sharing.pull(url, str(tmp_path / "pulled"), say=print)
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(inner).close()
    assert len(storage.list_names(f"{hub}/{NAME}/shares")) == 1
    sharing.share(parse(NAME), hub=hub, expires=60, say=print)
    (left,) = storage.list_names(f"{hub}/{NAME}/shares")
    assert left not in url
    assert [entry.name.path for entry in listing.entries(hub)[0]] == [NAME]


def test_a_shared_url_that_is_refused_for_a_while_is_asked_again(s3, run, tmp_path, monkeypatch):
    hub = s3() + "/hub"
    name = versions.publish(run, NAME, hub=hub)
    upstream = os.environ["AWS_ENDPOINT_URL"]
    proxy = FaultProxy(upstream, tmp_path, kinds=("slowdown", "internal"), only="GET", limit=2)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    little = faults.Patience(requests=2, tries=3, wait_s=0.02, total_s=60)
    monkeypatch.setattr(faults, "PATIENCE", little)
    try:
        with sharing._signing(60, print) as signed:
            url = signed(f"{versions.uri_of(name, hub)}/card.json")
        assert sharing._fetched(url, 1 << 20) == storage.read_bytes(
            f"{versions.uri_of(name, hub)}/card.json"
        )
        told = [fault for fault, _ in proxy.requests("GET")]
        assert told[:3] == ["slowdown", "internal", ""]
    finally:
        proxy.close()


def test_wrong_credentials_reach_no_hub(s3: Callable[[], str], run, monkeypatch):
    hub = s3() + "/hub"
    versions.publish(run, NAME, hub=hub)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
    with pytest.raises(storage.StorageError):
        listing.entries(hub)
    with pytest.raises(storage.StorageError):
        versions.publish(run, NAME, hub=hub)


def test_what_cannot_be_shared_is_refused(s3, run, tmp_path, monkeypatch):
    folder = str(tmp_path / "hub")
    versions.publish(run, NAME, hub=folder)
    with pytest.raises(HubError, match="is a folder, which no URL leads to"):
        sharing.share(parse(NAME), hub=folder, expires=60, say=print)
    hub = s3() + "/hub"
    versions.publish(run, NAME, hub=hub)
    said: list[str] = []
    monkeypatch.setenv("AWS_SESSION_TOKEN", "temporary")
    with sharing._signing(60, said.append) as signed:
        assert "X-Amz-Security-Token" in signed(f"{hub}/x")
    assert said == ["note: your credentials are temporary; the URL ends with them, if not before"]
    without_credentials(monkeypatch)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    with pytest.raises(HubError, match="no URL could be signed: Unable to locate credentials"):
        with sharing._signing(60, print) as signed:
            signed(f"{hub}/x")


def test_what_a_url_leads_to_is_not_trusted(s3, run, tmp_path):
    hub = s3() + "/hub"
    versions.publish(run, NAME, hub=hub)
    files = index_files(sharing.share(parse(NAME), hub=hub, expires=60, say=print))
    (tmp_path / "secret").write_text("local")

    def pull(value, to="pulled"):
        storage.write_bytes(f"{hub}/index.json", json.dumps(value).encode())
        with sharing._signing(60, print) as signed:
            url = signed(f"{hub}/index.json")
        return sharing.pull(url, str(tmp_path / to), say=print)

    with pytest.raises(HubError, match="this is no shared version"):
        pull(["not an index"])
    with pytest.raises(HubError, match=r"lacks manifest\.json"):
        pull({"name": "", "files": {}})
    with pytest.raises(HubError, match=r"file://.*expected http"):
        pull({"name": "", "files": files | {"task.safetensors": f"file://{tmp_path}/secret"}})
    with pytest.raises(CheckpointError, match=r"task\.safetensors did not arrive"):
        pull({"name": "", "files": files | {"task.safetensors": files["sr.safetensors"]}})
    with pytest.raises(CheckpointError, match=r"manifest\.json of checkpoint .* is malformed"):
        pull({"name": "", "files": files | {"manifest.json": files["sr.safetensors"]}}, "new")
    manifest = checkpoint.load(versions.resolve(f"hub://{NAME}", hub))
    lying = checkpoint._manifest({**manifest.files, "task.safetensors": (1 << 70, "0" * 64)})
    storage.write_bytes(f"{hub}/lying", lying)
    with sharing._signing(60, print) as signed:
        lying_url = signed(f"{hub}/lying")
    with pytest.raises(HubError, match=r"task\.safetensors: larger than the 4 GiB"):
        pull({"name": "", "files": files | {"manifest.json": lying_url}}, "new")
    assert not (tmp_path / "new").exists()
    assert not (tmp_path / "pulled" / "manifest.json").exists()
    with pytest.raises(HubError, match="the same command again continues"):
        sharing.pull("http://127.0.0.1:1/x", str(tmp_path / "pulled"), say=print)


@pytest.mark.parametrize(
    ("text", "value"), [("7d", 604_800), ("12h", 43_200), ("30m", 1800), ("1s", 1)]
)
def test_durations(text, value):
    assert sharing.seconds(text) == value


@pytest.mark.parametrize("text", ["8d", "0s", "", "d", "1w", "1.5h", "-1h", "604801s", "1 d"])
def test_malformed_durations_are_refused(text):
    with pytest.raises(HubError, match="expected a time from 1s to 7d"):
        sharing.seconds(text)


def test_the_hub_is_that_of_the_environment_or_the_one_given(run, tmp_path, monkeypatch):
    monkeypatch.delenv("SR4IR_HUB", raising=False)
    with pytest.raises(HubError, match="no hub: set SR4IR_HUB"):
        versions.resolve(f"hub://{NAME}")
    versions.publish(run, NAME, hub=str(tmp_path / "hub"))
    monkeypatch.setenv("SR4IR_HUB", "hub")
    monkeypatch.chdir(tmp_path)
    assert root() == str(tmp_path / "hub")
    assert versions.resolve(f"hub://{NAME}").startswith(str(tmp_path / "hub"))
    assert root("s3://bucket/other") == "s3://bucket/other"
