"""This computer: Python, packages, devices, the compiler, room in memory and on disk."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from sr4ir_dist.data.cache import DEFAULT_CACHE_BYTES, default_cache_dir
from sr4ir_dist.doctor.finding import Finding
from sr4ir_dist.training.engines import cpu_operator

_DISTRIBUTION = "sr4ir-dist"
_BUILD = "from sr4ir_dist.training.engines import build_cpu_operator; build_cpu_operator()"
_LIMIT_S = 30
_GIB = 1 << 30
# torch, Ray and DeepSpeed take about 0.7 GiB of a worker before there is a network.
_WORKER_BYTES, _COMFORT_BYTES = 1 * _GIB, 3 * _GIB
_LEAST_DISK = 1 * _GIB
_SHARED_BYTES = 1 * _GIB


def findings(workers: int, gpu: bool | None) -> Iterator[Finding]:
    """All checks of this computer.

    Args:
        workers: ranks that are to run here; 0 where they run elsewhere.
        gpu: whether each needs a GPU here; None for where there are some.
    """
    yield python()
    yield packages()
    yield device(gpu)
    yield cpu()
    yield from (compiler(), operator())
    yield memory(workers)
    yield shard_cache(default_cache_dir())
    yield shared_memory(Path("/dev/shm"))


def python(distribution: str = _DISTRIBUTION) -> Finding:
    """Whether this Python is one that the package is made for."""
    try:
        allowed = importlib.metadata.metadata(distribution)["Requires-Python"]
    except importlib.metadata.PackageNotFoundError:
        return _not_installed("python", distribution)
    found = platform.python_version()
    if SpecifierSet(allowed).contains(found, prereleases=True):
        return Finding("python", "ok", f"{found} at {sys.executable}")
    mend = f"set up an environment with Python {allowed}, such as make PYTHON=python3.11 setup"
    return Finding("python", "fail", f"{found}; required: {allowed}", mend)


def packages(distribution: str = _DISTRIBUTION) -> Finding:
    """Whether the required packages are installed, in versions that the package is made for."""
    try:
        lines = importlib.metadata.requires(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        return _not_installed("packages", distribution)
    required = [Requirement(line) for line in lines]
    required = [each for each in required if not each.marker or each.marker.evaluate({"extra": ""})]
    wrong = {}
    for each in required:
        try:
            found = importlib.metadata.version(each.name)
        except importlib.metadata.PackageNotFoundError:
            wrong[each] = "missing"
            continue
        if not each.specifier.contains(found, prereleases=True):
            wrong[each] = found
    if not wrong:
        return Finding("packages", "ok", f"{len(required)} required packages are as they must be")
    told = ", ".join(
        f"{each.name} {found} (required: {each.specifier})" for each, found in wrong.items()
    )
    mend = f"{sys.executable} -m pip install " + " ".join(f"'{each}'" for each in wrong)
    return Finding("packages", "fail", told, mend)


def device(gpu: bool | None) -> Finding:
    """The CUDA devices that torch can use here."""
    if torch.cuda.is_available():
        bf16 = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no bf16"
        each = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        names = ", ".join(f"{one.name} ({one.total_memory / _GIB:.0f} GiB)" for one in each)
        return Finding("device", "ok", f"{names}; CUDA {torch.version.cuda}, {bf16}")
    present = Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None
    if not present and not gpu:
        return Finding("device", "ok", "CPU only: no NVIDIA driver here")
    status = "fail" if gpu else "warn"
    if torch.version.cuda is None:
        mend = "install the torch build for CUDA"
        return Finding("device", status, "this torch is built without CUDA", mend)
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return Finding("device", status, "CUDA_VISIBLE_DEVICES hides all GPUs", "unset it")
    told = (
        f"torch {torch.__version__} finds no GPU; the driver must serve CUDA {torch.version.cuda}"
    )
    return Finding("device", status, told, "see nvidia-smi; update the driver, or train with --cpu")


def cpu() -> Finding:
    """What the processor has, which says what precision is worth it."""
    level = torch.backends.cpu.get_cpu_capability()
    info = Path("/proc/cpuinfo")
    flags = set(info.read_text().split()) if info.exists() else set()
    fast = [name for name in ("amx_bf16", "avx512_bf16") if name in flags]
    worth = (
        f"has {' and '.join(fast)}: precision=bf16 is worth it" if fast else "bf16 would be slow"
    )
    return Finding("cpu", "ok", f"{os.cpu_count()} CPUs, {level}; {worth}")


def compiler() -> Finding:
    """Whether a C++ compiler, Python's headers and ninja can build DeepSpeed's CPU operator."""
    if torch.cuda.is_available():
        return Finding("compiler", "skipped", "GPU workers need none")
    name = os.environ.get("CXX", "c++")
    mend = "install g++, python3-dev and ninja (Debian, Ubuntu: apt install g++ python3-dev)"
    # What is built already works here without them, but not on the next node.
    status = "fail" if cpu_operator() is None else "warn"
    path = shutil.which(name)
    if path is None:
        return Finding("compiler", status, f"no C++ compiler ({name}) on PATH", mend)
    if shutil.which("ninja") is None and not (Path(sys.executable).parent / "ninja").exists():
        return Finding("compiler", status, "no ninja on PATH or beside Python", mend)
    command = [path, "-fsyntax-only", "-x", "c++", "-I", sysconfig.get_path("include"), "-"]
    source = "#include <Python.h>\n#include <vector>\n"
    try:
        done = subprocess.run(
            command, input=source, capture_output=True, text=True, timeout=_LIMIT_S, check=False
        )
        problem = (done.stderr.splitlines() or ["no word why"])[0] if done.returncode else ""
    except (OSError, subprocess.TimeoutExpired) as error:
        problem = str(error)
    if problem:
        return Finding("compiler", status, f"{path} cannot compile: {problem}", mend)
    return Finding("compiler", "ok", f"{path}, Python's headers and ninja")


def operator() -> Finding:
    """Whether DeepSpeed's CPU operator is built; a cold start is slow, not wrong."""
    if torch.cuda.is_available():
        return Finding("cpu operator", "skipped", "GPU workers need none")
    path = cpu_operator()
    if path is not None:
        return Finding("cpu operator", "ok", f"built: {path}")
    told = "not built yet: the first step builds it, which takes each node about a minute"
    return Finding("cpu operator", "warn", told, f'once a node: {sys.executable} -c "{_BUILD}"')


def memory(workers: int) -> Finding:
    """Whether so many workers find memory here."""
    info = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(info["MemAvailable"].split()[0]) << 10
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and (text := limit.read_text().strip()).isdigit():
        used = int(limit.with_name("memory.current").read_text())
        # Files that were read count as used, though they give way.
        lines = limit.with_name("memory.stat").read_text().splitlines()
        used -= dict((name, int(size)) for name, size in map(str.split, lines))["inactive_file"]
        free = min(free, int(text) - used)
    told = f"{free / _GIB:.1f} GiB free for {workers} worker(s) here"
    mend = "fewer workers, more nodes, or smaller batches"
    if free < workers * _WORKER_BYTES:
        return Finding(
            "memory", "fail", told + "; each takes 1 GiB before there is a network", mend
        )
    if free < workers * _COMFORT_BYTES:
        return Finding("memory", "warn", told, mend)
    return Finding("memory", "ok", told)


def shard_cache(folder: Path) -> Finding:
    """Whether the node's cache of shards has the room that it may take."""
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(there).free
    told = (
        f"{free / _GIB:.1f} GiB free for {folder}; it takes up to {DEFAULT_CACHE_BYTES >> 30} GiB"
    )
    mend = "make room, or name another disk by SR4IR_CACHE_DIR or --cache-dir"
    if not os.access(there, os.W_OK):
        return Finding("shard cache", "fail", f"{there} cannot be written", mend)
    if free < _LEAST_DISK:
        return Finding("shard cache", "fail", told, mend)
    return Finding("shard cache", "ok" if free >= DEFAULT_CACHE_BYTES else "warn", told, mend)


def shared_memory(folder: Path) -> Finding:
    """Whether Ray's object store finds memory that processes can share."""
    free = shutil.disk_usage(folder).free if folder.exists() else 0
    told = f"{free / _GIB:.1f} GiB free in {folder} for Ray's object store"
    if free >= _SHARED_BYTES:
        return Finding("shared memory", "ok", told)
    mend = "give the container more (docker run --shm-size=8g); Ray falls back to disk, slowly"
    return Finding("shared memory", "warn", told, mend)


def _not_installed(name: str, distribution: str) -> Finding:
    told = f"{distribution} is not installed, so what it requires is not known"
    return Finding(name, "warn", told, "pip install . in the checkout")
