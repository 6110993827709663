"""A call survives its worker: another takes over on the same line, with the last state and the audio since."""

import os
import signal
from typing import Any

import pytest
import trio

from tests.conftest import StartDialogd
from tests.e2e.daemon import Dialogd
from tests.e2e.twilio_client import FRAME, PhoneCall, Twilio, verbs

TAKES_OVER = "worker died in mid-call, and another takes over"

COUNTER = '''
"""Counts keys, saves the count, and dies of some of them."""

import os

from dialog_worker import Agent, Media, Message, VoIP


class Counter(Agent):
    count = 0
    heard = 0

    def on_media(self, media: Media) -> None:
        self.heard += len(media.payload)

    def checkpoint(self) -> bytes:
        return str(self.count).encode()

    async def restore(self, checkpoint: bytes, playing: dict[str, int]) -> None:
        self.voip.trace("restored", checkpoint.decode(), {uuid: str(ms) for uuid, ms in playing.items()})
        self.count = int(checkpoint or b"0")
        if self.count == 7:
            os._exit(7)

    async def on_dtmf(self, dtmf) -> None:
        if dtmf.digit == "#":
            self.voip.trace("count", str(self.count), {"heard": str(self.heard)})
        elif dtmf.digit == "*":
            self.voip.post(Message("sentence", b"\\x7f" * 16000))
            await self.voip.room()
            self.voip.trace("posted", "")
        elif dtmf.digit == "0":
            os._exit(1)
        else:
            self.count += int(dtmf.digit)
            self.save()
            self.voip.trace("saved", str(self.count))


def create(voip: VoIP) -> Agent:
    return Counter(voip=voip)
'''


@pytest.fixture(scope="module")
def dialogd(start_shared_dialogd: StartDialogd) -> Dialogd:
    dialogd = start_shared_dialogd()
    dialogd.expects_traceback = True  # the agents' own
    return dialogd


@pytest.fixture(scope="module")
def counting(start_shared_dialogd: StartDialogd) -> Dialogd:
    return start_shared_dialogd(agent=COUNTER)


async def worker_of(dialogd: Dialogd, call: PhoneCall) -> int:
    pid: int = (await dialogd.ask(f"/calls/{call.sid}"))["worker_pid"]
    return pid


async def step(dialogd: Dialogd, call: PhoneCall, kind: str, number: int = 1) -> dict[str, Any]:
    """Return a call's step of a kind: the first, or the one of that number."""
    return (await dialogd.steps(call.sid, number, kind=kind))[-1]


@pytest.mark.parametrize("key", ["1", "2", "3", "8", "9"], ids=["raises", "blocks", "exits", "sends garbage", "sys.exit"])
async def test_an_agent_that_breaks_is_followed_by_another_on_the_same_line(dialogd: Dialogd, key: str) -> None:
    async with Twilio(dialogd) as twilio, twilio.streaming() as call:
        await call.echo()
        await call.press(key)
        await dialogd.logged(event=TAKES_OVER, call=call.sid)
        await call.echo()
        assert (await dialogd.ask(f"/calls/{call.sid}"))["state"] == "streaming"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM], ids=lambda number: number.name)
async def test_a_signal_costs_a_caller_nothing(dialogd: Dialogd, number: signal.Signals) -> None:
    async with Twilio(dialogd) as twilio, twilio.streaming() as call:
        await call.echo()
        os.kill(await worker_of(dialogd, call), number)
        await dialogd.logged(event=TAKES_OVER, call=call.sid)
        await call.echo()


async def test_a_killed_worker_is_noticed_by_none_of_ten_callers(dialogd: Dialogd) -> None:
    async with Twilio(dialogd) as twilio, trio.open_nursery() as nursery:
        calls = [await nursery.start(_hold_a_call, twilio) for _ in range(10)]
        for call in calls:
            await call.echo()
        victim, *others = calls
        async with trio.open_nursery() as talking:
            for call in others:
                talking.start_soon(_talk, call, 40)
            os.kill(await worker_of(dialogd, victim), signal.SIGKILL)
            await dialogd.logged(event=TAKES_OVER, call=victim.sid)
            await victim.echo()
        status = await dialogd.ask("/status")
        assert (status["calls"], status["workers"]) == (10, 10)
        for call in calls:
            await call.stop()
            await dialogd.ended(call.sid)
        status = await dialogd.ask("/status")
        nursery.cancel_scope.cancel()
    assert (status["calls"], status["workers"]) == (0, 0)


async def test_where_no_worker_may_follow_the_caller_gets_the_fallback_and_nine_others_nothing(
    start_dialogd: StartDialogd,
) -> None:
    dialogd = start_dialogd(calls={"restarts": 0})
    async with Twilio(dialogd) as twilio, trio.open_nursery() as nursery:
        calls = [await nursery.start(_hold_a_call, twilio) for _ in range(10)]
        for call in calls:
            await call.echo()
        victim, *others = calls
        async with trio.open_nursery() as talking:
            for call in others:
                talking.start_soon(_talk, call, 40)
            os.kill(await worker_of(dialogd, victim), signal.SIGKILL)
            assert await victim.closed() == 1000
            assert verbs(await victim.after()) == ["Say", "Hangup"]
        assert (await dialogd.ended(victim.sid))["reason"] == "worker died (-9)"
        assert (await dialogd.ask("/status"))["calls"] == 9
        for call in others:
            await call.stop()
            await dialogd.ended(call.sid)
        nursery.cancel_scope.cancel()


async def test_more_deaths_than_permitted_bring_the_fallback(start_dialogd: StartDialogd) -> None:
    dialogd = start_dialogd(calls={"restarts": 2})
    async with Twilio(dialogd) as twilio, twilio.streaming() as call:
        for _ in range(3):
            await call.echo()
            os.kill(await worker_of(dialogd, call), signal.SIGKILL)
            await trio.sleep(0.2)
        assert await call.closed() == 1000
        assert verbs(await call.after()) == ["Say", "Hangup"]
    assert len(dialogd.find(event=TAKES_OVER, call=call.sid)) == 2


async def test_the_next_worker_has_the_last_state(counting: Dialogd) -> None:
    async with Twilio(counting) as twilio, twilio.streaming() as call:
        for number, key in enumerate("21", 1):
            await call.press(key)
            await step(counting, call, "saved", number)
        await call.press("0")
        assert (await step(counting, call, "restored"))["text"] == "3"
        await call.press("#")
        assert (await step(counting, call, "count"))["text"] == "3"


async def test_the_next_worker_hears_what_was_said_since_the_state_was_saved(counting: Dialogd) -> None:
    async with Twilio(counting) as twilio, twilio.streaming() as call:
        await call.say(FRAME)
        await call.press("1")
        await step(counting, call, "saved")
        for _ in range(25):
            await call.say(FRAME)
        await call.press("#")
        await step(counting, call, "count")
        os.kill(await worker_of(counting, call), signal.SIGKILL)
        await step(counting, call, "restored")
        await call.press("#")
        heard = int((await step(counting, call, "count", 2))["fields"]["heard"])
    assert 25 * len(FRAME) <= heard <= 26 * len(FRAME)


async def test_what_was_being_said_is_heard_out_and_its_length_told(counting: Dialogd) -> None:
    async with Twilio(counting) as twilio, twilio.streaming() as call:
        await call.press("*")
        await step(counting, call, "posted")
        await call.press("0")
        restored = await step(counting, call, "restored")
        heard = b""
        while "sentence" not in call.marks:
            message = await call.receive()
            assert message["event"] != "clear"
            if message["event"] == "mark":
                call.marks.append(message["mark"]["name"])
            else:
                heard += message["media"]["payload"].encode()
    assert restored["fields"] == {"sentence": "2000"}
    assert heard


async def test_a_state_that_a_worker_dies_of_is_left_out_the_second_time(counting: Dialogd) -> None:
    async with Twilio(counting) as twilio, twilio.streaming() as call:
        await call.press("7")
        await step(counting, call, "saved")
        await call.press("0")
        assert (await step(counting, call, "restored", 2))["text"] == ""
        await call.press("#")
        assert (await step(counting, call, "count"))["text"] == "0"


async def _hold_a_call(twilio: Twilio, *, task_status: trio.TaskStatus[PhoneCall]) -> None:
    async with twilio.streaming() as call:
        task_status.started(call)
        await trio.sleep_forever()


async def _talk(call: PhoneCall, frames: int) -> None:
    """Say a frame every 10 ms, and check that each comes back in its turn."""
    for number in range(frames):
        await call.echo(bytes([number]) + FRAME[1:])
        await trio.sleep(0.01)
