"""An agent that has its call recorded: begun, paused, stopped, removed, and copied to this machine when it is finished."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from tests.conftest import StartDialogd
from tests.e2e.daemon import PUBLIC_URL, RECORDER, Dialogd
from tests.e2e.twilio_api import Answer, TwilioApi, twilio_api
from tests.e2e.twilio_client import PhoneCall, Twilio

AUDIO = b"RIFF" + bytes(range(256)) * 1000


@pytest.fixture(scope="module")
def served() -> Iterator[TwilioApi]:
    with twilio_api() as api:
        yield api


@pytest.fixture
def api(served: TwilioApi) -> TwilioApi:
    """Twilio's API, which will begin the recording RE1."""
    served.asked.clear()
    served.answers[:] = [Answer(201, '{"sid": "RE1"}')]
    return served


@pytest.fixture(scope="module")
def dialogd(start_shared_dialogd: StartDialogd, served: TwilioApi) -> Dialogd:
    return start_shared_dialogd(agent=RECORDER, twilio={"api_url": served.url})


async def press(call: PhoneCall, dialogd: Dialogd, keys: str) -> None:
    """Press keys, each after the agent was granted what the one before stands for."""
    for key in keys:
        await call.press(key)
        await dialogd.step(call.sid, kind="granted", text=key)


async def finish(call: PhoneCall, api: TwilioApi) -> str:
    """Have Twilio report that the recording is complete; return where it is said to be."""
    url = f"{api.url}/2010-04-01/Accounts/AC1/Recordings/RE1"
    more = {"RecordingSid": "RE1", "RecordingStatus": "completed", "RecordingChannels": "2", "RecordingDuration": "3"}
    assert (await call.report("recording", RecordingUrl=url, **more)).status_code == 204
    return url


async def test_a_recording_has_a_channel_for_each_side_and_is_reported_here(dialogd: Dialogd, api: TwilioApi) -> None:
    async with Twilio(dialogd) as twilio, twilio.streaming() as call:
        await press(call, dialogd, "1")
        await finish(call, api)
    [asked] = api.asked
    assert asked.path.endswith(f"/Calls/{call.sid}/Recordings.json")
    assert (asked.form["RecordingChannels"], asked.form["RecordingTrack"]) == ("dual", "both")
    assert asked.form["RecordingStatusCallback"] == f"{PUBLIC_URL}/twilio/recording"


async def test_a_recording_is_paused_resumed_stopped_and_removed(dialogd: Dialogd, api: TwilioApi) -> None:
    api.answers += [Answer(200, "{}")] * 3 + [Answer(204)]
    async with Twilio(dialogd) as twilio, twilio.streaming() as call:
        await press(call, dialogd, "13456")
        await call.echo()
    here = f"/Calls/{call.sid}/Recordings/RE1.json"
    assert [(asked.method, asked.form.get("Status")) for asked in api.asked[1:]] == [
        ("POST", "paused"),
        ("POST", "in-progress"),
        ("POST", "stopped"),
        ("DELETE", None),
    ]
    assert all(asked.path.endswith(here) for asked in api.asked[1:4])
    assert api.asked[4].path.endswith("/Recordings/RE1.json")


@pytest.mark.parametrize("key", list("3456"))
async def test_what_is_not_recorded_cannot_be_changed_and_the_agent_is_told_so(
    dialogd: Dialogd, api: TwilioApi, key: str
) -> None:
    async with Twilio(dialogd) as twilio, twilio.streaming() as call:
        await call.press(key)
        failed = await dialogd.step(call.sid, kind="failed")
        await call.echo()
    assert failed["fields"]["kind"] == "carrier"
    assert "no recording of this call" in failed["text"]
    assert api.asked == []


async def test_without_a_wish_for_a_copy_the_agent_is_told_where_twilio_has_it(dialogd: Dialogd, api: TwilioApi) -> None:
    async with Twilio(dialogd) as twilio, twilio.streaming() as call:
        await press(call, dialogd, "1")
        url = await finish(call, api)
        told = await dialogd.step(call.sid, kind="recording")
    assert (told["text"], told["fields"]) == ("", {"url": url, "channels": "2"})
    assert len(api.asked) == 1


async def test_a_copy_is_on_this_machine_when_the_agent_is_told_of_it(dialogd: Dialogd, api: TwilioApi) -> None:
    async with Twilio(dialogd) as twilio, twilio.streaming() as call:
        await press(call, dialogd, "2")
        api.answers.append(Answer(200, AUDIO))
        await finish(call, api)
        path = trio.Path((await dialogd.step(call.sid, kind="recording"))["text"])
        assert await path.read_bytes() == AUDIO
    assert path == trio.Path(dialogd.directory) / "recordings" / f"{call.sid}-RE1.wav"
    assert [(await place.stat()).st_mode & 0o777 for place in (path, path.parent)] == [0o600, 0o700]
    assert await dialogd.logged(event="recording is kept", call=call.sid, recording="RE1", path=str(path))


async def test_a_call_talks_on_while_its_recording_is_copied(dialogd: Dialogd, api: TwilioApi) -> None:
    async with Twilio(dialogd) as twilio, twilio.streaming() as call:
        await press(call, dialogd, "2")
        api.answers.append(Answer(200, AUDIO))
        api.speaks.clear()
        await finish(call, api)
        await call.echo()
        api.speaks.set()
        assert await dialogd.step(call.sid, kind="recording")


async def test_a_service_keeps_recordings_with_its_state(
    start_dialogd: StartDialogd, served: TwilioApi, api: TwilioApi, tmp_path: Path
) -> None:
    environ = {"STATE_DIRECTORY": str(tmp_path / "state")}
    dialogd = start_dialogd(agent=RECORDER, environ=environ, twilio={"api_url": served.url}, recordings={"format": "mp3"})
    async with Twilio(dialogd) as twilio, twilio.streaming() as call:
        await press(call, dialogd, "2")
        api.answers.append(Answer(200, AUDIO))
        await finish(call, api)
        await dialogd.step(call.sid, kind="recording")
    assert [path.name for path in (tmp_path / "state" / "recordings").iterdir()] == [f"{call.sid}-RE1.mp3"]
    assert api.asked[1].path.endswith("/Recordings/RE1.mp3")
