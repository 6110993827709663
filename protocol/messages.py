"""The vocabulary of the pipe: events travel to the worker, commands to the supervisor.

Every message is a frozen, array-like msgspec Struct whose first element is its tag. A new field goes at the end, with a
default, so that both sides of a hot swap can read it; anything else raises `PROTOCOL_VERSION`.

What comes fifty times a second holds only strings, bytes and numbers, and so is no concern of the collector's (`gc=False`).

No field is a list or `Any`: msgpack announces a sequence's length before its elements, and a decoder that believes the
announcement can be made to allocate gigabytes by five bytes.
"""

from typing import Annotated, Generic, Literal, TypeAlias, TypeVar

from msgspec import Meta, Struct

PROTOCOL_VERSION = 3
EXIT_WANT_OF_MEMORY = 12  # a worker's exit code when its agent was refused memory (ENOMEM)

Data = TypeVar("Data", str, bytes)
Uuid = Annotated[str, Meta(max_length=128)]  # the supervisor remembers some of them for as long as a call lasts


class Wire(Struct, frozen=True, array_like=True):
    """Base of everything on the pipe."""


class Message(Wire, Generic[Data], frozen=True, array_like=True, gc=False):
    """One piece of something being said: text on its way to a voice, or audio on its way to a caller.

    All pieces of one utterance share its `uuid`, of at most 128 characters; the last has `done`, and may be empty.
    """

    uuid: Uuid
    data: Data
    done: bool = False


class Hello(Wire, frozen=True, tag="Hello"):
    """The first frame each way: who is speaking, and in which version of this vocabulary."""

    version: int
    generation: str
    call_id: str


# Events: supervisor -> worker


class Metadata(Wire, frozen=True, tag="Metadata"):
    """What the carrier told of the call: once when it rings, and again, with more, when its stream starts.

    `fields` are the webhook's own, by the carrier's names; `parameters` the stream's custom parameters.
    `caller` and `callee` are as the carrier gives them, usually E.164.
    """

    call_id: str
    carrier: str
    caller: str
    callee: str
    fields: dict[str, str] = {}
    parameters: dict[str, str] = {}


class StreamingStarted(Wire, frozen=True, tag="StreamingStarted"):
    """The carrier's media socket is open; audio flows both ways from now on."""

    stream_id: str
    encoding: str = "audio/x-mulaw"
    sample_rate: int = 8000


class Media(Wire, frozen=True, tag="Media", gc=False):
    """The caller's voice: `payload` in the stream's encoding, `timestamp_ms` since the stream began."""

    timestamp_ms: int
    payload: bytes


class Dtmf(Wire, frozen=True, tag="Dtmf"):
    """The caller pressed a key."""

    digit: str


class MessageDispatched(Wire, frozen=True, tag="MessageDispatched"):
    """What became of an utterance: the caller heard `played_ms` of its `total_ms`, all of it unless `interrupted`."""

    uuid: str
    played_ms: int
    total_ms: int
    interrupted: bool


class Transcript(Wire, frozen=True, tag="Transcript"):
    """The carrier's own transcription of one utterance, or, unless `final`, what it seems to be so far.

    `track` is whose: "inbound" the caller's, "outbound" the agent's. `sequence` orders what the carrier sends, which may
    arrive otherwise. `stability` says how likely an interim text is to stay, from 0 to 1, where the carrier tells.
    """

    text: str
    track: str
    final: bool
    confidence: float | None = None
    sequence: int = 0
    language: str = ""
    stability: float | None = None


class TranscriptStatus(Wire, frozen=True, tag="TranscriptStatus"):
    """The carrier's transcription began, ended, or failed; then `message` and the carrier's `code` say why."""

    status: Literal["started", "stopped", "failed"]
    sid: str
    message: str = ""
    code: int | None = None


class RecordingUrl(Wire, frozen=True, tag="RecordingUrl"):
    """A recording of the call is complete.

    `url` is the carrier's, for which an agent has no credentials; `path` is the supervisor's copy of it on this machine,
    where the agent asked for one and it could be had.
    """

    url: str
    duration_s: float | None = None
    sid: str = ""
    channels: int = 1
    path: str = ""


class RecordingStatus(Wire, frozen=True, tag="RecordingStatus"):
    """A recording changed its state, in the carrier's words: "in-progress", "completed", "absent", "failed"."""

    sid: str
    status: str
    fields: dict[str, str] = {}


class StreamStatus(Wire, frozen=True, tag="StreamStatus"):
    """The carrier reports on its media stream: "started", "stopped", or "error", which `message` explains."""

    status: str
    stream_id: str
    message: str = ""


class StreamingStopped(Wire, frozen=True, tag="StreamingStopped"):
    """No audio flows any more."""

    reason: str


class CallStatus(Wire, frozen=True, tag="CallStatus"):
    """The carrier reported a change of the call's state, in its own words."""

    status: str
    fields: dict[str, str] = {}


class TimeLimit(Wire, frozen=True, tag="TimeLimit"):
    """The call has reached its permitted length, but for `remaining_s`: time to say goodbye."""

    remaining_s: float


class Restored(Wire, frozen=True, tag="Restored"):
    """This worker takes over a call: `checkpoint` is the last that its predecessor left, empty if there is none.

    `playing` tells, for each utterance of its predecessor's, how many ms of it the caller has heard or will hear.
    """

    checkpoint: bytes
    playing: dict[str, int] = {}


class Error(Wire, frozen=True, tag="Error"):
    """Something went wrong that the agent may want to know of; the call goes on."""

    code: str
    message: str


class Shutdown(Wire, frozen=True, tag="Shutdown"):
    """The call is over: leave within `deadline_s` seconds, or be killed."""

    reason: str
    deadline_s: float


class Failure(Wire, frozen=True):
    """Why a request failed. `code` and `status` are the carrier's, where it gave them."""

    kind: Literal["carrier", "timeout", "unsupported", "refused", "ended"]
    message: str
    code: int | None = None
    status: int | None = None


class Reply(Wire, frozen=True, tag="Reply"):
    """The answer to the request with this id: done, or why not. `value` is what the request asked for, if anything."""

    id: int
    failure: Failure | None = None
    value: str = ""


# Commands: worker -> supervisor


class Post(Wire, frozen=True, tag="Post", gc=False):
    """Audio for the caller, in the stream's encoding."""

    message: Message[bytes]


class Abort(Wire, frozen=True, tag="Abort"):
    """Stop saying this utterance, also where the carrier has already buffered it."""

    uuid: Uuid


class Checkpoint(Wire, frozen=True, tag="Checkpoint"):
    """The agent's state as bytes of its own making, kept for a worker that takes over.

    `audio_ms` of the caller's latest audio are not accounted for in it, and will be heard again.
    """

    state: bytes
    audio_ms: int = 0


class Heartbeat(Wire, frozen=True, tag="Heartbeat"):
    """The worker's event loop turns. `lag_ms`: how late this one is."""

    lag_ms: int = 0


class Trace(Wire, frozen=True, tag="Trace"):
    """Something worth telling an operator, in the agent's words: a log line, or a step of the conversation.

    `kind` is "log" (then `fields` has `level` and `logger`), or a step such as "heard", "said", "tool".
    """

    kind: str
    text: str
    fields: dict[str, str] = {}


class Turn(Wire, frozen=True, tag="Turn"):
    """The agent is done with something that the caller said: it was answered, the caller cut that short, or it failed.

    `delay_ms` is what the caller waited, from when the agent knew what was said to the first audio of the answer. Its parts:
    until the turn began (`queued_ms`), from there to the first words to be said (`thinking_ms`), from there to their first
    audio (`voicing_ms`). None where there was no such moment: a caller who speaks again may come before the first word.
    """

    outcome: Literal["answered", "interrupted", "failed"]
    delay_ms: int | None = None
    queued_ms: int | None = None
    thinking_ms: int | None = None
    voicing_ms: int | None = None


class Request(Wire, frozen=True):
    """Base of the commands that are answered by a `Reply` with the same id, within `timeout_s` seconds."""

    id: int
    timeout_s: float


class Hangup(Request, frozen=True, tag="Hangup"):
    """End the call at the carrier, after what has been posted was played unless told otherwise."""

    after_playout: bool = True


class TransferTo(Request, frozen=True, tag="TransferTo"):
    """Connect the caller to another number (E.164) or SIP address, after what has been posted was played."""

    destination: str
    after_playout: bool = True


class SendDtmf(Request, frozen=True, tag="SendDtmf"):
    """Press keys: 0-9, *, #, and w for half a second's wait."""

    digits: str


class StartRecording(Request, frozen=True, tag="StartRecording"):
    """Record at the carrier: each side on a channel of its own, or both mixed; silence is kept unless `trim`.

    With `download`, the finished recording is copied to this machine before it is told.
    """

    channels: Literal["dual", "mono"] = "dual"
    track: Literal["both", "inbound", "outbound"] = "both"
    trim: bool = False
    download: bool = False


class PauseRecording(Request, frozen=True, tag="PauseRecording"):
    """Pause the recording under way: leave the time out, or have silence in its place."""

    behavior: Literal["silence", "skip"] = "silence"


class ResumeRecording(Request, frozen=True, tag="ResumeRecording"):
    """Go on with a paused recording."""


class StopRecording(Request, frozen=True, tag="StopRecording"):
    """Stop the recording under way."""


class RemoveRecording(Request, frozen=True, tag="RemoveRecording"):
    """Delete the call's last recording at the carrier."""


class StartTranscript(Request, frozen=True, tag="StartTranscript"):
    """Have the carrier transcribe by one of its engines (Twilio: "deepgram" or "google"), in a language such as "en-US"."""

    track: Literal["both", "inbound", "outbound"] = "both"
    engine: str = "deepgram"
    language: str = "en-US"
    model: str = ""
    partial_results: bool = False


class StopTranscript(Request, frozen=True, tag="StopTranscript"):
    """Have the carrier transcribe no more."""


class Dispose(Request, frozen=True, tag="Dispose"):
    """The agent is done with the call: let the line go. With `fallback`, its caller gets what the operator has for that."""

    fallback: bool = False


Event: TypeAlias = (
    Hello
    | Metadata
    | StreamingStarted
    | Media
    | Dtmf
    | MessageDispatched
    | Transcript
    | TranscriptStatus
    | RecordingUrl
    | RecordingStatus
    | StreamingStopped
    | StreamStatus
    | CallStatus
    | TimeLimit
    | Restored
    | Error
    | Shutdown
    | Reply
)
Command: TypeAlias = (
    Hello
    | Post
    | Abort
    | Checkpoint
    | Heartbeat
    | Trace
    | Turn
    | Hangup
    | TransferTo
    | SendDtmf
    | StartRecording
    | PauseRecording
    | ResumeRecording
    | StopRecording
    | RemoveRecording
    | StartTranscript
    | StopTranscript
    | Dispose
)
