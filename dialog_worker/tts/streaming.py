"""What voices behind a WebSocket share: utterances are sent over one connection after another, and told in their order."""

import math
from abc import abstractmethod
from typing import Generic

import trio
from trio_websocket import ConnectionClosed
from wsproto.utilities import LocalProtocolError

from dialog_worker.provider import (
    ConfigurationError,
    Connection,
    ConnectionLost,
    Decoder,
    Endpoint,
    MessageT,
    ProviderSocket,
)
from dialog_worker.tts.base import TTS
from dialog_worker.tts.contexts import Cancel, Contexts, Limits, Line
from protocol.messages import Message

FREEING_S = 1.0  # of silence, after which a connection that takes no more is not waited for


class StreamingTTS(TTS, Generic[MessageT]):
    """A voice that takes text in contexts. Adapters add what is said over a connection.

    Raises `ConfigurationError` for limits that let nothing be said.
    """

    def __init__(
        self, endpoint: Endpoint, decoder: Decoder[MessageT], bytes_per_second: int, limits: Limits, give_up_s: float
    ) -> None:
        super().__init__()
        if limits.timeout_s <= 0 or limits.queue_size_limit < 1:
            raise ConfigurationError(
                f"timeout_s={limits.timeout_s} and queue_size_limit={limits.queue_size_limit} let {endpoint.provider} "
                "say nothing: give a timeout above 0 and a limit of at least 1"
            )
        self._contexts = Contexts(endpoint.provider, bytes_per_second, limits)
        self._socket = ProviderSocket(
            endpoint, decoder, self.emit, give_up_s=give_up_s, waiting_since=self._contexts.waiting_since
        )
        self._changed = trio.lowlevel.ParkingLot()

    def post(self, message: Message[str]) -> None:
        """Say `message.data`; whole sentences sound best, and begin at once."""
        self._contexts.post(message, trio.current_time())
        self._changed.unpark_all()

    def abort(self, uuid: str) -> None:
        """Stop this utterance; emit nothing more of it."""
        self._contexts.abort(uuid, trio.current_time())
        self._changed.unpark_all()

    async def run(self) -> None:
        """Hold a connection and speak until cancelled; after a fatal `ProviderError` every utterance ends at once."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._speak)
            self._contexts.give_up(await self._socket.serve(self._session))
            self._changed.unpark_all()

    @abstractmethod
    async def _transmit(self, connection: Connection[MessageT], request: Line | Cancel) -> None:
        """Send one request."""

    @abstractmethod
    async def _understand(self, connection: Connection[MessageT], message: MessageT) -> None:
        """Take one answer."""

    async def _keep_alive(self, connection: Connection[MessageT]) -> None:
        """Send what keeps an idle connection open, where that is needed."""

    def _has_room(self) -> bool:
        """Whether this connection may carry another context."""
        return True

    def _is_clogged(self) -> bool:
        """Whether only contexts that nobody wants are in the way of another."""
        return False

    def _forget(self) -> None:
        """The connection is gone."""

    def _explain(self, failure: Exception) -> Exception:
        """What a failed connection means at this provider."""
        return failure

    def _hear(self, connection: Connection[MessageT], context_id: str, audio: bytes) -> None:
        """Take audio, which shows that the service works."""
        if audio:
            connection.prove()
            self._contexts.audio(context_id, audio, trio.current_time())

    async def _speak(self) -> None:
        """Tell the agent what is ready; the only task that does, so that the order is the queue's."""
        while True:
            while event := self._contexts.next_event(trio.current_time()):
                await self.emit(event)
            self._changed.unpark_all()  # the end of one utterance may be the beginning of the next
            with trio.move_on_at(self._contexts.deadline()):
                await self._changed.park()

    async def _session(self, connection: Connection[MessageT]) -> None:
        """One connection. One that ends while nothing is wanted of it is replaced in silence, so that one is always warm."""
        failures: list[Exception] = []
        self._contexts.connected(trio.current_time())
        self._changed.unpark_all()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._listen, connection)
                nursery.start_soon(self._keep_alive, connection)
                await self._send(connection)
                nursery.cancel_scope.cancel()
        except* (ConnectionLost, ConnectionClosed, LocalProtocolError) as group:
            failures = [self._explain(failure) for failure in group.exceptions if isinstance(failure, Exception)]
        finally:
            minded = self._contexts.busy
            self._forget()
            self._contexts.disconnected(trio.current_time())
            self._changed.unpark_all()
        declared = [failure for failure in failures if isinstance(failure, ConnectionLost)]
        for failure in declared or (failures if minded else []):
            raise failure

    async def _listen(self, connection: Connection[MessageT]) -> None:
        while True:
            await self._understand(connection, await connection.receive())
            self._changed.unpark_all()

    async def _send(self, connection: Connection[MessageT]) -> None:
        """Send what is due, until nothing more can be hoped for from this connection."""
        while not self._contexts.stalled:
            while request := self._contexts.due(trio.current_time(), may_open=self._has_room()):
                await self._transmit(connection, request)
            clogged = self._is_clogged()
            patience_at = trio.current_time() + FREEING_S if clogged else math.inf
            with trio.move_on_at(min(patience_at, self._contexts.retry_at(trio.current_time()))) as waiting:
                await self._changed.park()
            if clogged and waiting.cancelled_caught and trio.current_time() >= patience_at:
                return
