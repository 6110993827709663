"""Twilio's REST API as far as a hangup needs it: remembers what was asked, answers as told."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl


@dataclass(frozen=True)
class Asked:
    """One request."""

    method: str
    path: str
    authorization: str
    form: dict[str, str]


@dataclass
class TwilioApi:
    """A server on loopback. `status` and `body` are its next answers."""

    url: str = ""
    status: int = 200
    body: str = field(default_factory=lambda: json.dumps({"status": "completed"}))
    asked: list[Asked] = field(default_factory=list)

    def fail(self, status: int, code: int, message: str) -> None:
        """Answer with an error as Twilio writes them from now on."""
        self.status = status
        self.body = json.dumps({"code": code, "message": message, "status": status, "more_info": "https://example.test"})


@contextmanager
def twilio_api() -> Iterator[TwilioApi]:
    """Serve a Twilio API until the block is left."""
    api = TwilioApi()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self) -> None:
            form = dict(parse_qsl(self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()))
            api.asked.append(Asked(self.command, self.path, self.headers.get("Authorization", ""), form))
            body = api.body.encode()
            self.send_response(api.status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = _answer

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        api.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, name="Twilio's API")
        thread.start()
        try:
            yield api
        finally:
            server.shutdown()
            thread.join()
