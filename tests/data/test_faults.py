"""What a server or a network spoils is tried again, and named when it stays so."""

import os
import threading
import time

import boto3
import pytest
import torch
from fault_proxy import KINDS, FaultProxy

from sr4ir_dist import faults, storage
from sr4ir_dist.data.cache import ShardCache
from sr4ir_dist.data.loader import Loader
from sr4ir_dist.data.schema import DatasetError
from sr4ir_dist.data.splits import open_split
from sr4ir_dist.data.transforms import PatchCrop

SAID = {
    "slowdown": "SERVICE_UNAVAILABLE|SLOW_DOWN",
    "internal": "INTERNAL_FAILURE",
    "reset": "NETWORK_CONNECTION",
    "silent": "Timeout was reached",
    "short": "Transferred a partial file",
}
CONTENT = b"0123456789" * 30_000


@pytest.fixture
def spoil(s3, tmp_path, monkeypatch):
    """Starts a proxy and sends what follows through it, with little patience."""
    started = []

    def start(*kinds, timeout_s=0.5, patience=None, **options) -> FaultProxy:
        upstream = os.environ["AWS_ENDPOINT_URL"]
        started.append(FaultProxy(upstream, tmp_path, kinds=kinds or KINDS, **options))
        monkeypatch.setenv("AWS_ENDPOINT_URL", started[-1].endpoint)
        monkeypatch.setenv("SR4IR_S3_TIMEOUT_S", str(timeout_s))
        little = faults.Patience(requests=2, tries=2, wait_s=0.02, total_s=60)
        monkeypatch.setattr(faults, "PATIENCE", patience or little)
        return started[-1]

    yield start
    for proxy in started:
        proxy.close()


@pytest.fixture
def uri(s3) -> str:
    """A file in a folder of a bucket."""
    found = storage.join(s3(), "folder", "file")
    storage.write_bytes(found, CONTENT)
    return found


def test_an_epoch_through_faults_of_every_kind_equals_one_without(s3, write, spoil, tmp_path):
    uri = storage.join(s3(), "set")
    write(uri, 150)

    def epoch(cache: str) -> list:
        batches = [[], []]
        errors = []

        def read(rank: int) -> None:
            try:
                with Loader(
                    open_split(uri, "train"),
                    transform=PatchCrop(8, 4, train=True),
                    batch_size=16,
                    seed=3,
                    rank=rank,
                    world_size=2,
                    shuffle=True,
                    target="label",
                    threads=1,
                    cache_dir=tmp_path / cache,
                ) as loader:
                    batches[rank] = list(loader.epoch(1))
            except Exception as error:
                errors.append(error)

        ranks = [threading.Thread(target=read, args=(rank,)) for rank in range(2)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
        assert errors == []
        return batches

    expected = epoch("undisturbed")
    proxy = spoil(share=0.1, seed=52, timeout_s=1.5, patience=faults.Patience(wait_s=0.05))
    found = epoch("disturbed")
    hits = [kind for kind, _ in proxy.requests() if kind]
    assert set(hits) == set(KINDS)
    assert len(hits) < 0.2 * len(proxy.requests())
    keys = [key for rank in found for batch in rank for key in batch.keys.tolist()]
    assert sorted(keys) == list(range(150))
    for one, other in zip(sum(found, []), sum(expected, []), strict=True):
        assert one.ids == other.ids
        assert torch.equal(one.keys, other.keys)
        assert torch.equal(one.hr, other.hr)
        assert torch.equal(one.targets, other.targets)


@pytest.mark.parametrize("kind", sorted(SAID))
def test_a_fault_that_stays_is_named_in_bounded_time(uri, spoil, kind):
    requests = 1 if kind == "silent" else 2  # each takes its second
    patience = faults.Patience(requests=requests, tries=2, wait_s=0.02)
    proxy = spoil(kind, only="GET", patience=patience)
    started = time.monotonic()
    with pytest.raises(storage.StorageError, match=SAID[kind]) as caught:
        storage.read_bytes(uri)
    assert time.monotonic() - started < 20
    assert str(caught.value).startswith(f"{uri}: ")
    assert f"2 tries of up to {requests} requests each" in str(caught.value)
    # After a reset the client's connection pool may send a request once more by itself.
    sent = 2 * requests
    assert sent <= len(proxy.requests("GET")) <= (2 * sent if kind == "reset" else sent)


@pytest.mark.parametrize(
    ("operation", "kind"),
    [
        (storage.exists, "internal"),
        (lambda uri: storage.write_bytes(uri, b"new"), "slowdown"),
        (storage.delete, "internal"),
        (lambda uri: storage.list_names(uri.rpartition("/")[0]), "short"),
        (lambda uri: storage.list_files(uri.rpartition("/")[0]), "short"),
    ],
    ids=["exists", "write", "delete", "list_names", "list_files"],
)
def test_every_operation_gives_up_or_is_done(uri, spoil, operation, kind):
    expected = operation(uri)
    storage.write_bytes(uri, CONTENT)
    upstream = os.environ["AWS_ENDPOINT_URL"]
    spoil(kind)
    with pytest.raises(storage.StorageError, match="given up after .* 2 tries"):
        operation(uri)
    # Three faults: the first try fails, and of the second the first request.
    os.environ["AWS_ENDPOINT_URL"] = upstream
    proxy = spoil(kind, limit=3)
    assert operation(uri) == expected
    assert len([fault for fault, _ in proxy.requests() if fault]) == 3


def test_a_download_leaves_nothing_of_the_tries_that_failed(uri, spoil, tmp_path):
    spoil("short", only="GET")
    folder = tmp_path / "to"
    with pytest.raises(storage.StorageError, match="given up"):
        storage.download(uri, folder / "file")
    assert list(folder.iterdir()) == []


def test_what_is_missing_is_asked_for_once(uri, s3, spoil):
    proxy = spoil(share=0)
    for missing in (f"{uri}-not", "s3://no-such-bucket-here/file"):
        with pytest.raises(storage.MissingError):
            storage.read_bytes(missing)
        assert len(proxy.requests(missing.removeprefix("s3:/"))) == 1
    with pytest.raises(storage.StorageError, match="NO_SUCH_BUCKET") as caught:
        storage.write_bytes("s3://no-such-bucket-here/file", b"")
    assert "tries" not in str(caught.value)
    assert len(proxy.requests("PUT")) == 1


def test_a_size_that_does_not_arrive_is_no_empty_file(uri, spoil):
    proxy = spoil("short", only="HEAD", limit=1)
    assert storage.read_bytes(uri) == CONTENT
    assert [kind for kind, _ in proxy.requests("HEAD")] == ["short", "", ""]


@pytest.mark.parametrize("size", [0, 100, 12 << 20])
def test_a_repeated_upload_leaves_one_whole_object(s3, spoil, tmp_path, size):
    bucket = s3()
    content = os.urandom(size)
    (tmp_path / "file").write_bytes(content)
    client = boto3.client("s3")  # not through the proxy
    patience = faults.Patience(requests=1, tries=12, wait_s=0.02)
    kinds = ("slowdown", "reset", "short", "internal")
    proxy = spoil(*kinds, share=0.5, limit=4, seed=1, patience=patience)
    storage.upload(tmp_path / "file", f"{bucket}/folder/file")
    assert [kind for kind, _ in proxy.requests() if kind] != []
    name = bucket.removeprefix("s3://")
    listed = client.list_objects_v2(Bucket=name)["Contents"]
    assert [(item["Key"], item["Size"]) for item in listed] == [("folder/file", size)]
    assert client.get_object(Bucket=name, Key="folder/file")["Body"].read() == content
    client.close()


@pytest.mark.parametrize("times", [1, 2])
def test_a_shard_with_a_wrong_digest_is_fetched_twice(s3, write, spoil, tmp_path, caplog, times):
    uri = storage.join(s3(), "set")
    manifest = write(uri, 40)
    shard = manifest.shards[2]
    proxy = spoil("flip", only=shard.path, limit=2 * times)  # its HEAD has nothing to flip
    cache = ShardCache(open_split(uri, "train"), directory=tmp_path / "cache")
    cache.open(1).close()
    if times == 1:
        cache.open(2).close()
    else:
        first = sum(other.rows for other in manifest.shards[:2])
        rows = rf"{shard.path} \(rows {first} to {first + shard.rows - 1} of the split\)"
        with pytest.raises(DatasetError, match=rf"{rows}.* expected sha256 {shard.sha256}, found "):
            cache.open(2)
    assert len(proxy.requests(f"GET {uri.removeprefix('s3:/')}/train/{shard.path}")) == 2
    assert ["once more" in line for line in caplog.messages] == [True]
    there = {path.stem for path in (tmp_path / "cache").glob("*.arrow")}
    assert (shard.sha256 in there) == (times == 1)


@pytest.mark.parametrize("text", ["", "soon", "0", "-1", "inf", "nan"])
def test_a_timeout_that_is_none_is_refused(uri, monkeypatch, text):
    monkeypatch.setenv("SR4IR_S3_TIMEOUT_S", text)
    with pytest.raises(storage.StorageError, match=f"SR4IR_S3_TIMEOUT_S={text}: expected seconds"):
        storage.exists(uri)
