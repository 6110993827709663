"""Frames: any split of a stream says the same, and whatever is not a message ends in a named error, cheaply."""

import tracemalloc
from contextlib import suppress
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.framing import MAX_FRAME_BYTES, FrameDecoder, FrameTooLarge, MalformedFrame, ProtocolError, encode
from protocol.messages import Command, Dtmf, Event, Media, Message, Post
from tests.protocol.strategies import commands, events


def frame(body: bytes) -> bytes:
    return len(body).to_bytes(4, "little") + body


def stream_of(messages: list[msgspec.Struct]) -> bytes:
    return b"".join(encode(message) for message in messages)


def feed_all(pieces: list[bytes], union: Any = Event) -> list[Any]:
    decoder: FrameDecoder[Any] = FrameDecoder(union)
    received = [message for piece in pieces for message in decoder.feed(piece)]
    assert decoder.begun == b""
    return received


# Splits


@given(st.lists(events, max_size=5), st.data())
def test_any_split_of_a_stream_gives_the_same_messages(messages: list[msgspec.Struct], data: st.DataObject) -> None:
    stream = stream_of(messages)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=12)))
    pieces = [stream[start:end] for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    assert feed_all(pieces) == messages


@given(st.lists(commands, max_size=3))
def test_a_stream_that_comes_byte_by_byte_gives_the_same_messages(messages: list[msgspec.Struct]) -> None:
    stream = stream_of(messages)
    assert feed_all([stream[index : index + 1] for index in range(len(stream))], Command) == messages


def test_a_message_is_returned_with_its_last_byte_and_not_before() -> None:
    stream = bytes(encode(Dtmf("5")))
    decoder: FrameDecoder[Any] = FrameDecoder(Event)
    assert decoder.feed(stream[:-1]) == []
    assert decoder.feed(stream[-1:]) == [Dtmf("5")]


def test_pending_says_how_much_of_an_unfinished_frame_has_come() -> None:
    decoder: FrameDecoder[Any] = FrameDecoder(Event)
    decoder.feed(bytes(encode(Dtmf("1"))) + b"\x09\x00")
    assert len(decoder.begun) == 2


def test_nothing_fed_gives_nothing() -> None:
    assert FrameDecoder[Any](Event).feed(b"") == []


# Limits


def biggest(audio_bytes: int) -> Post:
    return Post(Message("u", bytes(audio_bytes)))


def test_a_frame_of_exactly_the_limit_is_carried() -> None:
    room = MAX_FRAME_BYTES - (len(encode(biggest(1 << 19))) - 4 - (1 << 19))
    whole = encode(biggest(room))
    assert len(whole) == 4 + MAX_FRAME_BYTES
    assert feed_all([bytes(whole)], Command) == [biggest(room)]
    with pytest.raises(FrameTooLarge, match=f"{MAX_FRAME_BYTES + 1} bytes is over the limit of {MAX_FRAME_BYTES}"):
        encode(biggest(room + 1))


@pytest.mark.parametrize("size", [MAX_FRAME_BYTES + 1, 0x7FFFFFFF, 0xFFFFFFFF])
def test_a_frame_announced_over_the_limit_is_refused_at_its_first_four_bytes(size: int) -> None:
    with pytest.raises(FrameTooLarge, match=str(size)):
        FrameDecoder[Any](Event).feed(size.to_bytes(4, "little"))


def test_an_announced_frame_takes_no_memory_before_it_comes() -> None:
    tracemalloc.start()
    try:
        FrameDecoder[Any](Event).feed(MAX_FRAME_BYTES.to_bytes(4, "little"))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 64 << 10


# Garbage

DEEP = b"\x91" * 100_000  # arrays in arrays
HUGE = [
    pytest.param(b"\xdd\xff\xff\xff\xff\xa4Dtmf\xa11", id="a message of four billion fields"),
    pytest.param(b"\x92\xa4Dtmf\xdb\xff\xff\xff\xff", id="a string of 4 GiB"),
    pytest.param(b"\x92\xa8Restored\xc6\xff\xff\xff\xff", id="bytes of 4 GiB"),
    pytest.param(b"\x93\xaaCallStatus\xa1a\xdf\xff\xff\xff\xff", id="a map of four billion"),
    pytest.param(b"\x93\xa4Dtmf\xa11\xdd\xff\xff\xff\xff", id="an unknown field that is a huge array"),
    pytest.param(b"\x93\xa4Dtmf\xa11\xdf\xff\xff\xff\xff", id="an unknown field that is a huge map"),
    pytest.param(b"\x93\xa4Dtmf\xa11\xc9\xff\xff\xff\xff\x01", id="an unknown field that is a huge extension"),
    pytest.param(b"\x92\xdb\xff\xff\xff\xffDtmf", id="a tag of 4 GiB"),
    pytest.param(b"\x93\xa4Dtmf\xa11" + DEEP, id="an unknown field that nests deeply"),
    pytest.param(DEEP, id="nothing but nesting"),
]
NONSENSE = [
    pytest.param(b"", id="an empty frame"),
    pytest.param(b"\xc1", id="an opcode that does not exist"),
    pytest.param(b"\xc0", id="nil"),
    pytest.param(b"\x90", id="an empty array"),
    pytest.param(b"\x92\xa7Unknown\xa11", id="an unknown tag"),
    pytest.param(b"\x92\x01\x02", id="a tag that is a number"),
    pytest.param(b"\x91\xa4Dtmf", id="a field too few"),
    pytest.param(b"\x92\xa4Dtmf\xc4\x011", id="bytes for a string"),
    pytest.param(b"\x92\xa4Dtmf\xa1\xff", id="invalid UTF-8"),
    pytest.param(b"\x92\xa4\xff\xfe\xfd\xfc\xa11", id="invalid UTF-8 in the tag"),
    pytest.param(b"\x92\xa4Dtmf\xa3\xed\xa0\x80", id="a surrogate"),
    pytest.param(b"\x92\xa4Dtmf\xa11\xc0", id="something behind the message"),
    pytest.param(b"\x81\xa4type\xa4Dtmf", id="a map instead of an array"),
    pytest.param(b"\x92\xa8Restored\xd6\xff\x00\x00\x00\x00", id="an extension for bytes"),
    pytest.param(b"\x93\xa5Error\xa1a\x92\xa1b", id="an array cut short"),
]


@pytest.mark.parametrize("body", NONSENSE)
def test_nonsense_is_a_malformed_frame(body: bytes) -> None:
    with pytest.raises(MalformedFrame, match=f"a frame of {len(body)} bytes is not a message: "):
        FrameDecoder[Any](Event).feed(frame(body))


@pytest.mark.parametrize("body", HUGE)
def test_an_announced_size_is_not_believed(body: bytes) -> None:
    data, decoder = frame(body), FrameDecoder[Any](Event)
    tracemalloc.start()
    try:
        with pytest.raises(MalformedFrame):
            decoder.feed(data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20


@given(st.binary(max_size=200))
def test_random_bytes_are_messages_or_a_protocol_error(data: bytes) -> None:
    decoder: FrameDecoder[Any] = FrameDecoder(Event | Post)
    try:
        decoder.feed(data)
    except ProtocolError:
        return
    assert len(decoder.begun) <= len(data)


@given(st.binary(max_size=200))
def test_a_frame_of_random_bytes_is_a_message_or_malformed(body: bytes) -> None:
    with suppress(MalformedFrame):
        assert len(FrameDecoder[Any](Command).feed(frame(body))) == 1


@given(events, st.data())
def test_a_message_with_a_byte_changed_is_a_message_or_malformed(event: msgspec.Struct, data: st.DataObject) -> None:
    body = bytearray(encode(event)[4:])
    index = data.draw(st.integers(0, len(body) - 1))
    body[index] = data.draw(st.integers(0, 255))
    with suppress(MalformedFrame):
        assert len(FrameDecoder[Any](Event).feed(frame(bytes(body)))) == 1


@given(events, st.data())
def test_a_body_cut_short_is_malformed(event: msgspec.Struct, data: st.DataObject) -> None:
    body = bytes(encode(event)[4:])
    with pytest.raises(MalformedFrame):
        FrameDecoder[Any](Event).feed(frame(body[: data.draw(st.integers(0, len(body) - 1))]))


def test_a_message_of_the_other_direction_is_malformed() -> None:
    with pytest.raises(MalformedFrame, match="Media"):
        FrameDecoder[Any](Command).feed(bytes(encode(Media(0, b"x"))))


def test_after_an_error_the_decoder_is_spent() -> None:
    decoder: FrameDecoder[Any] = FrameDecoder(Event)
    with pytest.raises(MalformedFrame) as first:
        decoder.feed(frame(b"\xc1"))
    with pytest.raises(MalformedFrame) as second:
        decoder.feed(bytes(encode(Dtmf("1"))))
    assert second.value is first.value
