"""Published weights by name: which there are, where they lie, and how they are fetched once."""

from __future__ import annotations

import hashlib
import http.client
import re
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from torchvision.models import get_model_weights

from sr4ir_dist import storage
from sr4ir_dist.networks.pretrained import WeightsError, read_tensors

CONNECT_SECONDS = 20
"""How long a host may take to answer, and to send the next piece."""
_CHUNK = 1 << 20
_NAME = re.compile(r"[A-Z0-9_]+")
# torchvision and EDSR-PyTorch end a file's name with the start of its SHA-256.
_DIGEST = re.compile(r"-([0-9a-f]{8})$")
# network -> torchvision's models whose weights it can start from
_TORCHVISION = {
    "resnet18": ("resnet18",),
    "deeplabv3_mobilenet_v3_large": ("mobilenet_v3_large", "deeplabv3_mobilenet_v3_large"),
    "deeplabv3_resnet50": ("resnet50", "deeplabv3_resnet50"),
    "fasterrcnn_mobilenet_v3_large_fpn": (
        "mobilenet_v3_large",
        "fasterrcnn_mobilenet_v3_large_fpn",
    ),
    "vgg16": ("vgg16",),
    "vgg19": ("vgg19",),
}
# Caffe's VGG16, which expects images in another range.
_UNFIT = ("IMAGENET1K_FEATURES",)
_EDSR = "https://cv.snu.ac.kr/research/EDSR/models/edsr_baseline_"
_SWINIR = (
    "https://github.com/JingyunLiang/SwinIR/releases/download/v0.0/"
    "001_classicalSR_DIV2K_s48w8_SwinIR-M_"
)
_SR: dict[tuple[str, int | None], str] = {
    ("edsr", 2): f"{_EDSR}x2-1bc95232.pt",
    ("edsr", 4): f"{_EDSR}x4-6b446fab.pt",
    **{("swinir", scale): f"{_SWINIR}x{scale}.pth" for scale in (2, 4, 8)},
}


def is_name(text: str) -> bool:
    """Whether a setting is a name of published weights, and no path: only A-Z, 0-9 and `_`."""
    return _NAME.fullmatch(text) is not None


def names(network: str, scale: int | None = None) -> dict[str, str]:
    """Lists the published weights of a network: name -> URL.

    Args:
        network: A task network, `vgg16`, `vgg19`, `edsr` or `swinir`.
        scale: Of an SR network.
    """
    if (network, scale) in _SR:
        return {"DIV2K": _SR[network, scale]}
    return {
        weights.name: weights.url
        for model in _TORCHVISION.get(network, ())
        for weights in get_model_weights(model)
        if weights.name not in _UNFIT
    }


def find(name: str, network: str, *, field: str, scale: int | None = None) -> str:
    """Returns the URL of published weights; nothing is fetched.

    Args:
        name: As in `names`, which `IMAGENET1K_V1` or `DIV2K` are.
        network: As in `names`.
        field: The setting that names the weights, for messages: `sr.weights`.
        scale: Of an SR network.

    Raises:
        WeightsError: This network has no such weights; the message lists those that it has.
    """
    known = names(network, scale)
    if name in known:
        return known[name]
    if (name, network, scale) == ("DIV2K", "edsr", 8):
        raise WeightsError(
            f"{field}={name}: EDSR's weights for x8 are not public. Pre-train them "
            f"(folder_sr/edsr-x8/pretrain) and give that run by --set {field}=URI, or start from "
            f"the x4 file by --set {field}=FILE --set sr.partial=true"
        )
    which = network if scale is None else f"{network} x{scale}"
    there = f"choose from {list(known)}" if known else "there are none"
    raise WeightsError(
        f"{field}={name}: no published weights of {which} have this name; {there}, or give a file "
        f"by --set {field}=FILE"
    )


def download(url: str, path: Path) -> None:
    """Fetches a file over HTTP, in one try.

    Args:
        url: Where it lies.
        path: Where it goes; half a file may be left there.

    Raises:
        OSError: No connection, a status that is no success, silence for 20 seconds, or an end
            before the announced length.
    """
    try:
        with urllib.request.urlopen(url, timeout=CONNECT_SECONDS) as response:
            with path.open("wb") as sink:
                while chunk := response.read(_CHUNK):
                    sink.write(chunk)
                arrived = sink.tell()
            announced = response.headers.get("Content-Length")
    except urllib.error.HTTPError as error:
        error.close()
        raise OSError(f"the server answers {error.code} {error.reason}") from error
    except urllib.error.URLError as error:
        raise OSError(str(error.reason)) from error
    except http.client.HTTPException as error:
        raise OSError(f"{type(error).__name__}: {error}") from error
    if announced is not None and arrived != int(announced):
        raise OSError(f"{arrived} of {announced} bytes arrived")


def resolve(
    name: str,
    network: str,
    *,
    field: str,
    storage_uri: str,
    scale: int | None = None,
    say: Callable[[str], object] = lambda text: None,
    download: Callable[[str, Path], None] = download,
) -> str:
    """Returns where published weights lie in the storage, fetching them if they are not there yet.

    Call it on the driver: workers may have no network, and read `<storage_uri>/weights/<file>`.
    The file appears there whole or not at all, and only when its SHA-256 begins as its name says;
    where the name says nothing, when it can be read as weights.

    Args:
        name: As in `names`.
        network: As in `names`.
        field: The setting that names the weights, for messages: `task.weights`.
        storage_uri: Where runs are stored.
        scale: Of an SR network.
        say: Is told that a file is being fetched.
        download: Fetches a URL into a local file, and raises OSError where it cannot.

    Raises:
        WeightsError: Unknown name, before anything else happens; or the file could not be fetched
            or is not what it should be: the message names the URL and how to give a file instead.
        StorageError: The storage cannot be written.
    """
    url = find(name, network, field=field, scale=scale)
    file = PurePosixPath(url).name
    uri = storage.join(storage_uri, "weights", file)
    if storage.exists(uri):
        return uri
    say(f"{field}={name}: fetching {url} into {uri}, this once")
    with tempfile.TemporaryDirectory(prefix="weights-") as folder:
        path = Path(folder) / file
        try:
            download(url, path)
            _check(path)
        except OSError as error:
            raise WeightsError(
                f"{field}={name}: {url} could not be fetched: {error}. Fetch that file elsewhere "
                f"and give it by --set {field}=FILE"
            ) from error
        storage.upload(path, uri)
    return uri


def _check(path: Path) -> None:
    """Raises OSError when a fetched file is not what its name says."""
    stated = _DIGEST.search(path.stem)
    if stated is None:
        try:
            read_tensors(str(path))
        except WeightsError as error:
            raise OSError(f"what arrived are no weights ({error})") from error
        return
    with path.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    if not digest.startswith(stated[1]):
        raise OSError(f"the SHA-256 of what arrived starts with {digest[:8]}, not {stated[1]}")
