"""Media sockets beside each other: one whose carrier sends a lot has no more than its turn."""

import socket
from itertools import groupby

import trio

from dialog_supervisor.transports import ReadinessTransport
from protocol.readiness import TURN_BYTES, Readers


async def test_a_carrier_that_sends_much_is_read_a_little_between_two_frames_of_another() -> None:
    (loud, theirs), (quiet, others) = socket.socketpair(), socket.socketpair()
    heard: list[tuple[str, int]] = []

    def hear_the_loud(data: bytes) -> bool:
        heard.append(("loud", len(data)))
        return False

    def hear_the_quiet(data: bytes) -> bool:
        heard.append(("quiet", len(data)))
        quiet.send(b"x")  # for its next turn
        return heard.count(("quiet", 1)) == 5

    with loud, theirs, quiet, others:
        for end in (loud, theirs, quiet, others):
            end.setblocking(False)
        assert loud.send(bytes(100_000)) > 10 * TURN_BYTES
        quiet.send(b"x")
        async with trio.open_nursery() as nursery:
            await nursery.start(Readers().run)
            nursery.start_soon(ReadinessTransport(theirs).each, hear_the_loud)
            await ReadinessTransport(others).each(hear_the_quiet)
            nursery.cancel_scope.cancel()
    turns = [sum(size for _, size in turn) for who, turn in groupby(heard, lambda one: one[0]) if who == "loud"]
    assert len(turns) > 2
    assert max(turns) <= 2 * TURN_BYTES  # once before it and once behind it, in a round
