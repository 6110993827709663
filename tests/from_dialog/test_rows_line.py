"""One test for each row of Dialog for TypeScript's surface, named for it. Here: the gateway and the line."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from dialog_supervisor.config import load
from tests.conftest import StartDialogd
from tests.e2e.daemon import ACCOUNT_SID, Dialogd
from tests.e2e.twilio_api import TwilioApi, twilio_api
from tests.e2e.twilio_client import CALLER, Twilio, verbs
from tests.supervisor.configuration import TWILIO, Write, writer

LINE = '''
from dialog_worker import Agent, Message, VoIP

class Line(Agent):
    """Tells what happens on its line, and asks for what the caller's keys stand for."""

    def on_media(self, media):
        self.voip.trace("message", str(len(media.payload)))
        self.voip.post(Message("u1", media.payload))

    async def on_metadata(self, metadata):
        self.voip.trace("metadata", metadata.caller, metadata.parameters)

    async def on_message_dispatched(self, dispatched):
        self.voip.trace("message_dispatched", dispatched.uuid)

    async def on_transcript(self, transcript):
        self.voip.trace("transcript", transcript.text)

    async def on_recording_url(self, recording):
        self.voip.trace("recording_url", recording.url)

    async def on_streaming_started(self, started):
        self.voip.trace("streaming_started", started.stream_id)

    async def on_streaming_stopped(self, stopped):
        self.voip.trace("streaming_stopped", stopped.reason)

    async def on_dtmf(self, dtmf):
        await {"1": self.done, "2": self.cut, "3": self.voip.start_recording, "4": self.voip.stop_recording,
               "5": self.voip.remove_recording, "6": self.voip.start_transcript, "7": self.move, "8": self.voip.hangup,
               "9": self.voip.dispose}[dtmf.digit]()
        self.voip.trace("granted", dtmf.digit)

    async def done(self):
        self.voip.post(Message("u1", b"", done=True))

    async def cut(self):
        self.voip.abort("u1")

    async def move(self):
        await self.voip.transfer_to("+15551234567")


def create(voip: VoIP) -> Agent:
    return Line(voip=voip)
'''


@pytest.fixture(scope="module")
def api() -> Iterator[TwilioApi]:
    with twilio_api() as api:
        api.body = '{"sid": "RE00000000000000000000000000000000", "status": "completed"}'
        yield api


@pytest.fixture(scope="module")
def dialogd(start_shared_dialogd: StartDialogd, api: TwilioApi) -> Dialogd:
    return start_shared_dialogd(
        agent=LINE, log={"transcripts": True}, twilio={"api_url": api.url}, transfer={"allow": ["+1555*"]}
    )


@pytest.fixture
def write(tmp_path: Path) -> Write:
    return writer(tmp_path)


# TwilioGateway


async def test_twilio_gateway_answers_with_connect_stream(dialogd: Dialogd) -> None:
    async with Twilio(dialogd) as twilio, twilio.streaming() as call:
        assert verbs(call.document) == ["Connect"]


@pytest.mark.parametrize(
    ("method", "headers", "status"),
    [
        ("GET", {}, 405),
        ("POST", {"content-type": "application/json"}, 415),
        ("POST", {"content-type": "application/x-www-form-urlencoded"}, 400),
        ("POST", {"content-type": "application/x-www-form-urlencoded", "x-twilio-signature": "wrong"}, 403),
    ],
)
async def test_twilio_gateway_refuses(dialogd: Dialogd, method: str, headers: dict[str, str], status: int) -> None:
    async with Twilio(dialogd) as twilio:
        response = await twilio.request(method, f"{dialogd.public_url}/twilio/voice", headers=headers)
    assert response.status_code == status


async def test_twilio_gateway_knows_no_other_path(dialogd: Dialogd) -> None:
    async with Twilio(dialogd) as twilio:
        assert (await twilio.post(f"{dialogd.public_url}/twilio/elsewhere", {})).status_code == 404


def test_twilio_gateway_options(write: Write) -> None:
    file = write(gateway='public_url = "https://v.example"\nrequest_size_limit = 5\nmessage_size_limit = 6')
    config = load(file, {"TWILIO_AUTH_TOKEN": "t"})
    assert (config.gateway.request_size_limit, config.gateway.message_size_limit) == (5, 6)
    assert (config.twilio.account_sid in TWILIO, config.twilio.auth_token) == (True, "t")


async def test_event_voip_an_agent_is_made_for_every_call(dialogd: Dialogd) -> None:
    async with Twilio(dialogd) as twilio, twilio.streaming() as one, twilio.streaming() as other:
        ready = [await dialogd.step(call.sid, kind="worker") for call in (one, other)]
    assert ready[0]["fields"]["pid"] != ready[1]["fields"]["pid"]


# WebSocketListener and VoIP


async def test_web_socket_listener_and_voip_events(dialogd: Dialogd) -> None:
    async with Twilio(dialogd) as twilio, twilio.streaming(table="4") as call:
        await call.echo()
        await call.press("1")
        while "u1" not in call.marks:
            message = await call.receive()
            call.marks += [message["mark"]["name"]] if message["event"] == "mark" else []
        await call.return_mark("u1")
        dispatched = await dialogd.step(call.sid, kind="message_dispatched")
        started = await dialogd.step(call.sid, kind="streaming_started")
        [_, metadata] = await dialogd.steps(call.sid, 2, kind="metadata")
        heard = await dialogd.step(call.sid, kind="message")
        await call.stop()
        await dialogd.logged(event="streaming_stopped", call=call.sid)
    assert dispatched["text"] == "u1"
    assert started["text"] == call.stream_sid
    assert (metadata["text"], metadata["fields"]) == (CALLER, {"table": "4"})
    assert heard["text"] == "160"


async def test_web_socket_listener_closes_on_an_oversized_message(dialogd: Dialogd) -> None:
    async with Twilio(dialogd) as twilio, twilio.streaming() as call:
        await call.send({"event": "media", "media": {"payload": "A" * 100_000}})
        assert await call.closed() == 1009


async def test_voip_transcript_and_recording_url(dialogd: Dialogd) -> None:
    async with Twilio(dialogd) as twilio, twilio.streaming() as call:
        about = {"CallSid": call.sid, "AccountSid": ACCOUNT_SID}
        content = {
            "TranscriptionEvent": "transcription-content",
            "TranscriptionData": '{"transcript":"Hello"}',
        }
        recorded = {"RecordingSid": "RE1", "RecordingStatus": "completed", "RecordingUrl": "https://api.test/RE1"}
        for path, fields in (("transcript", content), ("recording", recorded)):
            assert (await twilio.post(f"{dialogd.public_url}/twilio/{path}", about | fields)).status_code == 204
        assert (await dialogd.step(call.sid, kind="transcript"))["text"] == "Hello"
        assert (await dialogd.step(call.sid, kind="recording_url"))["text"] == "https://api.test/RE1"


async def test_twilio_voip_post_and_abort(dialogd: Dialogd) -> None:
    async with Twilio(dialogd) as twilio, twilio.streaming() as call:
        await call.echo()
        await call.press("2")
        while (await call.receive())["event"] != "clear":
            pass


async def test_twilio_voip_recording_and_transcript(dialogd: Dialogd, api: TwilioApi) -> None:
    api.asked.clear()
    async with Twilio(dialogd) as twilio, twilio.streaming() as call:
        for number, key in enumerate("3456", 1):
            await call.press(key)
            await dialogd.steps(call.sid, number, kind="granted")
        about = {"CallSid": call.sid, "TranscriptionEvent": "transcription-stopped"}
        about["TranscriptionSid"] = "RE00000000000000000000000000000000"  # what the API answers to every request
        await twilio.post(f"{dialogd.public_url}/twilio/transcript", about)
    start, stop, remove, transcript = api.asked[:4]
    assert start.form["RecordingChannels"] == "dual"
    assert (start.form["RecordingTrack"], start.form["Trim"]) == ("both", "do-not-trim")
    assert stop.form == {"Status": "stopped"}
    assert remove.method == "DELETE"
    assert (transcript.form["Track"], transcript.form["TranscriptionEngine"]) == ("both_tracks", "deepgram")


@pytest.mark.parametrize(
    ("key", "asked"), [("7", "<Dial><Number>+15551234567</Number></Dial>"), ("8", "completed")], ids=["transferTo", "hangup"]
)
async def test_twilio_voip(dialogd: Dialogd, api: TwilioApi, key: str, asked: str) -> None:
    api.asked.clear()
    async with Twilio(dialogd) as twilio, twilio.streaming() as call:
        await call.press(key)
        await call.closed()
        await dialogd.ended(call.sid)
    assert asked in str(api.asked[0].form)


async def test_twilio_voip_dispose(dialogd: Dialogd) -> None:
    async with Twilio(dialogd) as twilio, twilio.streaming() as call:
        await call.press("9")
        assert await call.closed() == 1000


async def test_twilio_voip_worker_and_proxy_new_code_for_new_calls(start_dialogd: StartDialogd) -> None:
    dialogd = start_dialogd(agent=LINE)
    agent = dialogd.directory / "agent" / "agent.py"
    async with Twilio(dialogd) as twilio, twilio.streaming() as old:
        agent.write_text(LINE.replace('"message",', '"new code",'))
        assert (await dialogd.ctl("reload")).returncode == 0
        async with twilio.streaming() as new:
            await new.echo()
            await old.echo()
            assert await dialogd.step(new.sid, kind="new code")
            assert await dialogd.step(old.sid, kind="message")
