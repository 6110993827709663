"""A call that reaches its permitted length: the agent is told in time to say goodbye, and then the call ends."""

import pytest
import trio

from tests.conftest import StartDialogd
from tests.e2e.daemon import RECORDER, Dialogd
from tests.e2e.twilio_client import Twilio, verbs


@pytest.fixture
def dialogd(start_dialogd: StartDialogd) -> Dialogd:
    return start_dialogd(agent=RECORDER, calls={"max_duration": 1.2, "farewell_time": 0.6, "callbacks_timeout": 1.5})


async def test_the_agent_says_goodbye_and_the_call_ends_at_its_limit(dialogd: Dialogd) -> None:
    async with Twilio(dialogd) as twilio, twilio.streaming() as call:
        assert await call.hear() == b"\x7f" * 800
        told = await dialogd.step(call.sid, kind="time_limit")
        assert await call.closed() == 1000
        assert verbs(await call.after()) == ["Hangup"]
        ended = await dialogd.ended(call.sid)
    assert told["text"] == "0.6"
    assert told["t"] == pytest.approx(0.6, abs=0.25)
    assert ended["reason"] == "it lasted 1.2 s (calls.max_duration)"
    assert ended["seconds"] == pytest.approx(1.2, abs=0.3)
    assert await dialogd.logged(
        event="the call has reached its permitted length", remaining_s=0.6, max_duration=1.2, level="warning"
    )


async def test_a_call_whose_conversation_is_over_has_no_length_to_reach(dialogd: Dialogd) -> None:
    async with Twilio(dialogd) as twilio, twilio.streaming() as call:
        await call.report("recording", RecordingSid="RE1", RecordingStatus="in-progress")
        await dialogd.step(call.sid, kind="recording_status")
        await call.stop()
        await call.closed()
        async with trio.open_nursery() as nursery:
            steps = await nursery.start(dialogd.watch, call.sid)
    assert [step for step in steps if step["kind"] == "time_limit"] == []
    assert (await dialogd.ended(call.sid))["seconds"] > 1.2
    assert not dialogd.find(event="the call has reached its permitted length")
