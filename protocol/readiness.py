"""Waiting for the sockets that media travels on, at a fraction of what the event loop's own wait costs.

A wait in trio takes the loop once around: a registration with the kernel, a task switch, a look at every deadline. That is
more than all the rest of a frame's way through a process. But most of the time no other task has anything to do, and the
loop would only block. Then the task that waits here blocks in its place: on its sockets, on all that the loop waits for, and
no longer than until the loop's next deadline. As soon as there is anything else to do, it waits as any other task does.
"""

import select
import socket
from collections.abc import Callable
from contextvars import copy_context
from types import TracebackType
from typing import Any, Self

import trio


class _Solitude(trio.abc.Instrument):
    """Whether no task but this was woken since the loop last waited, so that it would do nothing but wait again."""

    def __init__(self) -> None:
        self.lasts = False
        self._task = trio.lowlevel.current_task()

    def before_io_wait(self, timeout: float) -> None:
        self.lasts = timeout > 0  # else somebody's turn has come already

    def task_scheduled(self, task: trio.lowlevel.Task) -> None:
        if task is not self._task:
            self.lasts = False


class _Loop:
    """What has to be known of trio's event loop to wait in its place, and is not part of its public interface."""

    def __init__(self, task: Any) -> None:
        runner = task._runner
        self.fd: int = runner.io_manager._epoll.fileno()
        self.ready = (self.fd, select.EPOLLIN)  # as epoll says that it has something to do
        self._now: Callable[[], float] = runner.clock.current_time
        self._next_deadline: Callable[[], float] = runner.deadlines.next_deadline
        self._task = task
        self.patience_s()

    @classmethod
    def found(cls) -> Self | None:
        """Return the loop that the present task runs in, or None if this trio is not built as those that are known."""
        try:
            return cls(trio.lowlevel.current_task())
        except (AttributeError, TypeError):
            return None

    def patience_s(self) -> float:
        """Return for how long the loop would wait now: not at all if the task is cancelled, which it would be told."""
        if self._task._cancel_status.effectively_cancelled:
            return 0.0
        next_deadline, now = self._next_deadline, self._now
        left_s = next_deadline() - now()
        return left_s if left_s < _LONGEST_S else _LONGEST_S


TURN_BYTES = 2 << 10  # to read at once: five frames of a carrier's, or ten messages of a worker's
_LONGEST_S = 60.0  # of a wait; the kernel takes no infinity


class Readiness:
    """Sockets, and the wait for any of them by the task that makes this; every task may add and remove. A context."""

    def __init__(self) -> None:
        self._sockets = select.epoll()
        self._everything = select.epoll()  # the same sockets, and what the loop waits for
        self._loop = _Loop.found()
        self._solitude = _Solitude()

    def __enter__(self) -> Self:
        if self._loop is not None:
            self._everything.register(self._loop.fd, select.EPOLLIN)
            trio.lowlevel.add_instrument(self._solitude)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._loop is not None:
            trio.lowlevel.remove_instrument(self._solitude)
        trio.lowlevel.notify_closing(self._sockets)
        self._sockets.close()
        self._everything.close()

    def add(self, fd: int) -> None:
        """Wait for this one too."""
        self._sockets.register(fd, select.EPOLLIN)
        self._everything.register(fd, select.EPOLLIN)

    def remove(self, fd: int) -> None:
        """Wait for it no more; to be called before it is closed."""
        self._sockets.unregister(fd)
        self._everything.unregister(fd)

    async def each(self, serve: Callable[[list[tuple[int, int]]], bool]) -> None:
        """Call `serve` with those that can be read or have ended, each with its epoll events, until it returns True.

        It must not wait. Raises what it raises.
        """
        while True:
            ready = self._wait_in_place() if self._solitude.lasts else []
            if not ready:
                await trio.lowlevel.wait_readable(self._sockets)
                ready = self._sockets.poll(0)
            if ready and serve(ready):
                return

    def _wait_in_place(self) -> list[tuple[int, int]]:
        """Block in the loop's place. Return nothing when it is the loop's turn."""
        assert self._loop is not None
        patience_s = self._loop.patience_s()
        ready = self._everything.poll(patience_s) if patience_s > 0 else []
        if self._loop.ready in ready:
            ready.remove(self._loop.ready)
            self._solitude.lasts = False
        return ready


class Readers:
    """Reads many sockets from one task: whoever waits in `when_readable` is called as soon as there is something to read.

    Each is called once a round, however much there is for it, so that one that has a lot to read keeps no other waiting; if
    it reads no more than `TURN_BYTES`.
    """

    def __init__(self) -> None:
        self._readings: dict[int, _Reading] = {}
        self._readiness: Readiness | None = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled. There may be one in a run."""
        with Readiness() as self._readiness:
            _current.set(self)
            try:
                task_status.started()
                await self._readiness.each(self._read)
            finally:
                _current.set(None)
                for fd in tuple(self._readings):
                    self.closing(fd)

    def _read(self, ready: list[tuple[int, int]]) -> bool:
        for fd, _ in ready:
            if (reading := self._readings.get(fd)) is None:  # one of this round has ended another's wait
                continue
            in_context = reading.in_context
            try:
                ended = in_context(reading.read)
            except Exception as error:  # noqa: BLE001 - raised again where it is waited for; it must not end the others
                self._end(fd, error)
                continue
            if ended:
                self._end(fd)
        return False

    async def serve(self, fd: int, read: Callable[[], bool]) -> None:
        """See `when_readable`."""
        assert self._readiness is not None
        reading = _Reading(read)
        self._readiness.add(fd)
        self._readings[fd] = reading
        try:
            await reading.ended.wait()
        finally:
            if self._readings.get(fd) is reading:
                self._end(fd)
        if reading.error is not None:
            raise reading.error

    def closing(self, fd: int) -> None:
        """End the wait for a descriptor that is about to be closed."""
        if fd in self._readings:
            self._end(fd, trio.ClosedResourceError("another task closed this fd"))

    def _end(self, fd: int, error: Exception | None = None) -> None:
        assert self._readiness is not None
        self._readiness.remove(fd)
        reading = self._readings.pop(fd)
        reading.error = error
        reading.ended.set()


class _Reading:
    """Somebody who waits in `when_readable`. What is called runs in the context of whoever waits, for the log's sake."""

    __slots__ = ("ended", "error", "in_context", "read")

    def __init__(self, read: Callable[[], bool]) -> None:
        self.read = read
        self.in_context: Callable[[Callable[[], bool]], bool] = copy_context().run
        self.ended = trio.Event()
        self.error: Exception | None = None


_current: trio.lowlevel.RunVar[Readers | None] = trio.lowlevel.RunVar("readers", None)


async def when_readable(fd: int, read: Callable[[], bool]) -> None:
    """Call `read` whenever there is something to read from `fd`, until it returns True. Raises what it raises.

    `read` must not wait, and reads once only, `TURN_BYTES` at most: it is called again. Raises `trio.ClosedResourceError`
    after `notify_closing`.
    """
    if (readers := _current.get()) is not None:
        await readers.serve(fd, read)
        return
    while True:
        await trio.lowlevel.wait_readable(fd)
        if read():
            return


async def read_each(sock: socket.socket, take: Callable[[bytes], bool]) -> None:
    """Pass bytes to `take` as they come, none for the end however it came, until it returns True. Raises what it raises."""
    await when_readable(sock.fileno(), reader(sock, take))


def reader(sock: socket.socket, take: Callable[[bytes], bool]) -> Callable[[], bool]:
    """Return what passes to `take` what there is to read, none for the end however it came, and returns what that does."""
    receive = sock.recv

    def read() -> bool:
        try:
            data = receive(TURN_BYTES)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        return take(data)

    return read


def notify_closing(fd: int) -> None:
    """Wake whoever waits for a descriptor that is about to be closed."""
    if (readers := _current.get()) is not None:
        readers.closing(fd)
    trio.lowlevel.notify_closing(fd)
