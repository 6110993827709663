"""What an agent's last handlers ask for, when the call is over, is still carried out and answered."""

from collections.abc import Iterator

import pytest

from tests.conftest import StartDialogd
from tests.e2e.daemon import Dialogd
from tests.e2e.twilio_api import Answer, TwilioApi, twilio_api
from tests.e2e.twilio_client import Twilio

TIDY = '''
from dialog_worker import Agent, VoIP


class Tidy(Agent):
    """Has its call recorded, and leaves nothing of it at the carrier."""

    async def on_streaming_started(self, started):
        await self.voip.start_recording()
        self.voip.trace("recording", "")

    async def on_recording_url(self, recording):
        await self.voip.remove_recording()
        self.voip.trace("removed", recording.url)

    async def on_shutdown(self, shutdown):
        self.voip.trace("shutdown", shutdown.reason)


def create(voip: VoIP) -> Agent:
    return Tidy(voip=voip)
'''


@pytest.fixture
def api() -> Iterator[TwilioApi]:
    with twilio_api() as api:
        api.answers.append(Answer(201, '{"sid": "RE1"}'))
        yield api


async def test_a_request_of_a_last_handler_is_answered(start_dialogd: StartDialogd, api: TwilioApi) -> None:
    dialogd: Dialogd = start_dialogd(agent=TIDY, twilio={"api_url": api.url}, log={"transcripts": True})
    async with Twilio(dialogd) as twilio, twilio.streaming() as call:
        await dialogd.step(call.sid, kind="recording")
        await call.stop()
        api.answers.append(Answer(204))
        await call.report("recording", RecordingSid="RE1", RecordingStatus="completed", RecordingUrl="https://x.test/RE1")
        assert (await dialogd.logged(event="removed", call=call.sid))["text"] == "https://x.test/RE1"
        assert await dialogd.logged(event="shutdown", call=call.sid)
        assert (await dialogd.ended(call.sid))["seconds"] < 4
    assert [asked.method for asked in api.asked] == ["POST", "DELETE"]
