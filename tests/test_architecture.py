"""The rules that keep the house small: arrows between rooms, sizes, names, what is tracked."""

import ast
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "sr4ir_dist"

# From the outermost to the innermost. A module may import from its own room and from rooms below.
ROOMS = (
    {"cli", "quickstart"},
    {"cli", "reproduction", "prediction", "tuning", "analysis", "benchmark", "doctor", "export"},
    {"training"},
    {"hub"},
    {"checkpoint", "retention"},
    {"tasks", "losses", "metrics"},
    {"networks", "data"},
    {
        "batch",
        "degradation",
        "cqmix",
        "keyed",
        "notices",
        "experiments",
        "recipes",
        "config",
        "overrides",
        "faults",
        "s3",
        "settings",
        "parallel",
        "storage",
        "suggestions",
        "untrusted",
    },
)
# Imports that no code of the room may have, at any depth of a function.
FORBIDDEN_LIBRARIES = {
    "recipes": {"torch", "ray", "deepspeed"},
    "training/engines.py": {"ray"},
    "training/step.py": {"ray", "deepspeed"},
}
MODULE_LINES, MODULE_LINES_AIM, FUNCTION_LINES = 400, 300, 60
# name of the function -> why it may be longer
LONG_FUNCTIONS: dict[str, str] = {}
FORBIDDEN_MODULES = {"utils", "util", "common", "helpers", "helper", "manager", "misc"}
TOP_LEVEL = {
    ".ci",
    ".gitignore",
    ".pre-commit-config.yaml",
    ".rayignore",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "LICENSE",
    "Makefile",
    "README.md",
    "cluster.yaml",
    "jobs",
    "pyproject.toml",
    "sr4ir_dist",
    "tests",
    "tune_spaces",
}
MACHINE_PATH = re.compile(rb"(?<![\w.:/~}*-])/(?:home|root|work|Users|mnt)/[\w.-]+")
TRACKED_BYTES = 500_000

MODULES = sorted((ROOT / PACKAGE).rglob("*.py"))
CODE = MODULES + sorted((ROOT / "jobs").rglob("*.py"))


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _imports(source: str) -> set[str]:
    """Dotted names that a source imports, at module level or later; relative ones as written."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = "." * node.level + (node.module or "")
            found |= {f"{start}.{alias.name}" for alias in node.names}
    return found


def _depth(room: str) -> int:
    return next((depth for depth, rooms in enumerate(ROOMS) if room in rooms), -1)


def _wrong_arrows(room: str, source: str) -> list[str]:
    """The imports in a module of a room that point out of the house's order."""
    wrong = []
    for name in _imports(source):
        parts = name.split(".")
        if parts[0] == "":
            wrong.append(f"{name} is relative")
        elif parts[0] == "jobs":
            wrong.append(f"{name} is a job")
        elif parts[0] == PACKAGE and len(parts) > 1:
            used = parts[1]
            if _depth(used) < 0 and used != "__version__":
                wrong.append(f"{name} is in no room")
            elif used != room and used != "__version__" and _depth(used) < _depth(room):
                wrong.append(f"{name} is above {room}")
    return sorted(wrong)


def _room(path: Path) -> str:
    return path.relative_to(ROOT / PACKAGE).parts[0].removesuffix(".py")


def test_the_arrow_check_sees_wrong_arrows():
    assert _wrong_arrows("tasks", "from sr4ir_dist.training import loop") != []
    assert _wrong_arrows("tasks", "def f():\n    import sr4ir_dist.checkpoint") != []
    assert _wrong_arrows("tasks", "from sr4ir_dist import training") != []
    assert _wrong_arrows("tasks", "from . import classification") != []
    assert _wrong_arrows("tasks", "from sr4ir_dist.bits import x") != []
    assert _wrong_arrows("tasks", "from sr4ir_dist import batch, losses\nimport torch") == []


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_imports_point_one_way(path):
    room = _room(path)
    if room == "__init__":
        assert not any(name.startswith(PACKAGE) for name in _imports(path.read_text()))
        return
    assert _depth(room) >= 0, f"{_name(path)} belongs to no room of {PACKAGE}"
    assert _wrong_arrows(room, path.read_text()) == []


@pytest.mark.parametrize("path", sorted(FORBIDDEN_LIBRARIES))
def test_rooms_that_know_no_framework(path):
    source = ROOT / PACKAGE / (path if path.endswith(".py") else f"{path}.py")
    libraries = {name.split(".")[0] for name in _imports(source.read_text())}
    assert libraries & FORBIDDEN_LIBRARIES[path] == set()


def test_modules_are_short():
    lines = {_name(path): len(path.read_text().splitlines()) for path in CODE}
    for name, count in sorted(lines.items()):
        if count > MODULE_LINES_AIM:
            print(f"{name}: {count} lines, aim at {MODULE_LINES_AIM}")
    assert {name: count for name, count in lines.items() if count > MODULE_LINES} == {}


def test_functions_are_short():
    long = {}
    for path in CODE:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                # The docstring explains rather than adds to what must be held in mind.
                documented = ast.get_docstring(node) is not None
                start = node.body[0].end_lineno if documented else node.lineno
                lines = (node.end_lineno or 0) - (start or 0)
                if lines > FUNCTION_LINES:
                    long[f"{_name(path)}:{node.name}"] = lines
    assert set(long) == set(LONG_FUNCTIONS), long


def test_names_say_what_is_inside():
    assert [_name(p) for p in CODE if {p.stem, p.parent.name} & FORBIDDEN_MODULES] == []
    bases = [
        f"{_name(path)}:{node.name}"
        for path in CODE
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef) and re.match(r"_?(Base|Abstract)[A-Z]", node.name)
    ]
    assert bases == []


def test_base_names_of_tests_are_unique():
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted({name for name in names if names.count(name) > 1}) == []
    assert list((ROOT / "tests").rglob("__init__.py")) == []


@pytest.fixture(scope="module")
def tracked() -> list[Path]:
    """Files in git's index, and new ones that git does not ignore."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: nothing is tracked")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout
    return [ROOT / name for name in listed.decode().split("\0") if name and (ROOT / name).is_file()]


def test_top_level_entries_are_known(tracked):
    assert {path.relative_to(ROOT).parts[0] for path in tracked} - TOP_LEVEL == set()


def test_no_machine_paths_in_tracked_files(tracked):
    found = {_name(p): m.group() for p in tracked if (m := MACHINE_PATH.search(p.read_bytes()))}
    assert found == {}


def test_the_machine_path_pattern_sees_paths():
    for text in (b'open("/home/' + b'someone/x")', b"cd /root" + b"/project", b"= /Users" + b"/me"):
        assert MACHINE_PATH.search(text), text
    for text in (b"https://example.org/home/page", b"s3://bucket/work/x", b"tests/root/x"):
        assert not MACHINE_PATH.search(text), text


def test_tracked_files_are_small(tracked):
    sizes = {_name(p): p.stat().st_size for p in tracked}
    assert {name: size for name, size in sizes.items() if size > TRACKED_BYTES} == {}


def test_jobs_travel_with_a_submitted_working_directory():
    """Ray drops what the ignore files name, so none of these may match."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: git cannot say what is ignored")
    needed = ["jobs/train.py", "sr4ir_dist/data/stream.py", "sr4ir_dist/runs.py", "tune_spaces/a"]
    for ignore in (".gitignore", ".rayignore"):
        command = ["git", "-c", f"core.excludesFile={ROOT / ignore}", "check-ignore", *needed]
        assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout == ""
