"""Where a fault is played: one dialogd, the phone company that calls it, and what they leave behind."""

import json
import shutil
import socket
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio
from msgspec import Struct

from dialog_local.carrier.company import PhoneCompany
from dialog_local.carrier.phonecall import Call
from tests.chaos.days import HOURS
from tests.chaos.verdict import FALLBACK
from tests.e2e.daemon import ACCOUNT_SID, AUTH_TOKEN, PUBLIC_URL, Dialogd, LogLine, write_config

DESK = Path(__file__).with_name("desk")
CALLER, CALLEE = "+15550001111", "+15550002222"
SETTLING_S = 10.0  # for what ends by and by: kept-alive connections, templates


class Traces(Struct, frozen=True):
    """What a dialogd takes of the machine."""

    processes: int
    descriptors: int
    tasks: int
    snapshots: int

    def beyond(self, before: "Traces") -> list[str]:
        """Return what there is more of than before."""
        names = self.__struct_fields__
        return [f"{more} {name}" for name in names if (more := getattr(self, name) - getattr(before, name)) > 0]


class Stage:
    """A dialogd under attack."""

    def __init__(self, directory: Path, server: str, settings: Mapping[str, Mapping[str, object]]) -> None:
        self.directory = directory
        self.agent = directory / "agent"
        self.temporary = directory / "tmp"
        self.dialogd: Dialogd
        self._server = server
        self._settings = settings
        self._company = PhoneCompany(ACCOUNT_SID, AUTH_TOKEN)
        self._past: list[Dialogd] = []
        self._calls: list[str] = []
        self.complaints: list[str] = []  # about what was done to dialogd as a whole
        self.struck_at: dict[str, float] = {}  # by call, on the machine's monotonic clock

    @classmethod
    @asynccontextmanager
    async def set_up(
        cls, directory: Path, server: str, settings: Mapping[str, Mapping[str, object]]
    ) -> AsyncIterator["Stage"]:
        """Have a dialogd run inside the block, and end it if it has not been stopped by then."""
        stage = cls(directory, server, settings)
        shutil.copytree(DESK, stage.agent, ignore=shutil.ignore_patterns("__pycache__"))
        stage.temporary.mkdir()
        async with stage._company.serve() as api_url:
            stage._configure(api_url)
            try:
                await trio.to_thread.run_sync(stage._start)
                yield stage
            finally:
                for dialogd in (*stage._past, stage.dialogd):
                    dialogd.__exit__()

    def _configure(self, api_url: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            listen = f"127.0.0.1:{free.getsockname()[1]}"
        tables: dict[str, dict[str, object]] = {
            "gateway": {"listen": listen},
            "twilio": {"api_url": api_url},
            "fallback": {"say": FALLBACK},
            "log": {"transcripts": True},
            "calls": {"max_load": 0, "min_free_memory": 0},
        }
        for name, values in self._settings.items():
            tables.setdefault(name, {}).update(values)
        self._config = write_config(self.directory, self.agent, **tables)

    def _start(self) -> None:
        providers = {
            "DEEPGRAM_URL": f"ws://{self._server}/v1/listen",
            "CARTESIA_URL": f"ws://{self._server}/tts/websocket",
            "OPENAI_BASE_URL": f"http://{self._server}/v1",
        }
        keys = dict.fromkeys(("DEEPGRAM_API_KEY", "CARTESIA_API_KEY", "OPENAI_API_KEY"), "local")
        own = {"TMPDIR": str(self.temporary), "XDG_STATE_HOME": str(self.directory / "state"), "HOURS": json.dumps(HOURS)}
        self.dialogd = Dialogd(self._config, providers | keys | own)
        self.dialogd.expects_traceback = True  # the agents' own
        self.dialogd.wait_for_log(event="ready")

    def call(self) -> Call:
        """Make a call to the agent."""
        via = f"http://127.0.0.1:{self.dialogd.port}"
        call = self._company.call(f"{PUBLIC_URL}/twilio/voice", CALLER, CALLEE, via=via)
        self._calls.append(call.sid)
        return call

    def number(self, call: Call) -> int:
        """Return which of the calls it is, from 0."""
        return self._calls.index(call.sid)

    def struck(self, call: Call) -> None:
        """Note the moment of a strike."""
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

    async def ended(self, call: Call) -> None:
        """Wait until a call is over for dialogd too."""
        await self.dialogd.ended(call.sid)

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
        """Measure what the dialogd takes."""
        status: dict[str, Any] = await self.dialogd.ask("/status")
        snapshots = sum(1 for _ in self.temporary.glob("*/*"))
        return Traces(len(self.dialogd.processes()), self.dialogd.descriptors(), status["tasks"], snapshots)

    async def leftovers(self, before: Traces) -> list[str]:
        """Return what there is more of than before, once that does not shrink any more."""
        left: list[str] = ["?"]
        with trio.move_on_after(SETTLING_S):
            while left:
                left = (await self.traces()).beyond(before)
                await trio.sleep(0.1 if left else 0)
        return left

    async def stop(self) -> list[str]:
        """Stop the dialogd, and return what is left of it."""
        try:
            await trio.to_thread.run_sync(self.dialogd.stop)
        except AssertionError as error:
            return [f"at its stop: {str(error)[-400:]}"]
        return [f"{path.relative_to(self.directory)}" for path in self.temporary.iterdir()]
