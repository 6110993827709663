"""A template that dies or is stopped: calls under way notice nothing, and those that come meanwhile wait for the next."""

import os
import signal
from pathlib import Path

import trio

from tests.conftest import StartDialogd
from tests.e2e.control import PATIENCE_S
from tests.e2e.daemon import PROBE, Dialogd
from tests.e2e.twilio_client import FRAME, PhoneCall, Twilio

DIED = "the template process died and is started again; calls under way go on"
STOPPED = "the template process does not answer and is killed"
SLOW_IMPORT = "import time\n\ntime.sleep(2.5)\n" + PROBE


async def template_of(dialogd: Dialogd) -> int:
    """Return the template's pid, where no call is under way."""
    [template] = dialogd.children()
    return template


def imports(pid: int) -> bool:
    """Whether a process has become a template's, and not only begun as a copy of dialogd's."""
    return b"dialog_supervisor.template" in Path(f"/proc/{pid}/cmdline").read_bytes()


async def worker_of(dialogd: Dialogd, call: PhoneCall) -> int:
    pid: int = (await dialogd.ask(f"/calls/{call.sid}"))["worker_pid"]
    return pid


async def test_a_call_that_comes_right_after_the_templates_death_gets_a_worker(start_dialogd: StartDialogd) -> None:
    dialogd = start_dialogd()
    template = await template_of(dialogd)
    async with Twilio(dialogd) as twilio, twilio.streaming() as bystander:
        await bystander.echo()
        os.kill(template, signal.SIGKILL)
        async with twilio.streaming() as call:
            await call.echo()
        await bystander.echo()
    assert len(dialogd.find(event=DIED)) == 1
    assert dialogd.find(event="no worker for this call") == []


async def test_a_stopped_template_is_replaced_and_callers_and_dead_workers_wait_for_the_next(
    start_dialogd: StartDialogd,
) -> None:
    dialogd = start_dialogd(calls={"restarts": 1})
    template = await template_of(dialogd)
    async with Twilio(dialogd) as twilio, twilio.streaming() as survivor:
        await survivor.echo()
        os.kill(template, signal.SIGSTOP)
        os.kill(await worker_of(dialogd, survivor), signal.SIGKILL)
        async with twilio.streaming() as call:
            await call.echo()
            await survivor.echo()
    assert len(dialogd.find(event=STOPPED)) == 1
    assert dialogd.find(event="no worker for this call") == []


async def test_one_that_is_stopped_in_its_start_is_replaced_in_time_for_who_waits_for_it(
    start_dialogd: StartDialogd,
) -> None:
    dialogd = start_dialogd(agent=SLOW_IMPORT)
    first = await template_of(dialogd)
    os.kill(first, signal.SIGKILL)
    with trio.fail_after(PATIENCE_S):
        while not (following := [pid for pid in dialogd.children() if pid != first and imports(pid)]):  # noqa: ASYNC110
            await trio.sleep(0.01)  # another process starts it
    os.kill(following[0], signal.SIGSTOP)
    async with Twilio(dialogd) as twilio, twilio.streaming() as call:
        for _ in range(400):  # more than the kernel keeps for a worker that is yet to come
            await call.say(FRAME)
        await call.hear()
    [told] = dialogd.find(event="the template process has not started again")
    assert told["reason"] == "a signal has stopped the template process in its start, 3 s ago"
    assert dialogd.find(event="no worker for this call") == []
    assert dialogd.find(event="worker does not read and is killed") == []
