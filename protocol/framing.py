"""Frames on the pipe, without I/O: a u32 little-endian length, then one msgpack message.

A `FrameDecoder` turns bytes in any split into messages; an `encode` turns a message into a frame. Whatever cannot be read
ends in a `ProtocolError` that says what was wrong with it.
"""

import struct
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import msgspec

MAX_FRAME_BYTES = 1 << 20  # a message is 20 ms of audio or a few strings; a megabyte is a mistake or an attack
_LENGTH = struct.Struct("<I")
_LENGTH_BYTES = _LENGTH.size
_length, _with_length = _LENGTH.unpack_from, _LENGTH.pack  # looked up once, as they are used for every frame

_UNREADABLE = (msgspec.MsgspecError, ValueError, RecursionError)

Incoming = TypeVar("Incoming", bound=msgspec.Struct)

_encode = msgspec.msgpack.Encoder().encode


class ProtocolError(Exception):
    """The other side of the pipe sent what this side cannot read. Ends that worker, never the supervisor."""


class FrameTooLarge(ProtocolError):
    """A frame was announced, or was about to be sent, over the limit."""

    def __init__(self, size: int, limit: int) -> None:
        super().__init__(f"a frame of {size} bytes is over the limit of {limit}")


class MalformedFrame(ProtocolError):
    """A frame's bytes are not a message of the expected vocabulary."""

    def __init__(self, size: int, why: Exception) -> None:
        super().__init__(f"a frame of {size} bytes is not a message: {why}")


class VersionMismatch(ProtocolError):
    """The other side speaks another version of the vocabulary, or did not introduce itself."""


def encode(message: msgspec.Struct) -> bytes:
    """Return the frame for `message`. Raises `FrameTooLarge`."""
    body = _encode(message)
    size = len(body)
    if size > MAX_FRAME_BYTES:
        raise FrameTooLarge(size, MAX_FRAME_BYTES)
    return _with_length(size) + body


class FrameDecoder(Generic[Incoming]):
    """Turns received bytes, in whatever pieces, into messages of the union it was made for.

    After an error it is spent: the stream has lost its frame boundaries, and every later call raises the same error.
    """

    __slots__ = ("_buffer", "_decode", "_error", "_max", "_wanted")

    def __init__(self, union: Any, *, max_frame_bytes: int = MAX_FRAME_BYTES) -> None:
        self._decode: Callable[[bytes | memoryview], Incoming] = msgspec.msgpack.Decoder(union).decode
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
            self._buffer.clear()
        body_bytes = len(data) - _LENGTH_BYTES
        try:
            if body_bytes >= 0 and _length(data)[0] == body_bytes <= self._max:
                decode = self._decode
                return [decode(data[_LENGTH_BYTES:])]  # as nearly always
            return self._split(data)
        except ProtocolError as error:
            self._error = error
            raise
        except _UNREADABLE as error:
            self._error = MalformedFrame(body_bytes, error)
            raise self._error from error

    def _split(self, data: bytes) -> list[Incoming]:
        """Return the messages that are whole, and keep what is not."""
        messages: list[Incoming] = []
        view, start, self._wanted = memoryview(data), 0, _LENGTH_BYTES
        while len(data) - start >= _LENGTH_BYTES:
            (size,) = _length(data, start)
            if size > self._max:
                raise FrameTooLarge(size, self._max)
            end = start + _LENGTH_BYTES + size
            if end > len(data):
                self._wanted = end - start
                break
            try:
                messages.append(self._decode(view[start + _LENGTH_BYTES : end]))
            except _UNREADABLE as error:
                raise MalformedFrame(size, error) from error
            start = end
        self._buffer += view[start:]
        return messages
