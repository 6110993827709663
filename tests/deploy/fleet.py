"""Two dialogds with one dialog.toml behind a real HAProxy, which has the configuration of `deploy/haproxy`."""

import csv
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import trio

from tests.deploy.machine import free_port
from tests.e2e.control import PATIENCE_S
from tests.e2e.daemon import PUBLIC_URL, Dialogd, write_agent, write_config
from tests.e2e.twilio_client import PhoneCall, Place

SHIPPED = Path(__file__).parents[2] / "deploy" / "haproxy" / "haproxy.cfg"
NODES = ("1", "2")


class Node(Dialogd):
    """One of the dialogds, by its name."""

    def __init__(self, config: Path, name: str) -> None:
        self.name = name
        super().__init__(config, {"DIALOG_NODE": name})

    @property
    def control(self) -> Path:
        return self.directory / f"{self.name}.sock"

    async def begun(self) -> list[str]:
        """Return the calls that it has."""
        return [str(call["id"]) for call in await self.ask("/calls")]


def haproxy() -> str:
    """Return where the program is, which is not on everybody's PATH."""
    found = shutil.which("haproxy", path=f"{os.environ['PATH']}:/usr/sbin")
    assert found, "this needs the Debian package haproxy; scripts/test installs it, as root"
    return found


class Server(NamedTuple):
    """A dialogd as HAProxy finds it, with the connections that it has there."""

    status: str
    connections: int


class Proxy:
    """A HAProxy; `place` is where the carrier calls."""

    def __init__(self, directory: Path, text: str, port: int) -> None:
        directory.mkdir()
        self.place = Place(PUBLIC_URL, port)
        self._admin = directory / "admin.sock"
        self._master = 0
        self.file = directory / "haproxy.cfg"
        self.file.write_text(text.replace("/run/haproxy/admin.sock", str(self._admin)))

    @contextmanager
    def running(self) -> Iterator["Proxy"]:
        """Run it until the block is left."""
        log = (self.file.parent / "log").open("w+")
        with log, subprocess.Popen([haproxy(), "-W", "-f", str(self.file)], stdout=log, stderr=log) as process:
            try:
                self._master = process.pid
                while not self._listens():
                    assert process.poll() is None, (self.file.parent / "log").read_text()
                    time.sleep(0.01)
                yield self
            finally:
                process.terminate()

    async def reload(self) -> None:
        """Have another process take over, as `systemctl reload haproxy` does, and wait until it has."""
        before = await self.told("show info")
        os.kill(self._master, signal.SIGUSR2)
        pid = re.compile(r"^Pid: \d+$", re.MULTILINE)
        with trio.fail_after(PATIENCE_S):
            while pid.findall(await self.told("show info")) == pid.findall(before):  # noqa: ASYNC110 - another process
                await trio.sleep(0.01)

    def _listens(self) -> bool:
        with socket.socket() as tried:
            return tried.connect_ex(("127.0.0.1", self.place.port)) == 0 and self._admin.exists()

    async def servers(self) -> dict[str, Server]:
        """Return how it finds each dialogd to be."""
        rows = csv.DictReader((await self.told("show stat")).removeprefix("# ").splitlines())
        return {row["svname"]: Server(row["status"], int(row["scur"])) for row in rows if row["svname"] in NODES}

    async def told(self, what: str) -> str:
        """Return what its stats socket answers to a command."""
        async with await trio.open_unix_socket(self._admin) as stream:
            await stream.send_all(f"{what}\n".encode())
            return b"".join([part async for part in stream]).decode()

    async def until(self, condition: Callable[[dict[str, Server]], bool]) -> None:
        """Wait until the dialogds are so."""
        with trio.fail_after(PATIENCE_S):
            while not condition(await self.servers()):  # noqa: ASYNC110 - another process
                await trio.sleep(0.01)

    async def finds(self, status: str, *names: str) -> None:
        """Wait until it finds dialogds to be UP, DOWN, or such as get nothing new (NOLB)."""
        await self.until(lambda found: all(found[name].status == status for name in names))


class Fleet:
    """The dialogds by their names, what is before them, and a client that is slow from the start."""

    def __init__(self, directory: Path, agent: str) -> None:
        self._directory = directory
        self._port = free_port()
        self.config = write_config(
            directory,
            write_agent(directory / "agent", agent),
            gateway={"listen": f"127.0.0.{{node}}:{self._port}", "public_url": PUBLIC_URL},
            control={"socket": str(directory / "{node}.sock")},
            store={"path": str(directory / "calls.sqlite")},
        )
        self.nodes: dict[str, Node] = {}
        self.proxy = self.configured("shipped")

    def configured(self, name: str, *changes: tuple[str, str]) -> Proxy:
        """Return a HAProxy with the shipped configuration, but for addresses, and these changes."""
        text, port = SHIPPED.read_text(), free_port()
        here = [(f"server {node}{more} 127.0.0.1:808{node}", node, more) for node in NODES for more in ("", "-full")]
        places = [(old, f"server {node}{more} 127.0.0.{node}:{self._port}") for old, node, more in here]
        for old, new in [("bind 127.0.0.1:8000", f"bind 127.0.0.1:{port}"), *places, *changes]:
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        if os.geteuid() != 0:  # only root becomes another
            text = re.sub(r"^ +(user|group) .*\n", "", text, flags=re.MULTILINE)
        return Proxy(self._directory / name, text, port)

    def start(self, name: str) -> Node:
        """Start a dialogd in the place of a dead one, and return when it takes calls."""
        self.nodes[name].__exit__()
        node = self.nodes[name] = Node(self.config, name)
        node.wait_for_log(event="ready", node=name)
        return node

    async def of(self, call: PhoneCall) -> Node:
        """Return which has a call."""
        [found] = [node for node in self.nodes.values() if call.sid in await node.begun()]
        return found


@contextmanager
def fleet(directory: Path, agent: str) -> Iterator[Fleet]:
    """Have all of it. The dialogds are stopped in the end."""
    found = Fleet(directory, agent)
    with ExitStack() as stack:
        try:
            for name in NODES:
                found.nodes[name] = Node(found.config, name)
            for name, node in found.nodes.items():
                node.wait_for_log(event="ready", node=name)
            stack.enter_context(found.proxy.running())
            yield found
            for node in found.nodes.values():
                node.stop()
        finally:
            for node in found.nodes.values():
                node.__exit__()
