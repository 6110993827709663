"""Sockets that are waited for in the event loop's place: everything else in the loop goes on as if they were not."""

import contextvars
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager

import pytest
import trio

from protocol import readiness
from protocol.readiness import Readers, Readiness, notify_closing, when_readable

SOON_S = 0.02
NEVER_S = 5.0  # a deadline that shows a hang


@contextmanager
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    here, there = socket.socketpair()
    there.setblocking(False)
    with here, there:
        yield here, there


@pytest.fixture(params=["in the loop's place", "as any task"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With a trio whose loop is known, and with one whose loop is not."""
    if request.param == "as any task":
        monkeypatch.setattr(readiness._Loop, "found", lambda: None)
    return str(request.param)


@pytest.fixture
async def readers(nursery: trio.Nursery) -> AsyncIterator[Readers]:
    made = Readers()
    await nursery.start(made.run)
    yield made
    nursery.cancel_scope.cancel()


async def wait(ready: Readiness) -> list[int]:
    """Return the sockets that can be read as soon as there are any."""
    found: list[int] = []

    def take(events: list[tuple[int, int]]) -> bool:
        found.extend(fd for fd, _ in events)
        return True

    await ready.each(take)
    return found


def talk_from_a_thread(here: socket.socket, count: int, every_s: float = 0.002) -> threading.Thread:
    """Send bytes one by one, as another process does: without a task that would wake the loop."""

    def talk() -> None:
        for _ in range(count):
            time.sleep(every_s)
            here.send(b"x")

    thread = threading.Thread(target=talk)
    thread.start()
    return thread


async def test_this_trio_is_one_that_is_known(way: str) -> None:
    assert (readiness._Loop.found() is None) is (way == "as any task")


async def test_what_another_sends_is_told_each_time() -> None:
    with pair() as (here, there), Readiness() as ready, trio.fail_after(NEVER_S):
        ready.add(there.fileno())
        thread = talk_from_a_thread(here, 20)
        heard = b""
        while len(heard) < 20:
            assert await wait(ready) == [there.fileno()]
            heard += _received(there)
        thread.join()


def _received(sock: socket.socket) -> bytes:
    try:
        return sock.recv(100)
    except BlockingIOError:
        return b""


async def test_who_sleeps_wakes_on_time_while_nothing_comes(nursery: trio.Nursery) -> None:
    woken = trio.Event()

    async def sleep() -> None:
        await trio.sleep(SOON_S)
        here.send(b"x")
        woken.set()

    with pair() as (here, there), Readiness() as ready, trio.fail_after(NEVER_S):
        ready.add(there.fileno())
        nursery.start_soon(sleep)
        await wait(ready)
        assert woken.is_set()


async def test_who_sleeps_wakes_on_time_while_much_comes(nursery: trio.Nursery) -> None:
    woken = trio.Event()

    async def sleep() -> None:
        await trio.sleep(SOON_S)
        woken.set()

    with pair() as (here, there), Readiness() as ready, trio.fail_after(NEVER_S):
        ready.add(there.fileno())
        nursery.start_soon(sleep)
        here.send(b"x")
        while not woken.is_set():
            await wait(ready)  # at once, as nobody takes what there is


async def test_a_deadline_that_is_brought_forward_meanwhile_is_kept(nursery: trio.Nursery) -> None:
    """As an agent does that measures the caller's silence: without waiting, between two frames."""
    silence, fell = trio.CancelScope(), trio.Event()

    async def fall_silent() -> None:
        with silence:
            await trio.sleep_forever()
        here.send(b"the end")
        fell.set()

    with pair() as (here, there), Readiness() as ready, trio.fail_after(NEVER_S):
        ready.add(there.fileno())
        nursery.start_soon(fall_silent)
        thread = talk_from_a_thread(here, 5)
        while not fell.is_set():
            await wait(ready)
            if _received(there).startswith(b"x"):  # a busy machine may bring several at once
                silence.deadline = trio.current_time() + SOON_S
        thread.join()


async def test_what_a_thread_asks_for_is_done() -> None:
    with pair() as (here, there), Readiness() as ready, trio.fail_after(NEVER_S):
        ready.add(there.fileno())
        thread = talk_from_a_thread(here, 3)
        asked = trio.Event()
        threading.Timer(SOON_S, trio.lowlevel.current_trio_token().run_sync_soon, (asked.set,)).start()
        while not asked.is_set():
            with trio.move_on_after(SOON_S):
                await wait(ready)
            _received(there)
        thread.join()


async def test_who_cancels_itself_between_two_waits_is_cancelled_at_the_next() -> None:
    with pair() as (here, there), Readiness() as ready, trio.fail_after(NEVER_S):
        ready.add(there.fileno())
        thread = talk_from_a_thread(here, 2)
        with trio.CancelScope() as scope:
            while True:
                await wait(ready)
                if _received(there):
                    scope.cancel()
        thread.join()
        assert scope.cancelled_caught


async def test_what_is_no_longer_waited_for_is_not_told() -> None:
    with pair() as (here, there), pair() as (other, quiet), Readiness() as ready, trio.fail_after(NEVER_S):
        ready.add(there.fileno())
        ready.add(quiet.fileno())
        ready.remove(there.fileno())
        here.send(b"x")
        other.send(b"x")
        assert await wait(ready) == [quiet.fileno()]


# Many readers


def counting(sock: socket.socket, enough: int, heard: list[bytes]) -> Callable[[], bool]:
    """Read a byte at a time, until it is enough."""

    def read() -> bool:
        heard.append(sock.recv(1))
        return len(heard) >= enough

    return read


async def test_a_reader_is_called_until_it_has_enough(readers: Readers) -> None:
    with pair() as (here, there), trio.fail_after(NEVER_S):
        here.send(b"abc")
        heard: list[bytes] = []
        await when_readable(there.fileno(), counting(there, 2, heard))
        assert heard == [b"a", b"b"]
        await when_readable(there.fileno(), counting(there, 3, heard))
        assert heard == [b"a", b"b", b"c"]


async def test_one_that_has_much_to_read_keeps_no_other_waiting(readers: Readers, nursery: trio.Nursery) -> None:
    order: list[str] = []

    def reading(name: str, sock: socket.socket, enough: int) -> Callable[[], bool]:
        def read() -> bool:
            sock.recv(1)
            order.append(name)
            return order.count(name) >= enough

        return read

    with pair() as (loud, there), pair() as (quiet, elsewhere), trio.fail_after(NEVER_S):
        loud.send(b"x" * 100)
        quiet.send(b"xx")
        async with trio.open_nursery() as both:
            both.start_soon(when_readable, there.fileno(), reading("loud", there, 100))
            both.start_soon(when_readable, elsewhere.fileno(), reading("quiet", elsewhere, 2))
    assert [index for index, name in enumerate(order) if name == "quiet"][-1] < 6


async def test_what_a_reader_raises_is_raised_where_it_is_waited_for_and_nowhere_else(readers: Readers) -> None:
    def fail() -> bool:
        raise ValueError("nonsense")

    with pair() as (here, there), pair() as (other, good), trio.fail_after(NEVER_S):
        here.send(b"x")
        with pytest.raises(ValueError, match="nonsense"):
            await when_readable(there.fileno(), fail)
        other.send(b"x")
        heard: list[bytes] = []
        await when_readable(good.fileno(), counting(good, 1, heard))
        assert heard == [b"x"]


async def test_who_waits_for_what_is_closed_is_told(readers: Readers, nursery: trio.Nursery) -> None:
    with pair() as (_, there), trio.fail_after(NEVER_S):
        told = trio.Event()

        async def wait() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await when_readable(there.fileno(), lambda: False)
            told.set()

        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        notify_closing(there.fileno())
        await told.wait()


async def test_a_wait_that_is_cancelled_reads_no_more(readers: Readers) -> None:
    with pair() as (here, there), trio.fail_after(NEVER_S):
        heard: list[bytes] = []
        with trio.move_on_after(SOON_S):
            await when_readable(there.fileno(), counting(there, 9, heard))
        here.send(b"x")
        await trio.sleep(SOON_S)
        assert heard == []
        await when_readable(there.fileno(), counting(there, 1, heard))
        assert heard == [b"x"]


async def test_a_reader_runs_in_the_context_of_who_waits(readers: Readers) -> None:
    call: contextvars.ContextVar[str] = contextvars.ContextVar("call", default="none")
    call.set("CA1")
    seen: list[str] = []

    def read() -> bool:
        seen.append(call.get())
        return True

    with pair() as (here, there), trio.fail_after(NEVER_S):
        here.send(b"x")
        await when_readable(there.fileno(), read)
    assert seen == ["CA1"]


async def test_without_readers_each_waits_for_itself() -> None:
    with pair() as (here, there), trio.fail_after(NEVER_S):
        here.send(b"ab")
        heard: list[bytes] = []
        await when_readable(there.fileno(), counting(there, 2, heard))
        assert heard == [b"a", b"b"]
