"""What one process hands another: the media socket, the ledger of what the caller hears, the line, the worker's requests."""

import json
import os
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Struct
from trio.testing import MockClock, wait_all_tasks_blocked
from websockets.client import ClientProtocol
from websockets.frames import Frame, Opcode
from websockets.protocol import Protocol, Side
from websockets.uri import parse_uri

from dialog_supervisor.carriers.base import LegState
from dialog_supervisor.carriers.playout import Playout, PlayoutState
from dialog_supervisor.carriers.twilio.recordings import RecordingsState, TranscriptionState
from dialog_supervisor.connections import Listener
from dialog_supervisor.frames import Unfinished
from dialog_supervisor.http import Request, Response, Upgrade
from dialog_supervisor.requests import Requests, RequestsState
from dialog_supervisor.sections import GatewayConfig, TransferConfig
from dialog_supervisor.telemetry.metrics import Party
from dialog_supervisor.transports import ReadinessTransport
from dialog_supervisor.websocket import MediaSocket, MediaSocketClosed, MediaSocketState
from protocol.messages import Event, Hangup, Message, MessageDispatched, RecordingUrl, Reply, StartRecording, TransferTo
from tests.e2e.twilio_api import Answer
from tests.supervisor.line import DUAL, QuietLeg, recorded_line

LIMIT = 65_536
MESSAGES = [b"one", b"", b"x" * 200, b"y" * 70_000]


def as_bytes_and_back(state: Struct) -> Any:
    """Send a state the way that states go."""
    return msgspec.msgpack.decode(msgspec.msgpack.encode(state), type=type(state))


# The media socket


def frames(messages: list[bytes], *, fragment: int = 0, ping: bool = False) -> bytes:
    """Return messages as a client's bytes, in fragments of a size, with pings between the fragments."""
    sent = bytearray()
    for message in messages:
        pieces = [message[at : at + fragment] for at in range(0, len(message), fragment)] if fragment else [message]
        for number, piece in enumerate(pieces or [b""]):
            opcode = Opcode.CONT if number else Opcode.TEXT
            sent += Frame(opcode, piece, fin=number == max(0, len(pieces) - 1)).serialize(mask=True)
            if ping:
                sent += Frame(Opcode.PING, b"there?").serialize(mask=True)
    return bytes(sent)


def understood(data: bytes) -> list[bytes]:
    """Return the messages that a server understands of bytes."""
    protocol = Protocol(Side.SERVER, max_size=None)
    protocol.receive_data(data)
    whole, parts = [], bytearray()
    for event in protocol.events_received():
        assert isinstance(event, Frame)
        if event.opcode in (Opcode.TEXT, Opcode.CONT):
            parts += event.data
            if event.fin:
                whole.append(bytes(parts))
                parts.clear()
    return whole


@given(st.data(), st.sampled_from([0, 1, 70, 1000]), st.booleans())
def test_what_is_unfinished_is_fed_again_and_nothing_else(data: st.DataObject, fragment: int, ping: bool) -> None:
    messages = [message[:300] for message in MESSAGES] if fragment == 1 else MESSAGES
    sent = frames(messages, fragment=fragment, ping=ping)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(sent)), max_size=6)))
    came = Unfinished()
    for begin, end in zip([0, *cuts], cuts, strict=False):
        came.feed(sent[begin:end])
    handed_over_at = cuts[-1] if cuts else 0
    before = understood(sent[:handed_over_at])
    assert before + understood(bytes(came.data) + sent[handed_over_at:]) == messages


class Carrier:
    """A client's bare end of an open media socket, whose other end goes from process to process."""

    def __init__(self) -> None:
        self.here, there = socket.socketpair()
        there.setblocking(False)
        self.media = MediaSocket.accepted(ReadinessTransport(there), self._handshake(), b"", max_message_bytes=LIMIT)
        self._ends = [there]
        self.here.recv(LIMIT)

    @staticmethod
    def _handshake() -> bytes:
        client = ClientProtocol(parse_uri("ws://voice.test/media"))
        client.send_request(client.connect())
        return b"".join(client.data_to_send())

    async def receive(self) -> str:
        """Return the next message, which is text."""
        messages: list[str] = []

        def take(data: bytes, text: bool) -> bool:
            assert text
            messages.append(data.decode())
            return True

        await self.media.each(take)
        return messages[0]

    def pass_on(self) -> None:
        """Have another process take the end over."""
        state = self.media.hand_over()
        assert state is not None
        known = as_bytes_and_back(state)
        end = socket.socket(fileno=os.dup(known.fd))
        self._ends.append(end)
        assert isinstance(known, MediaSocketState)
        self.media = MediaSocket.taken_over(ReadinessTransport(end), known, max_message_bytes=LIMIT)

    def close(self) -> None:
        for end in (self.here, *self._ends):
            end.close()


@pytest.fixture
async def carrier() -> Iterator[Carrier]:  # type: ignore[misc]  # pytest-trio's
    one = Carrier()
    yield one
    one.close()


async def test_a_media_socket_goes_on_in_the_middle_of_a_message(carrier: Carrier) -> None:
    sent = frames([b"before", b"between", b"after"])
    carrier.here.send(sent[:20])
    assert await carrier.receive() == "before"
    with trio.move_on_after(0.01):
        await carrier.receive()  # takes in the beginning of the next
    carrier.pass_on()
    carrier.here.send(sent[20:])
    assert [await carrier.receive(), await carrier.receive()] == ["between", "after"]


async def test_a_media_socket_goes_on_between_two_messages(carrier: Carrier) -> None:
    carrier.here.send(frames([b"before"]))
    assert await carrier.receive() == "before"
    carrier.pass_on()
    carrier.here.send(frames([b"after"]))
    assert await carrier.receive() == "after"


async def test_what_came_and_was_not_read_is_read_by_the_next_process(carrier: Carrier) -> None:
    carrier.here.send(frames([b"one", b"two", b"three"]))
    assert await carrier.receive() == "one"
    carrier.pass_on()
    assert [await carrier.receive(), await carrier.receive()] == ["two", "three"]


async def test_what_the_carrier_has_not_taken_is_sent_by_the_next_process(carrier: Carrier) -> None:
    carrier.here.setblocking(False)
    said = [json.dumps({"number": number, "payload": "x" * 20_000}).encode() for number in range(40)]
    for one in said:
        carrier.media.send(one)
    carrier.pass_on()

    async def hear(media: MediaSocket) -> None:
        client = Protocol(Side.CLIENT)
        heard: list[bytes] = []
        while len(heard) < len(said):
            await trio.lowlevel.wait_readable(carrier.here)
            client.receive_data(carrier.here.recv(LIMIT))
            heard += [bytes(event.data) for event in client.events_received() if isinstance(event, Frame)]
        assert heard == said
        media.close(1000)
        carrier.here.close()

    with trio.fail_after(5):
        await carrier.media.serve(hear)


async def test_a_socket_that_closes_is_not_handed_over(carrier: Carrier) -> None:
    carrier.media.close(1000)
    assert carrier.media.hand_over() is None


async def test_a_message_in_more_pieces_than_it_deserves_closes_the_socket(carrier: Carrier) -> None:
    carrier.here.setblocking(False)
    piece = Frame(Opcode.TEXT, b"", fin=False).serialize(mask=True)
    more = Frame(Opcode.CONT, b"", fin=False).serialize(mask=True) * 5000

    async def send() -> None:
        await trio.lowlevel.wait_writable(carrier.here)
        carrier.here.send(piece)
        for _ in range(10):
            await trio.lowlevel.wait_writable(carrier.here)
            carrier.here.send(more)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        with pytest.raises(MediaSocketClosed, match="1008 \\(a message comes in too many pieces\\)"):
            await carrier.receive()
        nursery.cancel_scope.cancel()


# The listener


async def answer(request: Request) -> Response | Upgrade:
    return Response(200, f"{request.path}\n")


@asynccontextmanager
async def a_listener() -> AsyncIterator[tuple[Listener, int]]:
    """Have a listener for the length of the block, and its port."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setblocking(False)
        listener = Listener(GatewayConfig(public_url="http://voice.test"), answer)
        async with trio.open_nursery() as nursery:
            await nursery.start(listener.serve, listening)
            yield listener, listening.getsockname()[1]
            nursery.cancel_scope.cancel()


async def ask(client: trio.SocketStream, path: str) -> bytes:
    await client.send_all(f"GET {path} HTTP/1.1\r\nhost: voice.test\r\n\r\n".encode())
    return bytes(await client.receive_some(LIMIT))


async def test_a_connection_goes_on_between_two_requests() -> None:
    async with a_listener() as (before, port):
        client = await trio.open_tcp_stream("127.0.0.1", port)
        assert (await ask(client, "/first")).endswith(b"/first\n")
        await wait_all_tasks_blocked()
        kept = [os.dup(fd) for fd in before.hand_over() or ()]
    async with client, a_listener() as (after, _):
        after.take_over(kept)
        with trio.fail_after(5):
            assert (await ask(client, "/second")).endswith(b"/second\n")


async def test_nothing_is_handed_over_while_a_request_is_coming() -> None:
    async with a_listener() as (listener, port), await trio.open_tcp_stream("127.0.0.1", port) as client:
        await client.send_all(b"GET /half HTTP/1.1\r\n")
        await wait_all_tasks_blocked(0.01)
        assert listener.hand_over() is None


async def test_who_connects_while_nobody_is_let_in_waits() -> None:
    async with a_listener() as (listener, port):
        with listener.paused():
            client = await trio.open_tcp_stream("127.0.0.1", port)
            await wait_all_tasks_blocked(0.01)
            assert listener.connections == 0
        async with client:
            with trio.fail_after(5):
                assert (await ask(client, "/patient")).endswith(b"/patient\n")


# The ledger


def test_a_ledger_goes_on_with_the_carriers_clock() -> None:
    before = Playout()
    before.post("a", bytes(8000), done=True, now=100.0)
    before.post("b", bytes(16_000), done=False, now=100.0)
    before.abort("gone", 100.0)
    state: PlayoutState = as_bytes_and_back(before.hand_over(100.5))
    after = Playout.taken_over(state, 7.5)
    assert after.buffered_s(8.5) == pytest.approx(1.5)  # a second later: of three seconds, half of them were left
    assert after.refuses("gone")
    assert after.unfinished() == ["b"]
    assert after.marked("a", 8.1) == MessageDispatched("a", 1000, 1000, interrupted=False)
    cut = after.abort("b", 9.0)
    assert cut is not None
    assert cut.dispatched == MessageDispatched("b", 1000, 2000, interrupted=True)


def test_what_is_sent_again_after_a_cut_is_told_by_its_new_mark_also_later() -> None:
    before = Playout()
    before.post("a", bytes(8000), done=True, now=0.0)
    before.post("b", bytes(8000), done=True, now=0.0)
    cut = before.abort("a", 0.5)
    assert cut is not None
    [(mark, _)] = cut.resend
    after = Playout.taken_over(as_bytes_and_back(before.hand_over(0.5)), 0.5)
    assert after.marked("b", 1.0) is None
    assert after.marked(mark, 1.5) == MessageDispatched("b", 1000, 1000, interrupted=False)


def test_what_a_caller_had_still_to_hear_when_the_line_was_lost_is_known_also_later() -> None:
    before = Playout()
    before.post("a", bytes(8000), done=True, now=0.0)
    before.pause(0.25)
    after = Playout.taken_over(as_bytes_and_back(before.hand_over(3.0)), 3.0)
    assert after.paused
    assert [len(audio) for _, audio in after.resume(5.0)] == [6000]


# The line


async def test_a_line_keeps_what_was_said_too_early_and_what_is_owed() -> None:
    before, after = QuietLeg(), QuietLeg()
    before.counts["frames_in"] = 7
    before.post(Message("a", b"early"))
    before.owe("RE1")
    state = before.hand_over(trio.current_time())
    assert state is not None
    known: LegState = as_bytes_and_back(state)
    after.take_over(known, trio.current_time())
    assert after.counts == {"frames_in": 7}
    assert after.orphaned() == {"a": 0}
    assert after.owed == ("RE1",)


async def test_recordings_that_are_under_way_or_to_be_copied_go_along(tmp_path: Path) -> None:
    async with recorded_line(tmp_path) as before, recorded_line(tmp_path) as after:
        await before.begun(StartRecording(1, 5, download=True))
        before.report("completed", RecordingUrl=after.url("RE1"))  # and `run`, which copies, does not run there
        await before.begun(DUAL, sid="RE2")
        state: RecordingsState = as_bytes_and_back(before.recordings.state())
        after.recordings.take_up(state)
        after.api.answers.append(Answer(200, b"RIFF"))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(after.recordings.run)
            with trio.fail_after(5):
                while not after.of(RecordingUrl):  # noqa: ASYNC110 - a file is written in a thread
                    await trio.sleep(0.01)
            nursery.cancel_scope.cancel()
        assert after.kept == ["CA1-RE1.wav"]
        assert after.recordings.state().current == "RE2"
        assert after.recordings.state().uncopied == ()


async def test_a_transcription_under_way_goes_along(tmp_path: Path) -> None:
    async with recorded_line(tmp_path) as before, recorded_line(tmp_path) as after:
        await before.transcribing()
        state: TranscriptionState = as_bytes_and_back(before.transcription.state())
        after.transcription.take_up(state)
        assert after.transcription.state() == state


# The worker's requests


class Ends:
    """How conversations were ended."""

    def __init__(self) -> None:
        self.reasons: list[str] = []

    def __call__(self, reason: str, *, by: Party, fallback: bool = False, released: bool = False) -> None:
        self.reasons.append(reason)


async def test_a_request_that_waits_for_the_caller_is_carried_out_by_the_next_process(autojump_clock: MockClock) -> None:
    before, after = QuietLeg(), QuietLeg()
    told: list[Event] = []
    ends = Ends()
    before.open = True
    before.post(Message("a", bytes(16_000), done=True))
    async with trio.open_nursery() as nursery:
        requests = Requests(before, TransferConfig(), told.append, ends)
        requests.take(Hangup(5, 60.0), nursery)
        await wait_all_tasks_blocked()
        state = requests.hand_over(trio.current_time())
        assert state is not None
        nursery.cancel_scope.cancel()
    known: RequestsState = as_bytes_and_back(state)
    async with trio.open_nursery() as nursery:
        Requests(after, TransferConfig(), told.append, ends).take_over(known, nursery)
    assert after.asked == ["hangup"]
    assert told == [Reply(5)]
    assert ends.reasons == ["the agent hung up"]


async def test_a_request_that_the_carrier_is_dealing_with_is_waited_for(autojump_clock: MockClock) -> None:
    leg = QuietLeg()
    told: list[Event] = []
    done = trio.Event()
    leg.act = done.wait
    async with trio.open_nursery() as nursery:
        requests = Requests(leg, TransferConfig(allow=("+15557654321",)), told.append, Ends())
        requests.take(TransferTo(1, 60.0, "+15557654321"), nursery)
        await wait_all_tasks_blocked()
        assert requests.hand_over(trio.current_time()) is None
        done.set()
    assert requests.hand_over(trio.current_time()) is not None
