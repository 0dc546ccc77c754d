import hashlib
import io
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from sr4ir_dist import storage
from sr4ir_dist.networks import published
from sr4ir_dist.networks.edsr import EDSR
from sr4ir_dist.networks.pretrained import WeightsError, load_weights
from sr4ir_dist.networks.swinir import SwinIR


class Host:
    """A web server on loopback that keeps count of what it was asked for."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.announce_more = 0
        self.silent = threading.Event()
        self.silent.set()
        host = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                host.asked.append(self.path)
                host.silent.wait(20)
                body = host.files.get(self.path)
                if body is None:
                    self.send_error(404)
                    return
                self.send_response(200)
                self.send_header("Content-Length", str(len(body) + host.announce_more))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,))
        self.thread.start()

    def close(self) -> None:
        self.silent.set()
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    host = Host()
    yield host
    host.close()


def saved(module: torch.nn.Module) -> bytes:
    content = io.BytesIO()
    torch.save({"params": module.state_dict()}, content)
    return content.getvalue()


def small() -> EDSR:
    return EDSR(4, blocks=1, features=4)


@pytest.fixture
def serve(host: Host, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Puts a body on the host as EDSR's x4 file, by default with its digest; gives the URL."""

    def put(body: bytes, name: str | None = None) -> str:
        name = name or f"edsr_x4-{hashlib.sha256(body).hexdigest()[:8]}.pt"
        host.files[f"/{name}"] = body
        monkeypatch.setitem(published._SR, ("edsr", 4), f"{host.url}/{name}")
        return f"{host.url}/{name}"

    return put


def resolve(folder: Path | str, **settings: object) -> str:
    return published.resolve(
        "DIV2K", "edsr", field="sr.weights", scale=4, storage_uri=str(folder), **settings
    )


def test_fetches_once_into_the_storage(
    host: Host, serve: Callable[..., str], tmp_path: Path
) -> None:
    network, said = small(), []
    url = serve(saved(network))
    uri = resolve(tmp_path, say=said.append)
    assert uri == f"{tmp_path}/weights/{url.rpartition('/')[2]}"
    assert said == [f"sr.weights=DIV2K: fetching {url} into {uri}, this once"]
    target = small()
    assert load_weights(target, uri).complete
    assert torch.equal(target.head[0].weight, network.head[0].weight)
    host.files.clear()
    assert resolve(tmp_path, say=said.append) == uri
    assert (len(host.asked), len(said)) == (1, 1)


def test_fetches_into_a_bucket(serve: Callable[..., str], s3: Callable[[], str]) -> None:
    serve(saved(small()))
    uri = resolve(f"{s3()}/runs")
    assert uri.startswith("s3://")
    assert storage.list_names(uri.rpartition("/")[0]) == [uri.rpartition("/")[2]]
    assert load_weights(small(), uri).complete


def refused(folder: Path, url: str) -> str:
    """The reason for which nothing was fetched; checks that nothing was left behind."""
    with pytest.raises(WeightsError) as caught:
        resolve(folder)
    message = str(caught.value)
    assert message.startswith(f"sr.weights=DIV2K: {url} could not be fetched: ")
    assert message.endswith("Fetch that file elsewhere and give it by --set sr.weights=FILE")
    assert storage.list_files(folder) == []
    return message


def test_another_digest_is_refused(serve: Callable[..., str], tmp_path: Path) -> None:
    body = saved(small())
    digest = hashlib.sha256(body).hexdigest()[:8]
    url = serve(body, "edsr_x4-00000000.pt")
    assert f"what arrived starts with {digest}, not 00000000" in refused(tmp_path, url)


def test_half_a_body_is_refused(host: Host, serve: Callable[..., str], tmp_path: Path) -> None:
    body = saved(small())
    url = serve(body, "edsr_x4.pt")
    host.announce_more = 1000
    assert f"{len(body)} of {len(body) + 1000} bytes arrived" in refused(tmp_path, url)


@pytest.mark.parametrize("body", [saved(small())[:-500], b"<html>Sign in</html>", b""])
def test_without_a_digest_only_weights_are_taken(
    body: bytes, serve: Callable[..., str], tmp_path: Path
) -> None:
    assert "what arrived are no weights" in refused(tmp_path, serve(body, "edsr_x4.pt"))


def test_without_a_network_the_message_says_what_to_do(
    host: Host,
    serve: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url = serve(b"")
    host.files.clear()
    assert "the server answers 404 Not Found" in refused(tmp_path, url)
    monkeypatch.setattr(published, "CONNECT_SECONDS", 0.3)
    host.silent.clear()
    assert "timed out" in refused(tmp_path, url)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/edsr.pt"
        monkeypatch.setitem(published._SR, ("edsr", 4), url)
        assert "refused" in refused(tmp_path, url)
    monkeypatch.setitem(published._SR, ("edsr", 4), "http://no-such-host.invalid/edsr.pt")
    refused(tmp_path, "http://no-such-host.invalid/edsr.pt")


def test_another_way_to_download(serve: Callable[..., str], tmp_path: Path) -> None:
    body = saved(small())
    url, asked = serve(body), []

    def download(source: str, path: Path) -> None:
        asked.append(source)
        path.write_bytes(body)

    assert storage.read_bytes(resolve(tmp_path, download=download)) == body
    assert asked == [url]


def test_unknown_names_are_refused_before_anything_else(tmp_path: Path) -> None:
    def never(url: str, path: Path) -> None:
        raise AssertionError(f"fetched {url}")

    def message(name: str, network: str, field: str, scale: int | None = None) -> str:
        with pytest.raises(WeightsError) as caught:
            published.resolve(
                name,
                network,
                field=field,
                scale=scale,
                storage_uri=str(tmp_path / "runs"),
                download=never,
            )
        return str(caught.value)

    said = message("IMAGENET", "fasterrcnn_mobilenet_v3_large_fpn", "task.weights")
    assert "task.weights=IMAGENET: no published weights of fasterrcnn_mobilenet" in said
    assert "['IMAGENET1K_V1', 'IMAGENET1K_V2', 'COCO_V1']" in said
    assert said.endswith("or give a file by --set task.weights=FILE")
    assert "choose from ['IMAGENET1K_V1']" in message("IMAGENET1K_FEATURES", "vgg16", "lpips")
    assert "of swinir x4 have this name; choose from ['DIV2K']" in message(
        "DF2K", "swinir", "sr.weights", 4
    )
    assert "of bicubic x4 have this name; there are none" in message(
        "DIV2K", "bicubic", "sr.weights", 4
    )
    said = message("DIV2K", "edsr", "sr.weights", 8)
    assert "not public" in said
    assert "(folder_sr/edsr-x8/pretrain)" in said
    assert "--set sr.partial=true" in said
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("network", "scale", "files"),
    [
        ("edsr", 2, {"DIV2K": "edsr_baseline_x2-1bc95232.pt"}),
        ("edsr", 4, {"DIV2K": "edsr_baseline_x4-6b446fab.pt"}),
        ("edsr", 8, {}),
        *(
            ("swinir", s, {"DIV2K": f"001_classicalSR_DIV2K_s48w8_SwinIR-M_x{s}.pth"})
            for s in (2, 4, 8)
        ),
        ("resnet18", None, {"IMAGENET1K_V1": "resnet18-f37072fd.pth"}),
        (
            "deeplabv3_resnet50",
            None,
            {
                "IMAGENET1K_V1": "resnet50-0676ba61.pth",
                "IMAGENET1K_V2": "resnet50-11ad3fa6.pth",
                "COCO_WITH_VOC_LABELS_V1": "deeplabv3_resnet50_coco-cd0a2569.pth",
            },
        ),
        (
            "deeplabv3_mobilenet_v3_large",
            None,
            {
                "IMAGENET1K_V1": "mobilenet_v3_large-8738ca79.pth",
                "IMAGENET1K_V2": "mobilenet_v3_large-5c1a4163.pth",
                "COCO_WITH_VOC_LABELS_V1": "deeplabv3_mobilenet_v3_large-fc3c493d.pth",
            },
        ),
        ("vgg16", None, {"IMAGENET1K_V1": "vgg16-397923af.pth"}),
        ("vgg19", None, {"IMAGENET1K_V1": "vgg19-dcbb9e9d.pth"}),
        ("bilinear", 4, {}),
    ],
)
def test_what_is_published(network: str, scale: int | None, files: dict[str, str]) -> None:
    urls = published.names(network, scale)
    assert {name: url.rpartition("/")[2] for name, url in urls.items()} == files
    assert all(url.startswith("https://") for url in urls.values())
    digests = [published._DIGEST.search(Path(file).stem) is not None for file in files.values()]
    assert digests == [network != "swinir"] * len(files)


def test_names_are_no_paths() -> None:
    assert published.is_name("IMAGENET1K_V1")
    assert published.is_name("DIV2K")
    for text in ("weights.pt", "runs", "s3://BUCKET", "/DIV2K", "DIV2K\n", ""):
        assert not published.is_name(text)


def test_a_public_swinir_file_of_another_scale_says_what_differs(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"blocks": 1, "features": 6, "depth": 2, "reconstruction": 2}
    host.files["/swinir_x4.pth"] = saved(SwinIR(4, **sizes))
    monkeypatch.setitem(published._SR, ("swinir", 4), f"{host.url}/swinir_x4.pth")
    uri = published.resolve(
        "DIV2K", "swinir", field="sr.weights", scale=4, storage_uri=str(tmp_path)
    )
    assert load_weights(SwinIR(4, **sizes), uri).complete
    with pytest.raises(WeightsError, match="missing: upsample.4.weight, upsample.4.bias\n"):
        load_weights(SwinIR(8, **sizes), uri)
