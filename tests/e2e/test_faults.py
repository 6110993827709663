"""Workers that fail, hang, leave or stay, where none may follow: each costs its own call alone, and the log says why."""

import pytest
import trio

from tests.conftest import StartDialogd
from tests.e2e.daemon import Dialogd
from tests.e2e.twilio_client import PhoneCall, Twilio, verbs


@pytest.fixture(scope="module")
def dialogd(start_shared_dialogd: StartDialogd) -> Dialogd:
    dialogd = start_shared_dialogd(calls={"shutdown_grace": 0.5, "restarts": 0})
    dialogd.expects_traceback = True  # the agents' own
    return dialogd


FAULTS = {
    "1": ("worker died in mid-call", 1),
    "2": ("worker hangs and is killed", -9),
    "3": ("worker died in mid-call", 7),
    "8": ("worker breaks the protocol and is killed", -9),
    "9": ("worker died in mid-call", 1),
}


@pytest.mark.parametrize("key", FAULTS, ids=["raises", "blocks its loop", "exits", "sends garbage", "calls sys.exit"])
async def test_an_agent_that_breaks_ends_its_own_call_and_no_other(dialogd: Dialogd, key: str) -> None:
    event, exit_code = FAULTS[key]
    async with Twilio(dialogd) as twilio, twilio.streaming() as bystander:
        async with twilio.streaming() as call:
            await call.echo()
            broken = trio.Event()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_converse, bystander, broken)
                await call.press(key)
                assert await call.closed() == 1000
                broken.set()
            assert verbs(await call.after()) == ["Say", "Hangup"]
            ended = await dialogd.ended(call.sid)
        await bystander.echo()
    assert ended["reason"] == f"worker died ({exit_code})"
    assert dialogd.find(event=event, call=call.sid)


async def _converse(call: PhoneCall, enough: trio.Event) -> None:
    while not enough.is_set():
        await call.echo()
        await trio.sleep(0.02)


@pytest.mark.parametrize(
    ("key", "cause"),
    [("1", "RuntimeError: the agent's own mistake"), ("9", "SystemExit: enough")],
    ids=["raise", "sys.exit"],
)
async def test_the_log_has_the_agents_own_traceback(dialogd: Dialogd, key: str, cause: str) -> None:
    async with Twilio(dialogd) as twilio, twilio.streaming() as call:
        await call.press(key)
        await call.closed()
        await call.after()
        await dialogd.ended(call.sid)
    told = [line["event"] for line in dialogd.find(call=call.sid, level="error", logger="agent")]
    assert any(cause in text and "agent.py" in text for text in told), told


async def test_an_agent_that_ignores_shutdown_is_killed_after_its_grace(dialogd: Dialogd) -> None:
    async with Twilio(dialogd) as twilio, twilio.streaming() as call:
        await call.press("4")
        await dialogd.step(call.sid, kind="stubborn")
        await call.stop()
        await dialogd.ended(call.sid)
    assert dialogd.find(event="worker did not leave and is killed", call=call.sid)
    assert (await dialogd.ask("/status"))["workers"] == 0


LEAVES_A_CHILD = '''
import subprocess

from dialog_worker import Agent, Media, Message, VoIP


class Parent(Agent):
    """An echo that starts a program and forgets it."""

    def on_media(self, media: Media) -> None:
        self.voip.post(Message("echo", media.payload))


def create(voip: VoIP) -> Agent:
    subprocess.Popen(["sleep", "300"])
    return Parent(voip=voip)
'''


async def test_what_a_worker_leaves_running_ends_with_its_call(start_dialogd: StartDialogd) -> None:
    dialogd = start_dialogd(agent=LEAVES_A_CHILD)
    before = set(dialogd.processes())
    async with Twilio(dialogd) as twilio, twilio.streaming() as call:
        await call.echo()
        assert len(set(dialogd.processes()) - before) == 2
    await dialogd.ended(call.sid)
    left = await dialogd.logged(event="worker left processes behind, which were killed", call=call.sid)
    assert (left["count"], left["names"]) == (1, ["sleep"])
    assert set(dialogd.processes()) == before
