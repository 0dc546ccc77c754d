"""Ray nodes with a network of their own each, on one machine: Linux network namespaces.

Every node lives in its own namespace behind a virtual switch, itself a namespace, so that nothing
of the machine's own network is touched and no address can collide with another's. What a namespace
holds can be killed as a whole, as a machine that loses its power, and its cable can be pulled.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

PORT = 6379
_ADDRESS = "10.0.0.{}"
# Of Ray's own defaults, a cut network is noticed after more than a minute. These are the times that
# the tests run with; everything else is Ray's default.
HEALTH_CHECKS = {
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "4",
}
_SETTINGS = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_enable_metrics_collection": "0",
    # Workers that are started before they are wanted import Ray for nothing.
    "RAY_prestart_worker_first_driver": "0",
}
_WORKER_TITLE = "ray::RayTrainWorker"


class HostsError(RuntimeError):
    """A namespace, a link or a node could not be made."""


def missing() -> str | None:
    """Why namespaces cannot be made here, or None where they can."""
    if shutil.which("ip") is None:
        return "needs the command `ip` (Debian: iproute2)"
    name = f"sr4ir-{os.getpid()}-try"
    made = _ip("netns", "add", name, check=False)
    if made.returncode:
        return f"needs network namespaces (root): {made.stderr.strip()}"
    linked = _ip("-n", name, "link", "add", "try", "type", "veth", check=False)
    bridged = _ip("-n", name, "link", "add", "switch", "type", "bridge", check=False)
    _ip("netns", "delete", name, check=False)
    failed = next((each for each in (linked, bridged) if each.returncode), None)
    return None if failed is None else f"needs virtual networks: {failed.stderr.strip()}"


@dataclass(frozen=True)
class Node:
    """A machine of the cluster.

    Attributes:
        number: its place on the switch.
        namespace: its network.
        address: its IP address.
        folder: Ray's files.
    """

    number: int
    namespace: str
    address: str
    folder: Path

    @property
    def cable(self) -> str:
        """The switch's end of its link."""
        return f"port{self.number}"


@dataclass
class Hosts:
    """Nodes on one switch; `hosts` makes and removes them.

    Attributes:
        folder: everything that the nodes write.
        environment: variables of everything that runs on the nodes.
        nodes: those that are there, the head first.
        severed: those of them whose network is cut.
    """

    folder: Path
    environment: Mapping[str, str]
    nodes: list[Node] = field(default_factory=list)
    severed: set[Node] = field(default_factory=set)
    _made: list[str] = field(default_factory=list)
    _started: list[subprocess.Popen[bytes]] = field(default_factory=list)
    _count: int = 0

    @property
    def head(self) -> Node:
        """The node of the cluster's own state, without CPUs for workers; drivers run there."""
        return self.nodes[0]

    @property
    def workers(self) -> list[Node]:
        """The nodes that training workers can run on."""
        return self.nodes[1:]

    @property
    def address(self) -> str:
        """The cluster's address, within its network."""
        return f"{self.head.address}:{PORT}"

    def add(self, *, cpus: int = 1, wait: bool = True) -> Node:
        """Start a node; the first is the head.

        Raises:
            HostsError: it did not start.
        """
        node = self._connect()
        self.nodes.append(node)
        words = ["start", "--block", f"--node-ip-address={node.address}", f"--num-cpus={cpus}"]
        words += ["--num-gpus=0", f"--object-store-memory={100 << 20}", f"--temp-dir={node.folder}"]
        if node is self.head:
            words += ["--head", f"--port={PORT}", f"--dashboard-host={node.address}"]
        else:
            words += [f"--address={self.address}"]
        process = self.start(node, "-m", "ray.scripts.scripts", *words, log=self._log(node))
        if wait:
            self._await(node, process)
        return node

    def start(self, node: Node, *words: str, log: Path) -> subprocess.Popen[bytes]:
        """Start Python with some arguments on a node; its output goes to the end of a file."""
        with log.open("ab") as sink:
            process = subprocess.Popen(
                ["ip", "netns", "exec", node.namespace, sys.executable, *words],
                env=dict(self.environment),
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._started.append(process)
        return process

    def pids(self, node: Node) -> list[int]:
        """All processes of a node."""
        return [int(line) for line in _ip("netns", "pids", node.namespace).stdout.split()]

    def training_workers(self, node: Node) -> list[int]:
        """The processes of the training workers on a node."""
        return [pid for pid in self.pids(node) if _title(pid).startswith(_WORKER_TITLE)]

    def node_id(self, node: Node) -> str | None:
        """Ray's own name of a node, None where its raylet does not run."""
        for pid in self.pids(node):
            words = _title(pid).split()
            if words and words[0].endswith("raylet"):
                for word in words:
                    if word.startswith("--node_id="):
                        return word.partition("=")[2]
        return None

    def kill(self, node: Node) -> None:
        """Kill all that runs on a node, at once, and take it off the switch."""
        _ip("-n", self._switch, "link", "delete", node.cable, check=False)
        self._end(node.namespace)
        self.nodes.remove(node)
        self.severed.discard(node)

    def kill_worker(self, node: Node) -> int:
        """Kill one training worker of a node with SIGKILL; gives its process id.

        Raises:
            HostsError: none runs there.
        """
        pids = self.training_workers(node)
        if not pids:
            raise HostsError(f"no training worker runs on {node.address}")
        os.kill(pids[0], signal.SIGKILL)
        return pids[0]

    def cut(self, node: Node) -> None:
        """Pull a node's cable; its processes go on."""
        _ip("-n", self._switch, "link", "set", node.cable, "down")
        self.severed.add(node)

    def heal(self, node: Node) -> None:
        """Put a node's cable back."""
        _ip("-n", self._switch, "link", "set", node.cable, "up")
        self.severed.discard(node)

    def drain(self, node: Node, *, seconds: int) -> None:
        """Tell Ray that a node will be taken away in so many seconds, as spot machines do.

        Raises:
            HostsError: Ray does not run there, or refused.
        """
        node_id = self.node_id(node)
        if node_id is None:
            raise HostsError(f"no raylet runs on {node.address}:\n{tail(self._log(node))}")
        words = ["drain-node", "--address", self.address, "--node-id", node_id]
        words += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
        words += ["--deadline-remaining-seconds", str(seconds)]
        log = self.folder / f"drain{node.number}.log"
        process = self.start(self.head, "-m", "ray.scripts.scripts", *words, log=log)
        if process.wait(60):
            raise HostsError(f"the drain of {node.address} was refused:\n{tail(log)}")

    def close(self) -> None:
        """Kill everything and remove every namespace; what fails does not stop the rest."""
        for namespace in reversed(self._made):
            with suppress(subprocess.SubprocessError, OSError):
                self._end(namespace)
        for process in self._started:
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)

    @property
    def _switch(self) -> str:
        return self._made[0]

    def _connect(self) -> Node:
        """A namespace with a link to the switch, which the first call makes."""
        if not self._made:
            switch = self._namespace("switch")
            _ip("-n", switch, "link", "add", "switch", "type", "bridge")
            _ip("-n", switch, "link", "set", "switch", "up")
        self._count += 1
        number = self._count
        name = self._namespace(str(number))
        node = Node(number, name, _ADDRESS.format(number), self.folder / f"n{number}")
        ends = ["eth0", "type", "veth", "peer", "name", node.cable, "netns", self._switch]
        _ip("-n", name, "link", "add", *ends)
        _ip("-n", self._switch, "link", "set", node.cable, "master", "switch", "up")
        _ip("-n", name, "address", "add", f"{node.address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            _ip("-n", name, "link", "set", device, "up")
        return node

    def _namespace(self, suffix: str) -> str:
        name = f"sr4ir-{os.getpid()}-{id(self) & 0xFFFF:04x}-{suffix}"
        _ip("netns", "add", name)
        self._made.append(name)
        return name

    def _end(self, namespace: str) -> None:
        if namespace not in self._made:
            return
        deadline = time.monotonic() + 20
        # Again, for what was just being started.
        while pids := _ip("netns", "pids", namespace).stdout.split():
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            if time.monotonic() > deadline:
                raise HostsError(f"processes {pids} of {namespace} do not end")
            time.sleep(0.05)
        for process in self._started:
            process.poll()  # else it stays as a zombie
        _ip("netns", "delete", namespace)
        self._made.remove(namespace)

    def _log(self, node: Node) -> Path:
        return self.folder / f"n{node.number}.log"

    def _await(self, node: Node, process: subprocess.Popen[bytes]) -> None:
        log = self._log(node)
        wait_until(
            lambda: process.poll() is not None or "Ray runtime started" in log.read_text(),
            seconds=120,
            what=f"the start of Ray on {node.address}",
        )
        if process.poll() is not None:
            raise HostsError(f"Ray on {node.address} ended:\n{tail(log)}")


@contextmanager
def hosts(*, workers: int, environment: Mapping[str, str] | None = None) -> Iterator[Hosts]:
    """A head and some worker nodes of 1 CPU each; nothing of them is left afterwards.

    Args:
        workers: nodes beside the head.
        environment: more variables for everything that runs on the nodes.
    """
    # With a short name: paths of unix sockets are limited to 107 bytes.
    folder = Path(tempfile.mkdtemp(prefix="h", dir="/tmp"))
    token = folder / "token"
    token.write_text("0123456789abcdef" * 4)
    token.chmod(0o600)
    settings = dict(os.environ)
    settings.pop("RAY_AUTH_TOKEN", None)
    settings |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    # Ray looks for clusters among all processes, and the machine may have others.
    settings["RAY_ADDRESS"] = f"{_ADDRESS.format(1)}:{PORT}"
    settings |= _SETTINGS | HEALTH_CHECKS | dict(environment or {})
    made = Hosts(folder, settings)
    try:
        made.add(cpus=0)
        for _ in range(workers):
            made.add()
        yield made
    finally:
        made.close()
        shutil.rmtree(folder, ignore_errors=True)


def wait_until(true: Callable[[], bool], *, seconds: float, what: str) -> float:
    """Wait for something; gives the seconds that it took.

    Raises:
        TimeoutError: it took longer than `seconds`.
    """
    started = time.monotonic()
    while not true():
        if time.monotonic() - started > seconds:
            raise TimeoutError(f"waited {seconds:.0f} s for {what}")
        time.sleep(0.1)
    return time.monotonic() - started


def _ip(*words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=30, check=False)
    if check and done.returncode:
        raise HostsError(f"ip {' '.join(words)}: {done.stderr.strip()}")
    return done


def _title(pid: int) -> str:
    try:
        return " ".join(psutil.Process(pid).cmdline())
    except psutil.Error:
        return ""


def tail(log: Path, lines: int = 30) -> str:
    """The last lines of a file."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
