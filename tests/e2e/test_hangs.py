"""A worker whose event loop does not turn: the log shows where it is, it is killed, and the caller keeps the line."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest
import trio

from dialog_supervisor import worker
from dialog_supervisor.worker import HEARTBEAT_LIMIT_S, SILENCE_WARNED_OF_S, UNREAD_LIMIT_S, Worker
from protocol.messages import Media
from tests.conftest import StartDialogd
from tests.e2e.daemon import Dialogd
from tests.e2e.twilio_client import PhoneCall, Twilio

WARNING = "worker's event loop does not turn"
KILLED = "worker hangs and is killed"
TAKES_OVER = "worker died in mid-call, and another takes over"

HANGING = '''
"""An echo that stops turning its event loop, in as many ways as there are keys."""

import re
import time

from dialog_worker import Agent, Media, Message, VoIP


class Hanging(Agent):
    def on_media(self, media: Media) -> None:
        self.voip.post(Message("echo", media.payload))

    async def on_dtmf(self, dtmf) -> None:
        {"1": sleep, "2": spin, "3": match, "4": nap}[dtmf.digit]()


def sleep() -> None:
    time.sleep(60)


def spin() -> None:
    while True:
        pass


def match() -> None:
    re.match("(a+)+$", "a" * 60 + "b")


def nap() -> None:
    time.sleep(3.4)


def create(voip: VoIP) -> Agent:
    return Hanging(voip=voip)
'''


@pytest.fixture(scope="module")
def dialogd(start_shared_dialogd: StartDialogd) -> Dialogd:
    return start_shared_dialogd(agent=HANGING)


async def worker_of(dialogd: Dialogd, call: PhoneCall) -> int:
    pid: int = (await dialogd.ask(f"/calls/{call.sid}"))["worker_pid"]
    return pid


async def hang(dialogd: Dialogd, twilio: Twilio, key: str, stacks: dict[str, str]) -> None:
    """Have a worker hang as `key` says, or be stopped, until another takes over; keep the stack that was logged."""
    async with twilio.streaming() as call:
        await call.echo()
        if key == "SIGSTOP":
            os.kill(await worker_of(dialogd, call), signal.SIGSTOP)
        else:
            await call.press(key)
        await dialogd.logged(event=TAKES_OVER, call=call.sid)
        await call.echo()
        [warning] = dialogd.find(event=WARNING, call=call.sid)
        [killed] = dialogd.find(event=KILLED, call=call.sid)
        assert (warning["level"], warning["pid"]) == ("warning", killed["pid"])
        stacks[key] = warning["stack"]


async def test_every_kind_of_hang_is_shown_with_its_stack_and_costs_the_caller_seconds(dialogd: Dialogd) -> None:
    stacks: dict[str, str] = {}
    async with Twilio(dialogd) as twilio, trio.open_nursery() as nursery:
        for key in ("1", "2", "3", "SIGSTOP"):
            nursery.start_soon(hang, dialogd, twilio, key, stacks)
    for key, place in (("1", "sleep"), ("2", "spin"), ("3", "match")):
        assert stacks[key].startswith("Stack (most recent call first):\n"), stacks[key]
        assert re.search(rf'agent.py", line \d+ in {place}\n.*agent.py", line \d+ in on_dtmf\n', stacks[key], re.DOTALL)
    assert stacks["SIGSTOP"] == "none: the process was stopped by a signal"


async def test_a_worker_that_comes_to_itself_in_time_lives_on(dialogd: Dialogd) -> None:
    async with Twilio(dialogd) as twilio, twilio.streaming() as call:
        await call.echo()
        await call.press("4")
        await dialogd.logged(event=WARNING, call=call.sid)
        pid = await worker_of(dialogd, call)
        await dialogd.logged(event="worker's event loop was blocked", call=call.sid)
        await call.echo()
        assert await worker_of(dialogd, call) == pid
    assert dialogd.find(event=KILLED, call=call.sid) == []


# By the clock


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    """Give a process that ignores the question for its stack, and reads nothing."""
    ignoring = "import signal, time; signal.signal(signal.SIGRTMIN, signal.SIG_IGN); print(flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", ignoring], stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        process.kill()


async def test_it_is_warned_of_after_two_seconds_and_killed_after_five(
    process: subprocess.Popen[bytes], autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    at: dict[str, float] = {}
    began_at = trio.current_time()
    monkeypatch.setattr(worker, "log", Log(at, began_at))
    silent = forked(process)
    with trio.move_on_after(60):
        await silent.run()
    silent.close()
    assert at[WARNING] == pytest.approx(SILENCE_WARNED_OF_S, abs=0.5)
    assert at[KILLED] == pytest.approx(HEARTBEAT_LIMIT_S)
    assert (silent.exit_code or process.wait(5)) == -signal.SIGKILL  # whoever was first has the status


async def test_one_that_hangs_after_it_was_long_held_back_is_killed_too(
    process: subprocess.Popen[bytes], autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    at: dict[str, float] = {}
    began_at = trio.current_time()
    monkeypatch.setattr(worker, "log", Log(at, began_at))
    held = forked(process)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(held.run)
        await trio.sleep(1)
        with held.held_back():
            await trio.sleep(100)
        assert at == {}
        with trio.move_on_after(60):
            await held.exited.wait()
        nursery.cancel_scope.cancel()
    held.close()
    assert at[KILLED] == pytest.approx(101 + HEARTBEAT_LIMIT_S)


async def test_one_whose_loop_turns_but_that_reads_nothing_is_killed(
    process: subprocess.Popen[bytes], autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    at: dict[str, float] = {}
    began_at = trio.current_time()
    monkeypatch.setattr(worker, "log", Log(at, began_at))
    deaf = Worker("generation", "call")
    theirs = os.dup(deaf.theirs[0])
    deaf.forked(process.pid, os.pidfd_open(process.pid))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(deaf.run)
        while not deaf.exited.is_set():
            deaf.link.post(Media(0, bytes(8000)), droppable=True)
            deaf.heartbeat()
            await trio.sleep(1)
        nursery.cancel_scope.cancel()
    deaf.close()
    os.close(theirs)
    assert UNREAD_LIMIT_S <= at["worker does not read and is killed"] < UNREAD_LIMIT_S + 30  # the kernel takes some first


def forked(process: "subprocess.Popen[bytes]") -> Worker:
    """Return the worker that `process` is."""
    one = Worker("generation", "call")
    one.forked(process.pid, os.pidfd_open(process.pid))
    return one


class Log:
    """Notes when each event was first logged."""

    def __init__(self, at: dict[str, float], began_at: float) -> None:
        self._at = at
        self._began_at = began_at

    def _note(self, event: str, **_: object) -> None:
        self._at.setdefault(event, trio.current_time() - self._began_at)

    warning = error = _note
