import sys
from pathlib import Path

import pytest
import torch

from sr4ir_dist.doctor import machine

on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="GPU workers need no compiler")


@pytest.fixture
def distribution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Installs a package that requires something; gives its name."""

    def install(*lines: str) -> str:
        metadata = tmp_path / "demanding-1.0.dist-info" / "METADATA"
        metadata.parent.mkdir()
        metadata.write_text("\n".join(("Metadata-Version: 2.1", "Name: demanding", *lines, "")))
        monkeypatch.syspath_prepend(tmp_path)
        return "demanding"

    return install


def test_this_environment_is_as_required():
    assert machine.python().status == "ok"
    assert machine.packages().status == "ok", machine.packages().told


def test_another_python_is_required(distribution):
    found = machine.python(distribution("Requires-Python: >=4"))
    assert found.status == "fail"
    assert "required: >=4" in found.told
    assert ">=4" in found.mend


def test_packages_that_are_missing_or_old_are_named_with_the_command(distribution):
    name = distribution(
        "Requires-Dist: torch>=99",
        "Requires-Dist: numpy>=1",
        "Requires-Dist: never-heard-of[fast]>=2,<3",
        'Requires-Dist: not-asked-for; extra == "other"',
    )
    found = machine.packages(name)
    assert found.status == "fail"
    assert f"torch {torch.__version__.partition('+')[0]}" in found.told
    assert "never-heard-of missing (required: <3,>=2)" in found.told
    assert found.mend.startswith(sys.executable)
    assert "'torch>=99' 'never-heard-of[fast]<3,>=2'" in found.mend
    for other in ("numpy", "not-asked-for"):
        assert other not in found.told + found.mend


def test_without_an_installation_nothing_is_known():
    for check in (machine.python, machine.packages):
        assert check("never-installed").status == "warn"


def test_a_gpu_that_is_asked_for_must_be_here():
    assert machine.device(None).status in ("ok", "warn")
    found = machine.device(True)
    assert found.status == ("ok" if torch.cuda.is_available() else "fail")


def test_the_processor_is_told():
    assert machine.cpu().told.split(",")[0].endswith("CPUs")


@on_cpu
def test_a_compiler_is_needed_until_the_operator_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert machine.compiler().status == "ok"
    assert machine.operator().status == "warn"
    assert "build_cpu_operator" in machine.operator().mend
    monkeypatch.setenv("PATH", str(tmp_path))
    found = machine.compiler()
    assert found.status == "fail"
    assert "no C++ compiler (c++)" in found.told
    assert "apt install g++" in found.mend

    built = tmp_path / "deepspeed_shm_comm" / "deepspeed_shm_comm.so"
    built.parent.mkdir()
    built.touch()
    assert machine.compiler().status == "warn"
    assert machine.operator().status == "ok"


@on_cpu
def test_a_compiler_that_does_not_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "false")
    found = machine.compiler()
    assert found.status == "fail"
    assert "cannot compile" in found.told


def test_memory_is_for_so_many_workers():
    assert machine.memory(0).status == "ok"
    assert machine.memory(100_000).status == "fail"
    free = float(machine.memory(0).told.split()[0])
    assert machine.memory(max(1, int(free / 2))).status == "warn"


def test_the_cache_needs_room_on_a_disk_that_can_be_written(tmp_path: Path):
    assert machine.shard_cache(tmp_path / "not" / "yet").status in ("ok", "warn")
    assert machine.shard_cache(Path("/proc/cache")).status == "fail"  # it has no room at all


def test_shared_memory(tmp_path: Path):
    assert machine.shared_memory(Path("/proc")).status == "warn"
    assert machine.shared_memory(tmp_path / "none").status == "warn"
    assert machine.shared_memory(tmp_path).status == "ok"
