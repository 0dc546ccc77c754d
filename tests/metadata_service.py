"""A service on loopback that answers like EC2's instance metadata service (IMDSv2)."""

import json
import secrets
import threading
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Ec2Metadata:
    """Serves the spot notice to those who have its token.

    Attributes:
        token: what is asked for.
        tokens_given: how often it was.
        notice: what is answered, if there is a notice.
        silent: so many connections are closed without an answer.
        broken: so many answers thereafter are no JSON.
    """

    def __init__(self) -> None:
        self.token, self.tokens_given = secrets.token_hex(8), 0
        self.notice: str | None = None
        self.silent = self.broken = 0
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "Ec2Metadata":
        threading.Thread(target=self._server.serve_forever, args=(0.05,)).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def announce(self, what: str, seconds: float) -> None:
        """Gives notice from now on."""
        self.notice = self.action(what, datetime.now(UTC) + timedelta(seconds=seconds))

    @staticmethod
    def action(what: str, end: datetime) -> str:
        """A notice as EC2 words it."""
        return json.dumps({"action": what, "time": end.strftime("%Y-%m-%dT%H:%M:%SZ")})

    def answer(self, method: str, path: str, headers) -> tuple[int, str]:
        """The status and the text of an answer."""
        if (method, path) == ("PUT", "/latest/api/token"):
            if not 1 <= int(headers["X-aws-ec2-metadata-token-ttl-seconds"]) <= 21600:
                return 400, ""
            self.tokens_given += 1
            return 200, self.token
        if headers["X-aws-ec2-metadata-token"] != self.token:
            return 401, ""
        if path != "/latest/meta-data/spot/instance-action" or self.notice is None:
            return 404, ""
        if self.broken > 0:
            self.broken -= 1
            return 200, self.notice[: len(self.notice) // 2]
        return 200, self.notice


def _handler(service: Ec2Metadata) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if service.silent > 0:
                service.silent -= 1
                return
            status, text = service.answer(self.command, self.path, self.headers)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        do_PUT = do_GET  # noqa: N815 (the names are http.server's)

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler
