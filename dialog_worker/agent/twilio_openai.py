"""An OpenAI agent that keeps a record of its calls: recorded and transcribed at Twilio, and given both at the end."""

import logging
from typing import Any

import msgspec
from msgspec import Struct

from dialog_worker.agent.openai import OpenAIAgent
from dialog_worker.voip import RequestFailed
from protocol.messages import Metadata, RecordingUrl, Shutdown, StreamingStarted, StreamingStopped, Transcript

log = logging.getLogger("agent")


class CompletedCall(Struct, frozen=True):
    """What is left of a call: whose it was, how it ended, and what was said in it.

    `recording` has the path of its copy on this machine, `transcript` Twilio's final utterances in their order; either may
    be missing, when Twilio did not deliver it within `calls.callbacks_timeout`. `history` is the conversation as the caller
    heard it, in the form of OpenAI's chat completions.
    """

    metadata: Metadata
    reason: str
    recording: RecordingUrl | None
    transcript: tuple[Transcript, ...]
    history: tuple[dict[str, Any], ...]


class _Record(Struct, frozen=True):
    """What a worker that takes over has to know besides the conversation."""

    conversation: bytes = b""
    transcript: tuple[Transcript, ...] = ()
    recording: RecordingUrl | None = None


class TwilioVoIPOpenAIAgent(OpenAIAgent):
    """Records and transcribes its call, greets without being interrupted, and is given everything once the caller has gone.

    The worker waits for recording and transcript up to `calls.callbacks_timeout`; then `on_call_completed` has
    `calls.shutdown_grace` for its work, and the agent is disposed of. `recording` and `transcription` are what
    `VoIP.start_recording` and `VoIP.start_transcript` are called with; None leaves that out.
    """

    recording: dict[str, Any] | None = {"download": True}  # noqa: RUF012 - replaced by a subclass, never changed
    transcription: dict[str, Any] | None = {}  # noqa: RUF012

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.transcript: list[Transcript] = []
        self._recorded: RecordingUrl | None = None
        self._kept = False  # recording and transcription were asked for
        self._ended = ""

    async def on_call_completed(self, call: CompletedCall) -> None:
        """Handle a call that is over: file it, send it, have it summarised. By default nothing is done."""

    async def on_streaming_started(self, started: StreamingStarted) -> None:
        """Record, transcribe and greet, all at once."""
        if not self._kept:
            self._kept = True
            self.nursery.start_soon(self._keep_record)
        if not self.history:
            self.nursery.start_soon(self.greet, False)

    async def _keep_record(self) -> None:
        """Have Twilio record and transcribe. A call that cannot be recorded is still a call."""
        wanted = ((self.voip.start_recording, self.recording), (self.voip.start_transcript, self.transcription))
        for start, options in wanted:
            if options is None:
                continue
            try:
                await start(**options)
            except RequestFailed as error:
                log.error("%s", error)

    def checkpoint(self) -> bytes:
        return msgspec.msgpack.encode(_Record(super().checkpoint(), tuple(self.transcript), self._recorded))

    async def restore(self, checkpoint: bytes, playing: dict[str, int]) -> None:
        record = msgspec.msgpack.decode(checkpoint, type=_Record) if checkpoint else _Record()
        self.transcript, self._recorded, self._kept = list(record.transcript), record.recording, True
        await super().restore(record.conversation, playing)

    async def on_transcript(self, transcript: Transcript) -> None:
        if transcript.final:
            self.transcript.append(transcript)
            self._unsaved_change()

    async def on_recording_url(self, recording: RecordingUrl) -> None:
        self._recorded = recording
        self._unsaved_change()

    async def on_streaming_stopped(self, stopped: StreamingStopped) -> None:
        self._ended = stopped.reason

    async def on_shutdown(self, shutdown: Shutdown) -> None:
        transcript = sorted(self.transcript, key=lambda utterance: utterance.sequence)
        await self.on_call_completed(
            CompletedCall(
                self.voip.metadata, self._ended or shutdown.reason, self._recorded, tuple(transcript), tuple(self._said())
            )
        )
