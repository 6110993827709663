"""Twilio's transcription of one call: asked for there, told of by its reports."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import structlog

from dialog_supervisor.carriers.base import CarrierError
from dialog_supervisor.carriers.twilio.recordings import TranscriptionState
from protocol.messages import StartTranscript, Transcript, TranscriptStatus
from tests.e2e.twilio_api import Answer, refusal
from tests.supervisor.line import ROOT, TRANSCRIBE, RecordedLine, recorded_line


@pytest.fixture
async def line(tmp_path: Path) -> AsyncIterator[RecordedLine]:
    async with recorded_line(tmp_path) as line:
        yield line


async def test_a_transcription_is_asked_for_with_what_the_agent_wants(line: RecordedLine) -> None:
    line.api.answers.append(Answer(201, '{"sid": "GT1"}'))
    await line.transcription.start(StartTranscript(1, 5, "inbound", "google", "de-DE", "long", partial_results=True))
    [asked] = line.api.asked
    assert (asked.method, asked.path) == ("POST", f"{ROOT}/Calls/CA1/Transcriptions.json")
    assert asked.form == {
        "Track": "inbound_track",
        "TranscriptionEngine": "google",
        "LanguageCode": "de-DE",
        "SpeechModel": "long",
        "PartialResults": "true",
        "StatusCallbackUrl": "https://voice.test/twilio/transcript",
        "StatusCallbackMethod": "POST",
    }


async def test_without_wishes_both_tracks_are_transcribed_by_the_engines_own_model(line: RecordedLine) -> None:
    line.api.answers.append(Answer(201, '{"sid": "GT1"}'))
    await line.transcription.start(TRANSCRIBE)
    form = line.api.asked[0].form
    assert (form["Track"], form["PartialResults"], form.get("SpeechModel")) == ("both_tracks", "false", None)


async def test_a_second_transcription_is_refused_while_one_is_under_way(line: RecordedLine) -> None:
    await line.transcribing()
    with pytest.raises(CarrierError, match="transcription GT1 is under way"):
        await line.transcription.start(TRANSCRIBE)


async def test_a_transcription_is_stopped_and_its_last_report_waited_for(line: RecordedLine) -> None:
    await line.transcribing()
    await line.transcription.stop()
    [asked] = line.api.asked
    assert (asked.path, asked.form) == (f"{ROOT}/Calls/CA1/Transcriptions/GT1.json", {"Status": "stopped"})
    assert line.leg.owed == ("GT1",)
    line.transcribed("stopped")
    assert not line.leg.owed


async def test_a_transcription_that_another_dialogd_began_can_be_stopped(line: RecordedLine) -> None:
    line.transcription.take_up(TranscriptionState(current="GT1", last="GT1"))
    await line.transcription.stop()
    assert line.api.asked[0].path == f"{ROOT}/Calls/CA1/Transcriptions/GT1.json"


async def test_without_a_transcription_there_is_nothing_to_stop(line: RecordedLine) -> None:
    with pytest.raises(CarrierError, match="no transcription of this call is under way"):
        await line.transcription.stop()


async def test_reports_on_a_transcription_are_told_in_order(line: RecordedLine) -> None:
    line.transcribed("started")
    line.transcribed("content", TranscriptionData='{"transcript": "Hello"}', Track="inbound_track")
    line.transcribed("stopped")
    assert line.leg.told == [
        TranscriptStatus("started", "GT1"),
        Transcript("Hello", "inbound", True),
        TranscriptStatus("stopped", "GT1"),
    ]


async def test_a_transcription_that_fails_is_told_logged_and_waited_for_no_more(line: RecordedLine) -> None:
    await line.transcribing()
    with structlog.testing.capture_logs() as lines:
        line.transcribed("error", ErrorCode="32650", ErrorMessage="no such engine")
    assert line.of(TranscriptStatus) == [TranscriptStatus("failed", "GT1", "no such engine", 32650)]
    assert [(one["event"], one["code"]) for one in lines] == [("transcription failed", 32650)]
    assert not line.leg.owed


async def test_the_end_of_a_transcription_may_be_reported_without_its_sid(line: RecordedLine) -> None:
    await line.transcribing()
    line.transcribed("stopped", sid="")
    assert not line.leg.owed


async def test_a_late_report_of_its_beginning_does_not_revive_a_stopped_transcription(line: RecordedLine) -> None:
    await line.transcribing()
    await line.transcription.stop()
    line.transcribed("started")
    await line.transcribing()


async def test_a_refused_transcription_is_not_waited_for(line: RecordedLine) -> None:
    line.api.answers.append(refusal(400, 32650, "Invalid transcription engine"))
    with pytest.raises(CarrierError) as caught:
        await line.transcription.start(TRANSCRIBE)
    assert (caught.value.code, line.leg.owed) == (32650, ())
