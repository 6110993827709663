"""A system with systemd as its process 1, booted by `deploy/systemd/boot`, in which dialogd runs as a service."""

import json
import re
import socket
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import trio

from tests.e2e.control import PATIENCE_S, Controlled, LogLine
from tests.e2e.daemon import PUBLIC_URL
from tests.e2e.site import checkpoint
from tests.e2e.twilio_client import Place

BOOT = Path(__file__).parents[2] / "deploy" / "systemd" / "boot"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"  # the system's, not that of who runs the tests
GROUPS = Path("/sys/fs/cgroup")  # as the system sees it

KEPT = """
import json, sqlite3
store = sqlite3.connect("file:/var/lib/dialog/calls.sqlite?mode=ro", uri=True)
print(json.dumps(dict(store.execute("SELECT call_id, CAST(record AS TEXT) FROM calls"))))
"""


class Machine(Controlled):
    """The system, by the id that its process 1 has outside; dialogd listens at `port` of this machine."""

    def __init__(self, pid: int, port: int) -> None:
        self.root = Path(f"/proc/{pid}/root")
        self.place = Place(PUBLIC_URL, port)
        self._enter = ["nsenter", "--target", str(pid), "--all", "env", f"PATH={PATH}", "timeout", str(PATIENCE_S)]

    @property
    def control(self) -> Path:
        return self.root / "run/dialog/control.sock"

    @property
    def text(self) -> str:
        return self.journal("--unit=dialogd")

    def run(self, *command: str) -> str:
        """Run a command in the system and return what it writes; it must succeed."""
        done = subprocess.run([*self._enter, *command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout

    async def does(self, *command: str) -> str:
        """Do the same without holding up the loop."""
        return await trio.to_thread.run_sync(lambda: self.run(*command))

    def journal(self, *matches: str) -> str:
        """Return the lines of the journal that match."""
        self.run("journalctl", "--sync")
        return self.run("journalctl", "--output=cat", "--no-pager", *matches)

    def show(self, name: str, unit: str = "dialogd") -> str:
        """Return a property of the service."""
        return self.run("systemctl", "show", "--value", f"--property={name}", unit).strip()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until something is so in the system; no event tells of it here."""
        with trio.fail_after(PATIENCE_S):
            while not await trio.to_thread.run_sync(condition):  # noqa: ASYNC110
                await trio.sleep(0.05)

    async def logged(self, **wanted: object) -> LogLine:
        """Wait for a line of the log, by its fields in the journal."""
        return await trio.to_thread.run_sync(
            self._await_line, [f"DIALOG_{key.upper()}={value}" for key, value in wanted.items()]
        )

    def _await_line(self, matches: list[str]) -> LogLine:
        command = [*self._enter, "journalctl", "--follow", "--lines=all", "--output=cat", *matches]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as following:
            assert following.stdout is not None
            line = following.stdout.readline()
            following.kill()
        assert line, f"not logged in {PATIENCE_S} s: {matches}\n{self.text}"
        found: LogLine = json.loads(line)
        return found

    def kept_calls(self) -> dict[str, bytes]:
        """Return the calls that the store has, and the last checkpoint of each."""
        rows: dict[str, str] = json.loads(self.run("/opt/dialog/venv/bin/python", "-c", KEPT))
        return {call_id: checkpoint(json.loads(record)) for call_id, record in rows.items()}

    def processes(self) -> list[str]:
        """Return the ids that the service's processes have in the system."""
        found = self.run("find", str(GROUPS / "system.slice"), "-path", "*/dialogd.service*", "-name", "cgroup.procs")
        return [pid for listing in found.split() for pid in self.run("cat", listing).split()]


@contextmanager
def booted(files: Path, port: int) -> Iterator[Machine]:
    """Have a system with these files laid over it, whose dialogd has started."""
    command = [str(BOOT), "--with", str(files), "cat"]  # which ends when nobody is there any more
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as boot:
        assert boot.stdin is not None
        assert boot.stderr is not None
        said = []
        for line in boot.stderr:
            said.append(line)
            if found := re.search(r"below process (\d+)", line):
                yield Machine(int(found[1]), port)
                boot.stdin.close()
                break
        rest = boot.stderr.read()
    assert boot.returncode == 0, "".join(said) + rest


def free_port() -> int:
    """Return a port that nobody listens at."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]
        return port


def write(root: Path, files: Mapping[str, str]) -> Path:
    """Write files by their paths below a directory, and return that."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root
