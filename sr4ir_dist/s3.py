"""The S3 clients, with their settings from the environment: the one place that reads them."""

import atexit
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from pyarrow import fs as pafs

from sr4ir_dist import faults
from sr4ir_dist.faults import StorageError

TIMEOUT_VARIABLE = "SR4IR_S3_TIMEOUT_S"
"""Says after how many seconds without a byte a request has failed; 30 by default."""
CHECKSUM_VARIABLES = ("AWS_REQUEST_CHECKSUM_CALCULATION", "AWS_RESPONSE_CHECKSUM_VALIDATION")
"""Set to `when_required`, they spare stores that know no newer checksums."""
WORKER_VARIABLES = (
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_PROFILE",
    "AWS_EC2_METADATA_DISABLED",
    *CHECKSUM_VARIABLES,
    TIMEOUT_VARIABLE,
)
"""What a worker on another node needs in order to reach the same bucket; never keys or tokens."""
_TIMEOUT_S, _CONNECT_TIMEOUT_S = 30, 10
# A filesystem fixes its settings when it is made, so other settings need another one.
_IDENTITY_VARIABLES = (*WORKER_VARIABLES, "AWS_ACCESS_KEY_ID", "AWS_SESSION_TOKEN")
_filesystems: dict[tuple[str | int | None, ...], pafs.S3FileSystem] = {}
# An S3 client that outlives the interpreter's shutdown has been seen to hang it.
atexit.register(_filesystems.clear)


def filesystem() -> pafs.S3FileSystem:
    """The filesystem of this process and the present settings of the environment.

    Raises:
        StorageError: the settings are broken; names the one that is.
    """
    # A client made before a fork must not be used, or even destroyed, after it.
    key = (os.getpid(), *(os.environ.get(name) for name in _IDENTITY_VARIABLES))
    if key not in _filesystems:
        endpoint, region = _endpoint_and_region()
        target = urlsplit(endpoint) if endpoint else None
        if target is not None and (target.scheme not in ("http", "https") or not target.netloc):
            raise StorageError(f"AWS_ENDPOINT_URL={endpoint}: expected http(s)://host[:port]")
        timeout, repeats = _timeout(), faults.PATIENCE.requests - 1
        _filesystems[key] = pafs.S3FileSystem(
            endpoint_override=target.netloc if target else None,
            scheme=target.scheme if target else "https",
            region=region,
            allow_delayed_open=True,  # one PUT for a small file instead of a multipart upload
            request_timeout=timeout,
            connect_timeout=min(timeout, _CONNECT_TIMEOUT_S),
            # Not the standard strategy, whose budget of repeats an outage uses up for good. What
            # this one calls attempts are those after the first.
            retry_strategy=pafs.AwsDefaultS3RetryStrategy(max_attempts=repeats),
        )
    return _filesystems[key]


@contextmanager
def client(**settings: Any) -> Iterator[Any]:
    """A boto3 client with the filesystem's settings, for what the filesystem cannot do.

    Args:
        **settings: of `botocore.config.Config`, besides timeouts and repeats.

    Raises:
        StorageError: the settings are broken; names the one that is.
    """
    import boto3
    from botocore.config import Config

    endpoint, region = _endpoint_and_region()
    timeout = _timeout()
    config = Config(
        read_timeout=timeout,
        connect_timeout=min(timeout, _CONNECT_TIMEOUT_S),
        retries={"total_max_attempts": faults.PATIENCE.requests, "mode": "standard"},
        **settings,
    )
    # A session of its own: boto3's default one keeps the credentials that it found first.
    session = boto3.Session()
    made = session.client("s3", endpoint_url=endpoint, region_name=region, config=config)
    try:
        yield made
    finally:
        made.close()


def signed_url(made: Any, uri: str, seconds: int) -> str:
    """A URL by which anyone can read a file for so long.

    Args:
        made: of `client(signature_version="s3v4")`.
        uri: the file, as `s3://bucket/key`.
        seconds: how long.
    """
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return made.generate_presigned_url("get_object", {"Bucket": bucket, "Key": key}, seconds)


def _timeout() -> float:
    text = os.environ.get(TIMEOUT_VARIABLE, str(_TIMEOUT_S))
    try:
        timeout = float(text)
    except ValueError:
        timeout = 0.0
    if not 0 < timeout < float("inf"):
        raise StorageError(f"{TIMEOUT_VARIABLE}={text}: expected seconds, above 0")
    return timeout


def _endpoint_and_region() -> tuple[str | None, str]:
    from botocore.exceptions import BotoCoreError
    from botocore.session import Session

    try:
        profile = Session().get_scoped_config()
    except BotoCoreError as error:
        raise StorageError(f"AWS settings: {error}") from error
    variables = os.environ.get
    endpoint = variables("AWS_ENDPOINT_URL_S3") or variables("AWS_ENDPOINT_URL")
    region = variables("AWS_REGION") or variables("AWS_DEFAULT_REGION")
    # Without a region the client asks the cloud's metadata service, which stalls outside of it.
    return endpoint or profile.get("endpoint_url"), region or profile.get("region") or "us-east-1"
