"""The outbox: bounded, in order, and giving up the oldest speech first."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.link import Outbox, OutboxFull


def frame(content: bytes) -> bytes:
    return content


def drained(outbox: Outbox) -> list[bytes]:
    frames = []
    while outbox:
        frames.append(bytes(outbox.head()))
        outbox.sent(len(outbox.head()))
    assert outbox.size == 0
    return frames


def test_frames_leave_in_the_order_they_came() -> None:
    outbox = Outbox()
    for content in (b"a", b"b", b"c"):
        outbox.put(frame(content), droppable=content == b"b")
    assert drained(outbox) == [b"a", b"b", b"c"]


def test_an_empty_outbox_is_false() -> None:
    outbox = Outbox()
    assert not outbox
    outbox.put(frame(b"a"))
    assert outbox


def test_the_size_is_what_has_not_been_sent() -> None:
    outbox = Outbox()
    outbox.put(frame(b"abc"))
    outbox.put(frame(b"de"))
    outbox.sent(2)
    assert outbox.size == 3
    assert outbox.head() == b"c"


def test_a_droppable_frame_too_many_pushes_out_the_oldest_of_its_kind() -> None:
    outbox = Outbox(max_droppable=2)
    outbox.put(frame(b"keep"))
    for content in (b"1", b"2", b"3"):
        outbox.put(frame(content), droppable=True)
    assert outbox.dropped == 1
    assert drained(outbox) == [b"keep", b"2", b"3"]


def test_a_frame_that_was_begun_before_it_was_queued_is_never_dropped() -> None:
    outbox = Outbox(max_droppable=1)
    outbox.put(frame(b"rest"), droppable=True, begun=True)
    for content in (b"1", b"2"):
        outbox.put(frame(content), droppable=True)
    assert drained(outbox) == [b"rest", b"2"]


def test_a_frame_that_was_begun_from_the_queue_is_never_dropped() -> None:
    outbox = Outbox(max_droppable=1)
    outbox.put(frame(b"begun"), droppable=True)
    outbox.sent(1)
    for content in (b"1", b"2"):
        outbox.put(frame(content), droppable=True)
    assert drained(outbox) == [b"egun", b"2"]


def test_a_frame_that_does_not_fit_is_refused_and_changes_nothing() -> None:
    outbox = Outbox(max_bytes=4)
    outbox.put(frame(b"abc"))
    with pytest.raises(OutboxFull, match="3 bytes are waiting"):
        outbox.put(frame(b"de"))
    assert outbox.size == 3
    assert drained(outbox) == [b"abc"]


def test_speech_gives_way_to_what_does_not_fit_beside_it() -> None:
    outbox = Outbox(max_bytes=6)
    outbox.put(frame(b"xx"))
    outbox.put(frame(b"11"), droppable=True)
    outbox.put(frame(b"22"), droppable=True)
    outbox.put(frame(b"yyy"))
    assert outbox.dropped == 2
    assert drained(outbox) == [b"xx", b"yyy"]


def test_the_rest_of_a_begun_frame_is_taken_whatever_its_size() -> None:
    outbox = Outbox(max_bytes=4)
    outbox.put(frame(b"the rest"), begun=True)
    assert drained(outbox) == [b"the rest"]


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("put"), st.integers(1, 9), st.booleans()),
            st.tuples(st.just("sent"), st.integers(1, 9), st.just(False)),
        ),
        max_size=60,
    )
)
def test_what_leaves_is_what_came_less_whole_droppable_frames(steps: list[tuple[str, int, bool]]) -> None:
    """A model: every frame has a number of its own, so the bytes that leave name the frames that they are of."""
    outbox, entered, left, refused = Outbox(max_bytes=30, max_droppable=3), {}, bytearray(), 0
    for number, (step, size, droppable) in enumerate(steps):
        if step == "sent" and outbox:
            left += outbox.head()[:size]
            outbox.sent(min(size, len(outbox.head())))
        elif step == "put":
            try:
                outbox.put(frame(bytes([number]) * size), droppable=droppable)
                entered[number] = (size, droppable)
            except OutboxFull:
                refused += 1
        assert outbox.size <= 30
    for content in drained(outbox):
        left += content
    present = list(dict.fromkeys(left))
    missing = [number for number in entered if number not in present]
    assert present == sorted(present)
    assert all(left.count(number) == entered[number][0] for number in present)
    assert all(entered[number][1] for number in missing)
    assert outbox.dropped == len(missing)
