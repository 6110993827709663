"""One end of the pipe, on trio: messages in by `async for` or `each`, messages out by `post`, questions by `request`.

The socket is used directly on readiness: a message that the kernel takes at once costs one system call and no task switch,
and a message that arrives costs one wake-up. What the kernel does not take waits in a bounded outbox for `run` to send.
"""

import socket
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import Any, Generic, Self, TypeAlias, TypeVar

import msgspec
import trio

from protocol import readiness
from protocol.framing import FrameDecoder, ProtocolError, VersionMismatch, encode
from protocol.messages import PROTOCOL_VERSION, Failure, Hello, Reply, Request

OUTBOX_BYTES = 1 << 20  # two minutes of audio; whoever is this far behind is not reading
DROPPABLE_FRAMES = 250  # 5 s of 20 ms media: older speech is not worth waiting for
KERNEL_BUFFER_BYTES = 64 << 10  # small, so that the outbox and not the kernel decides what is late
_RECEIVE_BYTES = 16 << 10  # at once: as a rule there is one message of 200
_REPLY_GRACE_S = 1.0  # a reply that says "timed out" should win over our own clock

Incoming = TypeVar("Incoming", bound=msgspec.Struct)
WhenReadable: TypeAlias = Callable[[Callable[[], bool]], Awaitable[None]]


class LinkClosed(Exception):
    """The other process is gone, or this end was closed."""


class OutboxFull(Exception):
    """The other process has not read for so long that `OUTBOX_BYTES` are waiting for it."""


class RequestFailed(Exception):
    """A request was refused, failed at the carrier, or was not answered in time; `failure` has the carrier's code."""

    def __init__(self, request: str, failure: Failure) -> None:
        super().__init__(
            f"{request} failed ({failure.kind}{'' if failure.code is None else f' {failure.code}'}): {failure.message}"
        )
        self.failure = failure


class LinkState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One end of a link on its way to a process that takes it over.

    `unread` are bytes that came and were not dealt with; `unsent` the frames that wait, each with whether it may be dropped.
    """

    fd: int
    unread: bytes
    unsent: tuple[tuple[bytes, bool], ...]
    dropped: int


class Outbox:
    """Frames waiting for the socket, without I/O. Droppable ones beyond the limit push out the oldest of their kind."""

    __slots__ = ("_droppable", "_frames", "_max_bytes", "_max_droppable", "dropped", "size")

    def __init__(self, *, max_bytes: int = OUTBOX_BYTES, max_droppable: int = DROPPABLE_FRAMES) -> None:
        self._frames: deque[tuple[bytes, bool]] = deque()
        self._max_bytes = max_bytes
        self._max_droppable = max_droppable
        self._droppable = 0
        self.size = 0
        self.dropped = 0

    def __bool__(self) -> bool:
        return bool(self._frames)

    def put(self, frame: bytes, *, droppable: bool = False, begun: bool = False) -> None:
        """Queue a frame; `begun` marks one that was partly sent and so can no longer be dropped. Raises `OutboxFull`.

        An empty outbox takes any frame: a stream that has sent the beginning of one must send the rest.
        """
        while self._droppable and self.size + len(frame) > self._max_bytes:
            self._drop_oldest()
        if self._frames and self.size + len(frame) > self._max_bytes:
            raise OutboxFull(f"{self.size} bytes are waiting to be read by the other process")
        droppable = droppable and not begun
        self._frames.append((frame, droppable))
        self.size += len(frame)
        self._droppable += droppable
        if self._droppable > self._max_droppable:
            self._drop_oldest()

    def waiting(self) -> tuple[tuple[bytes, bool], ...]:
        """Return what waits, each frame with whether it may be dropped. The first may have lost its beginning."""
        return tuple(self._frames)

    def head(self) -> bytes:
        """Return the bytes to send next."""
        return self._frames[0][0]

    def sent(self, count: int) -> None:
        """Take `count` bytes off the head."""
        frame, droppable = self._frames.popleft()
        self.size -= count
        self._droppable -= droppable
        if count < len(frame):
            self._frames.appendleft((frame[count:], False))

    def _drop_oldest(self) -> None:
        index = next(i for i, (_, droppable) in enumerate(self._frames) if droppable)
        self.size -= len(self._frames[index][0])
        del self._frames[index]
        self._droppable -= 1
        self.dropped += 1


class Link(Generic[Incoming]):
    """A duplex link that receives messages of one union and sends whatever Struct it is given.

    Only one task may read. `run` must be running somewhere for what the kernel did not take at once. `when_readable` calls
    what `each` gives it whenever there is something to read, until it returns True; it may do so early.
    """

    __slots__ = (
        "_closed",
        "_decoder",
        "_ended",
        "_fd",
        "_inbox",
        "_last_id",
        "_outbox",
        "_room",
        "_sock",
        "_taken_at",
        "_unread",
        "_waiting",
        "_when_readable",
        "_work",
    )

    def __init__(self, sock: socket.socket, incoming: Any, *, when_readable: WhenReadable | None = None) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, KERNEL_BUFFER_BYTES)
        self._sock = sock
        self._fd = sock.fileno()
        self._when_readable = when_readable or partial(readiness.when_readable, self._fd)
        self._decoder: FrameDecoder[Incoming] = FrameDecoder(incoming)
        self._unread = b""  # by a process that had this end before
        self._inbox: deque[Incoming] = deque()
        self._outbox = Outbox()
        self._taken_at = 0.0  # when something last went out of the outbox, or first waited in it
        self._work = trio.Event()  # the outbox has something
        self._room = trio.Event()  # the outbox is empty
        self._room.set()
        self._closed = False  # nothing can be sent any more
        self._ended = False  # nor will anything more come
        self._waiting: dict[int, _Waiter] = {}
        self._last_id = 0

    @classmethod
    def taken_over(cls, state: LinkState, incoming: Any) -> Self:
        """Return the end of a link as another process left it. The introductions are over. Raises OSError."""
        link = cls(socket.socket(fileno=state.fd), incoming)
        for frame, droppable in state.unsent:
            link._outbox.put(frame, droppable=droppable)
        link._outbox.dropped = state.dropped
        if link._outbox:
            link.reader_begins()  # how long nothing was read is not known here
            link._wait_for_room()
        link._unread = state.unread
        return link

    def hand_over(self) -> LinkState | None:
        """Return what another process needs to go on with this end; nothing when the other side is gone.

        For an end that makes no requests of its own.
        """
        if self._closed:
            return None
        taken = b"".join([encode(message) for message in self._inbox])
        unread = taken + self._unread + self._decoder.begun
        return LinkState(self._fd, unread, self._outbox.waiting(), self._outbox.dropped)

    @property
    def dropped(self) -> int:
        """How many droppable messages were given up because the other side did not read."""
        return self._outbox.dropped

    @property
    def waiting_bytes(self) -> int:
        """What was posted and is not in the kernel yet, because the other side does not read as fast."""
        return self._outbox.size

    @property
    def unread_s(self) -> float:
        """For how many seconds the other side has read nothing of what waits for it."""
        return trio.current_time() - self._taken_at if self._outbox else 0.0

    def reader_begins(self) -> None:
        """There is somebody at the other side only now: what has waited until then is no fault of theirs."""
        self._taken_at = trio.current_time()

    def post(self, message: msgspec.Struct, *, droppable: bool = False) -> None:
        """Send without waiting. Raises `LinkClosed`, `OutboxFull` or `FrameTooLarge`."""
        if self._closed:
            raise LinkClosed("the link is closed")
        frame = encode(message)
        sent = 0
        if not self._outbox.size:
            try:
                sent = self._sock.send(frame)
            except BlockingIOError:
                pass
            except OSError as error:
                self._broken()
                raise LinkClosed(f"the other process is gone: {error.strerror}") from error
            if sent == len(frame):
                return
        if not self._outbox:
            self._taken_at = trio.current_time()
        self._outbox.put(frame[sent:] if sent else frame, droppable=droppable, begun=sent > 0)
        self._wait_for_room()

    def _wait_for_room(self) -> None:
        self._room = trio.Event() if self._room.is_set() else self._room
        self._work.set()

    async def room(self) -> None:
        """Wait until everything posted has been handed to the kernel: back-pressure for whoever posts a lot."""
        await self._room.wait()

    async def run(self) -> None:
        """Send what waits in the outbox, until cancelled, closed, or until the other side is gone."""
        while not self._closed:
            await self._work.wait()
            self._work = trio.Event()
            while self._outbox and not self._closed:
                with suppress(trio.ClosedResourceError):  # `close` wakes whoever waits
                    await trio.lowlevel.wait_writable(self._fd)
                    self._send_some()
            self._room.set()

    def _send_some(self) -> None:
        try:
            self._outbox.sent(self._sock.send(self._outbox.head()))
            self._taken_at = trio.current_time()
        except BlockingIOError:
            pass
        except OSError:
            self._broken()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Incoming:
        """Return the next message; raises `ProtocolError` on what cannot be read.

        Ends when either side closed. What the other side sent before it closed is returned first, also when sending to it
        has failed meanwhile; a frame that it did not finish is not.
        """
        while not self._inbox:
            for message in self._decoder.feed(await self._receive()):
                if isinstance(message, Reply):
                    self._answered(message)
                else:
                    self._inbox.append(message)
        return self._inbox.popleft()

    async def each(self, take: Callable[[Incoming], bool]) -> None:
        """Pass messages to `take`, which must not wait, as they come, until it returns True or the other side is gone.

        What comes after it returned True is kept. Replies to requests go to whoever waits for them. Raises `ProtocolError`,
        and what `take` raises.
        """
        if self._unread:
            unread, self._unread = self._unread, b""
            self._inbox.extend(self._decoder.feed(unread))
        while self._inbox:
            if take(self._inbox.popleft()):
                return
        if not self._ended:
            await self._when_readable(readiness.reader(self._sock, partial(self._pass_on, take)))

    def _pass_on(self, take: Callable[[Incoming], bool], data: bytes) -> bool:
        if not data:
            self._end()
            return True
        enough = False
        for message in self._decoder.feed(data):
            if isinstance(message, Reply):
                self._answered(message)
            elif enough:
                self._inbox.append(message)
            else:
                enough = take(message)
        return enough

    @property
    def ended(self) -> bool:
        """Whether the other side is gone, and all it said was passed on."""
        return self._ended and not self._inbox

    async def _receive(self) -> bytes:
        if self._unread:
            unread, self._unread = self._unread, b""
            return unread
        while not self._ended:
            try:
                await trio.lowlevel.wait_readable(self._fd)
                if data := self._sock.recv(_RECEIVE_BYTES):
                    return data
            except BlockingIOError:
                continue
            except (OSError, trio.ClosedResourceError):
                pass
            self._end()
        raise StopAsyncIteration

    def introduce(self, generation: str, call_id: str) -> None:
        """Send this side's Hello, which must come before everything else."""
        self.post(Hello(PROTOCOL_VERSION, generation, call_id))

    async def introduced(self) -> Hello:
        """Return the other side's Hello. Raises `VersionMismatch` or `LinkClosed`."""
        async for message in self:
            if not isinstance(message, Hello):
                raise VersionMismatch(f"the first message is {type(message).__name__}, not Hello")
            if message.version != PROTOCOL_VERSION:
                raise VersionMismatch(f"the other side speaks version {message.version}, this one {PROTOCOL_VERSION}")
            return message
        raise LinkClosed("the other process is gone before its Hello")

    async def request(self, kind: type[Request], *, timeout_s: float, **fields: Any) -> str:
        """Ask, wait for the reply, and return its value. Raises `RequestFailed`; needs another task to iterate this link."""
        self._last_id += 1
        request, waiter = kind(self._last_id, timeout_s, **fields), _Waiter()
        self._waiting[request.id] = waiter
        try:
            self.post(request)
            with trio.move_on_after(timeout_s + _REPLY_GRACE_S):
                await waiter.done.wait()
        except LinkClosed:
            waiter.reply = Reply(request.id, Failure("ended", "the call is over"))
        finally:
            del self._waiting[request.id]
        reply = waiter.reply or Reply(request.id, Failure("timeout", f"no answer within {timeout_s:g} s"))
        if reply.failure is not None:
            raise RequestFailed(kind.__name__, reply.failure)
        return reply.value

    def _answered(self, reply: Reply) -> None:
        waiter = self._waiting.get(reply.id)
        if waiter is not None and waiter.reply is None:
            waiter.reply = reply
            waiter.done.set()

    def _broken(self) -> None:
        """Nothing can be sent any more; what the other side said last may still be waiting to be read."""
        self._closed = True
        self._work.set()
        self._room.set()

    def _end(self) -> None:
        """The other side is gone: nobody may go on waiting for it."""
        self._broken()
        self._ended = True
        for id_ in self._waiting:
            self._answered(Reply(id_, Failure("ended", "the call is over")))

    def close(self) -> None:
        """Close this end; whoever waits on it is woken."""
        if self._sock.fileno() != -1:
            self._end()
            readiness.notify_closing(self._fd)
            self._sock.close()


class _Waiter:
    """A request on its way."""

    def __init__(self) -> None:
        self.done = trio.Event()
        self.reply: Reply | None = None


__all__ = ["Link", "LinkClosed", "Outbox", "OutboxFull", "ProtocolError", "RequestFailed", "VersionMismatch"]
