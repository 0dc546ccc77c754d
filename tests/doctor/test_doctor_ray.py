import socket
from pathlib import Path

import pytest

from sr4ir_dist.doctor import cluster
from sr4ir_dist.doctor.node import differences, report
from sr4ir_dist.parallel import ClusterError
from sr4ir_dist.training.launch import Resources

SECRET = "conspicuous-token"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home folder, and no setting of Ray."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("mode", "place", "joins", "status", "told"),
    [
        ("", None, False, "ok", "makes one"),
        ("", None, True, "warn", "whoever reaches"),
        ("", "RAY_AUTH_TOKEN", True, "warn", "RAY_AUTH_MODE is not set"),
        ("", "home", True, "warn", "RAY_AUTH_MODE is not set"),
        ("token", "RAY_AUTH_TOKEN", True, "ok", "from RAY_AUTH_TOKEN"),
        ("TOKEN", "RAY_AUTH_TOKEN_PATH", True, "ok", "elsewhere"),
        ("token", "home", True, "ok", "auth_token"),
        ("token", None, False, "warn", "there is no token"),
        ("token", None, True, "fail", "there is no token"),
        ("token", "missing", True, "fail", "there is no token"),
        ("disabled", "home", True, "warn", "whoever reaches"),
        ("maybe", "home", True, "fail", "RAY_AUTH_MODE=maybe"),
    ],
)
def test_token_and_mode(
    home: Path, monkeypatch: pytest.MonkeyPatch, mode, place, joins, status, told
):
    if mode:
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
    if place == "RAY_AUTH_TOKEN":
        monkeypatch.setenv(place, SECRET)
    elif place is not None:
        path = home / ".ray" / "auth_token" if place == "home" else home / "elsewhere"
        path.parent.mkdir(exist_ok=True)
        if place != "missing":
            path.write_text(SECRET)
        if place != "home":
            monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
    found = cluster.token(joins=joins)
    assert found.status == status, found
    assert told in found.told
    assert (found.mend == "") == (status == "ok")
    assert SECRET not in repr(found)


def test_nobody_at_the_address(home: Path):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        _, found = cluster.findings(address, Resources(1), None)
    assert (found.name, found.status) == ("ray cluster", "fail")
    assert address in found.told
    assert "ray start" in found.mend


def test_the_address_that_a_run_would_join(home: Path, monkeypatch: pytest.MonkeyPatch):
    assert cluster.find("local") is None
    assert cluster.find("10.1.2.3:6379") == "10.1.2.3:6379"
    assert cluster.find("ray://10.1.2.3:10001") == "ray://10.1.2.3:10001"
    monkeypatch.setenv("RAY_ADDRESS", "10.4.5.6:6379")
    assert cluster.find(None) == "10.4.5.6:6379"
    with pytest.raises(ClusterError, match="--address nonsense"):
        cluster.find("nonsense")


def test_workers_on_this_machine(home: Path):
    *_, found = cluster.findings(None, Resources(1, gpu=False), None)
    assert (found.name, found.status) == ("ray resources", "ok")
    *_, found = cluster.findings(None, Resources(10_000, gpu=False), None)
    assert found.status == "fail"
    assert "workers=10000" in found.told


def test_a_node_with_other_versions():
    here = {"python": "3.11.7", "ray": "2.60.0"}
    assert differences(here, here) == []
    there = {"python": "3.11.7", "ray": "2.59.0", "storage": "s3://b: access denied"}
    assert differences(here, there) == [
        "ray: 2.59.0 (here 2.60.0)",
        "storage: s3://b: access denied",
    ]
    assert differences(report(None), report(None)) == []
