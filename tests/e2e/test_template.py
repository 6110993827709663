"""A template that dies or is stopped: calls under way notice nothing, and those that come meanwhile wait for the next."""

import os
import signal

from tests.conftest import StartDialogd
from tests.e2e.daemon import Dialogd
from tests.e2e.twilio_client import PhoneCall, Twilio

DIED = "the template process died and is started again; calls under way go on"
STOPPED = "the template process does not answer and is killed"


async def template_of(dialogd: Dialogd) -> int:
    """Return the template's pid, where no call is under way."""
    [template] = dialogd.children()
    return template


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
