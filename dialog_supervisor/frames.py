"""The frames of RFC 6455, as far as something has to be known of them besides what `websockets` does with them. No I/O."""

import struct

from websockets.utils import apply_mask as apply_mask_slowly

try:
    from websockets.speedups import apply_mask
except ImportError:  # a build of `websockets` without its C extension
    apply_mask = apply_mask_slowly

_EXTENDED_SIZES = {126: 2, 127: 8}  # bytes of the length that follows a frame's first two
_FIN, _CONTROL, _MASKED, _SIZE = 0x80, 0x08, 0x80, 0x7F  # bits of a frame's first two bytes (RFC 6455, 5.2)
_WHOLE_TEXT = 0x81  # a first byte: text that is not continued
_LONG, _VERY_LONG = _MASKED | 126, _MASKED | 127  # second bytes
_MASK_BYTES = 4
_HEAD, _LONG_HEAD = struct.Struct(">BBH"), struct.Struct(">BBQ")
_head = _HEAD.unpack_from


def text_frame(text: bytes) -> bytes:
    """Return the frame in which a server sends text."""
    size = len(text)
    if size < 126:
        return bytes((_WHOLE_TEXT, size)) + text
    if size < 1 << 16:
        return _HEAD.pack(_WHOLE_TEXT, 126, size) + text
    return _LONG_HEAD.pack(_WHOLE_TEXT, 127, size) + text


def whole_text(data: bytes, at: int, max_bytes: int) -> tuple[bytes, int] | None:
    """Return the text of the frame that begins at `at`, and where that ends; None if it is anything but the usual.

    The usual is ASCII in one whole frame of a client, of at most `max_bytes`.
    """
    if len(data) < at + 8:
        return None
    first, second, size = _head(data, at)
    if second == _LONG:
        begin = at + 8
    elif second >= _MASKED and second != _VERY_LONG:
        begin, size = at + 6, second - _MASKED
    else:
        return None
    end = begin + size
    if first != _WHOLE_TEXT or end > len(data) or size > max_bytes:
        return None
    text = apply_mask(data[begin:end], data[begin - _MASK_BYTES : begin])
    return (text, end) if text.isascii() else None


class Unfinished:
    """What has come of a message whose end has not, as bytes: whoever takes the socket over is fed them again. No I/O."""

    __slots__ = ("_frame", "_wanted", "data")

    def __init__(self) -> None:
        self.data = bytearray()
        self._frame = 0  # where the last frame in it begins, which is not whole
        self._wanted = 2  # how many bytes there must be to know more

    def feed(self, data: bytes) -> None:
        """Enter what was received, and forget the messages that it completes."""
        self.data += data
        if len(self.data) < self._wanted:
            return
        message, frame = 0, self._frame
        while (end := _frame_end(self.data, frame)) <= len(self.data):
            within_message = self.data[frame] & _CONTROL and frame != message
            whole = self.data[frame] & _FIN and not within_message
            frame = end
            if whole:
                message = frame
        del self.data[:message]
        self._frame, self._wanted = frame - message, end - message


def _frame_end(data: bytearray, at: int) -> int:
    """Return where the frame that begins at `at` ends, or how much there must be to know it (RFC 6455, 5.2)."""
    if len(data) < at + 2:
        return at + 2
    size = data[at + 1] & _SIZE
    extended = _EXTENDED_SIZES.get(size, 0)
    begin = at + 2 + extended + (_MASK_BYTES if data[at + 1] & _MASKED else 0)
    if not extended:
        return begin + size
    if len(data) < begin:
        return begin
    return begin + int.from_bytes(data[at + 2 : at + 2 + extended], "big")
