"""What Twilio reports on a call, as events: recordings, transcriptions, streams, and the call itself."""

import json

import pytest

from dialog_supervisor.carriers.twilio import callbacks
from dialog_supervisor.carriers.twilio.callbacks import Malformed
from protocol.messages import CallStatus, RecordingStatus, RecordingUrl, StreamStatus, Transcript, TranscriptStatus


def content(data: object = None, **fields: str) -> Transcript:
    """Return what a report with this TranscriptionData says."""
    text = data if isinstance(data, str) else json.dumps(data or {"transcript": "Hello", "confidence": 0.99})
    report = {"TranscriptionSid": "GT1", "TranscriptionEvent": "transcription-content", "TranscriptionData": text}
    found = callbacks.transcript(report | fields)
    assert isinstance(found, Transcript)
    return found


def status(event: str, **fields: str) -> TranscriptStatus:
    """Return what a report of this event says."""
    found = callbacks.transcript({"TranscriptionSid": "GT1", "TranscriptionEvent": f"transcription-{event}"} | fields)
    assert isinstance(found, TranscriptStatus)
    return found


# Transcriptions


def test_a_transcript_has_all_that_twilio_tells_of_it() -> None:
    told = content(Track="inbound_track", Final="true", SequenceId="7", LanguageCode="en-US")
    assert told == Transcript("Hello", "inbound", True, 0.99, 7, "en-US")


def test_a_draft_has_a_stability_and_no_confidence() -> None:
    told = content({"transcript": "Hel"}, Track="outbound_track", Final="false", SequenceId="2", Stability="0.9")
    assert told == Transcript("Hel", "outbound", False, None, 2, "", 0.9)


def test_a_stability_in_single_precision_is_read_to_its_last_place() -> None:
    assert content(Stability="0.8999999761581421").stability == 0.8999999761581421


@pytest.mark.parametrize("number", [".", "-1", "1e5", "NaN", "١", "0.5.5", " 1", "9" * 400, ""])
def test_a_number_that_is_none_counts_as_untold(number: str) -> None:
    told = content(Stability=number, SequenceId=number)
    assert (told.stability, told.sequence) == (None, 0)


@pytest.mark.parametrize("final", ["true", "True", "TRUE"])
def test_final_is_read_in_any_case(final: str) -> None:
    assert content(Final=final).final


def test_what_twilio_may_add_is_passed_over() -> None:
    assert content({"transcript": "Hello", "words": [{"word": "Hello"}]}, Track="inbound_track", News="1").text == "Hello"


@pytest.mark.parametrize(
    "data",
    [
        "",
        "Hello",
        "[]",
        "null",
        '{"transcript": 5}',
        '{"transcript": "\\ud800"}',
        '{"confidence": "high"}',
        '{"x":' + "[" * 100_000,
    ],
    ids=["empty", "text", "list", "null", "number", "half a surrogate pair", "confidence in words", "too deep"],
)
def test_data_that_cannot_be_read_is_malformed(data: str) -> None:
    with pytest.raises(Malformed, match="TranscriptionData cannot be read"):
        content(data, Track="inbound_track")


@pytest.mark.parametrize("event", ["started", "stopped"])
def test_a_transcription_that_begins_or_ends_is_told(event: str) -> None:
    assert status(event) == TranscriptStatus(event, "GT1")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "names", [("ErrorCode", "ErrorMessage"), ("TranscriptionErrorCode", "TranscriptionError")], ids=["short", "long"]
)
def test_a_failure_is_read_in_either_spelling(names: tuple[str, str]) -> None:
    told = status("error", **dict(zip(names, ("32650", "no such engine"), strict=True)))
    assert told == TranscriptStatus("failed", "GT1", "no such engine", 32650)


def test_a_failure_need_not_say_why() -> None:
    assert status("error") == TranscriptStatus("failed", "GT1", "", None)


@pytest.mark.parametrize("fields", [{}, {"TranscriptionEvent": ""}, {"TranscriptionEvent": "transcription-paused"}])
def test_an_unknown_event_of_a_transcription_is_malformed(fields: dict[str, str]) -> None:
    with pytest.raises(Malformed, match="TranscriptionEvent"):
        callbacks.transcript(fields)


# Recordings


@pytest.mark.parametrize("state", ["in-progress", "completed", "absent", "failed"])
def test_a_recordings_state_is_told_in_twilios_words_with_all_fields(state: str) -> None:
    fields = {"RecordingSid": "RE1", "RecordingStatus": state, "RecordingSource": "StartCallRecordingAPI"}
    assert callbacks.recording(fields) == RecordingStatus("RE1", state, fields)


@pytest.mark.parametrize("missing", ["RecordingSid", "RecordingStatus"])
def test_a_recording_without_sid_or_state_is_malformed(missing: str) -> None:
    with pytest.raises(Malformed, match="is missing"):
        callbacks.recording({"RecordingSid": "RE1", "RecordingStatus": "completed"} | {missing: ""})


def test_a_complete_recording_is_told_with_place_length_and_channels() -> None:
    fields = {"RecordingUrl": "https://api.twilio.com/RE1", "RecordingDuration": "12", "RecordingChannels": "2"}
    told = callbacks.recording_url(RecordingStatus("RE1", "completed", fields))
    assert told == RecordingUrl("https://api.twilio.com/RE1", 12.0, "RE1", 2)


@pytest.mark.parametrize("odd", ["-1", "soon", "."])
def test_a_recordings_odd_length_and_channels_count_as_untold(odd: str) -> None:
    told = callbacks.recording_url(RecordingStatus("RE1", "completed", {"RecordingDuration": odd, "RecordingChannels": odd}))
    assert (told.duration_s, told.channels) == (None, 1)


# Streams and calls


@pytest.mark.parametrize("event", ["started", "stopped", "error"])
def test_a_streams_state_is_told(event: str) -> None:
    told = callbacks.stream({"StreamEvent": f"stream-{event}", "StreamSid": "MZ1", "StreamError": "31920"})
    assert told == StreamStatus(event, "MZ1", "31920")


@pytest.mark.parametrize("event", ["", "started", "stream-paused"])
def test_an_unknown_event_of_a_stream_is_malformed(event: str) -> None:
    with pytest.raises(Malformed, match="StreamEvent"):
        callbacks.stream({"StreamEvent": event})


def test_a_calls_state_is_told_with_all_fields() -> None:
    fields = {"CallStatus": "completed", "CallDuration": "61", "SipResponseCode": "200"}
    assert callbacks.call(fields) == CallStatus("completed", fields)


def test_a_call_without_a_state_is_malformed() -> None:
    with pytest.raises(Malformed, match="CallStatus is missing"):
        callbacks.call({"CallSid": "CA1"})
