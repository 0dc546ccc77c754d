"""Fixtures shared by all tests: S3 servers, real data, parity records, a process group of one."""

import json
import os
import platform
import re
import secrets
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import boto3
import hypothesis
import numpy as np
import pytest
import torch.distributed as dist
from PIL import Image

# The same examples on every machine and every day, however slow it is.
hypothesis.settings.register_profile("suite", derandomize=True, deadline=None, max_examples=60)
hypothesis.settings.load_profile("suite")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--real-data", metavar="DIR", help="folder with the real datasets")
    parser.addoption("--parity", metavar="DIR", help="folder with records of the published method")
    parser.addoption("--s3rver", metavar="DIR", help="folder with s3rver in its node_modules")
    parser.addoption("--chromium", metavar="PATH", help="a Chromium, to look at pages with")
    parser.addoption("--record", metavar="DIR", help="folder for the results of long tests")
    parser.addoption("--write-golden", action="store_true", help="store the golden losses anew")


def _folder(request: pytest.FixtureRequest, option: str) -> Path:
    value = request.config.getoption(option)
    if not value:
        pytest.skip(f"needs {option} DIR")
    folder = Path(value).resolve()
    if not folder.is_dir():
        pytest.fail(f"{option} {folder}: no such folder")
    return folder


@pytest.fixture(scope="session")
def real_data(request: pytest.FixtureRequest) -> Path:
    """The folder given by ``--real-data``; skips without it."""
    return _folder(request, "--real-data")


@pytest.fixture(scope="session")
def parity(request: pytest.FixtureRequest) -> Path:
    """The folder given by ``--parity``; skips without it."""
    return _folder(request, "--parity")


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[[str, dict[str, Any]], None]:
    """Writes a result as DIR/NAME.json with the command and the machine (``--record=DIR``)."""

    def write(name: str, result: dict[str, Any]) -> None:
        folder = request.config.getoption("--record")
        if folder:
            test = request.node.nodeid
            command = f"pytest -m proof {test} --record={folder}"
            machine = f"{os.cpu_count()} CPUs, {platform.machine()}"
            content = {"command": command, "machine": machine} | result
            Path(folder, f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")

    return write


@pytest.fixture(scope="session")
def process_group() -> Iterator[None]:
    """Makes this process the only rank, as DeepSpeed needs it.

    Once in a session: DeepSpeed keeps the groups that it was first given.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_RANK", "0")
        # The rank processes compute on the CPU too.
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        yield
        dist.destroy_process_group()


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], str]]:
    """A real S3 server on loopback, which refuses requests that are not signed with its keys.

    Gives a function that makes a bucket and returns its URI.
    """
    program = [sys.executable, str(Path(__file__).with_name("s3_server.py"))]
    settings = {
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "testing",
        # Drawn, so that it can be looked for where no secret may be.
        "AWS_SECRET_ACCESS_KEY": secrets.token_hex(20),
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
            patch.delenv(name, raising=False)
        for name, value in settings.items():
            patch.setenv(name, value)
        with _served(program, tmp_path_factory.mktemp("s3")) as endpoint:
            patch.setenv("AWS_ENDPOINT_URL", endpoint)
            yield _make_bucket


@pytest.fixture
def aws(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Settings for an AWS of one's own on loopback, with EC2 and IAM, and for an empty home."""
    program = [sys.executable, "-c", "from moto.server import main; main(['-H127.0.0.1', '-p0'])"]
    with _served(program, tmp_path) as endpoint:
        region = dict.fromkeys(("AWS_REGION", "AWS_DEFAULT_REGION"), "us-west-2")
        keys = dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), "testing")
        yield region | keys | {"AWS_ENDPOINT_URL": endpoint, "HOME": str(tmp_path)}


_S3RVER = """
const S3rver = require("s3rver");
require("s3rver/lib/models/account").DUMMY_ACCOUNT
    .createKeyPair(process.env.AWS_ACCESS_KEY_ID, process.env.AWS_SECRET_ACCESS_KEY);
new S3rver({directory: process.argv[1], address: "127.0.0.1", port: 0, silent: true})
    .run((error, {port}) => console.log(`Running on http://127.0.0.1:${port}`));
"""


@pytest.fixture(scope="session")
def s3rver_endpoint(
    s3: object, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """An S3 server by other people, in the folder given by ``--s3rver``; skips without it."""
    folder = tmp_path_factory.mktemp("s3rver")
    # It makes the tokens of long listings with DES, which newer OpenSSLs keep for those who ask.
    node = ["node", "--openssl-legacy-provider"]
    program = [*node, "-e", _S3RVER, str(folder / "buckets")]
    with _served(program, folder, cwd=_folder(request, "--s3rver")) as endpoint:
        yield endpoint


@pytest.fixture
def s3rver(s3rver_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[], str]:
    """Like `s3`, on the other server, with the switch that such stores need."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3rver_endpoint)
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    monkeypatch.setenv("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required")
    return _make_bucket


def _make_bucket() -> str:
    bucket = f"bucket-{uuid.uuid4().hex[:12]}"
    with closing(boto3.client("s3")) as client:
        client.create_bucket(Bucket=bucket)
    return f"s3://{bucket}"


@contextmanager
def _served(program: list[str], folder: Path, cwd: Path | None = None) -> Iterator[str]:
    """Runs a server in a process of its own; gives its endpoint."""
    # Of its own, because pyarrow's destructors hold the GIL while they talk to the server.
    log = folder / "server.log"
    with log.open("wb") as sink:
        server = subprocess.Popen(program, cwd=cwd, stdout=sink, stderr=subprocess.STDOUT)
    try:
        yield _endpoint(server, log)
    finally:
        server.terminate()
        server.wait(20)


def _endpoint(server: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and server.poll() is None:
        match = re.search(r"Running on (http://127\.0\.0\.1:\d+)", log.read_text())
        if match:
            return match.group(1)
        time.sleep(0.1)
    raise RuntimeError(f"the S3 server did not start:\n{log.read_text()}")


def write_image(path: Path, seed: int, size: tuple[int, int] = (24, 20)) -> None:
    """Write a smooth random image of (height, width); the suffix says the format."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(coarse).resize((size[1], size[0]), Image.Resampling.BICUBIC).save(path)


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """An image-folder tree: 3 classes, 4 train and 2 val images each, one file that is no image."""
    root = tmp_path / "birds"
    for split, count in (("train", 4), ("val", 2)):
        for label, name in enumerate(("auk", "bat", "cat")):
            for i in range(count):
                suffix = "png" if i % 2 else "jpg"
                write_image(root / split / name / f"{i}.{suffix}", seed=100 * label + i)
    (root / "train" / "auk" / "notes.txt").write_text("no image\n")
    return root


@pytest.fixture
def sr_folder(tmp_path: Path) -> Path:
    """A plain folder of 12 PNG images of different sizes."""
    root = tmp_path / "plain"
    for i in range(12):
        write_image(root / f"{i:02d}.png", seed=i, size=(30 + i, 40))
    return root
