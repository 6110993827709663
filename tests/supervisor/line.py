"""Lines for tests: one at no carrier, which writes down what happens to it, and what Twilio records of one."""

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import httpx
import trio

from dialog_supervisor.carriers.base import Leg, StreamEnd
from dialog_supervisor.carriers.twilio.recordings import Recordings, Transcription
from dialog_supervisor.carriers.twilio.rest import TwilioRest
from dialog_supervisor.sections import RecordingsConfig, Secret, TwilioConfig
from dialog_supervisor.websocket import MediaSocket
from protocol.messages import Event, StartRecording, StartTranscript
from tests.e2e.twilio_api import Answer, TwilioApi, twilio_api

ACCOUNT = "AC" + "5" * 32
ROOT = f"/2010-04-01/Accounts/{ACCOUNT}"
DUAL = StartRecording(1, 5)
TRANSCRIBE = StartTranscript(1, 5)


class QuietLeg(Leg):
    """Does nothing, in the time and with the outcome that `act` has; `told` is what its worker would hear."""

    def __init__(self, emit: Callable[[Event], None] | None = None) -> None:
        self.told: list[Event] = []
        self.asked: list[str] = []
        self.act: Callable[[], Awaitable[object]] = trio.lowlevel.checkpoint
        super().__init__(self.told.append if emit is None else emit)

    async def _asked(self, name: str, *details: object) -> None:
        self.asked.append(" ".join([name, *map(str, details)]))
        await self.act()

    def _carried(self) -> bytes:
        return b"the carrier's own"

    def _take_up(self, carried: bytes) -> None:
        assert carried == b"the carrier's own"

    def _send_media(self, audio: bytes) -> None:
        pass

    def _send_mark(self, name: str) -> None:
        pass

    def _send_clear(self) -> None:
        pass

    async def stream(self, socket: MediaSocket) -> StreamEnd:
        return StreamEnd.RELEASED

    def release(self) -> None:
        pass

    async def hangup(self) -> None:
        await self._asked("hangup")

    async def transfer_to(self, destination: str) -> None:
        await self._asked("transfer_to", destination)

    async def send_dtmf(self, digits: str) -> None:
        await self._asked("send_dtmf", digits)

    async def start_recording(self, request: StartRecording) -> None:
        await self._asked("start_recording", request.channels, request.track)

    async def pause_recording(self, behavior: Literal["silence", "skip"]) -> None:
        await self._asked("pause_recording", behavior)

    async def resume_recording(self) -> None:
        await self._asked("resume_recording")

    async def stop_recording(self) -> None:
        await self._asked("stop_recording")

    async def remove_recording(self) -> None:
        await self._asked("remove_recording")

    async def start_transcript(self, request: StartTranscript) -> None:
        await self._asked("start_transcript", request.engine, request.language)

    async def stop_transcript(self) -> None:
        await self._asked("stop_transcript")

    def callback(self, about: str, fields: Mapping[str, str]) -> None:
        pass


@dataclass
class RecordedLine:
    """One call's recordings and transcription, and what is told of them."""

    api: TwilioApi
    rest: TwilioRest
    directory: Path
    size_limit: int = 1000
    leg: QuietLeg = field(default_factory=QuietLeg)

    def __post_init__(self) -> None:
        config = RecordingsConfig(directory=self.directory / "recordings", size_limit=self.size_limit)
        self.recordings = Recordings("CA1", self.leg, self.rest, config, "https://voice.test/twilio/recording")
        self.transcription = Transcription("CA1", self.leg, self.rest, "https://voice.test/twilio/transcript")

    def url(self, sid: str) -> str:
        return f"{self.api.url}{ROOT}/Recordings/{sid}"

    def report(self, status: str, sid: str = "RE1", **fields: str) -> None:
        """Have Twilio report on a recording."""
        base = {"RecordingSid": sid, "RecordingStatus": status, "RecordingUrl": self.url(sid), "RecordingDuration": "2"}
        self.recordings.callback(base | {"RecordingChannels": "2"} | fields)

    def transcribed(self, event: str, sid: str = "GT1", **fields: str) -> None:
        """Have Twilio report on a transcription."""
        self.transcription.callback({"TranscriptionSid": sid, "TranscriptionEvent": f"transcription-{event}"} | fields)

    def of(self, kind: type[Any]) -> list[Any]:
        """Return the events of a kind that were told."""
        return [event for event in self.leg.told if isinstance(event, kind)]

    async def begun(self, request: StartRecording = DUAL, sid: str = "RE1") -> None:
        """Begin a recording of this sid."""
        self.api.answers.append(Answer(201, f'{{"sid": "{sid}"}}'))
        await self.recordings.start(request)
        self.api.asked.clear()

    async def transcribing(self) -> None:
        """Begin a transcription."""
        self.api.answers.append(Answer(201, '{"sid": "GT1"}'))
        await self.transcription.start(TRANSCRIBE)
        self.api.asked.clear()

    @property
    def kept(self) -> list[str]:
        """The names of the files in the recordings' directory."""
        directory = self.directory / "recordings"
        return sorted(path.name for path in directory.iterdir()) if directory.is_dir() else []


@asynccontextmanager
async def recorded_line(directory: Path) -> AsyncIterator[RecordedLine]:
    """Have a Twilio API on loopback, and a call there."""
    with twilio_api() as api:
        config = TwilioConfig(account_sid=ACCOUNT, auth_token=Secret("token"), api_url=api.url, timeout=5)
        async with httpx.AsyncClient() as http:
            yield RecordedLine(api, TwilioRest(config, http), directory)
