"""Notices that this machine is about to be taken away, and Ray's being told, so that runs save.

Ray itself does not hear of a spot instance's end: its nodes just vanish. A process beside the
raylet waits for the notice of the cloud (its metadata service) or of the scheduler (a signal) and
drains the machine's node, upon which runs save at once and go on elsewhere.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime

from ray._private import services
from ray._raylet import GcsClient  # pyright: ignore[reportAttributeAccessIssue]
from ray.core.generated import autoscaler_pb2, gcs_pb2
from ray.exceptions import RpcError

from sr4ir_dist.parallel import ClusterError

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""Kubernetes and Slurm say by these that the end is near."""

_EC2, _GCE = "http://169.254.169.254", "metadata.google.internal"
_TOKEN_S, _ANSWER_S, _REACH_S, _AGAIN_S = 21_600, 2, 5, 1
_GCE_S = 30
_PREEMPTION = autoscaler_pb2.DRAIN_NODE_REASON_PREEMPTION  # pyright: ignore[reportAttributeAccessIssue]
_ALIVE = gcs_pb2.GcsNodeInfo.ALIVE  # pyright: ignore[reportAttributeAccessIssue]
# Metadata services are on the machine itself, whatever proxy the environment names.
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True)
class Notice:
    """This machine will be taken away: why, and in how many seconds."""

    why: str
    seconds: int


Source = Callable[[], Notice | None]
"""Asks once whether there is a notice; raises OSError or ValueError where there is no answer."""


def ec2() -> Source:
    """EC2's notice of a spot instance's interruption, by its metadata service (IMDSv2).

    `AWS_EC2_METADATA_SERVICE_ENDPOINT` says where else the service is, as for the AWS SDKs. EC2's
    rebalance recommendation is not asked for: it names no end and often none follows, while a node
    that was drained does no more work.
    """
    endpoint = os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT", _EC2).rstrip("/")
    token = ""

    def action() -> str:
        nonlocal token
        if not token:
            seconds = {"X-aws-ec2-metadata-token-ttl-seconds": str(_TOKEN_S)}
            token = _ask(f"{endpoint}/latest/api/token", seconds, "PUT")
        headers = {"X-aws-ec2-metadata-token": token}
        return _ask(f"{endpoint}/latest/meta-data/spot/instance-action", headers)

    def ask() -> Notice | None:
        nonlocal token
        try:
            try:
                text = action()
            except urllib.error.HTTPError as error:
                if error.code != 401:
                    raise
                token = ""  # it was too old
                text = action()
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return None
            raise
        told = json.loads(text)
        end = datetime.fromisoformat(told["time"])
        left = max(0, int(end.timestamp() - time.time()))
        return Notice(f"EC2 will {told['action']} this instance at {told['time']}", left)

    return ask


def gce() -> Source:
    """Google Compute Engine's notice of a preemption, which comes 30 seconds before the end.

    `GCE_METADATA_HOST` says where else the metadata service is, as for Google's libraries.
    """
    host = os.environ.get("GCE_METADATA_HOST", _GCE)
    address = f"http://{host}/computeMetadata/v1/instance/preempted"

    def ask() -> Notice | None:
        if _ask(address, {"Metadata-Flavor": "Google"}).strip() != "TRUE":
            return None
        return Notice("Compute Engine preempts this instance", _GCE_S)

    return ask


SOURCES: Mapping[str, Callable[[], Source]] = {"ec2": ec2, "gce": gce}


@contextmanager
def held_signals() -> Iterator[None]:
    """Hold `SIGNALS` back in this thread, for `wait` to take them; to be begun early."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def wait(
    source: Source | None, *, every_s: float, signal_s: int, say: Callable[[str], None]
) -> Notice:
    """Wait for a notice or a signal; within `held_signals`.

    A source that does not answer is told of once and asked on.

    Args:
        source: what to ask, if anything.
        every_s: seconds between questions.
        signal_s: seconds that are left when a signal comes.
        say: is told of a source that stops answering and of one that answers again.
    """
    silent = ""
    while True:
        taken = signal.sigtimedwait(SIGNALS, every_s)
        if taken is not None:
            return Notice(f"{signal.Signals(taken.si_signo).name} came", signal_s)
        if source is None:
            continue
        try:
            notice = source()
        except (OSError, ValueError, KeyError, http.client.HTTPException) as error:
            if not silent:
                say(f"the metadata service does not answer ({error}); it is asked on")
            silent = str(error)
            continue
        if silent:
            say("the metadata service answers")
            silent = ""
        if notice is not None:
            return notice


def drain(
    address: str,
    notice: Notice,
    *,
    node_ids: Sequence[str] = (),
    also_head: bool = False,
    head_s: float | None = None,
    say: Callable[[str], None],
) -> tuple[str, ...]:
    """Drain this machine's nodes of a cluster; gives their ids.

    While the head does not answer it is asked again, for so long.

    Args:
        address: `HOST:PORT` of the cluster's head.
        notice: why, and how long is left.
        node_ids: nodes to drain instead; by default those with an address of this machine.
        also_head: drain the head too, where it is on this machine.
        head_s: for how many seconds; None for those of the notice. Where the whole cluster goes,
            the head is often the first.
        say: is told each step.

    Raises:
        ClusterError: there is no such node, Ray refuses, or the head did not answer in time.
    """
    end = time.time() + notice.seconds
    patience_end = end if head_s is None else min(end, time.time() + head_s)
    while True:
        try:
            client = _client(address)
            chosen = tuple(node_ids) or own_nodes(client, address, also_head=also_head)
            for node in chosen:
                accepted, why = client.drain_node(node, _PREEMPTION, notice.why, int(end * 1000))
                if not accepted:
                    raise ClusterError(f"Ray does not drain node {node}: {why}")
                say(f"node {node} is drained, {notice.seconds} s before its end: {notice.why}")
            return chosen
        except (OSError, RpcError) as error:
            if time.time() + _AGAIN_S > patience_end:
                raise ClusterError(f"the head at {address} does not answer: {error}") from error
            say(f"the head at {address} does not answer ({error}); it is asked again")
            time.sleep(_AGAIN_S)


def wait_until_gone(address: str, node_ids: Sequence[str], seconds: float) -> bool:
    """Wait until drained nodes have left the cluster; gives whether they did in time.

    Args:
        address: `HOST:PORT` of the cluster's head.
        node_ids: the nodes.
        seconds: how long to wait at most.
    """
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            found = _client(address).get_all_node_info(timeout=_REACH_S, state_filter=_ALIVE)
            if not {node.hex() for node in found} & set(node_ids):
                return True
        except (OSError, RpcError):
            return False  # the head went too
        time.sleep(min(_AGAIN_S, max(0.0, end - time.monotonic())))
    return False


def own_nodes(client: GcsClient, address: str, *, also_head: bool = False) -> tuple[str, ...]:
    """The living nodes of a cluster that run on this machine, by its network addresses.

    Args:
        client: connected to the head.
        address: the head's; its loopback address stands for clusters that are on one machine.
        also_head: include the head.

    Raises:
        ClusterError: there is none.
    """
    # Every machine has a loopback address; another one's node may have registered with it.
    loopback = _is_loopback(address.rpartition(":")[0])
    alive = client.get_all_node_info(timeout=_REACH_S, state_filter=_ALIVE)
    here = {
        node.hex(): info
        for node, info in alive.items()
        if _is_own(info.node_manager_address)
        and (loopback or not _is_loopback(info.node_manager_address))
    }
    chosen = tuple(node for node, info in here.items() if also_head or not info.is_head_node)
    if not chosen:
        what = "only the head (--also-head drains it)" if here else "no node"
        raise ClusterError(f"{what} of the cluster at {address} runs on this machine")
    return chosen


def _client(address: str) -> GcsClient:
    # Ray itself would try for 40 seconds, which may be more than there are.
    host, _, port = address.rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), timeout=_REACH_S).close()
    return GcsClient(address=address)


def head_address(given: str | None) -> str:
    """`HOST:PORT` of the cluster's head: as given, of the environment, or this machine's cluster.

    Raises:
        ClusterError: there is none, or what was given is none.
    """
    try:
        found = services.canonicalize_bootstrap_address(given)  # pyright: ignore[reportArgumentType]
    except (ConnectionError, ValueError) as error:
        raise ClusterError(f"--address {given}: {error}") from error
    if found is None or not found.rpartition(":")[2].isdecimal():
        raise ClusterError(f"--address {found}: expected HOST:PORT of a cluster's head")
    return found


def _is_loopback(host: str) -> bool:
    return host.strip("[]") in ("::1", "localhost") or host.startswith("127.")


def _is_own(host: str) -> bool:
    """Whether an address is one of this machine's, to which alone a socket can be bound."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        try:
            probe.bind((host, 0))
        except OSError:
            return False
    return True


def _ask(address: str, headers: Mapping[str, str], method: str = "GET") -> str:
    request = urllib.request.Request(address, headers=dict(headers), method=method)
    with _DIRECT.open(request, timeout=_ANSWER_S) as answer:
        return answer.read(1 << 16).decode()
