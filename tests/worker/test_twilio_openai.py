"""An agent that has its call recorded and transcribed, and is given both when the caller has gone."""

from typing import Any

import pytest

from dialog_worker import STT, TTS, CompletedCall, TwilioVoIPOpenAIAgent, VoIP
from dialog_worker.testing import scripted_call
from protocol.messages import Failure, RecordingUrl, StartRecording, StartTranscript, Transcript

from .desk import spoken
from .model_server import ModelServer, model_server, text

RECORDING = RecordingUrl("https://api.twilio.com/RE1", 12.0, "RE1", 2, "/recordings/RE1.wav")


class Clerk(TwilioVoIPOpenAIAgent):
    system = "You keep records."
    greeting = "Hello."

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.completed: list[CompletedCall] = []

    async def on_call_completed(self, call: CompletedCall) -> None:
        self.completed.append(call)


class Office:
    def __init__(self, server: ModelServer, kind: type[Clerk] = Clerk) -> None:
        self._server, self._kind = server, kind
        self.clerk: Clerk

    def __call__(self, voip: VoIP, stt: STT, tts: TTS) -> Clerk:
        self.clerk = self._kind(voip=voip, stt=stt, tts=tts, model="m", api_key="k", base_url=self._server.url)
        return self.clerk


async def test_a_call_is_recorded_on_two_channels_and_transcribed_from_its_start() -> None:
    async with model_server() as server, scripted_call(Office(server)) as call:
        await call.next_said()
        recording, transcript = await call.requested(StartRecording), await call.requested(StartTranscript)
    assert isinstance(recording, StartRecording)
    assert (recording.channels, recording.track, recording.trim, recording.download) == ("dual", "both", False, True)
    assert isinstance(transcript, StartTranscript)
    assert (transcript.track, transcript.engine) == ("both", "deepgram")


async def test_the_greeting_is_not_interrupted() -> None:
    async with model_server() as server, scripted_call(Office(server)) as call:
        await call.until("saying")
        await call.caller_speaks()
        assert await call.next_said() == Clerk.greeting


async def test_recording_transcript_and_history_are_given_when_the_caller_has_gone() -> None:
    async with model_server() as server:
        server.scripts = [text("Noon.")]
        async with scripted_call(office := Office(server)) as call:
            await call.next_said()
            await call.caller_says("when")
            await call.next_said()
            await call.tell(Transcript("Noon.", "outbound", True, 0.9, sequence=4))
            await call.tell(Transcript("wh", "inbound", False, None, sequence=2))
            await call.tell(Transcript("When?", "inbound", True, 0.8, sequence=3))
            await call.tell(RECORDING)
            assert office.clerk.completed == []
    [completed] = office.clerk.completed
    assert completed.recording == RECORDING
    assert [utterance.text for utterance in completed.transcript] == ["When?", "Noon."]
    assert spoken(list(completed.history)) == [("assistant", Clerk.greeting), ("user", "when"), ("assistant", "Noon.")]
    assert completed.reason == "the caller hung up"
    assert completed.metadata.caller == "+15550001111"


async def test_a_call_of_which_nothing_arrived_is_completed_without() -> None:
    async with model_server() as server, scripted_call(office := Office(server)) as call:
        await call.next_said()
    [completed] = office.clerk.completed
    assert completed.recording is None
    assert completed.transcript == ()


async def test_a_call_that_cannot_be_recorded_is_still_a_call(caplog: pytest.LogCaptureFixture) -> None:
    async with model_server() as server, scripted_call(Office(server)) as call:
        call.failure = Failure("carrier", "Twilio answered 401: Authenticate", 20003, 401)
        assert await call.next_said() == Clerk.greeting
        call.failure = None
    assert "20003" in caplog.text or "Authenticate" in caplog.text


async def test_recording_and_transcription_may_be_left_out() -> None:
    class Discreet(Clerk):
        recording = None
        transcription = None

    async with model_server() as server, scripted_call(Office(server, Discreet)) as call:
        await call.next_said()
        assert call.requests == []
