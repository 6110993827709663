"""Where a bench takes place: servers that run for the length of a block, and `dialogctl load` against them."""

import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
from msgspec import Struct

from dialog_local.load.command import VOICE_PATH, Forks, Result

READY_S = 60.0  # for a server to answer
LEAVE_S = 20.0  # for one to end when told to
RAMP_S = 0.2  # from one call to the next: five new calls a second, as the goals have it
TOKEN = "token"
ACCOUNT = "AC" + "0" * 32
BIN = Path(sys.executable).parent
DIALOGCTL = str(BIN / "dialogctl")
ROOT = Path(__file__).parents[2]


class BenchFailed(Exception):
    """Nothing could be measured; the message says why."""


class Server(Struct, frozen=True):
    """A server that calls are placed at: its webhook, the command that places them, its process, and what it says."""

    webhook: str
    command: tuple[str, ...]
    pid: int
    log: Path


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextmanager
def process(log: Path, *command: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server for the length of the block, with its output in a file."""
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=output, cwd=ROOT) as started:
        try:
            yield started
        finally:
            started.terminate()
            try:
                started.wait(LEAVE_S)
            except subprocess.TimeoutExpired:
                started.send_signal(signal.SIGKILL)


def wait_ready(url: str, started: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until a server answers. Raises `BenchFailed` when it ends instead, or takes too long."""
    give_up_at = time.monotonic() + READY_S
    while time.monotonic() < give_up_at:
        try:
            urllib.request.urlopen(url, timeout=2).close()
        except OSError:
            if started.poll() is not None:
                raise BenchFailed(f"a server ended before it was ready; it said:\n{log.read_text()}") from None
            time.sleep(0.1)
        else:
            return
    raise BenchFailed(f"{url} is not ready after {READY_S:g} s; the server said:\n{log.read_text()}")


@contextmanager
def dialogd(directory: Path, agent: Path) -> Iterator[Server]:
    """Run a dialogd with this agent for the length of the block, its configuration and its log in `directory`.

    It takes calls however many processes wait for the processors: a bench has them wait.
    """
    listen, config, log = free_port(), directory / "dialog.toml", directory / "dialogd.log"
    config.write_text(
        f"""
[gateway]
listen = "127.0.0.1:{listen}"
public_url = "http://127.0.0.1:{listen}"
[twilio]
account_sid = "{ACCOUNT}"
auth_token = "{TOKEN}"
api_url = "http://127.0.0.1:{free_port()}"
[agent]
path = "{agent}"
[control]
socket = "{directory}/control.sock"
[calls]
max_load = 0
"""
    )
    with process(log, str(BIN / "dialogd"), "-c", str(config)) as started:
        wait_ready(f"http://127.0.0.1:{listen}/healthz", started, log)
        webhook = f"http://127.0.0.1:{listen}{VOICE_PATH}"
        yield Server(webhook, (DIALOGCTL, "-c", str(config), "load"), started.pid, log)


@contextmanager
def peer(directory: Path, python: Path, script: Path) -> Iterator[Server]:
    """Run another system's echo with the interpreter of its own environment; it is given a port."""
    port, log = free_port(), directory / f"{script.stem}.log"
    with process(log, str(python), str(script), str(port)) as started:
        wait_ready(f"http://127.0.0.1:{port}/healthz", started, log)
        url = f"http://127.0.0.1:{port}/twiml"
        yield Server(url, (DIALOGCTL, "load", "--url", url, "--token", TOKEN, "--pid", str(started.pid)), started.pid, log)


def load(server: Server, calls: int, seconds: float, ramp_s: float = RAMP_S) -> Result:
    """Place so many calls and measure. Calls that fail and frames that are lost are part of the result."""
    options = ("--calls", str(calls), "--seconds", str(seconds), "--ramp", str(ramp_s))
    return msgspec.json.decode(_dialogctl(server, *options), type=Result)


def time_workers(server: Server, calls: int) -> Forks:
    """Place so many calls one after another, and time how soon each one's worker is ready."""
    return msgspec.json.decode(_dialogctl(server, "--forks", str(calls)), type=Forks)


def _dialogctl(server: Server, *options: str) -> bytes:
    print(f"dialogctl load {' '.join(options)} …", file=sys.stderr)
    done = subprocess.run([*server.command, "--json", *options], capture_output=True, check=False)
    if not done.stdout:
        raise BenchFailed(f"{done.stderr.decode().strip()}\nthe server said:\n{server.log.read_text()}")
    return done.stdout
