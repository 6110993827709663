"""A real `dialogd` process with a configuration of its own, seen from outside: its log, control socket and /proc entries."""

import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import trio

from tests.e2e.control import PATIENCE_S, Controlled, LogLine

DIALOGD = Path(sys.executable).with_name("dialogd")
DIALOGCTL = DIALOGD.with_name("dialogctl")
ACCOUNT_SID = "AC" + "5" * 32
AUTH_TOKEN = "the-carriers-secret"
PUBLIC_URL = "http://voice.test"  # resolved nowhere: clients connect to the address that dialogd logs
NOWHERE = "http://127.0.0.1:9"  # the discard port: refuses connections, and never leaves this machine
_MARK = "DIALOGD_TEST_RUN"  # in the environment of every process that descends from one dialogd

PROBE = '''
"""An echo that does as the caller's keys say."""

import os
import sys
import time

import trio

from dialog_worker import Agent, Dtmf, Media, Message, MessageDispatched, Metadata, RequestFailed, VoIP


class Probe(Agent):
    """Says back whatever it hears, and misbehaves when asked to."""

    stubborn = False
    started = 0

    def on_media(self, media: Media) -> None:
        self.voip.post(Message("echo", media.payload))

    async def on_metadata(self, metadata: Metadata) -> None:
        self.voip.trace("metadata", metadata.caller, metadata.fields | metadata.parameters)

    async def on_message_dispatched(self, dispatched: MessageDispatched) -> None:
        self.voip.trace("dispatched", dispatched.uuid, {"interrupted": str(dispatched.interrupted)})

    async def on_dtmf(self, dtmf: Dtmf) -> None:
        await {"1": self.fail, "2": self.block, "3": self.leave, "4": self.stay, "5": self.goodbye, "6": self.cut,
               "7": self.flood, "8": self.garbage, "9": self.sys_exit, "0": self.tell, "*": self.transfer,
               "#": self.transfer_abroad, "A": self.dial_through, "B": self.dial_nonsense}[dtmf.digit]()

    async def fail(self) -> None:
        raise RuntimeError("the agent's own mistake")

    async def block(self) -> None:
        time.sleep(60)

    async def leave(self) -> None:
        os._exit(7)

    async def sys_exit(self) -> None:
        sys.exit("enough")

    async def stay(self) -> None:
        self.stubborn = True
        self.voip.trace("stubborn", "")

    async def goodbye(self) -> None:
        self.voip.post(Message("goodbye", b"\\x7f" * 1600, done=True))
        await self.end(after_playout=True)

    async def cut(self) -> None:
        await self.end(after_playout=False)

    async def end(self, *, after_playout: bool) -> None:
        await self.ask(self.voip.hangup(after_playout=after_playout))

    async def transfer(self) -> None:
        await self.ask(self.voip.transfer_to("+15557654321"))

    async def transfer_abroad(self) -> None:
        await self.ask(self.voip.transfer_to("+881234567890"))

    async def dial_through(self) -> None:
        await self.ask(self.voip.send_dtmf("1w2#"))

    async def dial_nonsense(self) -> None:
        await self.ask(self.voip.send_dtmf("call me"))

    async def on_streaming_started(self, started) -> None:
        self.started += 1

    async def ask(self, request) -> None:
        try:
            await request
            self.voip.trace("granted", "")
        except RequestFailed as error:
            failure = error.failure
            self.voip.trace("failed", failure.message, {"kind": failure.kind, "code": str(failure.code)})

    async def flood(self) -> None:
        for _ in range(7):
            self.voip.post(Message("music", b"\\x7f" * 8000 * 60))
            await self.voip.room()
        self.voip.trace("flooded", "")

    async def garbage(self) -> None:
        self.voip._link._sock.send(b"\\xff" * 64)

    async def tell(self) -> None:
        self.voip.trace("alive", str(os.getpid()), {"started": str(self.started)})

    async def run(self) -> None:
        await super().run()
        if self.stubborn:
            await trio.sleep_forever()


def create(voip: VoIP) -> Agent:
    """Make the agent of one call."""
    return Probe(voip=voip)
'''


RECORDER = '''
"""An echo that has Twilio record and transcribe as the caller's keys say, and tells of everything that it is told."""

from dialog_worker import Agent, Media, Message, RequestFailed, VoIP


class Recorder(Agent):
    """Says back whatever it hears."""

    def on_media(self, media: Media) -> None:
        self.voip.post(Message("echo", media.payload))

    async def on_dtmf(self, dtmf) -> None:
        voip = self.voip
        ask = {
            "1": voip.start_recording,
            "2": lambda: voip.start_recording(download=True),
            "3": voip.pause_recording,
            "4": voip.resume_recording,
            "5": voip.stop_recording,
            "6": voip.remove_recording,
            "7": lambda: voip.start_transcript(partial_results=True),
            "8": voip.stop_transcript,
            "9": lambda: voip.hangup(after_playout=False),
            "*": lambda: voip.transfer_to("+15557654321", after_playout=False),
        }[dtmf.digit]
        try:
            await ask()
            voip.trace("granted", dtmf.digit)
        except RequestFailed as error:
            failure = error.failure
            numbers = {"code": str(failure.code), "status": str(failure.status)}
            voip.trace("failed", failure.message, {"kind": failure.kind, **numbers})

    async def on_recording_url(self, recording) -> None:
        self.voip.trace("recording", recording.path, {"url": recording.url, "channels": str(recording.channels)})

    async def on_recording_status(self, status) -> None:
        self.voip.trace("recording_status", status.status, status.fields)

    async def on_transcript(self, transcript) -> None:
        self.voip.trace("transcript", transcript.text, {"track": transcript.track, "final": str(transcript.final)})

    async def on_transcript_status(self, status) -> None:
        self.voip.trace("transcript_status", status.status, {"code": str(status.code)})

    async def on_stream_status(self, status) -> None:
        self.voip.trace("stream_status", status.status, {"message": status.message})

    async def on_call_status(self, status) -> None:
        self.voip.trace("call_status", status.status, status.fields)

    async def on_time_limit(self, limit) -> None:
        self.voip.trace("time_limit", str(limit.remaining_s))
        self.voip.post(Message("goodbye", b"\\x7f" * 800, done=True))

    async def on_streaming_stopped(self, stopped) -> None:
        self.voip.trace("streaming_stopped", stopped.reason)

    async def on_error(self, error) -> None:
        self.voip.trace("error", error.code)

    async def on_shutdown(self, shutdown) -> None:
        self.voip.trace("shutdown", shutdown.reason)


def create(voip: VoIP) -> Agent:
    """Make the agent of one call."""
    return Recorder(voip=voip)
'''


def write_agent(directory: Path, source: str) -> Path:
    """Write an agent's code and return its directory."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "agent.py").write_text(source)
    return directory


def write_config(directory: Path, agent: Path, **sections: Mapping[str, object]) -> Path:
    """Write a dialog.toml for `agent`, with `sections` added to or replacing what a test needs anyway. Return its path.

    The table `[agent]` is called `agent_keys` here.
    """
    tables: dict[str, dict[str, object]] = {
        "gateway": {"listen": "127.0.0.1:0", "public_url": PUBLIC_URL},
        "twilio": {"account_sid": ACCOUNT_SID, "auth_token": "env:TWILIO_AUTH_TOKEN", "api_url": NOWHERE},
        "agent": {"path": str(agent)},
        "calls": {"ending_timeout": 2, "max_load": 0},  # the tests' machine may be as busy as it likes
        "control": {"socket": str(directory / "control.sock")},
    }
    for name, values in sections.items():
        tables.setdefault(name.removesuffix("_keys"), {}).update(values)
    file = directory / "dialog.toml"
    file.write_text("\n".join(line for name, values in tables.items() for line in _table(name, values)))
    return file


def _table(name: str, values: Mapping[str, object]) -> Iterator[str]:
    yield f"[{name}]"
    for key, value in values.items():
        yield f"{key} = {json.dumps(value)}"  # of strings, numbers and booleans, JSON is TOML too


class Dialogd(Controlled):
    """One process. `output` and `log` grow while it runs: what it wrote to stderr, and those lines of it that are JSON.

    With a `listener`, it is passed that instead of opening one, as by systemd's socket unit.
    """

    def __init__(
        self, config: Path, environ: Mapping[str, str], *options: str, listener: socket.socket | None = None
    ) -> None:
        self.config = config
        self.directory = config.parent
        self.public_url = PUBLIC_URL
        self.tls: ssl.SSLContext | None = None
        self.output: list[str] = []
        self.log: list[LogLine] = []
        self.expects_traceback = False
        self._run = uuid.uuid4().hex
        self._news = threading.Condition()
        own = {"TWILIO_AUTH_TOKEN": AUTH_TOKEN, _MARK: self._run, "XDG_STATE_HOME": str(self.directory / "state")}
        command = [str(DIALOGD), "-c", str(config), *options]
        if listener is not None:
            own |= {"LISTEN_FDS": "1", "LISTEN_FDNAMES": "gateway"}
            pass_on = f'export LISTEN_PID=$$; exec "$@" 3<&{listener.fileno()}'
            command = ["bash", "-c", pass_on, "bash", *command]
        self._process = subprocess.Popen(
            command,
            env=os.environ | own | dict(environ),
            pass_fds=[] if listener is None else [listener.fileno()],
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
        )
        self.pid = self._process.pid
        self._reader = threading.Thread(target=self._read, name="dialogd's stderr")
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            with self._news:
                self.output.append(text := line.decode())
                if text.startswith("{"):
                    self.log.append(json.loads(text))
                self._news.notify_all()
        with self._news:
            self._news.notify_all()

    def find(self, **wanted: object) -> list[LogLine]:
        """Return the log's lines that have these values."""
        return [line for line in self.log if wanted.items() <= line.items()]

    def wait_for_log(self, **wanted: object) -> LogLine:
        """Return the first line of the log with these values, when there is one."""
        with self._news:
            if not self._news.wait_for(lambda: self.find(**wanted) or self._process.poll() is not None, PATIENCE_S):
                raise AssertionError(f"not logged in {PATIENCE_S} s: {wanted}\n{self.text}")
        found = self.find(**wanted)
        assert found, f"never logged: {wanted}\n{self.text}"
        return found[0]

    async def logged(self, **wanted: object) -> LogLine:
        """Wait for a line of the log with these values and return it."""
        return await trio.to_thread.run_sync(lambda: self.wait_for_log(**wanted))

    @property
    def text(self) -> str:
        """All that was written to stderr."""
        return "".join(self.output)

    @property
    def port(self) -> int:
        """Where it listens, on 127.0.0.1."""
        return int(self.wait_for_log(event="ready")["listen"].rpartition(":")[2])

    # The control socket

    @property
    def control(self) -> Path:
        return self.directory / "control.sock"

    async def ctl(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        """Run `dialogctl` with this process's configuration, and return its exit code and what it wrote."""
        command = [str(DIALOGCTL), "-c", str(self.config), *arguments]
        environ = os.environ | {"TWILIO_AUTH_TOKEN": AUTH_TOKEN}
        done = await trio.run_process(command, env=environ, capture_stdout=True, capture_stderr=True, check=False)
        return subprocess.CompletedProcess(command, done.returncode, done.stdout.decode(), done.stderr.decode())

    # Its traces in the system

    def descriptors(self) -> int:
        """How many descriptors it has open."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def processes(self) -> list[int]:
        """Return the pids of itself and of everything that descends from it, also what it has lost sight of."""
        return [pid for pid in map(int, filter(str.isdecimal, os.listdir("/proc"))) if self._descends(pid)]

    def _descends(self, pid: int) -> bool:
        try:
            return f"{_MARK}={self._run}".encode() in Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:
            return False  # gone meanwhile

    def children(self) -> list[int]:
        """Return the pids of its children, zombies included. A child is listed with the thread that forked it (proc(5))."""
        return [
            int(pid) for listed in Path(f"/proc/{self.pid}/task").glob("*/children") for pid in listed.read_text().split()
        ]

    # Its end

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self._process.send_signal(number)

    async def killed(self) -> None:
        """Have it die at once, and wait until all that descended from it has noticed."""
        self.signal(signal.SIGKILL)
        await self.exited()
        with trio.fail_after(PATIENCE_S):
            while self.processes():  # noqa: ASYNC110 - no event tells of grandchildren
                await trio.sleep(0.02)

    @property
    def alive(self) -> bool:
        """Whether it has not exited."""
        return self._process.poll() is None

    def exit_code(self) -> int:
        """Wait until it has exited and return how."""
        code = self._process.wait(PATIENCE_S)
        self._reader.join(PATIENCE_S)
        return code

    async def exited(self) -> int:
        """Wait, without holding up the loop, until it has exited and return how."""
        return await trio.to_thread.run_sync(self.exit_code)

    def stop(self) -> None:
        """Have it stop, and check that it went well: exit code, no process left, no traceback in its log."""
        if self._process.poll() is None:
            self.signal(signal.SIGTERM)
        assert self.exit_code() == 0, self.text
        assert self.processes() == []
        assert not (self.directory / "control.sock").exists()
        if not self.expects_traceback:
            assert "Traceback" not in self.text, self.text

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Leave nothing behind, whatever happened."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self._reader.join()
        assert self._process.stderr is not None
        self._process.stderr.close()


@contextmanager
def running(
    directory: Path,
    *,
    agent: Path | str = PROBE,
    environ: Mapping[str, str] | None = None,
    options: Sequence[str] = (),
    **sections: Mapping[str, object],
) -> Iterator[Dialogd]:
    """Run a `dialogd` until the block is left, and check that it stops well.

    `agent` is an agent's source or the directory of one, `sections` the tables of dialog.toml as `write_config` takes them.
    """
    directory.mkdir(parents=True)
    path = write_agent(directory / "agent", agent) if isinstance(agent, str) else agent
    with Dialogd(write_config(directory, path, **sections), environ or {}, *options) as dialogd:
        dialogd.public_url = str(sections.get("gateway", {}).get("public_url", PUBLIC_URL))
        dialogd.wait_for_log(event="ready")
        yield dialogd
        dialogd.stop()
