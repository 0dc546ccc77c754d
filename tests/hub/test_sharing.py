"""Versions are pulled, and shared by URLs that need no account."""

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from fault_proxy import FaultProxy
from mortal_storage import Killed, dying
from small_runs import NAME, flip

from sr4ir_dist import checkpoint, faults, storage
from sr4ir_dist.checkpoint import CheckpointError
from sr4ir_dist.hub import listing, sharing, versions
from sr4ir_dist.hub.names import HubError, parse


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
