"""A proxy in front of an S3 server that spoils some of the replies, in a process of its own.

`FaultProxy` starts it for a test. It hits the drawn share of the requests, each kind in turn:

- `slowdown`, `internal`: 503 SlowDown, 500 InternalError; the request does not reach the server.
- `checksums`: 501 NotImplemented, for requests that bring the newer integrity checksums alone.
- `reset`: the request is carried out, and then the connection is reset.
- `silent`: the request is carried out, and nothing is ever said about it.
- `stall`, `short`: half of the reply's body comes, or where there is none its first line, and then
  nothing more, or the connection's end.
- `flip`: one bit of the reply's body is another.
"""

import argparse
import http.client
import itertools
import random
import socket
import struct
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

STATUS_KINDS = {
    "slowdown": (503, "SlowDown"),
    "internal": (500, "InternalError"),
    "checksums": (501, "NotImplemented"),
}
CHECKSUM = "x-amz-sdk-checksum-algorithm"
KINDS = ("slowdown", "internal", "reset", "silent", "short", "stall")


class FaultProxy:
    """A running proxy; `close` it.

    Args:
        upstream: the S3 server's endpoint.
        folder: where the log of requests is kept.
        kinds: the faults, which come in turn.
        share: of the requests that are hit.
        only: hits requests alone whose method and path contain this.
        limit: hits no more requests than this.
        seed: says which requests are hit.

    Attributes:
        endpoint: its URL.
    """

    def __init__(
        self,
        upstream: str,
        folder: Path,
        *,
        kinds: tuple[str, ...] = KINDS,
        share: float = 1.0,
        only: str = "",
        limit: int = sys.maxsize,
        seed: int = 0,
    ) -> None:
        self._log = folder / f"requests-{uuid.uuid4().hex}.log"
        options = {"kinds": ",".join(kinds), "share": share, "only": only, "limit": limit}
        options |= {"seed": seed, "log": self._log}
        self._process = subprocess.Popen(
            [sys.executable, __file__, upstream, *(f"--{k}={v}" for k, v in options.items())],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        self.endpoint = self._process.stdout.readline().strip()

    def requests(self, part: str = "") -> list[tuple[str, str]]:
        """The fault, or "", and the method and path of all requests so far that hold `part`."""
        lines = [line.split(" ", 1) for line in self._log.read_text().splitlines()]
        return [(fault.strip("-"), request) for fault, request in lines if part in request]

    def close(self) -> None:
        """Ends it."""
        self._process.kill()
        self._process.communicate()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "_Server"

    def _handle(self) -> None:
        body = self._body()
        kind = self.server.draw(f"{self.command} {self.path}")
        if kind == "checksums" and not {"x-amz-trailer", CHECKSUM} & set(
            map(str.lower, self.headers)
        ):
            kind = ""
        if kind in STATUS_KINDS:
            status, code = STATUS_KINDS[kind]
            text = f"<Error><Code>{code}</Code><Message>fault</Message></Error>".encode()
            content = b"" if self.command == "HEAD" else text
            self.wfile.write(_head(status, [("Content-Length", str(len(content)))]) + content)
            return
        head, content = self._forward(body)
        half = len(content) // 2
        if kind == "flip" and content:
            content = content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :]
        if kind in ("", "flip"):
            self.wfile.write(head + content)
            return
        self.close_connection = True
        if kind == "reset":
            now = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, now)
            return
        if kind != "silent":
            self.wfile.write(head + content[:half] if content else head[: head.index(b"\n") + 1])
        if kind != "short":
            self.connection.recv(1)  # ends when the client has had enough

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _handle  # noqa: N815

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _forward(self, body: bytes) -> tuple[bytes, bytes]:
        upstream = http.client.HTTPConnection(self.server.upstream)
        try:
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in ("content-length", "expect", "transfer-encoding"):
                    upstream.putheader(name, value)
            upstream.putheader("Content-Length", str(len(body)))
            upstream.endheaders(body)
            reply = upstream.getresponse()
            content = reply.read()
        finally:
            upstream.close()
        headers = [(k, v) for k, v in reply.getheaders() if k.lower() != "connection"]
        return _head(reply.status, headers), content

    def log_message(self, format: str, *args: object) -> None:
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = urlsplit(options.upstream).netloc
        self._options = options
        self._kinds = itertools.cycle(options.kinds.split(","))
        self._left = options.limit
        self._random = random.Random(options.seed)
        self._lock = threading.Lock()
        self._log = options.log.open("w", buffering=1)

    def draw(self, request: str) -> str:
        """The fault of a request, "" for none."""
        with self._lock:
            drawn = self._random.random() < self._options.share
            hit = drawn and self._options.only in request and self._left > 0
            self._left -= hit
            kind = next(self._kinds) if hit else ""
            self._log.write(f"{kind or '-'} {request}\n")
        return kind

    def shutdown_request(self, request: socket.socket) -> None:  # type: ignore[override]
        """Closes a connection without a goodbye before it, which a reset has none of."""
        self.close_request(request)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away is what this server is for."""


def _head(status: int, headers: Iterable[tuple[str, str]]) -> bytes:
    lines = [f"HTTP/1.1 {status} {http.client.responses[status]}"]
    lines += [f"{name}: {value}" for name, value in headers]
    return "\r\n".join([*lines, "", ""]).encode()


def _main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("upstream")
    parser.add_argument("--log", type=Path)
    parser.add_argument("--kinds")
    parser.add_argument("--only")
    for name, kind in (("share", float), ("limit", int), ("seed", int)):
        parser.add_argument(f"--{name}", type=kind)
    with _Server(parser.parse_args()) as server:
        print(f"http://127.0.0.1:{server.server_address[1]}", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    _main()
