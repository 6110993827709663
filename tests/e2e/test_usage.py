"""A worker that takes too much of the CPU, or has too many processes: the log says where, and another goes on."""

import re

import pytest

from tests.conftest import StartDialogd
from tests.e2e.daemon import Dialogd
from tests.e2e.twilio_client import Twilio

TAKES_OVER = "worker died in mid-call, and another takes over"

BUSY = '''
"""An echo that computes beside its loop, or starts more processes than it should."""

import subprocess
import threading

from dialog_worker import Agent, Media, Message, VoIP


def compute() -> None:
    while True:
        sum(range(100_000))


class Busy(Agent):
    def on_media(self, media: Media) -> None:
        self.voip.post(Message("echo", media.payload))

    async def on_dtmf(self, dtmf) -> None:
        if dtmf.digit == "1":
            threading.Thread(target=compute, daemon=True).start()
        else:
            for _ in range(30):
                subprocess.Popen(["setsid", "sleep", "60"])


def create(voip: VoIP) -> Agent:
    return Busy(voip=voip)
'''


@pytest.fixture(scope="module")
def dialogd(start_shared_dialogd: StartDialogd) -> Dialogd:
    return start_shared_dialogd(agent=BUSY, workers={"cpu_seconds_per_minute": 2, "processes": 20})


async def test_a_worker_that_computes_without_end_is_warned_of_with_its_stack_and_then_replaced(dialogd: Dialogd) -> None:
    async with Twilio(dialogd) as twilio, twilio.streaming() as call:
        await call.echo()
        await call.press("1")
        warning = await dialogd.logged(event="worker uses too much CPU", call=call.sid)
        assert warning["level"] == "warning"
        assert warning["cpu_s"] > warning["cpu_seconds_per_minute"] == 2
        assert re.search(r'^Thread 0x.*\n.*agent.py", line \d+ in compute\n', warning["stack"], re.MULTILINE)
        await call.echo()  # it still answers
        killed = await dialogd.logged(event="worker uses too much CPU and is killed", call=call.sid)
        assert killed["pid"] == warning["pid"]
        await dialogd.logged(event=TAKES_OVER, call=call.sid, pid=killed["pid"])
        await call.echo()
    await dialogd.ended(call.sid)


async def test_a_worker_with_too_many_processes_is_replaced_and_none_of_them_is_left(dialogd: Dialogd) -> None:
    before = set(dialogd.processes())
    async with Twilio(dialogd) as twilio, twilio.streaming() as call:
        await call.echo()
        await call.press("2")
        killed = await dialogd.logged(event="worker has too many processes and is killed", call=call.sid)
        assert killed["count"] > killed["limit"] == 20
        left = await dialogd.logged(event="worker left processes behind, which were killed", call=call.sid)
        assert left["names"] == ["sleep"]
        await dialogd.logged(event=TAKES_OVER, call=call.sid, pid=killed["pid"])
        await call.echo()
    await dialogd.ended(call.sid)
    assert set(dialogd.processes()) == before


async def test_how_much_memory_each_call_has_and_all_have_is_told(dialogd: Dialogd) -> None:
    async with Twilio(dialogd) as twilio, twilio.streaming() as call:
        await call.echo()
        one = await dialogd.ask(f"/calls/{call.sid}")
        [listed] = await dialogd.ask("/calls")
        status = await dialogd.ask("/status")
        shown = (await dialogd.ctl("status")).stdout
    assert 1_000_000 < one["memory"] < 100_000_000
    assert listed["memory_kind"] == one["memory_kind"] == status["memory_kind"] != "cgroup"
    assert status["memory"] == pytest.approx(one["memory"], rel=0.2)
    assert f" MB {status['memory_kind']}\n" in shown
