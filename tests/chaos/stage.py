"""Where a fault is played: one dialogd, the phone company that calls it, and what they leave behind."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, TypeAlias

import trio
from msgspec import Struct

from dialog_local.carrier.company import PhoneCompany
from dialog_local.carrier.phonecall import Call
from tests.chaos.days import HOURS
from tests.chaos.verdict import FALLBACK
from tests.e2e.control import LogLine
from tests.e2e.daemon import ACCOUNT_SID, AUTH_TOKEN, PUBLIC_URL, Dialogd, write_config

DESK = Path(__file__).with_name("desk")
CALLER, CALLEE = "+15550001111", "+15550002222"
SHIM = Path(__file__).with_name("clock.c")
RESTART_S = 1.0  # RestartSec= of deploy/systemd/dialogd.service
_BACKLOG = 128
_LOOK_S = 2.5  # between two looks: each leaves a connection behind that dialogd closes a little later
SETTLING_S = 10.0  # for what ends by and by: kept-alive connections, templates


Traces: TypeAlias = Counter[str]  # what a dialogd takes of the machine, by kind


class Props(Struct, frozen=True):
    """What a fault needs. `settings` of dialog.toml; a disk of its own, so large; a clock of its own."""

    settings: dict[str, dict[str, object]] = {}
    disk_bytes: int = 0
    own_clock: bool = False

    @property
    def lacking(self) -> str:
        """Return what this machine does not have of it, "" for nothing."""
        if self.disk_bytes and os.geteuid() != 0:
            return "root, to mount a small disk"
        if self.own_clock and shutil.which("cc") is None:
            return "a C compiler, cc"
        return ""


class Stage:
    """A dialogd under attack. Its listener outlives it, as one that systemd holds."""

    def __init__(self, directory: Path, server: str, props: Props, listener: socket.socket) -> None:
        self.directory = directory
        self.agent = directory / "agent"
        self.disk = directory / "disk"  # all that dialogd writes, but for its log and its control socket
        self.temporary = self.disk / "tmp"
        self.state = self.disk / "state"
        self.clock = directory / "clock"  # by how many seconds dialogd's clock is wrong
        self._shim = directory / "clock.so"
        self.dialogd: Dialogd
        self._server = server
        self._props = props
        self._listener = listener
        self._company = PhoneCompany(ACCOUNT_SID, AUTH_TOKEN)
        self._past: list[Dialogd] = []
        self._calls: list[str] = []
        self.complaints: list[str] = []  # about what was done to dialogd as a whole
        self.struck_at: dict[str, float] = {}  # by call, on the machine's monotonic clock

    @classmethod
    @asynccontextmanager
    async def set_up(cls, directory: Path, server: str, props: Props) -> AsyncIterator["Stage"]:
        """Have a dialogd run inside the block, and end it if it has not been stopped by then."""
        with socket.create_server(("127.0.0.1", 0), backlog=_BACKLOG) as listener, ExitStack() as undo:
            stage = cls(directory, server, props, listener)
            shutil.copytree(DESK, stage.agent, ignore=shutil.ignore_patterns("__pycache__"))
            stage.disk.mkdir()
            stage.set_clock(0)
            if props.own_clock:
                await trio.run_process(["cc", "-O2", "-shared", "-fPIC", "-o", str(stage._shim), str(SHIM)])
            if props.disk_bytes:
                _mount(stage.disk, props.disk_bytes, undo)
            stage.temporary.mkdir()
            async with stage._company.serve() as api_url:
                stage._configure(api_url)
                await trio.to_thread.run_sync(stage._start, undo)
                yield stage

    def _configure(self, api_url: str) -> None:
        tables: dict[str, dict[str, object]] = {
            "twilio": {"api_url": api_url},
            "fallback": {"say": FALLBACK},
            "log": {"transcripts": True},
            "calls": {"max_load": 0, "min_free_memory": 0},
        }
        for name, values in self._props.settings.items():
            tables.setdefault(name, {}).update(values)
        self._config = write_config(self.directory, self.agent, **tables)

    def _start(self, undo: ExitStack | None = None) -> None:
        providers = {
            "DEEPGRAM_URL": f"ws://{self._server}/v1/listen",
            "CARTESIA_URL": f"ws://{self._server}/tts/websocket",
            "OPENAI_BASE_URL": f"http://{self._server}/v1",
        }
        keys = dict.fromkeys(("DEEPGRAM_API_KEY", "CARTESIA_API_KEY", "OPENAI_API_KEY"), "local")
        own = {"TMPDIR": str(self.temporary), "XDG_STATE_HOME": str(self.state), "HOURS": json.dumps(HOURS)}
        clock = {"LD_PRELOAD": str(self._shim), "CLOCK_OFFSET": str(self.clock)}
        environ = providers | keys | own | (clock if self._props.own_clock else {})
        self.dialogd = Dialogd(self._config, environ, listener=self._listener)
        if undo is not None:
            undo.callback(self._end)
        self.dialogd.expects_traceback = True  # the agents' own
        self.dialogd.wait_for_log(event="ready")

    def _end(self) -> None:
        for number, dialogd in enumerate((*self._past, self.dialogd), 1):
            dialogd.__exit__()
            (self.directory / f"dialogd-{number}.log").write_text(dialogd.text)

    def set_clock(self, wrong_by_s: int) -> None:
        """Have the clock of dialogd and its workers be wrong from now on."""
        self.clock.touch()
        with self.clock.open("r+b") as offset:  # the same file, which they have mapped
            offset.write(wrong_by_s.to_bytes(8, sys.byteorder, signed=True))

    async def kill(self) -> None:
        """Kill dialogd, and start another as soon as systemd would."""
        for directory in self.temporary.iterdir():  # as if it had run for long: what is younger may be another's
            os.utime(directory, (0, 0))
        await self.dialogd.killed()
        self._past.append(self.dialogd)
        await trio.sleep(RESTART_S)
        await trio.to_thread.run_sync(self._start)

    def call(self) -> Call:
        """Make a call to the agent."""
        via = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        call = self._company.call(f"{PUBLIC_URL}/twilio/voice", CALLER, CALLEE, via=via)
        self._calls.append(call.sid)
        return call

    def number(self, call: Call) -> int:
        """Return which of the calls it is, from 0."""
        return self._calls.index(call.sid)

    def struck(self, call: Call) -> None:
        """From now on the fault may show in this call."""
        self.struck_at[call.sid] = time.monotonic()

    def complain(self, complaint: str) -> None:
        """Note that dialogd did not take something as it should."""
        self.complaints.append(complaint)

    async def next_line(self, **wanted: object) -> LogLine:
        """Wait for the next line of the log that has these values."""
        known = len(self.log(**wanted))
        while len(lines := self.log(**wanted)) <= known:  # noqa: ASYNC110 - another process
            await trio.sleep(0.01)
        return lines[known]

    def log(self, **wanted: object) -> list[LogLine]:
        """Return the log's lines that have these values, of every dialogd that ran here."""
        return [line for dialogd in (*self._past, self.dialogd) for line in dialogd.find(**wanted)]

    def own_log(self) -> list[LogLine]:
        """Return the lines that are about no call."""
        return [line for line in self.log() if "call" not in line]

    def times(self, event: str, call: Call) -> list[float]:
        """Return what a call's worker told of the times at which something happened."""
        return [float(line["text"]) for line in self.log(event=event, call=call.sid)]

    async def all_ended(self) -> None:
        """Wait until every call is over for dialogd too."""
        while (await self.dialogd.ask("/status"))["calls"]:  # noqa: ASYNC110 - another process
            await trio.sleep(_LOOK_S)

    async def worker(self, call: Call) -> int:
        """Return the pid of a call's worker."""
        pid: int = (await self.dialogd.ask(f"/calls/{call.sid}"))["worker_pid"]
        return pid

    async def template(self) -> int:
        """Return the pid of the template that forks the next call's worker."""
        workers = {call["worker_pid"] for call in await self.dialogd.ask("/calls")}
        [template] = [pid for pid in self.dialogd.children() if pid not in workers]
        return template

    async def traces(self) -> Traces:
        """Measure what the dialogd takes: processes, tasks, snapshots of code, descriptors by what they lead to."""
        status: dict[str, Any] = await self.dialogd.ask("/status")
        descriptors = Counter(_kind(file) for file in os.scandir(f"/proc/{self.dialogd.pid}/fd"))
        snapshots = sum(1 for _ in self.temporary.glob("*/*"))
        return descriptors + Counter(processes=len(self.dialogd.processes()), tasks=status["tasks"], snapshots=snapshots)

    async def leftovers(self, before: Traces) -> list[str]:
        """Return what there is more of than before, once that does not shrink any more."""
        left: list[str] = ["?"]
        with trio.move_on_after(SETTLING_S):
            while left:
                await trio.sleep(_LOOK_S)
                left = beyond(await self.traces(), before)
        return left

    async def stop(self) -> list[str]:
        """Stop the dialogd, and return what is left of it."""
        try:
            await trio.to_thread.run_sync(self.dialogd.stop)
        except AssertionError as error:
            return [f"at its stop: {str(error)[-400:]}"]
        return [f"{path.relative_to(self.disk)}" for path in self.temporary.iterdir()]


def _kind(descriptor: os.DirEntry[str]) -> str:
    try:
        target = os.readlink(descriptor)
    except FileNotFoundError:
        return "descriptor"  # closed meanwhile
    return "file" if target.startswith("/") else target.partition(":[")[0]


def beyond(now: Traces, before: Traces) -> list[str]:
    """Return what there is more of than before."""
    return [f"{count} {name}" for name, count in (now - before).items()]


def _mount(disk: Path, size: int, undo: ExitStack) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk], check=True)
    undo.callback(lambda: subprocess.run(["umount", "--lazy", disk], check=True))
