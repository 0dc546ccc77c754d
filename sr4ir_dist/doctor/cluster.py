"""Ray: its token, the cluster, room for the workers, and whether every node has the same code."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ray
import torch
from ray._private import services
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from sr4ir_dist import parallel
from sr4ir_dist.doctor.finding import Finding, Status, probe
from sr4ir_dist.doctor.node import differences, report
from sr4ir_dist.training.capacity import Resources, fit_workers

_CONNECT_S, _REACH_S, _NODES_S = 60, 5, 120
_START = "start Ray there (ray start --head), or name another --address (RAY_ADDRESS)"
_MEND_NODES = (
    "install the same versions on every node (pip install .), give nodes access to the storage "
    "(role, profile), and set AWS_ENDPOINT_URL and AWS_REGION where Ray is started"
)


def findings(
    address: str | None, resources: Resources, storage_uri: str | None
) -> Iterator[Finding]:
    """The checks of Ray; joins the cluster if there is one, and never starts one.

    Args:
        address: the cluster's, of `find`; None where there is none to join.
        resources: what a run asks for.
        storage_uri: where runs are to be kept, which every node must be able to write; or None.
    """
    yield token(joins=address is not None)
    if address is None:
        yield Finding("ray cluster", "skipped", "there is none to join: a run starts one here")
        here = {"CPU": float(os.cpu_count() or 1), "GPU": float(torch.cuda.device_count())}
        yield room([here], resources)
        return
    joined = cluster(address)
    yield joined
    if joined.status == "ok":
        alive = [node for node in ray.nodes() if node["Alive"]]
        yield room([node["Resources"] for node in alive], resources)
        yield nodes(alive, storage_uri)


def find(address: str | None) -> str | None:
    """The address of the cluster that a run would join, None where it would start one here.

    Args:
        address: what the user says; None leaves it to the environment and to what `ray start` left
            on this machine, `local` asks for a cluster of its own.

    Raises:
        ClusterError: there is no such address.
    """
    if address is not None and "://" in address:
        return address
    try:
        return services.canonicalize_bootstrap_address(address)  # pyright: ignore[reportArgumentType]
    except (ConnectionError, ValueError) as error:
        raise parallel.ClusterError(f"--address {address}: {error}") from error


def token(*, joins: bool) -> Finding:
    """Whether Ray's token and its mode of authentication go together.

    Args:
        joins: there is a cluster to join; a new one on this machine makes its own token.
    """

    def found(status: Status, told: str, mend: str = "") -> Finding:
        return Finding("ray token", status, told, mend)

    mode, where = os.environ.get("RAY_AUTH_MODE", "").lower(), _token_place()
    make = "make one (ray get-auth-token --generate), and give the same to every node"
    if mode not in ("", "token", "disabled"):
        told = f"RAY_AUTH_MODE={mode}: allowed are token and disabled"
        return found("fail", told, "export RAY_AUTH_MODE=token")
    if mode == "disabled":
        told = "RAY_AUTH_MODE=disabled: whoever reaches the cluster's ports can run code there"
        return found("warn", told, "export RAY_AUTH_MODE=token")
    if mode == "token" and where is None:
        told = "RAY_AUTH_MODE=token, and there is no token"
        return found("fail" if joins else "warn", told, make)
    if mode == "token":
        return found("ok", f"RAY_AUTH_MODE=token; the token comes from {where}")
    if where is not None:
        told = f"a token comes from {where}, but RAY_AUTH_MODE is not set"
        mend = "export RAY_AUTH_MODE=token: ray start asks for the token, ray job submit hides it"
        return found("warn", told, mend)
    if joins:
        told = "no token: whoever reaches the cluster's ports can run code there"
        return found("warn", told, f"export RAY_AUTH_MODE=token; {make}")
    return found("ok", "no token yet: Ray makes one for a cluster of its own")


def cluster(address: str) -> Finding:
    """Join the cluster at an address."""

    def join() -> str:
        _reach(address)  # Ray itself would try for minutes
        parallel.connect(address)
        return f"joined {address}: {len(ray.nodes())} node(s), Ray {ray.__version__}"

    return probe("ray cluster", join, mend=f"{_START}; its token must be ours", limit_s=_CONNECT_S)


def room(nodes: list[Mapping[str, float]], resources: Resources) -> Finding:
    """Whether all workers find a node, by what a run itself checks.

    Args:
        nodes: `CPU` and `GPU` of each node.
        resources: what a run asks for.
    """
    workers = resources.workers

    def fit() -> str:
        cpus, gpu = fit_workers(nodes, resources)
        each = f"{cpus} CPU(s){' and a GPU' if gpu else ''}"
        return f"{workers} worker(s) with {each} each find room on {len(nodes)} node(s)"

    return probe("ray resources", fit, mend="ask for less, or add nodes before the run starts")


def nodes(alive: list[dict[str, Any]], storage_uri: str | None) -> Finding:
    """Whether every node has this program's versions and can write the storage.

    Args:
        alive: the nodes, as `ray.nodes()` tells.
        storage_uri: where runs are to be kept; None leaves it out.
    """

    def ask() -> str:
        mine = report(None)
        problems = []
        task = ray.remote(report)
        asked = {
            task.options(
                num_cpus=0,
                max_retries=0,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
            ).remote(storage_uri): node["NodeManagerAddress"]
            for node in alive
        }
        done, _ = ray.wait(list(asked), num_returns=len(asked), timeout=_NODES_S)
        for answer, name in asked.items():
            try:
                told = ray.get(answer, timeout=0) if answer in done else {"answer": "none in time"}
            except Exception as error:
                told = {"answer": str(error).strip().splitlines()[-1]}
            problems += [f"{name}: {text}" for text in differences(mine, told)]
        if problems:
            raise RuntimeError("; ".join(problems))
        access = " and can write the storage" if storage_uri else ""
        return f"{len(asked)} node(s) have the versions of this one{access}"

    return probe("ray nodes", ask, mend=_MEND_NODES, limit_s=_NODES_S + 10)


def _token_place() -> str | None:
    """Where Ray finds its token, in Ray's order; None where there is none."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return "RAY_AUTH_TOKEN"
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else Path.home() / ".ray" / "auth_token"
    return str(path) if path.is_file() and path.stat().st_size else None


def _reach(address: str) -> None:
    """Opens a connection to the cluster's port."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=_REACH_S).close()
    except (OSError, ValueError) as error:
        raise parallel.ClusterError(f"no Ray cluster at {address}: {error}") from error
