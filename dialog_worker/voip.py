"""The phone line as an agent sees it: `VoIP`, and `VoIPProxy`, which has it at the other end of the pipe."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Literal, Self

from protocol.link import Link, LinkClosed, RequestFailed
from protocol.messages import (
    Abort,
    Checkpoint,
    Dispose,
    Event,
    Hangup,
    Media,
    Message,
    Metadata,
    PauseRecording,
    Post,
    RemoveRecording,
    Request,
    ResumeRecording,
    SendDtmf,
    StartRecording,
    StartTranscript,
    StopRecording,
    StopTranscript,
    Trace,
    TransferTo,
    Turn,
)

REQUEST_TIMEOUT_S = 15.0  # what the carrier's API may take, and a little
PLAYOUT_TIMEOUT_S = 120.0  # besides, for what has yet to be heard

__all__ = ["RequestFailed", "VoIP", "VoIPProxy"]


class VoIP(ABC):
    """The phone line of one call.

    Audio is mu-law at 8 kHz unless `StreamingStarted` said otherwise. The requests raise `RequestFailed`, which has the
    carrier's error code in `failure.code`; `failure.kind` says whether the carrier refused, did not answer, or cannot do it.
    """

    @property
    @abstractmethod
    def metadata(self) -> Metadata:
        """What the carrier told of the call so far."""

    def __aiter__(self) -> Self:
        return self

    @abstractmethod
    async def __anext__(self) -> Event:
        """Return what happens next on the line; ends when the line is gone. For one reader: the agent."""

    async def listen(self, hear: Callable[[Media], None]) -> Event | None:
        """Call `hear` with the caller's voice as it comes, and return what else happens, or None when the line is gone.

        `hear` must not wait. For one reader: the agent. Raises what it raises.
        """
        async for event in self:
            if not isinstance(event, Media):
                return event
            hear(event)
        return None

    @abstractmethod
    def post(self, message: Message[bytes]) -> None:
        """Have the caller hear audio. Never blocks; raises `OutboxFull` where `room` was not awaited for long.

        Each message whose last piece has `done` is answered by a `MessageDispatched`.
        """

    @abstractmethod
    async def room(self) -> None:
        """Wait until what was posted is on its way: back-pressure for whoever posts faster than a caller can listen."""

    @abstractmethod
    def abort(self, uuid: str) -> None:
        """Stop a message, also what the carrier has buffered of it. Answered by a `MessageDispatched`, if any was posted."""

    @abstractmethod
    def trace(self, kind: str, text: str, fields: dict[str, str] | None = None) -> None:
        """Tell whoever watches the call what the agent does."""

    def report(self, turn: Turn) -> None:  # noqa: B027 - a line that keeps no figures needs no method for them
        """Tell how a turn of the conversation went, for the operator's figures. Never blocks. By default nothing is done."""

    @abstractmethod
    def save(self, state: bytes, audio_ms: int) -> None:
        """Have a state kept for a worker that takes over, which will hear the caller's last `audio_ms` again.

        Never blocks. At most 1 MB.
        """

    @abstractmethod
    async def request(self, kind: type[Request], *, timeout_s: float, **fields: Any) -> str:
        """Ask the supervisor for something and return its answer. Raises `RequestFailed`."""

    async def hangup(self, *, after_playout: bool = True) -> None:
        """End the call at the carrier, after what has been posted was heard unless told otherwise."""
        patience = REQUEST_TIMEOUT_S + (PLAYOUT_TIMEOUT_S if after_playout else 0)
        await self.request(Hangup, timeout_s=patience, after_playout=after_playout)

    async def transfer_to(self, destination: str, *, after_playout: bool = True) -> None:
        """Connect the caller to another number (E.164) or SIP address, after what has been posted was heard.

        The call is then over for this worker. A destination that the operator's list does not cover is refused.
        """
        patience = REQUEST_TIMEOUT_S + (PLAYOUT_TIMEOUT_S if after_playout else 0)
        await self.request(TransferTo, timeout_s=patience, destination=destination, after_playout=after_playout)

    async def send_dtmf(self, digits: str) -> None:
        """Press keys: 0-9, *, #, and w for half a second's wait."""
        await self.request(SendDtmf, timeout_s=REQUEST_TIMEOUT_S, digits=digits)

    async def start_recording(
        self,
        *,
        channels: Literal["dual", "mono"] = "dual",
        track: Literal["both", "inbound", "outbound"] = "both",
        trim: bool = False,
        download: bool = False,
    ) -> None:
        """Record the call at the carrier; `on_recording_url` is told when the recording is complete.

        By default each side has a channel of its own; `trim` leaves silence out at both ends. With `download` the
        supervisor has copied it to this machine by then. Recording another's voice may need their consent by law.
        """
        options = {"channels": channels, "track": track, "trim": trim, "download": download}
        await self.request(StartRecording, timeout_s=REQUEST_TIMEOUT_S, **options)

    async def pause_recording(self, behavior: Literal["silence", "skip"] = "silence") -> None:
        """Pause the recording: silence takes the time's place, or nothing does. For a card number, for example."""
        await self.request(PauseRecording, timeout_s=REQUEST_TIMEOUT_S, behavior=behavior)

    async def resume_recording(self) -> None:
        """Go on with a paused recording."""
        await self.request(ResumeRecording, timeout_s=REQUEST_TIMEOUT_S)

    async def stop_recording(self) -> None:
        """Stop the recording under way. The end of the call does so too."""
        await self.request(StopRecording, timeout_s=REQUEST_TIMEOUT_S)

    async def remove_recording(self) -> None:
        """Delete the call's last recording at the carrier, and stop it before if it is under way. A copy here stays."""
        await self.request(RemoveRecording, timeout_s=REQUEST_TIMEOUT_S)

    async def start_transcript(
        self,
        *,
        track: Literal["both", "inbound", "outbound"] = "both",
        engine: str = "deepgram",
        language: str = "en-US",
        model: str = "",
        partial_results: bool = False,
    ) -> None:
        """Have the carrier transcribe; `on_transcript` is told of each utterance, and of its drafts if asked for.

        Twilio's engines are "deepgram" and "google", each with models of its own.
        """
        options = {"track": track, "engine": engine, "language": language, "model": model}
        await self.request(StartTranscript, timeout_s=REQUEST_TIMEOUT_S, partial_results=partial_results, **options)

    async def stop_transcript(self) -> None:
        """Have the carrier transcribe no more. The end of the call does so too."""
        await self.request(StopTranscript, timeout_s=REQUEST_TIMEOUT_S)

    async def dispose(self, *, fallback: bool = False) -> None:
        """Let go of the line: the carrier asks what comes next, and hangs up, or does what `[fallback]` says."""
        await self.request(Dispose, timeout_s=REQUEST_TIMEOUT_S, fallback=fallback)


def sendable(text: str) -> str:
    """Return text without halves of surrogate pairs, which UTF-8 cannot express and some models write."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


class VoIPProxy(VoIP):
    """The line at the other end of the pipe, in the supervisor."""

    def __init__(self, link: Link[Event], call_id: str) -> None:
        self._link = link
        self._metadata = Metadata(call_id, "", "", "")

    @property
    def metadata(self) -> Metadata:
        return self._metadata

    async def __anext__(self) -> Event:
        return self._noted(await anext(self._link))

    async def listen(self, hear: Callable[[Media], None]) -> Event | None:
        event: Event | None = None

        def take(message: Event) -> bool:
            nonlocal event
            if isinstance(message, Media):
                hear(message)
                return False
            event = self._noted(message)
            return True

        await self._link.each(take)
        return event

    def _noted(self, event: Event) -> Event:
        if isinstance(event, Metadata):
            self._metadata = event
        return event

    def post(self, message: Message[bytes]) -> None:
        self._tell(Post(message))

    async def room(self) -> None:
        await self._link.room()

    def abort(self, uuid: str) -> None:
        self._tell(Abort(uuid))

    def trace(self, kind: str, text: str, fields: dict[str, str] | None = None) -> None:
        self._tell(Trace(kind, sendable(text), {name: sendable(value) for name, value in (fields or {}).items()}))

    def report(self, turn: Turn) -> None:
        self._tell(turn)

    def save(self, state: bytes, audio_ms: int) -> None:
        self._tell(Checkpoint(state, audio_ms))

    def _tell(self, command: Post | Abort | Trace | Turn | Checkpoint) -> None:
        try:  # noqa: SIM105 - for every frame, where `suppress` makes an object and calls it twice
            self._link.post(command)
        except LinkClosed:
            pass  # the call is over, and whoever listens learns of it

    async def request(self, kind: type[Request], *, timeout_s: float, **fields: Any) -> str:
        return await self._link.request(kind, timeout_s=timeout_s, **fields)
