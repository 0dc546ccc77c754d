"""Pruning leaves what is newest, best or needed, and no kill leaves half a checkpoint."""

import json
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from sr4ir_dist import checkpoint, retention, storage

SCORES = {1: 5.0, 2: 9.0, 3: 7.0, 4: 9.0, 5: 1.0, 6: None}


def files(step, content="first"):
    return {
        "progress.json": json.dumps({"step": step, "score": SCORES[step]}).encode(),
        "sr.safetensors": f"the weights after {step}, {content}".encode(),
    }


def score(saved):
    return saved.json("progress.json")["score"]


def publish(run):
    return {step: checkpoint.publish(run, step, files(step)) for step in SCORES}


def prune(run, newest=1, best=0):
    retention.prune(run, newest=newest, best=best, score=score)


def kept(run):
    return {int(uri[-9:]) for uri in checkpoint.newest_first(run)}


@pytest.fixture(params=["path", "s3"])
def run(request, tmp_path):
    return (
        str(tmp_path / "run") if request.param == "path" else request.getfixturevalue("s3")() + "/r"
    )


@pytest.mark.parametrize(
    ("newest", "best", "expected"),
    [
        (1, 0, {6}),
        (3, 0, {4, 5, 6}),
        (1, 1, {6, 4}),  # of equal ones the newer
        (1, 2, {6, 4, 2}),
        (3, 1, {4, 5, 6}),
        (1, 9, {1, 2, 3, 4, 5, 6}),
        (9, 0, {1, 2, 3, 4, 5, 6}),
    ],
)
def test_the_newest_and_the_best_stay(tmp_path, newest, best, expected):
    uris = publish(str(tmp_path))
    for _ in range(2):
        prune(str(tmp_path), newest, best)
        assert kept(str(tmp_path)) == expected
    assert {step for step, uri in uris.items() if Path(uri).exists()} == expected


def test_a_damaged_checkpoint_is_not_the_best(tmp_path):
    uris = publish(str(tmp_path))
    (Path(uris[4]) / "progress.json").write_bytes(b"")
    prune(str(tmp_path), best=1)
    assert kept(str(tmp_path)) == {6, 2}


def test_what_someone_needs_stays_until_they_are_done(run):
    uris = publish(run)
    for step, by in ((1, "one"), (2, "one"), (2, "other")):
        retention.hold(uris[step], by=by, days=1)
    retention.hold(f"{run}/weights", by="one", days=1)  # no run's checkpoint
    prune(run)
    assert kept(run) == {1, 2, 6}
    retention.release(uris[1], by="other")
    retention.release(uris[2], by="other")
    prune(run)
    assert kept(run) == {1, 2, 6}
    retention.release(uris[2], by="one")
    retention.release(uris[2], by="one")
    prune(run)
    assert kept(run) == {1, 6}


def test_references_end_and_are_renewed(run, monkeypatch):
    uris = publish(run)
    result = f"{run}-of-another/result.json"
    retention.hold(uris[1], by="another run", days=30, until=result)
    retention.hold(uris[2], by="an evaluation", days=2)
    retention.hold(uris[3], by="an evaluation", days=2)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 24 * 3600)
    retention.hold(uris[3], by="an evaluation", days=2)
    monkeypatch.setattr(time, "time", lambda: now + 2.5 * 24 * 3600)
    prune(run)
    assert kept(run) == {1, 3, 6}
    storage.write_json(result, {})
    prune(run)
    assert kept(run) == {3, 6}
    assert len(storage.list_names(f"{run}/references")) == 1


def test_a_damaged_reference_counts(tmp_path):
    run = str(tmp_path)
    uris = publish(run)
    for step, content in ((1, "{"), (2, "[]"), (3, "{}"), (4, '{"expires": "soon"}')):
        retention.hold(uris[step], by="one", days=1)
        (reference,) = (tmp_path / "references").glob(f"step-00000000{step}.*")
        reference.write_text(content)
    prune(run)
    assert kept(run) == {1, 2, 3, 4, 6}


def test_a_reference_that_others_end_counts_and_holds_nothing_else(tmp_path):
    run = str(tmp_path)
    uris = publish(run)
    retention.hold(uris[1], by="someone", days=1, until="gs://where/only/they/may/look")
    prune(run)
    assert kept(run) == {1, 6}


def test_what_interrupted_saves_left_goes_too(tmp_path):
    run = str(tmp_path)
    uris = publish(run)
    for step in (2, 6):
        (Path(uris[step]) / "manifest.json").unlink()
    prune(run)
    # The newest may be a save that is under way.
    assert {path.name[-1] for path in (tmp_path / "checkpoints").iterdir()} == {"5", "6"}


def test_a_checkpoint_that_is_gone_cannot_be_held(tmp_path):
    uris = publish(str(tmp_path))
    prune(str(tmp_path))
    with pytest.raises(checkpoint.CheckpointError, match="no checkpoint at .*step-000000001"):
        retention.hold(uris[1], by="one", days=1)


def test_storage_that_may_only_be_read_gets_a_warning(tmp_path, caplog):
    uris = publish(str(tmp_path))
    (tmp_path / "references").write_text("in the way")
    retention.hold(uris[1], by="one", days=1)
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{uris[1]} may be pruned while it is needed: ")


class Killed(BaseException):
    """What a process does not live to see."""


@contextmanager
def killed(number, moment):
    """Ends what is inside at its n-th change of the storage: before it, in its middle, after it."""
    left = number

    def dying(operation):
        def run(uri, *content):
            nonlocal left
            left -= 1
            if left:
                return operation(uri, *content)
            if moment == "middle":
                half(Path(uri), *content)
            elif moment == "after":
                operation(uri, *content)
            raise Killed

        return run

    with pytest.MonkeyPatch.context() as patch:
        for name in ("write_bytes", "delete"):
            patch.setattr(storage, name, dying(getattr(storage, name)))
        yield


def half(path, content=None):
    if content is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{'0' * 32}.tmp")
        temporary.write_bytes(content[: len(content) // 2])
    elif path.is_dir():
        next(path.iterdir()).unlink()


@pytest.mark.parametrize("moment", ["before", "middle", "after"])
@pytest.mark.parametrize("steps", [(1, 2, 3, 5), (1, 2, 4, 5)], ids=["a new step", "one again"])
def test_a_save_that_is_killed_anywhere_leaves_whole_checkpoints(tmp_path, moment, steps):
    """A run that has gone back before its step 5 saves step 4 and prunes."""
    seen = []
    for number in range(1, 100):
        run = str(tmp_path / str(number))
        for step in steps:
            checkpoint.publish(run, step, files(step))
        try:
            with killed(number, moment):
                checkpoint.publish(run, 4, files(4, "second"))
                prune(run, newest=2, best=2)
        except Killed:
            seen.append(assert_whole(run, steps))
        else:
            break
    assert kept(run) == {2, 3, 4} & {4, *steps}
    # Of the 6 to 8 changes some come before the new checkpoint is there, and some after.
    assert len(seen) in (6, 7, 8)
    assert set(seen) == {False, True}
    # What is left half-done is in nobody's way.
    for again in range(1, number):
        run = str(tmp_path / str(again))
        checkpoint.publish(run, 4, files(4, "second"))
        prune(run, newest=2, best=2)
        assert kept(run) == {2, 3, 4} & {4, *steps}


def assert_whole(run, steps):
    """Every checkpoint that is listed is whole; says whether the new one is."""
    found = {}
    for uri in checkpoint.newest_first(run):
        saved = checkpoint.verify(uri)
        step = int(uri[-9:])
        found[step] = saved.read("sr.safetensors")
        assert saved.json("progress.json")["step"] == step
    new = found.get(4) == files(4, "second")["sr.safetensors"]
    for step in steps:
        if step < 4 and not (new and step == 1):
            assert found[step] == files(step)["sr.safetensors"]
    return new
