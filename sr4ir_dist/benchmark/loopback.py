"""An S3 server on this machine, in a process of its own, for measurements and tests."""

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

START_SECONDS = 60


@contextmanager
def s3_server() -> Iterator[dict[str, str]]:
    """Runs moto's S3 server on a free port of the loopback interface, empty and in memory.

    Gives the environment variables by which AWS libraries reach it. Needs the extra ``benchmark``
    or ``test``.

    Raises:
        RuntimeError: it did not start.
    """
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "server.log")
        # A process of its own: pyarrow's destructors hold the GIL while they talk to the server.
        with log.open("wb") as sink:
            server = subprocess.Popen(
                [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"],
                stdout=sink,
                stderr=subprocess.STDOUT,
            )
        try:
            yield {
                "AWS_ENDPOINT_URL": _endpoint(server, log),
                "AWS_REGION": "us-east-1",
                "AWS_DEFAULT_REGION": "us-east-1",
                "AWS_ACCESS_KEY_ID": "testing",
                "AWS_SECRET_ACCESS_KEY": "testing",
                "AWS_EC2_METADATA_DISABLED": "true",
                "AWS_CONFIG_FILE": os.devnull,
                "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            }
        finally:
            server.terminate()
            server.wait(20)


@contextmanager
def bucket_of(prefix: str | None) -> Iterator[str | None]:
    """The prefix to measure from; for `loopback` there is a server as long as this is open."""
    if prefix != "loopback":
        yield prefix
        return
    import boto3

    with s3_server() as environment:
        os.environ.update(environment)
        boto3.client("s3").create_bucket(Bucket="benchmark")
        yield "s3://benchmark/data"


def _endpoint(server: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        match = re.search(r"Running on (http://127\.0\.0\.1:\d+)", log.read_text())
        if match:
            return match.group(1)
        time.sleep(0.1)
    raise RuntimeError(f"the S3 server did not start:\n{log.read_text()}")
