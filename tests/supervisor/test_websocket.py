"""The media socket against peers that are not Twilio, or not in their right mind: one socket closes, with the right code."""

import base64
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.lowlevel

from tests.conftest import StartDialogd
from tests.e2e.daemon import Dialogd
from tests.e2e.raw import BINARY, CLOSE, CONTINUATION, PING, PONG, TEXT, Wire, connect, frame, handshake, media_socket
from tests.e2e.twilio_client import FRAME, PhoneCall, Twilio

SIZE_LIMIT = 8192
CONNECTED = {"event": "connected", "protocol": "Call", "version": "1.0.0"}


@pytest.fixture(scope="module")
def dialogd(start_shared_dialogd: StartDialogd) -> Dialogd:
    return start_shared_dialogd(gateway={"message_size_limit": SIZE_LIMIT})


@pytest.fixture
async def call(dialogd: Dialogd) -> AsyncIterator[PhoneCall]:
    """A call that rings; afterwards, whatever became of it, a good call must still work."""
    async with Twilio(dialogd) as twilio:
        ringing = PhoneCall(twilio)
        await ringing.ring()
        ringing.stream_sid = "MZ1"
        yield ringing
        await ringing.after("completed")
        async with twilio.streaming() as good:
            await good.echo()
            await good.stop()
            assert await good.closed() == 1000


def text(message: object) -> bytes:
    return frame(TEXT, json.dumps(message).encode())


def media(payload: str = base64.b64encode(FRAME).decode(), **changed: object) -> dict[str, object]:
    details = {"track": "inbound", "chunk": "1", "timestamp": "20", "payload": payload}
    message: dict[str, object] = {"event": "media", "sequenceNumber": "2", "media": details, "streamSid": "MZ1"}
    return message | changed


@asynccontextmanager
async def started(dialogd: Dialogd, call: PhoneCall) -> AsyncIterator[Wire]:
    """Open the call's media socket and start its stream."""
    async with media_socket(dialogd, call) as wire:
        await wire.send(text(CONNECTED) + text(call.start_message()))
        yield wire


async def echoes(wire: Wire) -> bool:
    """Say something and return whether it comes back."""
    await wire.send(text(media()))
    opcode, payload = await wire.frame()
    found: bytes = base64.b64decode(json.loads(payload)["media"]["payload"])
    return opcode == TEXT and found == FRAME


# The handshake


async def test_the_handshake_is_answered_as_rfc_6455_says(dialogd: Dialogd, call: PhoneCall) -> None:
    async with await connect(dialogd) as wire:
        await wire.send(handshake(call, Sec_WebSocket_Key="dGhlIHNhbXBsZSBub25jZQ=="))
        head = await wire.until(b"\r\n\r\n")
    assert b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=" in head


@pytest.mark.parametrize(
    ("changed", "status"),
    [
        ({"Upgrade": ""}, 426),
        ({"Upgrade": "h2c"}, 426),
        ({"Connection": "keep-alive"}, 426),
        ({"Connection": ""}, 426),
        ({"Sec_WebSocket_Key": ""}, 400),
        ({"Sec_WebSocket_Key": "c2hvcnQ="}, 400),
        ({"Sec_WebSocket_Key": "not base64, not at all"}, 400),
        ({"Sec_WebSocket_Version": ""}, 400),
        ({"Sec_WebSocket_Version": "8"}, 400),
        ({"X_Filler": "a" * 9000}, 431),
    ],
)
async def test_a_bad_handshake_is_refused(dialogd: Dialogd, call: PhoneCall, changed: dict[str, str], status: int) -> None:
    async with await connect(dialogd) as wire:
        await wire.send(handshake(call, **changed))
        assert (await wire.response())[0] == status


async def test_a_post_does_not_open_a_media_socket(dialogd: Dialogd, call: PhoneCall) -> None:
    async with await connect(dialogd) as wire:
        await wire.send(handshake(call).replace(b"GET", b"POST", 1))
        assert not (await wire.rest()).startswith(b"HTTP/1.1 101")


async def test_frames_sent_along_with_the_handshake_are_read(dialogd: Dialogd, call: PhoneCall) -> None:
    async with await connect(dialogd) as wire:
        await wire.send(handshake(call) + text(CONNECTED) + text(call.start_message()))
        assert (await wire.until(b"\r\n\r\n")).startswith(b"HTTP/1.1 101 ")
        assert await echoes(wire)


# The stream's start


@pytest.mark.parametrize(
    "changed",
    [
        {"callSid": "CA" + "0" * 32},
        {"accountSid": "AC" + "0" * 32},
        {"mediaFormat": {"encoding": "audio/x-mulaw", "sampleRate": 16000}},
    ],
)
async def test_a_start_that_is_not_this_calls_closes_the_socket(
    dialogd: Dialogd, call: PhoneCall, changed: dict[str, object]
) -> None:
    async with media_socket(dialogd, call) as wire:
        start = call.start_message()
        start["start"] |= changed
        await wire.send(text(start))
        assert await wire.closed_with() == (1003 if "mediaFormat" in changed else 1008)


async def test_media_before_start_is_dropped(dialogd: Dialogd, call: PhoneCall) -> None:
    async with media_socket(dialogd, call) as wire:
        await wire.send(text(CONNECTED) + text(media("AAAA")) + text(call.start_message()))
        assert await echoes(wire)


async def test_a_second_start_changes_nothing(dialogd: Dialogd, call: PhoneCall) -> None:
    async with started(dialogd, call) as wire:
        await wire.send(text(call.start_message()) + text(CONNECTED))
        assert await echoes(wire)


# Messages

HARMLESS = {
    "a binary message": frame(BINARY, b"\x00\x01\x02"),
    "malformed JSON": frame(TEXT, b'{"event": "media"'),
    "JSON that is no object": frame(TEXT, b"[1, 2, 3]"),
    "deeply nested JSON": frame(TEXT, b"[" * 4000),
    "an empty message": frame(TEXT, b""),
    "an unknown event": text({"event": "weather", "streamSid": "MZ1"}),
    "no event": text({"streamSid": "MZ1"}),
    "media of another stream": text(media("AAAA", streamSid="MZ2")),
    "media of the other track": text(media(media={"track": "outbound", "payload": "AAAA"})),
    "media without a payload": text(media(media={"track": "inbound"})),
    "a payload that is no base64": text(media("not base64!")),
    "a payload with bad padding": text(media("AAAAA")),
    "a payload that is no string": text(media(media={"payload": 5})),
    "an empty payload": text(media("")),
    "a timestamp that is no number": text(media(media={"payload": "AAAA", "timestamp": "soon"})),
    "a timestamp that no clock has": text(media(media={"payload": "AAAA", "timestamp": "9" * 30})),
    "a negative timestamp": text(media(media={"payload": "AAAA", "timestamp": "-1"})),
    "a mark that nobody sent": text({"event": "mark", "streamSid": "MZ1", "mark": {"name": "?"}}),
    "a lone surrogate": frame(TEXT, b'{"event":"mark","streamSid":"MZ1","mark":{"name":"\\ud800"}}'),
    "dtmf without a digit": text({"event": "dtmf", "streamSid": "MZ1", "dtmf": {}}),
    "a ping": frame(PING, b""),
    "a pong that nobody asked for": frame(PONG, b"?"),
}


@pytest.mark.parametrize("message", HARMLESS.values(), ids=HARMLESS)
async def test_a_message_that_makes_no_sense_is_dropped(dialogd: Dialogd, call: PhoneCall, message: bytes) -> None:
    async with started(dialogd, call) as wire:
        await wire.send(message)
        if message == HARMLESS["a ping"]:
            assert await wire.frame() == (PONG, b"")
        assert await echoes(wire)


async def test_a_hundred_unreadable_messages_are_forgiven_and_one_more_is_not(dialogd: Dialogd, call: PhoneCall) -> None:
    async with started(dialogd, call) as wire:
        await wire.send(frame(TEXT, b"?") * 100)
        assert await echoes(wire)
        await wire.send(frame(TEXT, b"?"))
        assert await wire.closed_with() == 1008


async def test_a_message_in_fragments_with_a_ping_between_is_put_together(dialogd: Dialogd, call: PhoneCall) -> None:
    whole = json.dumps(media()).encode()
    async with started(dialogd, call) as wire:
        await wire.send(frame(TEXT, whole[:7], fin=False) + frame(CONTINUATION, b"", fin=False))
        await wire.send(frame(PING, b"there?") + frame(CONTINUATION, whole[7:50], fin=False))
        assert await wire.frame() == (PONG, b"there?")
        await wire.send(frame(CONTINUATION, whole[50:]))
        assert (await wire.frame())[0] == TEXT


async def test_frames_that_arrive_byte_by_byte_are_put_together(dialogd: Dialogd, call: PhoneCall) -> None:
    async with started(dialogd, call) as wire:
        for byte in text(media()):
            await wire.send(bytes([byte]))
            await trio.lowlevel.checkpoint()
        assert (await wire.frame())[0] == TEXT


async def test_a_message_of_exactly_the_limit_is_read(dialogd: Dialogd, call: PhoneCall) -> None:
    async with started(dialogd, call) as wire:
        await wire.send(frame(TEXT, b" " * SIZE_LIMIT))
        assert await echoes(wire)


async def test_a_character_split_over_two_fragments_is_put_together(dialogd: Dialogd, call: PhoneCall) -> None:
    name = "ä".encode()
    async with started(dialogd, call) as wire:
        head = b'{"event":"mark","streamSid":"MZ1","mark":{"name":"'
        await wire.send(frame(TEXT, head + name[:1], fin=False) + frame(CONTINUATION, name[1:] + b'"}}'))
        assert await echoes(wire)


FATAL = {
    "a message over the limit": (frame(TEXT, b"a" * (SIZE_LIMIT + 1)), 1009),
    "a message over the limit in fragments": (frame(TEXT, b"a" * SIZE_LIMIT, fin=False) + frame(CONTINUATION, b"a"), 1009),
    "a length of 2^62": (bytes([0x81, 0xFF]) + (1 << 62).to_bytes(8) + b"mask", 1009),
    "text that is not UTF-8": (frame(TEXT, b"\xc3\x28"), 1007),
    "a frame that is not masked": (frame(TEXT, b"{}", masked=False), 1002),
    "an unknown opcode": (frame(3, b""), 1002),
    "a reserved bit": (frame(0x41, b"{}"), 1002),
    "a continuation of nothing": (frame(CONTINUATION, b"x"), 1002),
    "a message within a message": (frame(TEXT, b"x", fin=False) + frame(TEXT, b"y"), 1002),
    "a fragmented ping": (frame(PING, b"x", fin=False), 1002),
    "a ping over 125 bytes": (frame(PING, b"x" * 126), 1002),
    "a close with half a code": (frame(CLOSE, b"\x03"), 1002),
    "a close with a code that nobody may send": (frame(CLOSE, (1005).to_bytes(2)), 1002),
    "a close": (frame(CLOSE, (1001).to_bytes(2) + b"leaving"), 1001),
    "a second HTTP request": (b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", 1002),
}


@pytest.mark.parametrize(("sent", "code"), FATAL.values(), ids=FATAL)
async def test_a_broken_frame_closes_the_socket_with_its_code(
    dialogd: Dialogd, call: PhoneCall, sent: bytes, code: int
) -> None:
    async with started(dialogd, call) as wire:
        assert await echoes(wire)
        await wire.send(sent)
        assert await wire.closed_with() == code
        assert await wire.rest() == b""


# The end


async def test_whatever_follows_stop_is_ignored(dialogd: Dialogd, call: PhoneCall) -> None:
    async with started(dialogd, call) as wire:
        stop = text({"event": "stop", "sequenceNumber": "5", "streamSid": "MZ1", "stop": {"callSid": call.sid}})
        await wire.send(stop + text(media()) + stop + frame(TEXT, b"?") * 200)
        assert await wire.closed_with() == 1000
    assert (await dialogd.ended(call.sid))["reason"] == "the carrier stopped the stream"


@pytest.mark.parametrize(
    "sent",
    [b"", frame(TEXT, b"{")[:3], text(CONNECTED), frame(TEXT, b"x", fin=False)],
    ids=["at once", "in a frame", "after a message", "in a message"],
)
async def test_a_socket_may_vanish_at_any_stage(dialogd: Dialogd, call: PhoneCall, sent: bytes) -> None:
    async with media_socket(dialogd, call) as wire:
        await wire.send(sent)
    await dialogd.logged(event="media socket closed", call=call.sid, code=1006)


async def test_a_peer_that_never_answers_a_close_is_left(dialogd: Dialogd, call: PhoneCall) -> None:
    async with started(dialogd, call) as wire:
        assert await echoes(wire)
        await dialogd.ask(f"/calls/{call.sid}/hangup", "POST")
        assert await wire.closed_with() == 1000
        with trio.fail_after(5):
            assert await wire.rest() == b""
