"""What names, tags and their absence mean."""

import re
from pathlib import Path

import pytest
from small_runs import NAME, ids

from sr4ir_dist import checkpoint, storage
from sr4ir_dist.checkpoint import CheckpointError
from sr4ir_dist.hub import listing, versions
from sr4ir_dist.hub.names import HubError, parse, root


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
        "hub://team/other@best": "hub://team/other@best: nothing is published under this name in ",
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


def test_a_tag_whose_version_is_gone_says_so(run, tmp_path):
    hub = str(tmp_path / "hub")
    name = versions.publish(run, NAME, hub=hub, tag="best")
    checkpoint.delete(versions.uri_of(name, hub))
    with pytest.raises(HubError, match=f"the tag names {name.which}, which was deleted"):
        versions.resolve(f"hub://{NAME}@best", hub)


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
