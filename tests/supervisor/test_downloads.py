"""Finished recordings that are copied here: whole, private and told with their path, or told without."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import structlog
import trio
from trio.testing import wait_all_tasks_blocked

from dialog_supervisor.carriers.twilio import rest
from protocol.messages import Error, RecordingStatus, RecordingUrl, StartRecording
from tests.e2e.twilio_api import Answer, refusal, twilio_api
from tests.supervisor.line import ACCOUNT, ROOT, RecordedLine, recorded_line

BASIC = httpx.BasicAuth(ACCOUNT, "token")._auth_header
DOWNLOAD = StartRecording(1, 5, download=True)


@pytest.fixture
async def line(tmp_path: Path) -> AsyncIterator[RecordedLine]:
    async with recorded_line(tmp_path) as line:
        yield line


@pytest.fixture
async def copying(line: RecordedLine, nursery: trio.Nursery) -> RecordedLine:
    """A line whose recording is to be copied."""
    nursery.start_soon(line.recordings.run)
    await line.begun(DOWNLOAD)
    return line


async def settled(line: RecordedLine) -> list[Any]:
    """Wait until nothing is owed and return what was told of it, besides the states."""
    with trio.fail_after(5):
        await line.leg.settled()
    return [event for event in line.leg.told if not isinstance(event, RecordingStatus)]


async def test_a_copy_is_told_with_its_path_once_it_is_whole(copying: RecordedLine) -> None:
    copying.api.answers.append(Answer(200, bytes(range(256)), {"Content-Type": "audio/x-wav"}))
    copying.report("completed")
    assert copying.of(RecordingUrl) == []
    path = copying.directory / "recordings" / "CA1-RE1.wav"
    assert await settled(copying) == [RecordingUrl(copying.url("RE1"), 2.0, "RE1", 2, str(path))]
    assert path.read_bytes() == bytes(range(256))


async def test_a_copy_is_fetched_once_with_the_accounts_credentials(copying: RecordedLine) -> None:
    copying.api.answers.append(Answer(200, b"RIFF"))
    copying.report("completed")
    copying.report("completed")
    await settled(copying)
    [asked] = copying.api.asked
    assert (asked.method, asked.path, asked.authorization) == ("GET", f"{ROOT}/Recordings/RE1.wav", BASIC)


async def test_an_address_at_the_production_host_is_fetched_from_the_configured_one(copying: RecordedLine) -> None:
    copying.api.answers.append(Answer(200, b"RIFF"))
    copying.report("completed", RecordingUrl=f"https://api.twilio.com{ROOT}/Recordings/RE1")
    await settled(copying)
    assert copying.kept == ["CA1-RE1.wav"]


async def test_media_that_is_not_there_yet_is_asked_for_again(
    copying: RecordedLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rest, "_MEDIA_BACKOFF_S", 0.001)
    copying.api.answers += [Answer(404), Answer(503), Answer(200, b"RIFF")]
    copying.report("completed")
    await settled(copying)
    assert (copying.kept, len(copying.api.asked)) == (["CA1-RE1.wav"], 3)


async def failed(line: RecordedLine) -> str:
    """Return why a copy failed, as it was told before the recording, and logged."""
    with structlog.testing.capture_logs() as lines:
        error, told = await settled(line)
    assert isinstance(error, Error)
    assert error.code == "recording_not_copied"
    assert (told.sid, told.path) == ("RE1", "")
    [logged] = [one for one in lines if one["log_level"] == "error"]
    assert logged["event"] == "recording is not copied; it is still at the carrier"
    assert error.message == f"RE1: {logged['reason']}"
    assert [name for name in line.kept if name.endswith((".wav", ".part"))] == []
    return error.message


async def test_media_that_never_comes_is_told(copying: RecordedLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rest, "_MEDIA_BACKOFF_S", 0.001)
    copying.api.answers += [Answer(404)] * 5
    copying.report("completed")
    assert "Twilio answered 404" in await failed(copying)
    assert len(copying.api.asked) == 5


async def test_media_that_is_refused_is_not_asked_for_again(copying: RecordedLine) -> None:
    copying.api.answers.append(refusal(401, 20003, "Authenticate"))
    copying.report("completed")
    assert "Twilio answered 401" in await failed(copying)
    assert len(copying.api.asked) == 1


async def test_media_that_breaks_off_is_told(copying: RecordedLine) -> None:
    copying.api.answers.append(Answer(200, b"RIFF", {"Transfer-Encoding": "chunked"}))
    copying.report("completed")
    assert "cannot be reached" in await failed(copying)


@pytest.mark.parametrize(
    "url",
    [
        "https://evil.test/Recordings/RE1",
        "https://evil.test/https://api.twilio.com/RE1",
        "https://api.twilio.com.evil.test/",
        "",
    ],
)
async def test_media_elsewhere_is_not_fetched(copying: RecordedLine, url: str) -> None:
    copying.report("completed", RecordingUrl=url)
    assert "which is not Twilio's API" in await failed(copying)
    assert copying.api.asked == []


async def test_an_address_that_is_none_is_told(copying: RecordedLine) -> None:
    copying.report("completed", RecordingUrl=f"{copying.api.url}/\x00")
    assert "cannot be reached" in await failed(copying)


async def test_a_redirection_to_another_host_is_followed_without_the_credentials(copying: RecordedLine) -> None:
    with twilio_api() as store:
        store.answers.append(Answer(200, b"RIFF"))
        elsewhere = store.url.replace("127.0.0.1", "localhost")
        copying.api.answers.append(Answer(307, "", {"Location": f"{elsewhere}/RE1"}))
        copying.report("completed")
        await settled(copying)
        assert [asked.authorization for asked in store.asked] == [""]
    assert copying.kept == ["CA1-RE1.wav"]


@pytest.mark.filterwarnings(
    "ignore:Async generator '(httpx|httpcore):ResourceWarning"  # they leave theirs to the collector; the response is closed
)
async def test_a_recording_that_is_too_large_is_told(copying: RecordedLine) -> None:
    copying.api.answers.append(Answer(200, bytes(1001)))
    copying.report("completed")
    assert "larger than 1000 bytes (recordings.size_limit)" in await failed(copying)


async def test_a_full_disk_is_told(copying: RecordedLine) -> None:
    (copying.directory / "recordings").mkdir()
    (copying.directory / "recordings" / "CA1-RE1.wav.part").symlink_to("/dev/full")
    copying.api.answers.append(Answer(200, b"RIFF"))
    copying.report("completed")
    assert "No space left on device" in await failed(copying)


async def test_a_directory_that_cannot_be_made_is_told(copying: RecordedLine) -> None:
    (copying.directory / "recordings").write_text("a file")
    copying.report("completed")
    assert "File exists" in await failed(copying)


async def test_after_one_that_failed_the_next_is_copied(copying: RecordedLine) -> None:
    copying.api.answers.append(refusal(401, 20003, "Authenticate"))
    copying.report("completed")
    await failed(copying)
    await copying.begun(DOWNLOAD, "RE2")
    copying.api.answers.append(Answer(200, b"RIFF"))
    copying.report("completed", "RE2")
    await settled(copying)
    assert copying.kept == ["CA1-RE2.wav"]


async def test_a_recording_that_nobody_wants_here_is_not_copied(line: RecordedLine, nursery: trio.Nursery) -> None:
    nursery.start_soon(line.recordings.run)
    await line.begun()
    line.report("completed")
    await wait_all_tasks_blocked()
    assert line.api.asked == []
