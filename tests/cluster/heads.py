"""A Ray head of one's own on loopback, as `ray start --head` makes it, with a token."""

import json
import os
import random
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from ray.autoscaler._private.fake_multi_node.node_provider import (
    FAKE_HEAD_NODE_ID as HEAD_ID,
)
from ray.autoscaler._private.fake_multi_node.node_provider import (
    FakeMultiNodeProvider,
)

# The programs of this environment, whatever the caller's PATH is.
PROGRAMS = Path(sys.executable).parent
# Drawn, because this file too travels to the cluster.
TOKEN = secrets.token_hex(32)
PORTS = (
    *("--port", "--dashboard-port", "--dashboard-agent-listen-port", "--ray-client-server-port"),
    *("--dashboard-agent-grpc-port", "--runtime-env-agent-port", "--metrics-export-port"),
)

AUTOSCALED = {
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    "RAY_FAKE_CLUSTER": "1",
    "RAY_enable_autoscaler_v2": "1",
    "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
    "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
}


@dataclass(frozen=True)
class Head:
    """A cluster of one node."""

    pid: int
    folder: Path
    address: str
    dashboard: str
    environment: dict[str, str]

    def run(
        self, *command: str, cwd: Path, **environment: str | None
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command in a submitter's environment; None takes a variable away."""
        changed = self.environment | environment
        return subprocess.run(
            command,
            cwd=cwd,
            env={name: value for name, value in changed.items() if value is not None},
            capture_output=True,
            text=True,
            check=False,
        )

    def told(self, result: subprocess.CompletedProcess[str]) -> str:
        """What a command and the head said, to explain a failure."""
        return "\n".join((result.stdout, result.stderr, (self.folder / "head.log").read_text()))

    def submit(
        self, *command: str, cwd: Path, **environment: str | None
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command through `ray job submit --working-dir .`."""
        submit = (str(PROGRAMS / "ray"), "job", "submit", "--address", self.dashboard)
        return self.run(*submit, "--working-dir", ".", "--", *command, cwd=cwd, **environment)


@contextmanager
def running_head(*, cpus: int, nodes: int = 0) -> Iterator[Head]:
    """Start a head, and end it and what it started.

    Args:
        cpus: of the head itself.
        nodes: how many more of one CPU its autoscaler may start, on this machine.
    """
    folder = Path(tempfile.mkdtemp(prefix="ray-"))  # short: paths of unix sockets are limited
    token = folder / "token"
    token.write_text(TOKEN)
    ports = {option: str(port) for option, port in zip(PORTS, free_ports(len(PORTS)), strict=True)}
    address = f"127.0.0.1:{ports['--port']}"
    settings = {
        "PATH": f"{PROGRAMS}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        # Workers that are started before they are wanted import Ray for nothing.
        "RAY_prestart_worker_first_driver": "0",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        "SR4IR_CACHE_DIR": str(folder / "cache"),
        "NO_COLOR": "1",
    }
    others = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment = others | settings
    command = [str(PROGRAMS / "ray"), "start", "--head", "--block", "--num-cpus", str(cpus)]
    command += ["--num-gpus", "0", "--temp-dir", str(folder / "t"), "--disable-usage-stats"]
    command += ["--node-ip-address", "127.0.0.1", "--dashboard-host", "127.0.0.1"]
    command += ["--min-worker-port", "0", "--max-worker-port", "0"]
    command += [word for option in ports.items() for word in option]
    if nodes:
        config = folder / "autoscaler.json"
        config.write_text(json.dumps(autoscaler(address, nodes)))
        command += ["--autoscaling-config", str(config)]
        environment |= AUTOSCALED
    log = folder / "head.log"
    with log.open("wb") as sink:
        node = subprocess.Popen(command, env=environment, stdout=sink, stderr=subprocess.STDOUT)
    try:
        dashboard = f"http://127.0.0.1:{ports['--dashboard-port']}"
        wait_for_answer(dashboard, node, log)
        yield Head(node.pid, folder, address, dashboard, environment)
    finally:
        stop(node)
        shutil.rmtree(folder, ignore_errors=True)


def autoscaler(address: str, nodes: int) -> dict[str, Any]:
    """Settings of Ray's own autoscaler whose machines are nodes on this one."""
    worker = {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": nodes}
    head = {"resources": {}, "node_config": {}, "max_workers": 0}
    # By its class: the file of defaults that Ray has for it by name is not in its wheel.
    kind = f"{FakeMultiNodeProvider.__module__}.{FakeMultiNodeProvider.__name__}"
    provider = {"type": "external", "module": kind, "gcs_address": address}
    commands = ("setup", "head_setup", "worker_setup", "initialization")
    commands += ("head_start_ray", "worker_start_ray")
    empty = {f"{name}_commands": [] for name in commands} | {"cluster_synced_files": []}
    return empty | {
        "cluster_name": "fake",
        "max_workers": nodes,
        "idle_timeout_minutes": 0.2,
        "provider": provider | {"head_node_id": HEAD_ID, "launch_multiple": True},
        "available_node_types": {"worker": worker, "ray.head.default": head},
        "head_node_type": "ray.head.default",
    }


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody uses, of those that the kernel gives nobody meanwhile."""
    found: list[int] = []
    for port in random.Random(os.getpid()).sample(range(20_000, 32_000), 1000):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            return found
    raise RuntimeError(f"fewer than {count} free ports")


def wait_for_answer(url: str, node: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 180
    while node.poll() is None and time.monotonic() < deadline:
        try:
            urllib.request.urlopen(f"{url}/api/version", timeout=5).close()
            return
        except urllib.error.HTTPError as error:
            error.close()  # it answers, and wants a token
            return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError(f"the Ray head did not start:\n{log.read_text()}")


def stop(node: subprocess.Popen[bytes]) -> None:
    """Ends a head and what it started, and nothing else: there may be other clusters here."""
    started = psutil.Process(node.pid).children(recursive=True) if node.poll() is None else []
    node.terminate()
    try:
        node.wait(30)
    except subprocess.TimeoutExpired:
        node.kill()
        node.wait()
    _, left = psutil.wait_procs(started, timeout=10)
    for process in left:
        process.kill()
    psutil.wait_procs(left, timeout=10)
