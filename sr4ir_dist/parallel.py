"""One function over many jobs, side by side: on threads of this machine, or on a Ray cluster."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import islice
from typing import Any

from sr4ir_dist import storage

Run = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]
"""Calls a function with each job and gives the results as they come, in any order. An error of the
function is raised, and no further job is begun."""

# How often a task is begun again because its worker or its node died; what it raises is final.
_RESTARTS = 5
# A shard takes seconds, and an autoscaler some minutes to add a node.
_TELL_EVERY_S, _GIVE_UP_S = 30.0, 1800.0
# How long a head that is just starting may take until it answers.
_ANSWER_S = 20.0


class ClusterError(ValueError):
    """There is no Ray cluster where one was asked for, or it lost what it was to do."""


# On one machine: while one job waits for the disk or the network, another one computes.
_AT_A_TIME = 2


def threads_of_job() -> int:
    """How many threads a job on this machine may have for itself, so that all CPUs work."""
    return max(1, (os.cpu_count() or 1) // _AT_A_TIME)


def on_threads(count: int = _AT_A_TIME) -> Run:
    """Run so many jobs at a time on threads of this process."""

    def run(function: Callable[[Any], Any], jobs: Iterable[Any]) -> Iterator[Any]:
        with ThreadPoolExecutor(count) as pool:
            waiting = [pool.submit(function, job) for job in jobs]
            try:
                yield from (future.result() for future in as_completed(waiting))
            finally:
                for future in waiting:
                    future.cancel()

    return run


def on_cluster(say: Callable[[str], None] = print) -> Run:
    """Run jobs as tasks of 1 CPU on all nodes of the cluster that this process has joined.

    A task whose worker or node dies is begun again, so a job must bear to be done twice. Running
    raises ``ClusterError`` when that happens too often, and when no job ends for half an hour.

    Args:
        say: is told what is waited for where no job ends for long.
    """
    # Takes a second to import, which those who stay on their machine need not wait for.
    import ray
    from ray.exceptions import RayError, RayTaskError

    def run(function: Callable[[Any], Any], jobs: Iterable[Any]) -> Iterator[Any]:
        task = ray.remote(
            num_cpus=1,
            max_retries=_RESTARTS,
            scheduling_strategy="SPREAD",
        )(_call)
        shared = ray.put(function)
        waiting: list[Any] = []
        jobs = iter(jobs)
        try:
            while True:
                # Enough to keep all busy, also after the cluster has grown.
                free = 2 * int(ray.cluster_resources().get("CPU", 1)) - len(waiting)
                waiting += [task.remote(shared, job) for job in islice(jobs, max(0, free))]
                if not waiting:
                    return
                ended = _first(waiting, say)
                waiting.remove(ended)
                yield ray.get(ended)
        except RayTaskError as error:
            raise error.cause from None
        except RayError as error:
            raise ClusterError(f"the Ray cluster lost a task: {error}") from error
        finally:
            for each in waiting:
                ray.cancel(each)

    return run


def _first(waiting: list[Any], say: Callable[[str], None]) -> Any:
    """The first of some tasks that ends, or has ended."""
    import ray

    started = time.monotonic()
    while True:
        done, _ = ray.wait(waiting, timeout=_TELL_EVERY_S)
        if done:
            return done[0]
        has = ray.cluster_resources().get("CPU", 0)
        free = ray.available_resources().get("CPU", 0)
        what = (
            f"none of {len(waiting)} tasks of 1 CPU has ended for "
            f"{time.monotonic() - started:.0f} s; {free:g} of the cluster's {has:g} CPUs are free"
        )
        if time.monotonic() - started >= _GIVE_UP_S:
            raise ClusterError(f"{what}: other jobs may hold them, or a node may hang")
        say(f"waiting: {what}")


def wants_cluster(address: str | None) -> bool:
    """Whether a Ray cluster was asked for: by its address, by the environment, as in a Ray job."""
    # With http it is where jobs are submitted to, and no cluster that this process could join.
    given = os.environ.get("RAY_ADDRESS", "")
    return address is not None or (given != "" and not given.startswith("http"))


def connect(address: str | None = None) -> None:
    """Join the Ray cluster at an address or that of the environment, or start one here.

    All that this process then starts on it, on every node, has this process's settings of S3, but
    no keys: nodes have their own.

    Raises:
        ClusterError: there is no cluster at the address, or none could be started here.
    """
    import ray

    if ray.is_initialized():
        return
    _check_answer(address or os.environ.get("RAY_ADDRESS", ""))
    # Ray warns about a change of its own defaults that does not concern us.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Settings that a submitted job brought along are this process's too; Ray is not to mind that.
    os.environ.setdefault("RAY_OVERRIDE_JOB_RUNTIME_ENV", "1")
    settings = storage.worker_environment()
    runtime_env = {"env_vars": settings} if settings else None
    try:
        ray.init(address=address, logging_level=logging.WARNING, runtime_env=runtime_env)
    except ConnectionError as error:
        raise ClusterError(f"no Ray cluster at {address or 'RAY_ADDRESS'}: {error}") from error
    except Exception as error:
        # Ray's own words for a node that does not start in time, of no kind of their own.
        if type(error) is not Exception:
            raise
        raise ClusterError(f"Ray did not start: {error}") from error


def _check_answer(address: str) -> None:
    """Wait until something answers at HOST:PORT: where nothing does, Ray tries for minutes.

    Raises:
        ClusterError: nothing did in time.
    """
    host, _, port = address.rpartition(":")
    if not port.isdigit() or "://" in address:
        return  # `auto`, `local`, or for Ray to say what is wrong with it
    deadline = time.monotonic() + _ANSWER_S
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_S).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise ClusterError(f"no Ray cluster answers at {address}: {error}") from error
            time.sleep(0.5)


def _call(function: Callable[[Any], Any], job: Any) -> Any:
    return function(job)
