"""Twilio's REST API as far as tests need it: remembers what was asked, answers as told."""

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl


@dataclass(frozen=True)
class Asked:
    """One request. `form` has the last of a field's values, `pairs` all of them."""

    method: str
    path: str
    authorization: str
    form: dict[str, str]
    pairs: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Answer:
    """One answer."""

    status: int = 200
    body: str | bytes = ""
    headers: Mapping[str, str] = field(default_factory=dict)


def refusal(status: int, code: int, message: str, **headers: str) -> Answer:
    """Return an error as Twilio writes them; in `headers`, _ stands for -."""
    body = json.dumps({"code": code, "message": message, "status": status, "more_info": "https://example.test"})
    return Answer(status, body, {name.replace("_", "-"): value for name, value in headers.items()})


@dataclass
class TwilioApi:
    """A server on loopback. `answers` come first, one a request; then `status` and `body` for every other.

    While `speaks` is not set, no request is answered.
    """

    url: str = ""
    status: int = 200
    body: str = field(default_factory=lambda: json.dumps({"status": "completed"}))
    asked: list[Asked] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    speaks: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.speaks.set()

    def fail(self, status: int, code: int, message: str) -> None:
        """Answer with an error as Twilio writes them from now on."""
        refused = refusal(status, code, message)
        self.status, self.body = refused.status, str(refused.body)

    def answer(self) -> Answer:
        """Return the next answer."""
        return self.answers.pop(0) if self.answers else Answer(self.status, self.body)


@contextmanager
def twilio_api() -> Iterator[TwilioApi]:
    """Serve a Twilio API until the block is left."""
    api = TwilioApi()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self) -> None:
            pairs = tuple(parse_qsl(self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()))
            api.asked.append(Asked(self.command, self.path, self.headers.get("Authorization", ""), dict(pairs), pairs))
            answer = api.answer()
            api.speaks.wait()
            body = answer.body.encode() if isinstance(answer.body, str) else answer.body
            self.send_response(answer.status)
            for name, value in {"Content-Type": "application/json", **answer.headers}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(body)

        def __getattr__(self, name: str) -> Callable[[], None]:
            """Answer every method: `do_GET` and so on."""
            if name.startswith("do_"):
                return self._answer
            raise AttributeError(name)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        api.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, name="Twilio's API")
        thread.start()
        try:
            yield api
        finally:
            api.speaks.set()
            server.shutdown()
            thread.join()
