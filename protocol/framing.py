"""Frames on the pipe, without I/O: a u32 little-endian length, then one msgpack message.

A `FrameDecoder` turns bytes in any split into messages; an `encode` turns a message into a frame. Whatever cannot be read
ends in a `ProtocolError` that says what was wrong with it.
"""

from collections.abc import Iterator
from typing import Any, Generic, TypeVar

import msgspec

MAX_FRAME_BYTES = 1 << 20  # a message is 20 ms of audio or a few strings; a megabyte is a mistake or an attack
_LENGTH_BYTES = 4

Incoming = TypeVar("Incoming", bound=msgspec.Struct)

_encoder = msgspec.msgpack.Encoder()


class ProtocolError(Exception):
    """The other side of the pipe sent what this side cannot read. Ends that worker, never the supervisor."""


class FrameTooLarge(ProtocolError):
    """A frame was announced, or was about to be sent, over the limit."""

    def __init__(self, size: int, limit: int) -> None:
        super().__init__(f"a frame of {size} bytes is over the limit of {limit}")


class MalformedFrame(ProtocolError):
    """A frame's bytes are not a message of the expected vocabulary."""


class VersionMismatch(ProtocolError):
    """The other side speaks another version of the vocabulary, or did not introduce itself."""


def encode(message: msgspec.Struct) -> bytearray:
    """Return the frame for `message`. Raises `FrameTooLarge`."""
    frame = bytearray(_LENGTH_BYTES)
    _encoder.encode_into(message, frame, _LENGTH_BYTES)
    size = len(frame) - _LENGTH_BYTES
    if size > MAX_FRAME_BYTES:
        raise FrameTooLarge(size, MAX_FRAME_BYTES)
    frame[:_LENGTH_BYTES] = size.to_bytes(_LENGTH_BYTES, "little")
    return frame


class FrameDecoder(Generic[Incoming]):
    """Turns received bytes, in whatever pieces, into messages of the union it was made for.

    After an error it is spent: the stream has lost its frame boundaries, and every later call raises the same error.
    """

    def __init__(self, union: Any, *, max_frame_bytes: int = MAX_FRAME_BYTES) -> None:
        self._decoder: msgspec.msgpack.Decoder[Incoming] = msgspec.msgpack.Decoder(union)
        self._max = max_frame_bytes
        self._buffer = bytearray()
        self._wanted = 0  # how long the buffer must be before its first frame is whole
        self._error: ProtocolError | None = None

    @property
    def begun(self) -> bytes:
        """What there is of a frame that has not ended."""
        return bytes(self._buffer)

    def feed(self, data: bytes) -> list[Incoming]:
        """Return the messages completed by `data`. Raises `FrameTooLarge` or `MalformedFrame`."""
        if self._error is not None:
            raise self._error
        if self._buffer:
            self._buffer += data
            if len(self._buffer) < self._wanted:
                return []
            data = bytes(self._buffer)
        messages, used = [], 0
        try:
            for message, end in self._frames(data):
                messages.append(message)
                used = end
        except ProtocolError as error:
            self._error = error
            raise
        self._buffer[:] = data[used:]
        return messages

    def _frames(self, data: bytes) -> Iterator[tuple[Incoming, int]]:
        start, view = 0, memoryview(data)
        while len(data) - start >= _LENGTH_BYTES:
            size = int.from_bytes(view[start : start + _LENGTH_BYTES], "little")
            if size > self._max:
                raise FrameTooLarge(size, self._max)
            end = start + _LENGTH_BYTES + size
            if end > len(data):
                self._wanted = end - start
                return
            yield self._decode(view[start + _LENGTH_BYTES : end]), end
            start = end
        self._wanted = _LENGTH_BYTES

    def _decode(self, body: memoryview) -> Incoming:
        try:
            return self._decoder.decode(body)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise MalformedFrame(f"a frame of {len(body)} bytes is not a message: {error}") from error
