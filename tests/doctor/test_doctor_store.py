import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from fault_proxy import FaultProxy

from sr4ir_dist import faults, storage
from sr4ir_dist.doctor import store
from sr4ir_dist.doctor.finding import Finding, probe
from sr4ir_dist.faults import StorageError
from sr4ir_dist.s3 import WORKER_VARIABLES

LOCAL = ["write", "read", "multipart", "ranges", "overwrite", "list", "delete"]


def statuses(found: list[Finding]) -> dict[str, str]:
    return {each.name.removeprefix("storage "): each.status for each in found}


@contextmanager
def polite_server(lag_s: float) -> Iterator[str]:
    """A server that says yes to everything, and whose clock is behind; gives its URL."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_PUT = handle_any  # noqa: N815

        def date_time_string(self, timestamp: float | None = None) -> str:
            return formatdate(time.time() - lag_s, usegmt=True)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.fixture
def spoil(s3: Callable[[], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Sends what follows through a proxy that spoils some requests, with little patience."""
    started: list[FaultProxy] = []

    def start(kind: str, only: str = "") -> None:
        started.append(
            FaultProxy(os.environ["AWS_ENDPOINT_URL"], tmp_path, kinds=(kind,), only=only)
        )
        monkeypatch.setenv("AWS_ENDPOINT_URL", started[-1].endpoint)
        little = faults.Patience(requests=1, tries=1)
        monkeypatch.setattr(faults, "PATIENCE", little)

    yield start
    for proxy in started:
        proxy.close()


def test_a_folder_that_is_ready(tmp_path: Path):
    found = list(store.findings(str(tmp_path)))
    assert statuses(found) == dict.fromkeys(LOCAL, "ok")
    assert list(tmp_path.iterdir()) == []


def test_a_bucket_that_is_ready(s3: Callable[[], str]):
    uri = s3()
    found = list(store.findings(f"{uri}/runs"))
    names = {"endpoint", "clock", "credentials", "checksums", "conditional put", *LOCAL}
    assert statuses(found) == dict.fromkeys(names, "ok")
    assert next(each for each in found if each.name == "storage conditional put").told == "enforced"
    assert storage.list_files(uri) == []


def test_a_folder_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").touch()
    (found,) = store.findings(str(tmp_path / "file" / "runs"))  # which root cannot write either
    assert (found.name, found.status) == ("storage write", "fail")
    assert "can be written" in found.mend


def test_a_bucket_that_is_not_there(s3: Callable[[], str]):
    found = statuses(list(store.findings("s3://no-such-bucket/runs")))
    assert found["endpoint"] == found["credentials"] == "ok"
    assert (found["write"], found["checksums"]) == ("fail", "skipped")
    assert "delete" not in found


def test_credentials_that_are_wrong(s3: Callable[[], str], monkeypatch: pytest.MonkeyPatch):
    uri = s3()
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    monkeypatch.setenv("AWS_REGION", "us-east-2")  # a client of its own for these credentials
    found = statuses(list(store.findings(f"{uri}/runs")))
    assert found["endpoint"] == found["credentials"] == "ok"
    assert (found["write"], found["checksums"]) == ("fail", "skipped")


def test_a_port_where_nobody_listens(s3: Callable[[], str], monkeypatch: pytest.MonkeyPatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://someone:hidden@{address}")
        first, rest = store.findings("s3://bucket/runs")
    assert (first.status, rest.status) == ("fail", "skipped")
    assert address in first.told
    assert "AWS_ENDPOINT_URL" in first.mend
    assert "hidden" not in repr(first)


@pytest.mark.parametrize(
    ("lag_s", "status"), [(0, "ok"), (-30, "ok"), (300, "warn"), (3600, "fail"), (-3600, "fail")]
)
def test_the_clock_is_held_against_the_servers(
    s3: Callable[[], str], monkeypatch: pytest.MonkeyPatch, lag_s: float, status: str
):
    with polite_server(lag_s) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        found = store.clock()
    assert found.status == status
    assert abs(lag_s) < 60 or ("ahead of" if lag_s > 0 else "behind") in found.told
    assert ("set-ntp" in found.mend) == (status != "ok")


def test_credentials_are_found_and_never_told(
    s3: Callable[[], str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "conspicuous-key")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "conspicuous-token")
    found = store.credentials()
    assert (found.status, found.told) == ("ok", "found by: env, temporary")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name)
    assert store.credentials().status == "fail"
    monkeypatch.setenv("AWS_PROFILE", "lab")
    assert "lab" in store.credentials().told
    secrets = tmp_path / "credentials"
    secrets.write_text("[lab]\naws_access_key_id = a\naws_secret_access_key = conspicuous\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(secrets))
    found = store.credentials()
    assert (found.status, "conspicuous" in repr(found)) == ("ok", False)


def test_a_store_that_breaks_on_checksums_gets_the_variables_that_help(
    spoil, s3: Callable[[], str], monkeypatch: pytest.MonkeyPatch
):
    uri = s3()
    spoil("checksums")
    found = {each.name: each for each in store.findings(f"{uri}/runs")}
    assert found["storage write"].status == found["storage checksums"].status == "fail"
    mend = found["storage checksums"].mend
    settings = [word.rstrip(",") for word in mend.split() if "=" in word]
    assert len(settings) == 2
    assert storage.list_files(uri) == []

    for name, _, value in (setting.partition("=") for setting in settings):
        assert name in WORKER_VARIABLES
        monkeypatch.setenv(name, value)
    assert set(statuses(list(store.findings(f"{uri}/runs"))).values()) == {"ok"}


@pytest.mark.parametrize(
    ("action", "kind", "only"),
    [
        (store.read, "flip", "GET"),
        (store.ranges, "flip", "GET"),
        (store.multipart, "internal", "POST"),
        (store.overwrite, "internal", "PUT"),
        (store.list_names, "internal", "list-type=2"),
        (store.delete, "internal", "delete"),
    ],
)
def test_what_a_store_cannot_do_is_found(spoil, s3: Callable[[], str], action, kind, only):
    folder = f"{s3()}/runs"
    store.write(folder)
    store.multipart(folder)
    spoil(kind, only)
    with pytest.raises(StorageError):
        action(folder)


def test_a_store_that_forgets(tmp_path: Path):
    with pytest.raises(StorageError, match="was written and is not listed"):
        store.list_names(str(tmp_path))


def test_conditions_that_are_ignored_are_only_told(
    s3: Callable[[], str], monkeypatch: pytest.MonkeyPatch
):
    with polite_server(0) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        assert store.conditional_put("s3://bucket/runs").startswith("ignored")


def test_a_check_that_hangs_has_failed():
    forever = threading.Event()
    found = probe("hangs", lambda: str(forever.wait()), mend="do", limit_s=0.05)
    forever.set()
    assert found == Finding("hangs", "fail", "no answer in 0 s", "do")
