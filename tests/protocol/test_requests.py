"""Questions over the link: every one ends, in an answer or in a failure that says why, and leaves nothing behind."""

from typing import Any

import pytest
import trio
from trio.testing import MockClock

from protocol.link import Link, LinkClosed, OutboxFull, RequestFailed
from protocol.messages import (
    Checkpoint,
    Dtmf,
    Failure,
    Hangup,
    Heartbeat,
    Reply,
    StartRecording,
    TransferTo,
)
from tests.protocol.conftest import Pair

BIG = 100_000  # more than the kernel takes of one message


def fill(link: Link[Any]) -> int:
    """Post until the outbox takes no more; return how many messages it took."""
    message, posted = Checkpoint(bytes(BIG)), 0
    try:
        while True:
            link.post(message)
            posted += 1
    except OutboxFull:
        return posted


async def answer(link: Link[Any], failure: Failure | None = None, value: str = "") -> None:
    """Reply to every request that comes."""
    async for request in link:
        link.post(Reply(request.id, failure, value))


async def listen(link: Link[Any]) -> None:
    async for _ in link:
        pass


def waiting(link: Link[Any]) -> int:
    return len(link._waiting)


async def test_a_request_returns_its_replys_value(pair: Pair, nursery: trio.Nursery) -> None:
    nursery.start_soon(answer, pair.supervisor, None, "RE1")
    nursery.start_soon(listen, pair.worker)
    assert await pair.worker.request(StartRecording, timeout_s=5) == "RE1"
    assert waiting(pair.worker) == 0
    pair.close()


async def test_a_request_carries_its_fields_its_deadline_and_an_id_of_its_own(pair: Pair, nursery: trio.Nursery) -> None:
    received: list[Any] = []

    async def collect() -> None:
        async for request in pair.supervisor:
            received.append(request)
            pair.supervisor.post(Reply(request.id))

    nursery.start_soon(collect)
    nursery.start_soon(listen, pair.worker)
    await pair.worker.request(TransferTo, timeout_s=5, destination="+15550100")
    await pair.worker.request(Hangup, timeout_s=2.5, after_playout=False)
    first, second = received
    assert (first.destination, first.timeout_s) == ("+15550100", 5)
    assert (second.after_playout, second.timeout_s) == (False, 2.5)
    assert first.id != second.id
    pair.close()


async def test_a_failed_request_raises_with_the_carriers_code(pair: Pair, nursery: trio.Nursery) -> None:
    failure = Failure("carrier", "Call is not in-progress", 21220, 400)
    nursery.start_soon(answer, pair.supervisor, failure)
    nursery.start_soon(listen, pair.worker)
    with pytest.raises(RequestFailed, match=r"Hangup failed \(carrier 21220\): Call is not in-progress") as caught:
        await pair.worker.request(Hangup, timeout_s=5)
    assert caught.value.failure == failure
    pair.close()


async def test_replies_find_their_requests_in_any_order(pair: Pair, nursery: trio.Nursery) -> None:
    values: dict[str, str] = {}

    async def ask(destination: str) -> None:
        values[destination] = await pair.worker.request(TransferTo, timeout_s=5, destination=destination)

    async with trio.open_nursery() as asking:
        nursery.start_soon(listen, pair.worker)
        for destination in ("a", "b", "c"):
            asking.start_soon(ask, destination)
        for request in reversed([await anext(pair.supervisor) for _ in range(3)]):
            pair.supervisor.post(Reply(request.id, None, request.destination.upper()))
    assert values == {"a": "A", "b": "B", "c": "C"}
    pair.close()


async def test_a_request_that_nobody_answers_times_out(pair: Pair, nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    nursery.start_soon(pair.worker.run)
    with pytest.raises(RequestFailed, match="no answer within 3 s") as caught:
        await pair.worker.request(Hangup, timeout_s=3)
    assert caught.value.failure.kind == "timeout"
    assert trio.current_time() == pytest.approx(4, abs=0.01)
    assert waiting(pair.worker) == 0
    nursery.cancel_scope.cancel()


async def test_a_reply_that_comes_too_late_is_ignored(pair: Pair, nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    with pytest.raises(RequestFailed):
        await pair.worker.request(Hangup, timeout_s=1)
    late = await anext(pair.supervisor)
    pair.supervisor.post(Reply(late.id))
    pair.supervisor.post(Dtmf("1"))
    assert await anext(pair.worker) == Dtmf("1")


async def test_a_reply_to_nothing_is_ignored(pair: Pair) -> None:
    pair.supervisor.post(Reply(99))
    pair.supervisor.post(Dtmf("1"))
    assert await anext(pair.worker) == Dtmf("1")


async def test_a_request_ends_when_the_other_side_does(pair: Pair, nursery: trio.Nursery) -> None:
    nursery.start_soon(listen, pair.worker)

    async def leave() -> None:
        await anext(pair.supervisor)
        pair.supervisor.close()

    nursery.start_soon(leave)
    with pytest.raises(RequestFailed) as caught, trio.fail_after(5):
        await pair.worker.request(Hangup, timeout_s=60)
    assert caught.value.failure.kind == "ended"
    assert waiting(pair.worker) == 0


async def test_a_request_ends_when_its_own_side_closes(pair: Pair, nursery: trio.Nursery) -> None:
    async def leave() -> None:
        await anext(pair.supervisor)
        pair.worker.close()

    nursery.start_soon(leave)
    with pytest.raises(RequestFailed) as caught, trio.fail_after(5):
        await pair.worker.request(Hangup, timeout_s=60)
    assert caught.value.failure.kind == "ended"


async def test_a_request_on_a_closed_link_fails_as_ended(pair: Pair) -> None:
    pair.worker.close()
    with pytest.raises(RequestFailed) as caught:
        await pair.worker.request(Hangup, timeout_s=60)
    assert caught.value.failure.kind == "ended"
    assert waiting(pair.worker) == 0


async def test_an_answer_that_came_before_the_end_counts(pair: Pair, nursery: trio.Nursery) -> None:
    nursery.start_soon(listen, pair.worker)

    async def answer_and_leave() -> None:
        request = await anext(pair.supervisor)
        pair.supervisor.post(Reply(request.id, None, "done"))
        pair.supervisor.close()

    nursery.start_soon(answer_and_leave)
    assert await pair.worker.request(Hangup, timeout_s=5) == "done"


async def test_an_answer_in_the_pipe_counts_although_sending_failed_meanwhile(pair: Pair, nursery: trio.Nursery) -> None:
    async def answer_and_leave() -> None:
        request = await anext(pair.supervisor)
        pair.supervisor.post(Reply(request.id, None, "done"))
        pair.supervisor.close()
        with pytest.raises(LinkClosed):
            pair.worker.post(Heartbeat())
        nursery.start_soon(listen, pair.worker)

    nursery.start_soon(answer_and_leave)
    assert await pair.worker.request(Hangup, timeout_s=5) == "done"


async def test_the_first_reply_to_a_request_counts(pair: Pair, nursery: trio.Nursery) -> None:
    nursery.start_soon(listen, pair.worker)

    async def answer_twice() -> None:
        request = await anext(pair.supervisor)
        pair.supervisor.post(Reply(request.id, None, "first"))
        pair.supervisor.post(Reply(request.id, Failure("refused", "second")))

    nursery.start_soon(answer_twice)
    assert await pair.worker.request(Hangup, timeout_s=5) == "first"
    pair.close()


async def test_a_request_that_is_cancelled_leaves_nothing_behind(pair: Pair) -> None:
    with trio.move_on_after(0.01) as scope:
        await pair.worker.request(Hangup, timeout_s=60)
    assert scope.cancelled_caught
    assert waiting(pair.worker) == 0
    asked = await anext(pair.supervisor)
    pair.supervisor.post(Reply(asked.id))
    pair.supervisor.post(Dtmf("1"))
    assert await anext(pair.worker) == Dtmf("1")


async def test_a_request_that_does_not_fit_leaves_nothing_behind(pair: Pair) -> None:
    fill(pair.worker)
    with pytest.raises(OutboxFull):
        await pair.worker.request(TransferTo, timeout_s=60, destination="x" * BIG)
    assert waiting(pair.worker) == 0
