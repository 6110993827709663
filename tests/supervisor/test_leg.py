"""A call's line at any carrier: what is said before there is a stream, what an abort does, and who waits for what."""

from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from dialog_supervisor.carriers.base import AHEAD_S, EARLY_BYTES, Leg, StreamEnd, Unsupported
from dialog_supervisor.websocket import MediaSocket
from protocol.messages import Event, Message, MessageDispatched, StartRecording, StartTranscript

MS = 8  # bytes


class RecordingLeg(Leg):
    """Writes down what it is to send."""

    def __init__(self) -> None:
        self.told: list[Event] = []
        self.sent: list[tuple[str, bytes | str]] = []
        super().__init__(self.told.append)

    def open_stream(self) -> None:
        self.open = True
        self.opened()

    def lose_stream(self) -> None:
        self.closed()

    def _carried(self) -> bytes:
        return b"the carrier's own"

    def _take_up(self, carried: bytes) -> None:
        assert carried == b"the carrier's own"

    def _send_media(self, audio: bytes) -> None:
        self.sent.append(("media", audio))

    def _send_mark(self, name: str) -> None:
        self.sent.append(("mark", name))

    def _send_clear(self) -> None:
        self.sent.append(("clear", ""))

    async def stream(self, socket: MediaSocket) -> StreamEnd:
        return StreamEnd.RELEASED

    def release(self) -> None:
        pass

    async def hangup(self) -> None:
        pass


@pytest.fixture
async def leg() -> RecordingLeg:
    return RecordingLeg()


@pytest.fixture
async def streaming(leg: RecordingLeg) -> RecordingLeg:
    leg.open_stream()
    return leg


def piece(uuid: str, ms: int, *, done: bool = False) -> Message[bytes]:
    return Message(uuid, bytes(ms * MS), done)


# Sending


async def test_audio_is_sent_at_once_and_a_mark_behind_the_last_piece(streaming: RecordingLeg) -> None:
    streaming.post(Message("a", b"1"))
    streaming.post(Message("a", b"2", done=True))
    assert streaming.sent == [("media", b"1"), ("media", b"2"), ("mark", "a")]
    assert streaming.counts["frames_out"] == 2


async def test_an_empty_last_piece_is_only_a_mark(streaming: RecordingLeg) -> None:
    streaming.post(Message("a", b"", done=True))
    assert streaming.sent == [("mark", "a")]


async def test_a_mark_that_returns_is_told(streaming: RecordingLeg) -> None:
    streaming.post(piece("a", 20, done=True))
    streaming.marked("a")
    assert streaming.told == [MessageDispatched("a", 20, 20, interrupted=False)]


async def test_an_unknown_mark_is_not_told(streaming: RecordingLeg) -> None:
    streaming.marked("nobody's")
    assert streaming.told == []


# Before there is a stream


async def test_what_is_said_early_is_kept_in_order_until_a_stream_opens(leg: RecordingLeg) -> None:
    leg.post(Message("a", b"1"))
    leg.post(Message("b", b"2", done=True))
    leg.post(Message("a", b"3", done=True))
    assert leg.sent == []
    leg.open_stream()
    assert leg.sent == [("media", b"1"), ("media", b"2"), ("mark", "b"), ("media", b"3"), ("mark", "a")]


async def test_what_is_said_while_a_stream_is_lost_is_played_on_the_next(streaming: RecordingLeg) -> None:
    streaming.lose_stream()
    streaming.post(Message("a", b"1", done=True))
    assert streaming.sent == []
    streaming.open_stream()
    assert streaming.sent == [("media", b"1"), ("mark", "a")]


async def test_an_early_utterance_that_is_aborted_is_not_said(leg: RecordingLeg) -> None:
    leg.post(piece("a", 100))
    leg.post(piece("b", 20))
    leg.abort("a")
    leg.post(piece("a", 100, done=True))
    leg.open_stream()
    assert leg.told == [MessageDispatched("a", 0, 100, interrupted=True)]
    assert leg.sent == [("media", bytes(20 * MS))]
    assert leg.counts["late"] == 1


async def test_an_early_utterance_is_told_of_once_however_often_it_is_aborted(leg: RecordingLeg) -> None:
    leg.post(piece("a", 100))
    leg.abort("a")
    leg.post(piece("a", 100))
    leg.abort("a")
    assert len(leg.told) == 1


async def test_an_utterance_that_is_too_long_to_be_kept_is_given_up_and_told(leg: RecordingLeg) -> None:
    leg.post(Message("short", bytes(80), done=True))
    half = EARLY_BYTES // 2
    for _ in range(3):
        leg.post(Message("long", bytes(half)))
    leg.open_stream()
    assert leg.told == [MessageDispatched("long", 0, 2 * half // MS, interrupted=True)]
    assert leg.sent == [("media", bytes(80)), ("mark", "short")]
    assert leg.counts["too_early"] == 1


async def test_what_was_given_up_or_aborted_makes_room_for_others(leg: RecordingLeg) -> None:
    for number in range(5):
        leg.post(Message(f"long {number}", bytes(EARLY_BYTES - 1000)))
        leg.abort(f"long {number}")
    leg.post(Message("a", b"1", done=True))
    leg.open_stream()
    assert leg.sent == [("media", b"1"), ("mark", "a")]
    assert leg.counts["too_early"] == 0


async def test_empty_pieces_take_room_too(leg: RecordingLeg) -> None:
    for _ in range(10_000):
        leg.post(Message("a", b""))
    assert leg.counts["too_early"] == 1
    assert leg._early == []


# Aborts


async def test_an_abort_clears_and_tells_how_much_was_heard(streaming: RecordingLeg, autojump_clock: MockClock) -> None:
    streaming.post(piece("a", 1000))
    await trio.sleep(0.3)
    streaming.abort("a")
    assert streaming.sent[1:] == [("clear", "")]
    assert streaming.told == [MessageDispatched("a", 300, 1000, interrupted=True)]


async def test_an_abort_of_nothing_neither_clears_nor_tells(streaming: RecordingLeg) -> None:
    streaming.post(piece("other", 100))
    streaming.abort("a")
    assert streaming.sent == [("media", bytes(100 * MS))]
    assert streaming.told == []


async def test_others_are_sent_again_after_the_clear(streaming: RecordingLeg) -> None:
    streaming.post(piece("a", 1000))
    streaming.post(Message("b", b"b" * 80, done=True))
    streaming.abort("a")
    assert streaming.sent[3:] == [("clear", ""), ("media", b"b" * 80), ("mark", "b#1")]


async def test_late_audio_after_an_abort_is_counted_and_dropped(streaming: RecordingLeg) -> None:
    streaming.post(piece("a", 20))
    streaming.abort("a")
    streaming.post(piece("a", 20, done=True))
    assert streaming.sent[2:] == []
    assert streaming.counts["late"] == 1


async def test_what_was_not_heard_before_a_stream_was_lost_is_sent_again_on_the_next(
    streaming: RecordingLeg, autojump_clock: MockClock
) -> None:
    streaming.post(piece("a", 100, done=True))
    streaming.post(piece("b", 100, done=True))
    await trio.sleep(0.15)
    streaming.lose_stream()
    streaming.post(piece("c", 10, done=True))
    await trio.sleep(5)
    streaming.sent.clear()
    streaming.open_stream()
    media = [len(audio) // MS for kind, audio in streaming.sent if kind == "media"]
    marks = [name for kind, name in streaming.sent if kind == "mark"]
    assert (media, marks) == ([50, 10], ["a#1", "b#2", "c"])
    for name in marks:
        streaming.marked(str(name))
    assert streaming.told == [
        MessageDispatched(uuid, ms, ms, interrupted=False) for uuid, ms in {"a": 100, "b": 100, "c": 10}.items()
    ]


async def test_an_abort_while_the_stream_is_lost_tells_what_was_heard_before(
    streaming: RecordingLeg, autojump_clock: MockClock
) -> None:
    streaming.post(piece("a", 100, done=True))
    streaming.post(piece("b", 100, done=True))
    await trio.sleep(0.05)
    streaming.lose_stream()
    await trio.sleep(5)
    streaming.abort("a")
    assert streaming.told == [MessageDispatched("a", 50, 100, interrupted=True)]
    streaming.sent.clear()
    streaming.open_stream()
    assert [len(audio) // MS for kind, audio in streaming.sent if kind == "media"] == [100]


async def test_when_the_conversation_is_over_everything_is_told(streaming: RecordingLeg, autojump_clock: MockClock) -> None:
    streaming.post(piece("a", 100, done=True))
    streaming.post(piece("b", 100, done=True))
    await trio.sleep(0.15)
    streaming.lose_stream()
    await trio.sleep(5)
    streaming.interrupted()
    assert streaming.told == [
        MessageDispatched("a", 100, 100, interrupted=False),
        MessageDispatched("b", 50, 100, interrupted=True),
    ]


# Back-pressure


async def test_room_is_there_while_the_carrier_has_little(streaming: RecordingLeg, autojump_clock: MockClock) -> None:
    streaming.post(piece("a", int(AHEAD_S * 1000)))
    begun = trio.current_time()
    await streaming.room()
    assert trio.current_time() == begun


async def test_room_waits_until_the_carrier_has_played_enough(streaming: RecordingLeg, autojump_clock: MockClock) -> None:
    streaming.post(piece("a", int((AHEAD_S + 7) * 1000)))
    begun = trio.current_time()
    await streaming.room()
    assert trio.current_time() - begun == pytest.approx(7, abs=0.01)


async def test_an_abort_makes_room_at_once(streaming: RecordingLeg, autojump_clock: MockClock) -> None:
    streaming.post(piece("a", int((AHEAD_S + 7) * 1000)))
    begun = trio.current_time()
    async with trio.open_nursery() as waiting:
        waiting.start_soon(streaming.room)
        await trio.sleep(1)
        streaming.abort("a")
    assert trio.current_time() - begun == pytest.approx(1, abs=0.01)


# Waiting for the end


async def test_played_returns_at_once_when_nothing_is_to_be_heard(
    streaming: RecordingLeg, autojump_clock: MockClock
) -> None:
    await streaming.played()
    assert streaming.counts["marks_missing"] == 0


async def test_played_waits_for_the_last_mark(
    streaming: RecordingLeg, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    streaming.post(piece("a", 1000, done=True))
    streaming.post(piece("b", 1000, done=True))
    heard = trio.Event()

    async def wait() -> None:
        await streaming.played()
        heard.set()

    nursery.start_soon(wait)
    await trio.sleep(1)
    streaming.marked("a")
    await wait_all_tasks_blocked()
    assert not heard.is_set()
    await trio.sleep(1)
    streaming.marked("b")
    await heard.wait()
    assert streaming.counts["marks_missing"] == 0


async def test_a_mark_that_never_returns_is_waited_for_a_little(streaming: RecordingLeg, autojump_clock: MockClock) -> None:
    streaming.post(piece("a", 3000, done=True))
    begun = trio.current_time()
    await streaming.played()
    assert 3 < trio.current_time() - begun <= 5.01
    assert streaming.counts["marks_missing"] == 1


async def test_what_is_said_meanwhile_is_waited_for_too(
    streaming: RecordingLeg, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    streaming.post(piece("a", 1000))
    begun = trio.current_time()
    nursery.start_soon(_post_after, streaming, 0.5, piece("a", 10_000, done=True))
    await streaming.played()
    assert trio.current_time() - begun >= 11


async def _post_after(leg: RecordingLeg, seconds: float, message: Message[bytes]) -> None:
    await trio.sleep(seconds)
    leg.post(message)


async def test_played_waits_for_the_next_stream_and_returns_when_there_is_none_any_more(
    streaming: RecordingLeg, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    streaming.post(piece("a", 60_000, done=True))

    async def lose() -> None:
        await trio.sleep(1)
        streaming.lose_stream()
        await trio.sleep(9)
        streaming.interrupted()

    begun = trio.current_time()
    nursery.start_soon(lose)
    await streaming.played()
    assert trio.current_time() - begun == pytest.approx(10, abs=0.01)


# What a carrier cannot do


@pytest.mark.parametrize(
    ("request_", "arguments"),
    [
        ("transfer_to", ["+15550100"]),
        ("send_dtmf", ["1234"]),
        ("start_recording", [StartRecording(1, 1.0)]),
        ("pause_recording", ["silence"]),
        ("resume_recording", []),
        ("stop_recording", []),
        ("remove_recording", []),
        ("start_transcript", [StartTranscript(1, 1.0)]),
        ("stop_transcript", []),
    ],
)
async def test_what_a_carrier_does_not_offer_is_unsupported_by_name(
    leg: RecordingLeg, request_: str, arguments: list[Any]
) -> None:
    with pytest.raises(Unsupported, match=request_):
        await getattr(leg, request_)(*arguments)


async def test_refused_digits_are_not_repeated(leg: RecordingLeg) -> None:
    with pytest.raises(Unsupported) as caught:
        await leg.send_dtmf("4711")
    assert "4711" not in str(caught.value)
