"""The public connections: whom the listener lets in, each in a task of its own, and how they pass to another process."""

import errno
import math
import os
import socket
import ssl
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import structlog
import trio

from dialog_supervisor import descriptors
from dialog_supervisor.http import Conversation, Handler, Refused, Request, Response, Upgrade
from dialog_supervisor.sections import GatewayConfig
from dialog_supervisor.telemetry import metrics
from dialog_supervisor.telemetry.metrics import Closed
from dialog_supervisor.transports import ReadinessTransport, StreamTransport
from dialog_supervisor.websocket import MediaSocket, MediaSocketState

_TLS_HANDSHAKE_S = 10.0
_ACCEPT_PAUSE_S = 0.1  # when the process is out of descriptors
_TOLD_EVERY_S = 10.0  # that connections are not let in: there may be thousands
_OUT_OF_DESCRIPTORS = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
_FULL = os.strerror(errno.EMFILE)
_TOO_MANY = b"HTTP/1.1 503 Service Unavailable\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"

log = structlog.get_logger("http")


class Listener:
    """Accepts connections and serves each in a task of its own, up to `max_connections` at a time."""

    def __init__(self, config: GatewayConfig, handler: Handler, tls: ssl.SSLContext | None = None) -> None:
        self._config = config
        self._handler = handler
        self._tls = tls
        self.connections = 0
        self._conversations: dict[int, Conversation] = {}  # by descriptor, until it becomes a media socket
        self._accepting = trio.Event()
        self._accepting.set()
        self._nursery: trio.Nursery | None = None
        self._untold: Counter[Closed] = Counter()
        self._told_at: dict[Closed, float] = {}
        self.fd = -1  # of the listening socket

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, nobody is let in: who connects waits in the kernel's queue."""
        self._accepting = trio.Event()
        try:
            yield
        finally:
            self._accepting.set()

    def hand_over(self) -> tuple[int, ...] | None:
        """Return the connections on which nothing is going on, media sockets apart; nothing while a request is answered."""
        if not all(conversation.silent for conversation in self._conversations.values()):
            return None
        return tuple(self._conversations)

    async def serve(
        self, listening: socket.socket, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Accept on a listening, non-blocking socket until cancelled."""
        self.fd = listening.fileno()
        async with trio.open_nursery() as self._nursery:
            task_status.started()
            while True:
                await self._accepting.wait()
                await trio.lowlevel.wait_readable(listening.fileno())
                if not self._accepting.is_set():
                    continue
                try:
                    accepted, _ = listening.accept()
                except (BlockingIOError, ConnectionError):
                    continue
                except OSError as error:
                    if error.errno not in _OUT_OF_DESCRIPTORS:
                        raise
                    self._out_of_descriptors()
                    await trio.sleep(_ACCEPT_PAUSE_S)
                    continue
                accepted.setblocking(False)
                if descriptors.scarce(accepted.fileno()):
                    self._out_of_descriptors()
                    self._turn_away(accepted)
                elif self.connections < self._config.max_connections:
                    self._begin(accepted, self._connection)
                else:
                    self._too_many()
                    self._turn_away(accepted)

    def take_over(self, connections: Iterable[int]) -> None:
        """Go on with plain connections that another process handed over between two requests. Needs `serve` to run."""
        for fd in connections:
            self._begin(_connected(fd), partial(self._connection, served=1))

    def take_over_media(self, state: MediaSocketState, serve: Callable[[MediaSocket], Awaitable[None]]) -> None:
        """Go on with a media socket that another process handed over. Needs `serve` to run."""
        self._begin(_connected(state.fd), partial(self._media, state, serve))

    def _begin(self, connection: socket.socket, serve: Callable[[socket.socket], Awaitable[None]]) -> None:
        assert self._nursery is not None
        self.connections += 1
        self._nursery.start_soon(self._guard, connection, serve)

    def _turn_away(self, accepted: socket.socket) -> None:
        with accepted:
            if self._tls is None:
                try:
                    accepted.send(_TOO_MANY)
                except OSError as error:
                    log.debug("connection lost", reason=error.strerror)

    def _too_many(self) -> None:
        if count := self._kept_out("max_connections"):
            limit = self._config.max_connections
            log.warning("too many connections", count=count, limit=limit, key="gateway.max_connections")

    def _out_of_descriptors(self) -> None:
        if count := self._kept_out("descriptors"):
            log.error("cannot accept a connection", count=count, reason=_FULL, remedy="raise LimitNOFILE")

    def _kept_out(self, why: Closed) -> int:
        """Count a connection that is not let in. Return how many there were since the last time, when it is time to tell."""
        metrics.CONNECTIONS_REFUSED.labels(why).inc()
        self._untold[why] += 1
        now = trio.current_time()
        if now < self._told_at.get(why, -math.inf) + _TOLD_EVERY_S:
            return 0
        self._told_at[why] = now
        return self._untold.pop(why)

    async def _guard(self, connection: socket.socket, serve: Callable[[socket.socket], Awaitable[None]]) -> None:
        """Serve one connection to its end; whatever its client does wrong concerns nobody else."""
        try:
            with connection:
                await serve(connection)
        except (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError, OSError) as error:
            log.debug("connection lost", reason=str(error.__cause__ or error) or type(error).__name__)
        except Exception:  # a connection's boundary: what goes wrong on one must not end the others
            log.exception("connection failed")
        finally:
            self.connections -= 1

    async def _connection(self, connection: socket.socket, served: int = 0) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        stream: trio.abc.Stream = trio.SocketStream(trio.socket.from_stdlib_socket(connection))
        if self._tls is not None:
            stream = trio.SSLStream(stream, self._tls, server_side=True, https_compatible=True)
        try:
            if isinstance(stream, trio.SSLStream):
                with trio.fail_after(_TLS_HANDSHAKE_S):
                    await stream.do_handshake()
            await self._speak(stream, connection, served)
        finally:
            await trio.aclose_forcefully(stream)

    async def _media(
        self, state: MediaSocketState, serve: Callable[[MediaSocket], Awaitable[None]], connection: socket.socket
    ) -> None:
        transport, limit = ReadinessTransport(connection), self._config.message_size_limit
        await MediaSocket.taken_over(transport, state, max_message_bytes=limit).serve(serve)

    async def _speak(self, stream: trio.abc.Stream, connection: socket.socket, served: int) -> None:
        """Answer one request after another, until one of them turns the connection into a media socket."""
        fd = connection.fileno()
        conversation = self._conversations[fd] = Conversation(stream, self._config, served)
        try:
            upgrade = await self._converse(conversation)
        except Refused as refused:
            metrics.REQUESTS_REFUSED.labels(refused.status).inc()
            log.info("request refused", status=refused.status, reason=refused.reason)
            await conversation.refuse(refused)
            return
        finally:
            del self._conversations[fd]
        if upgrade is not None:
            transport = StreamTransport(stream) if self._tls is not None else ReadinessTransport(connection)
            limit = self._config.message_size_limit
            media = MediaSocket.accepted(transport, conversation.head, conversation.unread, max_message_bytes=limit)
            await media.serve(upgrade.serve)

    async def _converse(self, conversation: Conversation) -> Upgrade | None:
        """Answer requests until there are no more. Return the answer that makes it a media socket. Raises `Refused`."""
        while (request := await conversation.receive()) is not None:
            answer = await self._answer(request)
            if isinstance(answer, Upgrade):
                return answer
            await conversation.send(answer)
            if not conversation.reusable:
                return None
        return None

    async def _answer(self, request: Request) -> Response | Upgrade:
        try:
            return await self._handler(request)
        except Exception:  # a request's boundary
            log.exception("request failed", method=request.method, path=request.path)
            return Response(500, "something went wrong here\n")


def _connected(fd: int) -> socket.socket:
    connection = socket.socket(fileno=fd)
    connection.setblocking(False)
    return connection
