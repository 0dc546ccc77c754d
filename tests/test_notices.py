"""Notices of a machine's end: services that answer like the clouds' own, and real signals."""

import json
import secrets
import signal
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from metadata_service import Ec2Metadata

from sr4ir_dist import notices
from sr4ir_dist.parallel import ClusterError


@pytest.fixture
def ec2(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ec2Metadata]:
    with Ec2Metadata() as service:
        monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", service.endpoint)
        yield service


def test_ec2_is_asked_with_a_token_that_is_kept_and_renewed(ec2: Ec2Metadata):
    ask = notices.ec2()
    assert [ask(), ask()] == [None, None]
    assert ec2.tokens_given == 1
    ec2.token = secrets.token_hex(8)  # the one that was given is too old
    assert ask() is None
    assert ec2.tokens_given == 2
    ec2.announce("stop", 119.5)
    notice = ask()
    assert notice is not None
    assert notice.why.startswith("EC2 will stop this instance at ")
    assert 110 <= notice.seconds <= 119
    ec2.announce("terminate", -5)
    assert (late := ask()) is not None
    assert late.seconds == 0


def test_no_proxy_is_asked_for_the_metadata_service(
    ec2: Ec2Metadata, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("no_proxy", "")
    assert notices.ec2()() is None


def test_compute_engine_is_asked_in_its_way(monkeypatch: pytest.MonkeyPatch):
    preempted = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            known = self.path == "/computeMetadata/v1/instance/preempted"
            self.send_response(
                200 if known and self.headers["Metadata-Flavor"] == "Google" else 403
            )
            self.end_headers()
            self.wfile.write(b"TRUE" if preempted.is_set() else b"FALSE")

        def log_message(self, format, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever).start()
        monkeypatch.setenv("GCE_METADATA_HOST", f"127.0.0.1:{server.server_port}")
        ask = notices.gce()
        assert ask() is None
        preempted.set()
        assert (notice := ask()) is not None
        assert notice.seconds == 30
        server.shutdown()


@pytest.mark.parametrize("sent", notices.SIGNALS)
def test_a_signal_is_a_notice_also_when_it_came_before_the_waiting(sent: signal.Signals):
    with notices.held_signals():
        # To this thread: those of other tests' libraries do not hold it, and it would end them all.
        signal.pthread_kill(threading.get_ident(), sent)
        found = notices.wait(None, every_s=30, signal_s=45, say=pytest.fail)
    assert found == notices.Notice(f"{sent.name} came", 45)


def test_a_service_that_does_not_answer_is_told_of_once_and_asked_on(ec2: Ec2Metadata):
    ec2.silent = 3  # no answers at all, then some that are none
    ec2.broken = 2
    ec2.announce("terminate", 60)
    told: list[str] = []
    with notices.held_signals():
        found = notices.wait(notices.ec2(), every_s=0.01, signal_s=1, say=told.append)
    assert found.why.startswith("EC2 will terminate")
    assert [text.partition(" (")[0] for text in told] == [
        "the metadata service does not answer",
        "the metadata service answers",
    ]


def test_a_head_that_does_not_answer_is_asked_until_the_time_is_up():
    told: list[str] = []
    with pytest.raises(ClusterError, match=r"the head at 127\.0\.0\.1:1 does not answer"):
        notices.drain("127.0.0.1:1", notices.Notice("test", 2), say=told.append)
    assert 1 <= len(told) <= 2


def test_a_head_that_has_gone_does_not_hold_a_machine_that_goes_too():
    started, told = time.monotonic(), []
    with pytest.raises(ClusterError, match=r"the head at 127\.0\.0\.1:1 does not answer"):
        notices.drain("127.0.0.1:1", notices.Notice("test", 100), head_s=1.5, say=told.append)
    assert time.monotonic() - started < 10
    assert told


@pytest.mark.parametrize("given", ["http://127.0.0.1:8265", "127.0.0.1", "nowhere.invalid"])
def test_an_address_that_is_none_is_refused(given: str):
    with pytest.raises(ClusterError, match="--address"):
        notices.head_address(given)


def test_times_are_read_as_ec2_writes_them():
    end = datetime.now(UTC) + timedelta(seconds=100)
    told = json.loads(Ec2Metadata.action("terminate", end))
    assert told["time"].endswith("Z")
    assert abs((datetime.fromisoformat(told["time"]) - end).total_seconds()) <= 1
