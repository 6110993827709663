"""What may happen in a call, as methods for an agent's author to override; by default most of it is passed over.

Handlers run one after another, in the order of the events, beside the wiring: one that takes long delays the next handler
and nothing else.
"""

import logging

from dialog_worker.participant import ProviderError
from protocol.messages import (
    CallStatus,
    Dtmf,
    Error,
    MessageDispatched,
    Metadata,
    RecordingStatus,
    RecordingUrl,
    Shutdown,
    StreamingStarted,
    StreamingStopped,
    StreamStatus,
    TimeLimit,
    Transcript,
    TranscriptStatus,
)

log = logging.getLogger("agent")


class Handlers:
    """An agent's handlers that need nothing of the agent."""

    async def on_metadata(self, metadata: Metadata) -> None:
        """Handle what the carrier tells of the call."""

    async def on_streaming_started(self, started: StreamingStarted) -> None:
        """Handle the opening of the line. By default nothing is said."""

    async def on_streaming_stopped(self, stopped: StreamingStopped) -> None:
        """Handle the end of the line."""

    async def on_dtmf(self, dtmf: Dtmf) -> None:
        """Handle a key pressed by the caller."""

    async def on_transcript(self, transcript: Transcript) -> None:
        """Handle the carrier's own transcription."""

    async def on_transcript_status(self, status: TranscriptStatus) -> None:
        """Handle the beginning, the end or the failure of the carrier's transcription."""

    async def on_recording_url(self, recording: RecordingUrl) -> None:
        """Handle the completion of a recording, with its copy on this machine if there is one."""

    async def on_recording_status(self, status: RecordingStatus) -> None:
        """Handle a change of a recording's state at the carrier."""

    async def on_stream_status(self, status: StreamStatus) -> None:
        """Handle the carrier's own report on its media stream."""

    async def on_message_dispatched(self, dispatched: MessageDispatched) -> None:
        """Handle the news of how much of a message the caller heard."""

    async def on_call_status(self, status: CallStatus) -> None:
        """Handle a change of the call's state at the carrier."""

    async def on_time_limit(self, limit: TimeLimit) -> None:
        """Handle the news that the call will be ended in `remaining_s` for its length: say goodbye."""

    async def on_shutdown(self, shutdown: Shutdown) -> None:
        """Handle the end of everything: the call is over, and `deadline_s` are left. The last handler to be called."""

    async def on_error(self, error: Error) -> None:
        """Handle trouble on the supervisor's side. By default it is logged."""
        log.warning("%s: %s", error.code, error.message)

    async def on_provider_error(self, error: ProviderError) -> None:
        """Handle trouble at a provider, which is mended as far as that goes without you. By default it is logged.

        After a `fatal` one the next provider takes over, if there is one and you do not give another here; else the agent
        gives up.
        """
        log.warning("%s: %s%s", error.participant or "provider", error.message, f" ({error.code})" if error.code else "")
