"""A call's recordings: asked for at Twilio, told of by its reports."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import structlog
import trio

from dialog_supervisor.carriers.base import CarrierError
from dialog_supervisor.carriers.twilio.recordings import RecordingsState
from protocol.messages import RecordingStatus, RecordingUrl, StartRecording
from tests.e2e.twilio_api import Answer, refusal
from tests.supervisor.line import DUAL, ROOT, RecordedLine, recorded_line


@pytest.fixture
async def line(tmp_path: Path) -> AsyncIterator[RecordedLine]:
    async with recorded_line(tmp_path) as line:
        yield line


# Requests


async def test_a_recording_is_asked_for_with_what_the_agent_wants(line: RecordedLine) -> None:
    line.api.answers.append(Answer(201, '{"sid": "RE1"}'))
    await line.recordings.start(StartRecording(1, 5, "mono", "inbound", trim=True))
    [asked] = line.api.asked
    assert (asked.method, asked.path) == ("POST", f"{ROOT}/Calls/CA1/Recordings.json")
    assert asked.pairs == (
        ("RecordingStatusCallbackEvent", "in-progress"),
        ("RecordingStatusCallbackEvent", "completed"),
        ("RecordingStatusCallbackEvent", "absent"),
        ("RecordingStatusCallback", "https://voice.test/twilio/recording"),
        ("RecordingStatusCallbackMethod", "POST"),
        ("Trim", "trim-silence"),
        ("RecordingChannels", "mono"),
        ("RecordingTrack", "inbound"),
    )


async def test_a_second_recording_is_refused_while_one_is_under_way(line: RecordedLine) -> None:
    await line.begun()
    with pytest.raises(CarrierError, match="recording RE1 is under way; stop it before another begins"):
        await line.recordings.start(DUAL)
    assert line.api.asked == []


async def test_of_two_recordings_asked_for_at_once_one_is_made(line: RecordedLine) -> None:
    line.api.answers.append(Answer(201, '{"sid": "RE1"}'))
    refused = []

    async def start() -> None:
        try:
            await line.recordings.start(DUAL)
        except CarrierError as error:
            refused.append(str(error))

    async with trio.open_nursery() as both:
        both.start_soon(start)
        both.start_soon(start)
    assert len(line.api.asked) == len(refused) == 1


async def test_a_recording_that_twilio_refuses_is_not_waited_for(line: RecordedLine) -> None:
    line.api.answers.append(refusal(400, 21220, "Call is not in-progress"))
    with pytest.raises(CarrierError) as caught:
        await line.recordings.start(DUAL)
    assert (caught.value.code, caught.value.status, line.leg.owed) == (21220, 400, ())


async def test_an_answer_without_a_sid_is_no_recording(line: RecordedLine) -> None:
    line.api.answers.append(Answer(201, "{}"))
    with pytest.raises(CarrierError, match="answered without a sid"):
        await line.recordings.start(DUAL)
    assert not line.leg.owed


@pytest.mark.parametrize(
    ("change", "form"),
    [
        ("pause", {"Status": "paused", "PauseBehavior": "skip"}),
        ("resume", {"Status": "in-progress"}),
        ("stop", {"Status": "stopped"}),
    ],
)
async def test_the_recording_under_way_is_paused_resumed_and_stopped(
    line: RecordedLine, change: str, form: dict[str, str]
) -> None:
    await line.begun()
    await getattr(line.recordings, change)(*(["skip"] if change == "pause" else []))
    [asked] = line.api.asked
    assert (asked.path, asked.form) == (f"{ROOT}/Calls/CA1/Recordings/RE1.json", form)


@pytest.mark.parametrize("change", ["pause", "resume", "stop"])
async def test_without_a_recording_there_is_nothing_to_change(line: RecordedLine, change: str) -> None:
    with pytest.raises(CarrierError, match="no recording of this call is under way"):
        await getattr(line.recordings, change)(*(["skip"] if change == "pause" else []))
    assert line.api.asked == []


async def test_a_recording_that_another_dialogd_began_can_be_stopped_and_is_told_of(line: RecordedLine) -> None:
    line.recordings.take_up(RecordingsState(current="RE1", last="RE1"))
    await line.recordings.stop()
    assert line.api.asked[0].path == f"{ROOT}/Calls/CA1/Recordings/RE1.json"
    line.report("completed")
    assert [recording.sid for recording in line.of(RecordingUrl)] == ["RE1"]


async def test_what_another_dialogd_has_to_know_of_recordings(line: RecordedLine) -> None:
    await line.begun(StartRecording(1, 5, download=True))
    wanted = frozenset({"RE1"})
    assert line.recordings.state() == RecordingsState(current="RE1", last="RE1", wanted=wanted)
    line.report("completed")
    state = line.recordings.state()
    assert (state.current, state.last, state.finished) == ("", "RE1", wanted)
    assert [recording.sid for recording in state.uncopied] == ["RE1"]


async def test_after_a_stop_another_may_begin(line: RecordedLine) -> None:
    await line.begun()
    await line.recordings.stop()
    await line.begun(sid="RE2")
    assert line.leg.owed == ("RE1", "RE2")


async def test_a_finished_recording_is_removed(line: RecordedLine) -> None:
    await line.begun()
    line.report("completed")
    line.api.answers.append(Answer(204))
    await line.recordings.remove()
    assert [(asked.method, asked.path) for asked in line.api.asked] == [("DELETE", f"{ROOT}/Recordings/RE1.json")]


async def test_a_recording_under_way_is_stopped_before_it_is_removed_and_then_waited_for_no_more(line: RecordedLine) -> None:
    await line.begun()
    line.api.answers += [Answer(200, "{}"), Answer(204)]
    await line.recordings.remove()
    assert [(asked.method, asked.form) for asked in line.api.asked] == [("POST", {"Status": "stopped"}), ("DELETE", {})]
    assert not line.leg.owed


async def test_a_removal_that_fails_may_be_tried_again(line: RecordedLine) -> None:
    await line.begun()
    line.api.answers += [Answer(200, "{}"), refusal(500, 20500, "Internal Server Error"), Answer(204)]
    with pytest.raises(CarrierError):
        await line.recordings.remove()
    await line.recordings.remove()
    assert [asked.method for asked in line.api.asked] == ["POST", "DELETE", "DELETE"]


async def test_without_a_recording_there_is_nothing_to_remove(line: RecordedLine) -> None:
    with pytest.raises(CarrierError, match="there is no recording of this call to be removed"):
        await line.recordings.remove()


# Reports


async def test_a_complete_recording_is_told_and_waited_for_no_more(line: RecordedLine) -> None:
    await line.begun()
    assert line.leg.owed == ("RE1",)
    line.report("completed")
    assert line.of(RecordingUrl) == [RecordingUrl(line.url("RE1"), 2.0, "RE1", 2)]
    assert not line.leg.owed


async def test_its_state_is_told_before_it(line: RecordedLine) -> None:
    await line.begun()
    line.report("completed")
    assert [type(event) for event in line.leg.told] == [RecordingStatus, RecordingUrl]


async def test_a_report_that_comes_twice_is_told_once(line: RecordedLine) -> None:
    await line.begun()
    line.report("completed")
    line.report("completed")
    assert len(line.leg.told) == 2


async def test_a_recording_may_be_reported_before_the_answer_to_the_request_for_it(line: RecordedLine) -> None:
    line.report("in-progress")
    assert line.leg.owed == ("RE1",)
    await line.recordings.stop()
    assert line.api.asked[0].path.endswith("/RE1.json")


async def test_a_recording_that_ends_before_the_answer_to_the_request_for_it_is_not_under_way(line: RecordedLine) -> None:
    line.report("in-progress")
    line.report("completed")
    line.recordings._begun("RE1")
    assert not line.leg.owed


async def test_a_late_report_of_its_beginning_does_not_revive_a_stopped_recording(line: RecordedLine) -> None:
    await line.begun()
    await line.recordings.stop()
    line.report("in-progress")
    await line.begun(sid="RE2")
    line.report("in-progress")
    await line.recordings.stop()
    assert line.api.asked[-1].path.endswith("/RE2.json")


@pytest.mark.parametrize("status", ["absent", "failed"])
async def test_a_recording_that_is_not_is_told_logged_and_waited_for_no_more(line: RecordedLine, status: str) -> None:
    await line.begun()
    with structlog.testing.capture_logs() as lines:
        line.report(status)
    assert [(event.sid, event.status) for event in line.of(RecordingStatus)] == [("RE1", status)]
    assert line.of(RecordingUrl) == []
    assert not line.leg.owed
    assert [(one["event"], one["status"]) for one in lines] == [("there is no recording", status)]


async def test_a_state_that_twilio_may_invent_is_told_and_changes_nothing(line: RecordedLine) -> None:
    await line.begun()
    line.report("processing")
    assert [event.status for event in line.of(RecordingStatus)] == ["processing"]
    assert line.leg.owed == ("RE1",)
