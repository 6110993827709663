"""Twilio's Media Streams messages, as bytes: decoded into Structs, encoded from a call's few facts. No I/O.

Source: Twilio docs, "Media Streams - WebSocket Messages". sequenceNumber, chunk and timestamp are strings there, sampleRate
and channels numbers; both are taken in either form. Unknown fields are ignored on the way in, and never sent on the way
out, where Twilio warns of them (31951).
"""

import binascii
from typing import Annotated, TypeAlias

import msgspec
from msgspec import Meta, Struct

Number = Annotated[int, Meta(ge=0, lt=1 << 53)]  # what JSON can express exactly, and what the pipe can carry


class Malformed(Exception):
    """A message is not one of Twilio's."""


class _Incoming(Struct, frozen=True, tag_field="event", rename="camel"):
    """Base of what Twilio sends."""


class Connected(_Incoming, frozen=True, tag="connected"):
    """The first message on a socket."""


class MediaFormat(Struct, frozen=True, rename="camel"):
    """How the audio is encoded."""

    encoding: str = "audio/x-mulaw"
    sample_rate: int = 8000
    channels: int = 1


class StartDetails(Struct, frozen=True, rename="camel"):
    """Which call's stream this is."""

    call_sid: str
    stream_sid: str = ""
    account_sid: str = ""
    tracks: tuple[str, ...] = ()
    media_format: MediaFormat = MediaFormat()
    custom_parameters: dict[str, str] = {}


class Start(_Incoming, frozen=True, tag="start"):
    """The stream begins."""

    start: StartDetails
    stream_sid: str = ""


class MediaDetails(Struct, frozen=True, gc=False):
    """A frame: `timestamp` in milliseconds since the stream began, `payload` (base64 on the wire, which msgspec decodes)."""

    payload: bytes
    timestamp: Number = 0
    track: str = "inbound"


class Media(_Incoming, frozen=True, tag="media", gc=False):
    """The caller's voice, 20 ms of it as a rule."""

    media: MediaDetails
    stream_sid: str = ""


class DtmfDetails(Struct, frozen=True):
    """A key."""

    digit: str


class Dtmf(_Incoming, frozen=True, tag="dtmf"):
    """The caller pressed a key."""

    dtmf: DtmfDetails
    stream_sid: str = ""


class MarkDetails(Struct, frozen=True):
    """A name that this side gave."""

    name: str


class Mark(_Incoming, frozen=True, tag="mark"):
    """Everything sent before the mark of this name was played, or cleared."""

    mark: MarkDetails
    stream_sid: str = ""


class Stop(_Incoming, frozen=True, tag="stop"):
    """The stream ended; no frame follows."""

    stream_sid: str = ""


Incoming: TypeAlias = Connected | Start | Media | Dtmf | Mark | Stop

_decoder: msgspec.json.Decoder[Incoming] = msgspec.json.Decoder(
    Incoming, strict=False
)  # not strict: numbers come as strings
_encoder = msgspec.json.Encoder()


def decode(text: bytes) -> Incoming:
    """Return the message in `text`, which is UTF-8. Raises `Malformed`."""
    try:
        return _decoder.decode(text)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise Malformed(str(error)) from None


class Encoder:
    """Messages to one stream. The head of a media message is prepared once: fifty of them follow a second."""

    __slots__ = ("_mark_head", "_media_head", "clear")

    def __init__(self, stream_sid: str) -> None:
        sid = _encoder.encode(stream_sid)
        self._media_head = b'{"event":"media","streamSid":' + sid + b',"media":{"payload":"'
        self._mark_head = b'{"event":"mark","streamSid":' + sid + b',"mark":{"name":'
        self.clear = b'{"event":"clear","streamSid":' + sid + b"}"

    def media(self, payload: bytes) -> bytes:
        """Return the message that has the caller hear `payload`: raw mu-law, without a header."""
        return self._media_head + binascii.b2a_base64(payload, newline=False) + b'"}}'

    def mark(self, name: str) -> bytes:
        """Return the message that asks to be told when everything sent so far was played."""
        return self._mark_head + _encoder.encode(name) + b"}}"
