"""Processes that a worker starts and that would outlive it: none does, however it hides, and no other call notices."""

import pytest
import trio

from tests.conftest import StartDialogd
from tests.e2e.control import PATIENCE_S
from tests.e2e.daemon import Dialogd
from tests.e2e.twilio_client import Twilio

LEFT = "worker left processes behind, which were killed"
TAKES_OVER = "worker died in mid-call, and another takes over"

FLOODING = '''
"""An echo that starts processes in ways that hide them, and dies."""

import os
import subprocess
import time

from dialog_worker import Agent, Media, Message, VoIP


def daemon(does) -> None:
    """As daemon(7): in a session of its own, without a parent."""
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            does()
        os._exit(0)
    os.wait()


def run() -> None:
    """For ever another process."""
    while True:
        if os.fork():
            os._exit(0)
        os.setsid()


def multiply(times: int = 5) -> None:
    """363 processes in the end, each in a session of its own."""
    for _ in range(3 if times else 0):
        if os.fork() == 0:
            os.setsid()
            multiply(times - 1)
    time.sleep(60)


def linger() -> None:
    time.sleep(60)


class Flooding(Agent):
    def on_media(self, media: Media) -> None:
        self.voip.post(Message("echo", media.payload))

    async def on_dtmf(self, dtmf) -> None:
        does = {"1": linger, "2": run, "3": multiply}.get(dtmf.digit)
        if does:
            daemon(does)
            time.sleep(0.5)
            os._exit(5)
        subprocess.Popen(["env", "-i", "setsid", "sleep", "60"])
        self.voip.trace("started", "")


def create(voip: VoIP) -> Agent:
    return Flooding(voip=voip)
'''


@pytest.fixture(scope="module")
def dialogd(start_shared_dialogd: StartDialogd) -> Dialogd:
    return start_shared_dialogd(agent=FLOODING)


async def gone(dialogd: Dialogd, but: set[int]) -> None:
    """Wait until nothing of dialogd's is left but these: its template, and the worker that took over."""
    with trio.fail_after(PATIENCE_S):
        while set(dialogd.processes()) - but or set(dialogd.children()) - but:  # noqa: ASYNC110 - other processes
            await trio.sleep(0.02)


@pytest.mark.parametrize(
    ("key", "count"), [("1", 1), ("2", 1), ("3", 100)], ids=["a daemon", "one that is never the same", "a crowd"]
)
async def test_what_hides_from_its_worker_is_killed_with_it_and_no_other_call_notices(
    dialogd: Dialogd, key: str, count: int
) -> None:
    before = set(dialogd.processes())
    async with Twilio(dialogd) as twilio, twilio.streaming() as other, twilio.streaming() as call:
        await other.echo()
        await call.echo()
        await call.press(key)
        await dialogd.logged(event=TAKES_OVER, call=call.sid)
        await call.echo()
        left = await dialogd.logged(event=LEFT, call=call.sid)
        assert left["count"] >= count
        workers = {(await dialogd.ask(f"/calls/{one.sid}"))["worker_pid"] for one in (call, other)}
        await gone(dialogd, before | workers)
        await other.echo()
    ended = await dialogd.ended(other.sid)
    assert ended["media_dropped"] == 0


async def test_what_a_call_leaves_behind_ends_with_it(dialogd: Dialogd) -> None:
    before = set(dialogd.processes())
    async with Twilio(dialogd) as twilio, twilio.streaming() as call:
        await call.echo()
        await call.press("9")
        await dialogd.step(call.sid, kind="started")
    await dialogd.ended(call.sid)
    await dialogd.logged(event=LEFT, call=call.sid)
    await gone(dialogd, before)
