"""Versions are found by what they are and can."""

import pytest
from small_runs import NAME, publish_run

from sr4ir_dist import checkpoint
from sr4ir_dist.hub import listing, versions
from sr4ir_dist.hub.names import HubError, parse


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
