"""The link over a real socketpair: both ways at once, bounded, and never waiting for somebody who is gone."""

import socket
from collections.abc import AsyncIterator
from itertools import groupby
from typing import Any

import pytest
import trio
from msgspec import Struct
from trio.testing import wait_all_tasks_blocked

from protocol.framing import FrameTooLarge, MalformedFrame, encode
from protocol.link import DROPPABLE_FRAMES, KERNEL_BUFFER_BYTES, Link, LinkClosed, OutboxFull, VersionMismatch
from protocol.messages import (
    PROTOCOL_VERSION,
    Checkpoint,
    Dtmf,
    Event,
    Hangup,
    Heartbeat,
    Hello,
    Media,
    Message,
    Post,
    Reply,
    Trace,
)
from protocol.readiness import TURN_BYTES, Readers
from tests.protocol.conftest import Pair

BIG = 100_000  # more than the kernel takes of one message


@pytest.fixture
async def raw() -> AsyncIterator[tuple[Link[Any], socket.socket]]:
    """A worker's link, and the bare socket at its other end."""
    ours, theirs = socket.socketpair()
    link: Link[Any] = Link(theirs, Event)
    yield link, ours
    link.close()
    ours.close()


async def take(link: Link[Any], count: int) -> list[Struct]:
    return [await anext(link) for _ in range(count)]


async def rest_of(link: Link[Any]) -> list[Struct]:
    return [message async for message in link]


def fill(link: Link[Any]) -> int:
    """Post until the outbox takes no more; return how many messages it took."""
    message, posted = Checkpoint(bytes(BIG)), 0
    try:
        while True:
            link.post(message)
            posted += 1
    except OutboxFull:
        return posted


# Messages


async def test_messages_arrive_in_order_both_ways(pair: Pair) -> None:
    events, commands = [Dtmf("1"), Media(20, b"a"), Dtmf("2")], [Heartbeat(3), Post(Message("u", b"x", done=True))]
    for event in events:
        pair.supervisor.post(event)
    for command in commands:
        pair.worker.post(command)
    assert await take(pair.worker, 3) == events
    assert await take(pair.supervisor, 2) == commands


async def test_a_message_that_the_kernel_takes_needs_nobody_running(pair: Pair) -> None:
    pair.supervisor.post(Dtmf("1"))
    await pair.supervisor.room()
    assert await anext(pair.worker) == Dtmf("1")


async def test_what_the_kernel_does_not_take_is_sent_by_run(pair: Pair, nursery: trio.Nursery) -> None:
    states = [Checkpoint(bytes([number]) * BIG) for number in range(8)]
    for state in states:
        pair.worker.post(state)
    nursery.start_soon(pair.worker.run)
    assert await take(pair.supervisor, len(states)) == states


async def test_many_small_messages_beyond_the_kernels_buffer_arrive_whole(pair: Pair, nursery: trio.Nursery) -> None:
    nursery.start_soon(pair.supervisor.run)
    events = [Media(number, bytes(160)) for number in range(3000)]
    for event in events:
        pair.supervisor.post(event)
    assert await take(pair.worker, len(events)) == events


async def test_a_message_over_the_limit_is_refused_and_the_link_goes_on(pair: Pair) -> None:
    with pytest.raises(FrameTooLarge):
        pair.worker.post(Checkpoint(bytes(2 << 20)))
    pair.worker.post(Heartbeat())
    assert await anext(pair.supervisor) == Heartbeat()


async def test_garbage_ends_the_iteration_with_a_protocol_error(raw: tuple[Link[Any], socket.socket]) -> None:
    link, other = raw
    other.send(b"\x01\x00\x00\x00\xc1")
    with pytest.raises(MalformedFrame):
        await anext(link)


# Back-pressure


async def test_room_is_there_at_once_when_nothing_waits(pair: Pair) -> None:
    with trio.fail_after(1):
        await pair.supervisor.room()


async def test_room_waits_until_the_other_side_has_read(pair: Pair, nursery: trio.Nursery) -> None:
    nursery.start_soon(pair.worker.run)
    has_room = trio.Event()

    async def wait_for_room() -> None:
        await pair.worker.room()
        has_room.set()

    count = fill(pair.worker)
    nursery.start_soon(wait_for_room)
    await wait_all_tasks_blocked(0.01)
    assert not has_room.is_set()
    await take(pair.supervisor, count)
    with trio.fail_after(5):
        await has_room.wait()


async def test_an_outbox_that_nobody_empties_is_full_at_last(pair: Pair) -> None:
    assert fill(pair.worker) <= (1 << 20) // BIG + 2
    with pytest.raises(OutboxFull):
        pair.worker.post(Checkpoint(bytes(BIG)))


async def test_what_was_refused_is_missing_and_nothing_else(pair: Pair, nursery: trio.Nursery) -> None:
    count = fill(pair.worker)
    nursery.start_soon(pair.worker.run)
    assert len(await take(pair.supervisor, count)) == count
    await pair.worker.room()
    pair.worker.post(Heartbeat(7))
    assert await anext(pair.supervisor) == Heartbeat(7)


async def test_the_biggest_message_of_all_passes_a_busy_kernel(pair: Pair, nursery: trio.Nursery) -> None:
    """Its beginning is sent before it is known that the rest must wait: the rest must then be kept."""
    biggest = Checkpoint(bytes((1 << 20) - 20))
    pair.worker.post(biggest)
    nursery.start_soon(pair.worker.run)
    assert await anext(pair.supervisor) == biggest


async def test_speech_for_a_reader_that_sleeps_is_dropped_oldest_first(pair: Pair, nursery: trio.Nursery) -> None:
    sent = 2000
    for number in range(sent):
        pair.supervisor.post(Media(number, bytes(160)), droppable=True)
    pair.supervisor.post(Dtmf("9"))
    assert pair.supervisor.dropped > 0
    nursery.start_soon(pair.supervisor.run)
    received = await take(pair.worker, sent - pair.supervisor.dropped + 1)
    times = [event.timestamp_ms for event in received[:-1] if isinstance(event, Media)]
    early = next(index for index, time in enumerate(times) if time != index)
    assert received[-1] == Dtmf("9")
    assert times[early:] == list(range(sent - len(times) + early, sent))
    assert len(times) - early == DROPPABLE_FRAMES


async def test_a_sleeping_reader_costs_speech_but_no_other_event(pair: Pair, nursery: trio.Nursery) -> None:
    for number in range(1500):
        pair.supervisor.post(Media(number, bytes(160)), droppable=True)
        if number % 100 == 0:
            pair.supervisor.post(Dtmf(str(number)))
    nursery.start_soon(pair.supervisor.run)
    received = await take(pair.worker, 1515 - pair.supervisor.dropped)
    assert [event.digit for event in received if isinstance(event, Dtmf)] == [str(n) for n in range(0, 1500, 100)]


# Ends


async def test_the_iteration_ends_when_the_other_side_closes(pair: Pair) -> None:
    pair.supervisor.post(Dtmf("1"))
    pair.supervisor.close()
    assert await rest_of(pair.worker) == [Dtmf("1")]


async def test_posting_to_somebody_who_is_gone_raises(pair: Pair) -> None:
    pair.worker.close()
    with pytest.raises(LinkClosed, match="gone"):
        pair.supervisor.post(Dtmf("1"))
    with pytest.raises(LinkClosed):
        pair.supervisor.post(Dtmf("1"))


async def test_the_last_words_of_the_other_side_are_read_although_sending_to_it_failed(pair: Pair) -> None:
    pair.worker.post(Trace("log", "why I died"))
    pair.worker.close()
    with pytest.raises(LinkClosed):
        pair.supervisor.post(Media(0, b"x"), droppable=True)
    assert await rest_of(pair.supervisor) == [Trace("log", "why I died")]


async def test_last_words_are_read_when_the_other_side_died_with_unread_messages(pair: Pair) -> None:
    pair.supervisor.post(Media(0, b"never read"))
    pair.worker.post(Trace("log", "why I died"))
    pair.worker.close()
    assert await rest_of(pair.supervisor) == [Trace("log", "why I died")]


async def test_a_frame_that_ends_in_the_middle_is_not_a_message(raw: tuple[Link[Any], socket.socket]) -> None:
    link, other = raw
    other.send(bytes(encode(Dtmf("1")) + encode(Dtmf("2"))[:-1]))
    other.close()
    assert await rest_of(link) == [Dtmf("1")]


async def test_room_does_not_wait_for_somebody_who_is_gone(pair: Pair, nursery: trio.Nursery) -> None:
    nursery.start_soon(pair.worker.run)
    fill(pair.worker)
    pair.supervisor.close()
    with trio.fail_after(5):
        await pair.worker.room()


async def test_run_ends_when_the_other_side_is_gone(pair: Pair) -> None:
    fill(pair.worker)
    pair.supervisor.close()
    with trio.fail_after(5):
        await pair.worker.run()


async def test_closing_wakes_the_one_who_iterates(pair: Pair, nursery: trio.Nursery) -> None:
    ended = trio.Event()

    async def iterate() -> None:
        assert await rest_of(pair.worker) == []
        ended.set()

    nursery.start_soon(iterate)
    await wait_all_tasks_blocked()
    pair.worker.close()
    with trio.fail_after(5):
        await ended.wait()


async def test_closing_wakes_the_one_who_sends(pair: Pair) -> None:
    fill(pair.worker)
    async with trio.open_nursery() as sending:
        sending.start_soon(pair.worker.run)
        await wait_all_tasks_blocked()
        pair.worker.close()
        sending.cancel_scope.deadline = trio.current_time() + 5
    assert not sending.cancel_scope.cancelled_caught


async def test_a_closed_link_refuses_and_may_be_closed_again(pair: Pair) -> None:
    pair.worker.close()
    pair.worker.close()
    with pytest.raises(LinkClosed, match="closed"):
        pair.worker.post(Heartbeat())
    assert await rest_of(pair.worker) == []


# The introduction


async def test_both_sides_introduce_themselves(pair: Pair) -> None:
    pair.supervisor.introduce("gen-1", "CA1")
    pair.worker.introduce("gen-1", "CA1")
    assert await pair.worker.introduced() == Hello(PROTOCOL_VERSION, "gen-1", "CA1")
    assert await pair.supervisor.introduced() == Hello(PROTOCOL_VERSION, "gen-1", "CA1")


async def test_another_version_is_refused(pair: Pair) -> None:
    pair.supervisor.post(Hello(PROTOCOL_VERSION + 1, "g", "c"))
    with pytest.raises(VersionMismatch, match=f"version {PROTOCOL_VERSION + 1}, this one {PROTOCOL_VERSION}"):
        await pair.worker.introduced()


async def test_whoever_does_not_introduce_itself_first_is_refused(pair: Pair) -> None:
    pair.supervisor.post(Dtmf("1"))
    pair.supervisor.introduce("g", "c")
    with pytest.raises(VersionMismatch, match="the first message is Dtmf"):
        await pair.worker.introduced()


async def test_whoever_is_gone_before_its_hello_is_gone(pair: Pair) -> None:
    pair.supervisor.close()
    with pytest.raises(LinkClosed, match="before its Hello"):
        await pair.worker.introduced()


# Beside another


async def test_a_worker_that_has_said_much_is_read_a_little_between_two_messages_of_another(
    pair: Pair, nursery: trio.Nursery
) -> None:
    quiet, order = Pair(), list[str]()
    post = Post(Message("u", b"\xff" * 160))
    for _ in range(KERNEL_BUFFER_BYTES // len(encode(post))):
        pair.worker.post(post)

    def hear_the_loud(_: Struct) -> bool:
        order.append("loud")
        return False

    def hear_the_quiet(_: Struct) -> bool:
        order.append("quiet")
        quiet.worker.post(Heartbeat(0))  # for its next turn
        return order.count("quiet") == 5

    await nursery.start(Readers().run)
    quiet.worker.post(Heartbeat(0))
    nursery.start_soon(pair.supervisor.each, hear_the_loud)
    await quiet.supervisor.each(hear_the_quiet)
    nursery.cancel_scope.cancel()
    quiet.close()
    turns = [list(heard) for who, heard in groupby(order) if who == "loud"]
    assert len(turns) > 2
    assert max(map(len, turns)) <= 2 * (TURN_BYTES // len(encode(post)) + 1)  # once before it and once behind it, in a round


async def test_replies_among_what_is_passed_on_go_to_whoever_asked(pair: Pair, nursery: trio.Nursery) -> None:
    heard: list[Struct] = []

    def hear(event: Struct) -> bool:
        heard.append(event)
        return isinstance(event, Dtmf)

    async def answer() -> None:
        asked = await anext(pair.supervisor)
        assert isinstance(asked, Hangup)
        for message in (Media(0, b""), Dtmf("1"), Reply(asked.id, None, "done"), Dtmf("2")):  # which come as one
            pair.supervisor.post(message)

    nursery.start_soon(answer)
    nursery.start_soon(pair.worker.each, hear)
    assert await pair.worker.request(Hangup, timeout_s=5) == "done"
    await pair.worker.each(hear)
    assert heard == [Media(0, b""), Dtmf("1"), Dtmf("2")]
