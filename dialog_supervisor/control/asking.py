"""How dialogctl's commands ask a running dialogd: over its control socket, which the configuration names."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import msgspec

from dialog_supervisor.config import Config, load

CONFIG_VARIABLE = "DIALOG_CONFIG"  # how dialogctl's -c reaches the commands, also those that other rooms add
_ANSWER_TIMEOUT_S = 10.0
_NOT_FOUND = 404


class Failed(Exception):
    """The command cannot be done; the message says why, and what to do."""


def configuration() -> Config:
    """Return the configuration that the command line names. Raises `ConfigError`."""
    return load(os.environ[CONFIG_VARIABLE])


def ask(method: str, path: str, *, timeout_s: float = _ANSWER_TIMEOUT_S) -> Any:
    """Return what dialogd answers: what its JSON says, or text. Raises `Failed`."""
    with _connected(timeout_s) as client:
        try:
            response = client.request(method, path)
        except httpx.ReadTimeout:
            raise Failed(f"dialogd has not answered {method} {path} within {timeout_s:g} s; its log may say why") from None
    if response.is_error:
        raise Failed(_error(response))
    return response.json() if response.headers["content-type"] == "application/json" else response.text


def _error(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"])
    except (ValueError, LookupError, TypeError):
        return f"what answers is no dialogd of this version: {response.status_code} {response.text[:200]!r}"


def ask_lines(path: str) -> Iterator[str] | None:
    """Return the lines of an answer as they come, until dialogd says no more; None if there is nothing. Raises `Failed`."""
    lines = _lines(path)
    return lines if next(lines) else None


def _lines(path: str) -> Iterator[str]:
    """Yield first whether there is anything, as text that is empty if not, and then line by line."""
    with _connected(None) as client, client.stream("GET", path) as response:
        yield "" if response.status_code == _NOT_FOUND else path
        yield from response.iter_lines()


@contextmanager
def _connected(timeout_s: float | None) -> Iterator[httpx.Client]:
    config = configuration()
    socket = config.control.socket
    try:
        transport = httpx.HTTPTransport(uds=str(socket))
        with httpx.Client(transport=transport, base_url="http://dialogd", timeout=timeout_s) as client:
            yield client
    except httpx.HTTPError as error:
        raise Failed(f"no dialogd answers at {socket} ({error}); start one with: dialogd -c {config.file}") from None


def print_json(value: Any) -> None:
    """Print a value for a program to read, and for people too."""
    print(msgspec.json.format(msgspec.json.encode(value)).decode())
