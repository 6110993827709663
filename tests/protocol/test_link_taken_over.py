"""One end of a link goes from one process to another: what had come, and what had not left, goes along."""

import os
from typing import Any

import msgspec
import trio

from protocol.framing import encode
from protocol.link import Link, LinkState
from protocol.messages import Command, Dtmf, Heartbeat, Media, Trace
from tests.protocol.conftest import Pair
from tests.protocol.test_link import take

SECOND = bytes(8000)  # of audio


def taken_over(link: Link[Any]) -> Link[Any]:
    """Have what would be another process take the supervisor's end over, by a state as bytes."""
    state = link.hand_over()
    assert state is not None
    known = msgspec.msgpack.decode(msgspec.msgpack.encode(state), type=LinkState)
    return Link.taken_over(msgspec.structs.replace(known, fd=os.dup(known.fd)), Command)


async def test_what_came_and_was_not_dealt_with_is_dealt_with_by_the_next_process(pair: Pair) -> None:
    for lag in range(3):
        pair.worker.post(Heartbeat(lag))
    assert await anext(pair.supervisor) == Heartbeat(0)
    pair.worker.post(Heartbeat(3))
    link = taken_over(pair.supervisor)
    assert await take(link, 3) == [Heartbeat(1), Heartbeat(2), Heartbeat(3)]
    link.close()


async def test_a_frame_that_has_begun_to_come_is_read_on(pair: Pair) -> None:
    frame = encode(Trace("heard", "a table for two"))
    pair.worker._sock.send(encode(Heartbeat()) + frame[:9])
    assert await anext(pair.supervisor) == Heartbeat()
    pair.worker._sock.send(frame[9:])
    link = taken_over(pair.supervisor)
    assert await anext(link) == Trace("heard", "a table for two")
    link.close()


async def test_what_had_not_left_is_sent_by_the_next_process_from_where_the_first_stopped(pair: Pair) -> None:
    posted = [Media(number, SECOND) for number in range(60)]
    for media in posted:
        pair.supervisor.post(media, droppable=True)
    pair.supervisor.post(Dtmf("5"))
    link = taken_over(pair.supervisor)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(link.run)
        assert await take(pair.worker, 61) == [*posted, Dtmf("5")]
        nursery.cancel_scope.cancel()
    link.close()


async def test_how_long_nothing_was_read_is_counted_anew(pair: Pair) -> None:
    for number in range(60):
        pair.supervisor.post(Media(number, SECOND))
    link = taken_over(pair.supervisor)
    assert link.waiting_bytes > 0
    assert link.unread_s < 1
    link.close()


async def test_what_may_be_dropped_may_still_be_dropped_and_is_counted_on(pair: Pair) -> None:
    for number in range(400):
        pair.supervisor.post(Media(number, SECOND), droppable=True)
    dropped = pair.supervisor.dropped
    assert dropped
    link = taken_over(pair.supervisor)
    assert link.dropped == dropped
    link.post(Media(400, SECOND), droppable=True)
    assert link.dropped == dropped + 1
    link.close()


async def test_an_end_whose_other_process_is_gone_is_not_handed_over(pair: Pair) -> None:
    pair.worker.close()
    assert [message async for message in pair.supervisor] == []
    assert pair.supervisor.hand_over() is None
