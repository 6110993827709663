"""What a dialogd holds, seen from outside: its processes in /proc, its control API, its store and other files, its log."""

import json
import os
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from dialog_local.load.wire import Target
from scripts.benches.soak_verdict import Sample

READY_S = 60.0
STOP_S = 30.0
_ROOT = Path(__file__).parents[2]
_ACCOUNT_SID, _AUTH_TOKEN = "AC" + "0" * 32, "token"
_MB = 1e6
_CONFIG = """
[gateway]
listen = "127.0.0.1:0"
public_url = "http://voice.test"
[twilio]
account_sid = "{account_sid}"
auth_token = "{auth_token}"
api_url = "http://127.0.0.1:9"   # nobody is there: a call that dialogd had to end by the API shows as a warning
[agent]
path = "{agent}"
[calls]
max_load = 0   # what else the machine does is not what is tried here
[control]
socket = "{directory}/control.sock"
[log]
format = "json"
"""


class _Memory(NamedTuple):
    """In MB. `anonymous`: pages of no file, its own or shared with whom it was forked from or has forked."""

    pss: float = 0.0
    rss: float = 0.0
    anonymous: float = 0.0
    private: float = 0.0


class Dialogd:
    """A dialogd on examples/echo, configured as the unit does it: event logs and store in a state directory of its own."""

    def __init__(self, directory: Path) -> None:
        self._state, self._runtime = directory / "state", directory / "run"
        for place in (self._state, self._runtime):
            place.mkdir()
        self._log = directory / "dialogd.log"
        self._socket = directory / "control.sock"
        config = directory / "dialog.toml"
        agent = _ROOT / "examples" / "echo"
        config.write_text(_CONFIG.format(account_sid=_ACCOUNT_SID, auth_token=_AUTH_TOKEN, agent=agent, directory=directory))
        environ = os.environ | {"STATE_DIRECTORY": str(self._state), "RUNTIME_DIRECTORY": str(self._runtime)}
        command = [str(Path(sys.executable).with_name("dialogd")), "-c", str(config)]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(command, env=environ, stderr=log, stdin=subprocess.DEVNULL)
        self.pid = self._process.pid

    def ready(self) -> Target:
        """Wait until calls are taken, and return where to place them. Raises `RuntimeError` with its log."""
        give_up_at = time.monotonic() + READY_S
        while time.monotonic() < give_up_at and self._process.poll() is None:
            if (line := next((line for line in self.lines() if line.get("event") == "ready"), None)) is not None:
                host, _, port = line["listen"].rpartition(":")
                return Target("http://voice.test/twilio/voice", (host, int(port)), _ACCOUNT_SID, _AUTH_TOKEN)
            time.sleep(0.05)
        raise RuntimeError(f"dialogd did not start:\n{self._log.read_text()}")

    def stop(self) -> int:
        """Have it stop, and return its exit code."""
        self._process.terminate()
        try:
            return self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def lines(self) -> Iterator[dict[str, Any]]:
        """Yield its log."""
        for line in self._log.read_text(errors="replace").splitlines():
            with suppress(ValueError):
                yield json.loads(line)

    def complaints(self) -> Counter[str]:
        """Return how often each warning and error stands in its log; what is no line of its log counts too."""
        found: Counter[str] = Counter()
        for line in self._log.read_text(errors="replace").splitlines():
            try:
                said = json.loads(line)
            except ValueError:
                found[f"not a log line: {line[:80]}"] += 1
                continue
            if said["level"] in ("warning", "error", "critical"):
                why = "; ".join(str(said[key]) for key in ("reason", "detail") if key in said)
                found[f"{said['level']}: {said['event'].splitlines()[0]}{f' ({why})' if why else ''}"] += 1
        return found

    def sample(self, began_at: float) -> Sample:
        """Return all figures now. What is read from /proc comes first: the question about the status costs descriptors."""
        figures = self._processes()
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(self._socket)), base_url="http://dialogd") as client:
            status = client.get("/status").json()
        figures |= {name: float(status[name]) for name in ("tasks", "calls", "connections")}
        figures["groups"] = float(_directories(status["cgroup"]["path"]))
        figures |= self._files()
        return Sample(round(time.monotonic() - began_at, 2), figures)

    def _processes(self) -> dict[str, float]:
        templates = _children(self.pid)
        workers = [worker for template in templates for worker in _children(template)]
        own = _memory(self.pid)
        template = _sum([_memory(pid) for pid in templates])
        each = [
            found for pid in workers if (found := _memory(pid)).pss
        ]  # those that ended meanwhile are no part of the mean
        worker = _sum(each)
        return {
            "dialogd_pss": own.pss,
            "dialogd_rss": own.rss,
            "dialogd_anonymous": own.anonymous,
            "template_pss": template.pss,
            "template_rss": template.rss,
            "template_anonymous": template.anonymous,
            "worker_pss": round(worker.pss / max(1, len(each)), 3),
            "worker_rss": round(worker.rss / max(1, len(each)), 3),
            "worker_private": round(worker.private / max(1, len(each)), 3),
            "dialogd_fds": float(len(os.listdir(f"/proc/{self.pid}/fd"))),
            "template_fds": float(sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in templates)),
            "dialogd_threads": float(len(os.listdir(f"/proc/{self.pid}/task"))),
            "processes": float(1 + len(templates) + len(workers)),
        }

    def _files(self) -> dict[str, float]:
        store, events = self._state / "calls.sqlite", self._state / "events"
        kept = [path for place in (self._state, self._runtime) for path in place.rglob("*") if path.parent != events]
        with closing(sqlite3.connect(f"file:{store}?mode=ro", uri=True)) as connection:
            rows = [connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in ("calls", "lines")]
        sizes = [path.stat().st_size for path in self._state.glob("calls.sqlite*") if path.is_file()]
        return {
            "store_rows": float(sum(rows)),
            "store_mb": round(sum(sizes) / _MB, 3),
            "files": float(sum(not path.name.startswith("calls.sqlite") for path in kept)),
            "event_logs": float(len(os.listdir(events)) if events.is_dir() else 0),
        }


@contextmanager
def running() -> Iterator[Dialogd]:
    """Run a dialogd in a temporary directory until the block is left."""
    with tempfile.TemporaryDirectory(prefix="dialog-soak.") as directory:
        dialogd = Dialogd(Path(directory))
        try:
            yield dialogd
        finally:
            dialogd.stop()


def _children(pid: int) -> list[int]:
    """Return a process's children: one is listed with the thread that forked it (proc(5))."""
    found: list[int] = []
    with suppress(OSError):
        for listed in Path(f"/proc/{pid}/task").glob("*/children"):
            with suppress(OSError):
                found += map(int, listed.read_text().split())
    return found


def _memory(pid: int) -> _Memory:
    """Return what smaps_rollup says (proc_pid_smaps(5)); nothing of a process that is gone."""
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return _Memory()
    mb = {line.split(":")[0]: int(line.split()[1]) * 1024 / _MB for line in rollup.splitlines()[1:]}
    return _Memory(mb["Pss"], mb["Rss"], mb["Anonymous"], mb["Private_Clean"] + mb["Private_Dirty"])


def _sum(found: Sequence[_Memory]) -> _Memory:
    return _Memory(*(sum(column) for column in zip(*found, strict=True)))


def _directories(path: str | None) -> int:
    return 0 if path is None else sum(entry.is_dir() for entry in os.scandir(path))
