"""cluster.yaml and its siblings: Ray's own checks of them, versions, what is safe, the shell."""

import ast
import copy
import json
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from ray._private.runtime_env.packaging import create_package
from ray.autoscaler._private.kuberay import autoscaling_config as kuberay
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil

ROOT = Path(__file__).resolve().parents[1]
CLUSTERS = ("cluster.yaml", "jobs/on_premises.yaml")
RAY_JOB, IMAGE, SLURM = "jobs/rayjob.yaml", "jobs/rayjob.Dockerfile", "jobs/slurm.sh"
FILES = (*CLUSTERS, RAY_JOB, IMAGE, SLURM)
TRAVEL_BYTES = 10_000_000
SECRETS = re.compile(
    r"(?:AKIA|ASIA)[A-Z0-9]{16}|-----BEGIN|(?i:password|secret_access_key|auth_token)\s*[=:]\s*\w"
    r"|\b[0-9a-f]{40,}\b"
)


def read(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text())


def prepared(name: str) -> dict[str, Any]:
    """A cluster file as `ray up` takes it, checked by Ray."""
    config = prepare_config(read(name))
    validate_config(config)
    return config


@pytest.mark.parametrize("name", CLUSTERS)
def test_ray_takes_the_cluster_file(name: str):
    config = prepared(name)
    assert config["head_node_type"] in config["available_node_types"]
    assert config["max_workers"] >= 2
    assert config["idle_timeout_minutes"] > 0


@pytest.mark.parametrize("name", CLUSTERS)
def test_what_is_copied_to_the_nodes_is_here(name: str):
    mounts = prepared(name)["file_mounts"]
    assert mounts.pop("~/.ray/auth_token") == "~/.ray/auth_token"
    assert mounts
    assert [local for local in mounts.values() if not (ROOT / local).exists()] == []


@pytest.mark.parametrize("name", CLUSTERS)
def test_the_head_starts_as_it_should(name: str):
    (start,) = (each for each in prepared(name)["head_start_ray_commands"] if "ray start" in each)
    for option in (
        "--autoscaling-config=~/ray_bootstrap_config.yaml",
        "--dashboard-host=127.0.0.1",
        "export RAY_AUTH_MODE=token",
    ):
        assert option in start


def test_no_head_has_a_gpu():
    aws = prepared("cluster.yaml")
    head = aws["available_node_types"][aws["head_node_type"]]
    assert head["resources"]["GPU"] == 0
    assert "InstanceMarketOptions" not in head["node_config"]
    assert "--num-gpus=0" in " ".join(prepared("jobs/on_premises.yaml")["head_start_ray_commands"])
    assert derived()["available_node_types"]["headgroup"]["resources"].get("GPU", 0) == 0


def asked_for(config: dict[str, Any], gpus: int) -> dict[str, int]:
    """The nodes that Ray's autoscaler launches for so many workers of a GPU each."""
    read_config = AutoscalingConfig(config, skip_content_hash=True)
    request = SchedulingRequest(
        node_type_configs=read_config.get_node_type_configs(),
        max_num_nodes=read_config.get_max_num_nodes(),
        disable_launch_config_check=True,
        resource_requests=ResourceRequestUtil.group_by_count(
            [ResourceRequestUtil.make({"GPU": 1, "CPU": 4})] * gpus
        ),
        current_instances=[],
    )
    reply = ResourceDemandScheduler(event_logger=None).schedule(request)
    return {each.instance_type: each.count for each in reply.to_launch}


def test_spot_instances_are_launched_and_on_demand_ones_when_turned_on():
    config = read("cluster.yaml")
    assert asked_for(config, 4) == {"gpu_spot": 4}
    assert asked_for(config, 20)["gpu_spot"] == 8
    # As the file's comments say.
    fallback = copy.deepcopy(config)
    fallback["available_node_types"]["gpu_on_demand"] |= {"priority": 20, "max_workers": 8}
    assert asked_for(fallback, 4) == {"gpu_on_demand": 4}
    types = config["available_node_types"]
    spot, on_demand = (types[name]["node_config"] for name in ("gpu_spot", "gpu_on_demand"))
    assert spot == on_demand | {"InstanceMarketOptions": {"MarketType": "spot"}}


def test_aws_nodes_have_an_image_a_role_and_the_safer_metadata_service():
    for node_type in prepared("cluster.yaml")["available_node_types"].values():
        node = node_type["node_config"]
        assert node["ImageId"].startswith(("resolve:ssm:/aws/service/deeplearning/ami/", "ami-"))
        assert set(node["IamInstanceProfile"]) == {"Name"}
        assert node["MetadataOptions"]["HttpTokens"] == "required"


def test_ec2_takes_the_node_types(aws: dict[str, str]):
    program = ROOT / "tests" / "launch_on_aws.py"
    done = subprocess.run(
        [sys.executable, str(program), "cluster.yaml"],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin"} | aws,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    nodes = json.loads(done.stdout.splitlines()[-1])
    assert {name: node.get("InstanceLifecycle") for name, node in nodes.items()} == {
        "head": None,
        "gpu_spot": "spot",
        "gpu_on_demand": None,
    }
    for name, node in nodes.items():
        role = "sr4ir-head" if name == "head" else "sr4ir-worker"
        assert node["IamInstanceProfile"]["Arn"].endswith(f"/{role}")
        assert node["Tags"]["ray-cluster-name"] == "sr4ir"
        # EC2's table of instance types, which moto brings, agrees with the file's resources.
        assert node["resources"].get("accelerator_type:L4") == (None if name == "head" else 1)
        assert node["resources"]["GPU"] == (name != "head")


def derived() -> dict[str, Any]:
    """What Ray's autoscaler makes of the RayJob's cluster; checks it."""
    job = read(RAY_JOB)
    cluster = {"metadata": {"name": "x", "namespace": "y"}, "spec": job["spec"]["rayClusterSpec"]}
    return kuberay._derive_autoscaling_config_from_ray_cr(cluster)


def test_the_ray_job_scales_workers_with_a_gpu_each():
    workers = derived()["available_node_types"]["gpu"]
    assert (workers["min_workers"], workers["max_workers"]) == (0, 8)
    assert workers["resources"]["GPU"] == 1


def test_the_ray_job_ends_and_announces_its_pods_end():
    spec = read(RAY_JOB)["spec"]
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["ttlSecondsAfterFinished"] > 0
    assert spec["activeDeadlineSeconds"] > 0
    (group,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    pod = group["template"]["spec"]
    (container,) = pod["containers"]
    command = container["lifecycle"]["preStop"]["exec"]["command"][-1]
    (seconds,) = re.findall(r"drain_on_notice\.py .*--seconds (\d+)", command)
    assert int(seconds) < pod["terminationGracePeriodSeconds"] <= 120
    # Pods whose head went first do not wait for it with their GPUs.
    (head_seconds,) = re.findall(r" --head-seconds (\d+)", command)
    assert int(head_seconds) <= 15
    assert "/dev/shm" in {mount["mountPath"] for mount in container["volumeMounts"]}


def unknown_fields(value: Any, kind: str, types: dict, where: str = "") -> list[str]:
    """Fields of a manifest that its types have not."""
    if kind.endswith("[]"):
        lists = [unknown_fields(item, kind[:-2], types, f"{where}[]") for item in value]
        return [name for names in lists for name in names]
    if kind in ("", "{}"):
        return []
    known = types[kind]
    found = [f"{where}.{name}" for name in value if name not in known]
    for name in value.keys() & known.keys():
        found += unknown_fields(value[name], known[name], types, f"{where}.{name}")
    return found


def test_the_ray_job_has_fields_that_kuberay_knows():
    types = json.loads((ROOT / "tests/assets/kuberay/fields.json").read_text())["types"]
    job = read(RAY_JOB)
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert unknown_fields(job, "RayJob", types) == []
    spoilt = copy.deepcopy(job)
    spoilt["spec"]["shutDownAfterJobFinishes"] = True
    pod = spoilt["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]
    pod["containers"][0]["lifecycle"]["prestop"] = {}
    where = ".spec.rayClusterSpec.workerGroupSpecs[].template.spec.containers[].lifecycle.prestop"
    assert set(unknown_fields(spoilt, "RayJob", types)) == {".spec.shutDownAfterJobFinishes", where}


def pins() -> dict[str, str]:
    """The versions that the tests run on, by package: the lower bounds of pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = {}
    for requirement in map(Requirement, project["dependencies"]):
        (found[requirement.name],) = (
            each.version for each in requirement.specifier if each.operator == ">="
        )
    return found


@pytest.mark.parametrize("name", FILES)
def test_versions_are_those_of_the_project(name: str):
    text, wanted = (ROOT / name).read_text(), pins()
    pinned = re.findall(r'"(\w[\w-]*)(?:\[[\w,]+\])?==([\w.]+)"', text)
    if name in (*CLUSTERS, IMAGE):
        assert {package for package, _ in pinned} == {"ray", "torch", "torchvision", "deepspeed"}
    ray = re.findall(r'rayVersion: "([\d.]+)"|ray[:-](\d+\.\d+\.\d+)', text)
    if name in (RAY_JOB, IMAGE):
        assert ray
    pinned += [("ray", "".join(version)) for version in ray]
    assert [each for each in pinned if wanted[each[0]] != each[1]] == []


def test_all_files_mean_the_same_python():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pyright"]
    for name in CLUSTERS:
        assert f"--python {project['pythonVersion']} " in (ROOT / name).read_text()
    assert f"-py{project['pythonVersion'].replace('.', '')}-" in (ROOT / IMAGE).read_text()
    installers = {
        v for name in FILES for v in re.findall(r"uv(?:==|/)([\d.]+)", (ROOT / name).read_text())
    }
    assert len(installers) == 1


def test_the_token_is_asked_for_wherever_ray_starts():
    for name in CLUSTERS:
        config = prepared(name)
        for kind in ("head_start_ray_commands", "worker_start_ray_commands"):
            starts = [each for each in config[kind] if "ray start" in each or "drain_on" in each]
            assert starts
            assert [each for each in starts if "export RAY_AUTH_MODE=token" not in each] == []
    cluster = read(RAY_JOB)["spec"]["rayClusterSpec"]
    assert cluster["authOptions"]["mode"] == "token"
    assert cluster["authOptions"]["secretName"]
    assert "export RAY_AUTH_MODE=token" in (ROOT / SLURM).read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", CLUSTERS)
def test_nodes_start_and_a_notice_drains_one(name: str, tmp_path: Path):
    # In namespaces of its own, as `ray stop` is among the commands.
    apart = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "--net"]
    if shutil.which("ip") is None or subprocess.run([*apart, "true"], check=False).returncode:
        pytest.skip("needs namespaces of its own (root, unshare, ip)")
    program = [sys.executable, str(ROOT / "tests" / "node_commands.py"), name, str(tmp_path)]
    with tempfile.TemporaryDirectory(prefix="ray-") as short:  # for paths of unix sockets
        done = subprocess.run(
            [*apart, *program, short], capture_output=True, text=True, check=False, timeout=200
        )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"node [0-9a-f]{56} is drained, ", done.stdout)


def test_the_pattern_of_secrets_sees_them():
    for text in ("AKIA" + "ABCDEFGHIJKLMNOP", "-----BEGIN" + " RSA", "RAY_AUTH_TOKEN=" + "f00"):
        assert SECRETS.search(text), text
    assert SECRETS.search("0123456789abcdef" * 4)


@pytest.mark.parametrize("name", FILES)
def test_no_file_has_a_secret(name: str):
    assert SECRETS.search((ROOT / name).read_text()) is None


def shell_parts() -> Iterator[tuple[str, str]]:
    """All shell in the files, by where it is."""
    yield SLURM, (ROOT / SLURM).read_text()
    for name in CLUSTERS:
        for kind, commands in read(name).items():
            if kind.endswith("_commands"):
                for number, command in enumerate(commands):
                    yield f"{name} {kind} {number}", f"#!/bin/bash\n({command})\n"
    spec = read(RAY_JOB)["spec"]
    yield f"{RAY_JOB} entrypoint", f"#!/bin/sh\n{spec['entrypoint']}\n"
    (group,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    yield (
        f"{RAY_JOB} preStop",
        f"#!/bin/bash\n{container['lifecycle']['preStop']['exec']['command'][-1]}\n",
    )


def test_shell_is_sound(tmp_path: Path):
    beside = shutil.which("shellcheck", path=Path(sys.executable).parent)
    program = beside or shutil.which("shellcheck")
    if program is None:
        pytest.skip("needs shellcheck (pip install -e '.[test]')")
    paths = []
    for where, text in shell_parts():
        paths.append(tmp_path / re.sub(r"\W+", "-", where))
        paths[-1].write_text(text)
    # SC1090, SC1091: files of the nodes that are not here. SC2088: Ray's own parts expand this ~.
    options = ["--exclude=SC1090,SC1091,SC2088", "--format=gcc"]
    checked = subprocess.run(
        [program, *options, *paths], capture_output=True, text=True, check=False
    )
    assert checked.stdout + checked.stderr == ""
    assert len(paths) > 10


@pytest.fixture(scope="module")
def travelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a job submitted with `--working-dir .`, packed by Ray and unpacked."""
    folder = tmp_path_factory.mktemp("job")
    package = folder / "package.zip"
    create_package(str(ROOT), package, include_gitignore=True, excludes=[".git", ".venv"])
    assert package.stat().st_size < TRAVEL_BYTES
    with zipfile.ZipFile(package) as content:
        content.extractall(folder / "unpacked")
    return folder / "unpacked"


def test_what_travels_is_small_and_has_no_secret(travelled: Path):
    files = [path for path in travelled.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < TRAVEL_BYTES
    names = {path.relative_to(travelled).as_posix() for path in files}
    assert not {
        name for name in names if name.startswith((".git/", ".venv/", "runs/", "datasets/"))
    }
    # Keys in files, by the names that such files have, and by what is in them.
    assert not {n for n in names if re.search(r"(^|/)(\.env|auth_token|credentials|.*\.pem)$", n)}
    key = re.compile(rb"(?:AKIA|ASIA)[A-Z0-9]{16}|-----BEGIN [A-Z ]*PRIVATE KEY")
    assert [path for path in files if key.search(path.read_bytes())] == []


# Runs a job and writes down which files it opens.
WATCHED = """
import runpy, sys
folder, *sys.argv[:] = sys.argv[1:]
sys.path.insert(0, folder)
opened = set()
sys.addaudithook(lambda event, what: opened.add(str(what[0])) if event == "open" else None)
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print("opened:", sorted(name.removeprefix(folder + "/") for name in opened))
"""


@pytest.mark.parametrize(
    "command",
    [
        "train.py voc_seg/edsr-x8/sr4ir --show",
        # Reads its space, and then finds no dataset.
        "tune.py tune_spaces/laptop.yaml drawn_cls/edsr-x4/sr4ir --data missing",
        "evaluate.py --help",
        "predict.py --help",
        "prepare_data.py --help",
        "drain_on_notice.py --help",
    ],
    ids=lambda command: command.partition(" ")[0],
)
def test_a_submitted_job_has_all_it_reads(travelled: Path, command: str):
    job, *arguments = command.split()
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, str(travelled), f"jobs/{job}", *arguments],
        cwd=travelled,
        env={"PATH": "/usr/bin:/bin", "HOME": str(travelled.parent), "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    told = done.stdout + done.stderr
    assert done.returncode == ("missing" in command), told
    if "missing" in command:
        assert "error: " in told
        assert "missing/" in told
    opened = set(ast.literal_eval(done.stdout.rpartition("opened: ")[2].splitlines()[0]))
    # Of its folder it opens code alone, and what the user names.
    own = {name for name in opened if not name.startswith("/") and (travelled / name).is_file()}
    assert f"jobs/{job}" in own
    assert {name for name in own if not name.endswith((".py", ".pyc"))} == set()
