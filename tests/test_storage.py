import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import boto3
import pytest
from pyarrow import fs

from sr4ir_dist import storage


@pytest.fixture(params=["path", "file", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty place of each kind, with a blank in its name."""
    if request.param == "s3":
        return request.getfixturevalue("s3")() + "/a folder"
    folder = tmp_path / "a folder"
    return str(folder) if request.param == "path" else folder.as_uri()


def test_write_read_list_delete(root: str):
    assert not storage.exists(root)
    assert storage.list_names(root) == []
    for name in ("b/deep/file", "a", "c"):
        storage.write_bytes(storage.join(root, name), name.encode())
    assert storage.list_names(root) == ["a", "b", "c"]
    assert storage.list_files(root) == ["a", "b/deep/file", "c"]
    marks = storage.list_marks(root)
    assert [size for size, _ in marks.values()] == [1, 11, 1]
    for path, (size, changed) in marks.items():
        assert storage.mark(storage.join(root, path))[0] == size
        assert abs(changed / 1e9 - time.time()) < 60
    assert storage.mark(storage.join(root, "never there")) == (None, None)
    assert storage.read_bytes(storage.join(root, "b", "deep/file")) == b"b/deep/file"
    assert storage.exists(storage.join(root, "b"))
    storage.write_bytes(storage.join(root, "a"), b"")
    assert storage.read_bytes(storage.join(root, "a")) == b""
    storage.delete(storage.join(root, "b"))
    storage.delete(storage.join(root, "c"))
    storage.delete(storage.join(root, "never there"))
    assert storage.list_names(root) == ["a"]


def test_json(root: str):
    uri = storage.join(root, "value.json")
    value = {"a": [1, 2.5, None], "name": "é"}
    storage.write_json(uri, value)
    assert storage.read_json(uri) == value
    storage.write_bytes(uri, b'{"a": ')
    with pytest.raises(storage.StorageError, match=r"value\.json: not valid JSON"):
        storage.read_json(uri)


def test_upload_and_download_of_several_chunks(root: str, tmp_path: Path):
    content = os.urandom((17 << 20) + 3)
    (tmp_path / "source").write_bytes(content)
    uri = storage.join(root, "copy")
    storage.upload(tmp_path / "source", uri)
    storage.download(uri, tmp_path / "new folder" / "back")
    assert (tmp_path / "new folder" / "back").read_bytes() == content
    assert os.listdir(tmp_path / "new folder") == ["back"]
    assert storage.list_names(root) == ["copy"]


def test_upload_of_an_empty_file(root: str, tmp_path: Path):
    (tmp_path / "empty").touch()
    storage.upload(tmp_path / "empty", storage.join(root, "empty"))
    assert storage.read_bytes(storage.join(root, "empty")) == b""


def test_what_is_missing_is_named(root: str, tmp_path: Path):
    uri = storage.join(root, "missing")
    with pytest.raises(storage.MissingError, match="missing: nothing there"):
        storage.read_bytes(uri)
    with pytest.raises(storage.MissingError, match="missing: nothing there"):
        storage.download(uri, tmp_path / "to" / "x")
    assert not (tmp_path / "to").exists() or os.listdir(tmp_path / "to") == []
    with pytest.raises(storage.StorageError, match="no such source"):
        storage.upload(tmp_path / "no such source", uri)
    assert not storage.exists(uri)


def test_check_writable_leaves_nothing(root: str):
    storage.check_writable(root)
    assert storage.list_names(root) == []


def test_check_writable_says_what_cannot_be_written(tmp_path: Path, s3: Callable[[], str]):
    (tmp_path / "file").touch()
    with pytest.raises(storage.StorageError, match="file/below: cannot be written"):
        storage.check_writable(str(tmp_path / "file" / "below"))
    with pytest.raises(storage.StorageError, match="s3://no-such-bucket-here/x: cannot be written"):
        storage.check_writable("s3://no-such-bucket-here/x")


def test_a_failed_write_keeps_the_old_file_and_leaves_no_other(tmp_path: Path):
    target = tmp_path / "target"
    target.write_bytes(b"old")
    with pytest.raises(storage.StorageError):
        storage.upload(tmp_path, str(target))  # a folder cannot be copied as a file
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["target"]


def test_a_killed_writer_leaves_nothing_visible(tmp_path: Path):
    code = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from sr4ir_dist import storage\n"
        "os.replace = lambda *args: os._exit(9)\n"
        "storage.write_bytes(sys.argv[1], b'half')\n"
    )
    repository = Path(storage.__file__).parents[1]
    killed = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "target")], cwd=repository, check=False
    )
    assert killed.returncode == 9
    assert len(os.listdir(tmp_path)) == 1  # the temporary file
    assert storage.list_names(str(tmp_path)) == []
    assert storage.list_files(str(tmp_path)) == []
    assert not storage.exists(str(tmp_path / "target"))


def test_a_small_file_on_s3_is_one_object_and_no_upload_stays_open(s3: Callable[[], str]):
    bucket = s3()
    storage.write_bytes(f"{bucket}/a/b/c", b"x" * 100_000)
    client = boto3.client("s3")
    objects = client.list_objects_v2(Bucket=bucket.removeprefix("s3://"))["Contents"]
    assert [item["Key"] for item in objects] == ["a/b/c"]
    assert "-" not in objects[0]["ETag"]  # the digest of a multipart upload has a dash
    client.close()


def test_one_s3_filesystem_a_process_and_settings(
    s3: Callable[[], str], monkeypatch: pytest.MonkeyPatch
):
    uri = s3()
    first, path = storage.filesystem(f"{uri}/a/")
    assert path == uri.removeprefix("s3://") + "/a"
    assert isinstance(first, fs.S3FileSystem)
    assert storage.filesystem(s3())[0] is first
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    other = storage.filesystem(uri)[0]
    assert isinstance(other, fs.S3FileSystem)
    assert other is not first
    assert (first.region, other.region) == ("us-east-1", "eu-west-1")


def test_endpoint_and_region_of_a_profile(
    s3: Callable[[], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    uri = s3()
    storage.write_bytes(f"{uri}/x", b"there")
    (tmp_path / "config").write_text(
        f"[profile lab]\nregion = eu-north-1\nendpoint_url = {os.environ['AWS_ENDPOINT_URL']}\n"
    )
    for name in ("AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_PROFILE", "lab")
    system = storage.filesystem(uri)[0]
    assert isinstance(system, fs.S3FileSystem)
    assert system.region == "eu-north-1"
    assert storage.read_bytes(f"{uri}/x") == b"there"
    monkeypatch.setenv("AWS_PROFILE", "another")
    with pytest.raises(storage.StorageError, match="another"):
        storage.filesystem(uri)


def test_a_forked_process_has_a_filesystem_of_its_own(s3: Callable[[], str]):
    code = (
        "import os, sys\n"
        "from sr4ir_dist import storage\n"
        "storage.write_bytes(sys.argv[1] + '/parent', b'1')\n"
        "parents = storage.filesystem(sys.argv[1])[0]\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    assert storage.filesystem(sys.argv[1])[0] is not parents\n"
        "    content = storage.read_bytes(sys.argv[1] + '/parent')\n"
        "    storage.write_bytes(sys.argv[1] + '/child', content)\n"
        "    os._exit(0)\n"
        "assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0\n"
        "assert storage.filesystem(sys.argv[1])[0] is parents\n"
    )
    uri = s3() + "/x"
    repository = Path(storage.__file__).parents[1]
    subprocess.run([sys.executable, "-c", code, uri], cwd=repository, check=True, timeout=60)
    assert storage.list_names(uri) == ["child", "parent"]


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("gs://bucket/key", "unknown scheme 'gs'; allowed: s3://, file://"),
        ("file://host/path", "three slashes"),
        ("s3:///key", "expected s3://bucket/key"),
        ("s3://bucket/key?region=x", "without a query"),
        ("", "an empty path"),
    ],
)
def test_bad_uris(uri: str, message: str):
    with pytest.raises(storage.StorageError, match=message):
        storage.filesystem(uri)


def test_bad_endpoint(s3: Callable[[], str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "localhost:9000")
    with pytest.raises(storage.StorageError, match="AWS_ENDPOINT_URL=localhost:9000"):
        storage.filesystem("s3://bucket")


@pytest.mark.parametrize("uri", ["/", "/tmp", "s3://bucket", "s3://bucket/"])
def test_delete_refuses_whole_buckets_and_top_level_folders(uri: str, s3: Callable[[], str]):
    with pytest.raises(storage.StorageError, match="refusing"):
        storage.delete(uri)


def test_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert storage.absolute("a/../b") == str(tmp_path / "b")
    assert storage.absolute("s3://bucket/a") == "s3://bucket/a"
    assert storage.absolute("file:///a") == "file:///a"
    assert storage.local_path("file:///a%20b/c") == Path("/a b/c")
    assert storage.local_path("x") == tmp_path / "x"
    assert storage.join("s3://bucket/", "a/", "/b") == "s3://bucket/a/b"
    assert storage.join("/", "a") == "/a"
    assert storage.is_local("a")
    assert not storage.is_local("s3://bucket")
    with pytest.raises(storage.StorageError, match="not a local path"):
        storage.local_path("s3://bucket/a")


def test_a_filesystem_travels_without_secrets(s3: object, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "conspicuous-key")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "conspicuous-session")
    pickled = pickle.dumps(storage.filesystem("s3://bucket")[0])
    assert os.environ["AWS_ENDPOINT_URL"].partition("//")[2].encode() in pickled
    assert b"conspicuous" not in pickled


def test_worker_environment_has_settings_and_no_secrets(monkeypatch: pytest.MonkeyPatch):
    for name in list(os.environ):
        if name.startswith(("AWS_", "SR4IR_")):
            monkeypatch.delenv(name)
    settings = {
        "AWS_ENDPOINT_URL_S3": "http://127.0.0.1:1",
        "AWS_REGION": "r",
        "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_PROFILE": "p",
        "SR4IR_S3_TIMEOUT_S": "5",
    }
    secrets = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
    for name, value in {**settings, **dict.fromkeys(secrets, "secret")}.items():
        monkeypatch.setenv(name, value)
    assert storage.worker_environment() == settings


def test_what_killed_writers_left_is_deleted(tmp_path: Path):
    left = tmp_path / f".shard.arrow.{'0' * 32}.tmp"
    kept = [tmp_path / name for name in ("shard.arrow", ".hidden", "notes.tmp")]
    for path in (left, *kept):
        path.touch()
    storage.delete_unfinished(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(kept)
    storage.delete_unfinished(tmp_path / "nothing")
    storage.delete_unfinished("s3://bucket/folder")
