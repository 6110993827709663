"""What recognisers behind a WebSocket share: the caller's audio is kept until it is settled, and handed over if need be."""

import math
from abc import abstractmethod
from collections import deque
from collections.abc import Iterable
from typing import Generic

import trio
from msgspec import Struct
from trio_websocket import ConnectionClosed
from wsproto.utilities import LocalProtocolError

from dialog_worker.participant import ProviderError
from dialog_worker.provider import Connection, ConnectionLost, Decoder, Endpoint, MessageT, ProviderSocket
from dialog_worker.stt.base import STT, Hearing, Owed
from dialog_worker.stt.buffer import LONGEST_FRAME_S, AudioBuffer
from dialog_worker.stt.unanswered import Unanswered

STALL_S = (
    2.5  # without an answer to a voice: with a new connection the answer still comes within 5 s of the caller's last word
)
PING_S = 5.0  # so that a dead line is found in a pause, not by the caller's next word
PONG_S = 3.0


class Stream(Struct, frozen=True):
    """The caller's audio: its encoding, its samples a second, and how many bytes of it are kept (None: 30 s)."""

    encoding: str
    sample_rate: int
    queue_size_limit: int | None = None
    longest_s: float = LONGEST_FRAME_S  # that the provider takes at once


class StreamingSTT(STT, Generic[MessageT]):
    """A recogniser that is sent audio over one connection after another. Adapters add what is said over it."""

    def __init__(self, endpoint: Endpoint, decoder: Decoder[MessageT], stream: Stream, give_up_s: float) -> None:
        super().__init__()
        self._provider = endpoint.provider
        self._socket = ProviderSocket(
            endpoint, decoder, self._report, give_up_s=give_up_s, waiting_since=self._waiting_since
        )
        self._audio = AudioBuffer(stream.encoding, stream.sample_rate, stream.queue_size_limit, stream.longest_s)
        self._voice = Unanswered(stream.encoding, stream.sample_rate)
        self._posted = trio.lowlevel.ParkingLot()
        self._overflowed = trio.lowlevel.ParkingLot()
        self._loss_told = False  # in this outage
        self._untold = deque[Hearing]()
        self._telling = trio.StrictFIFOLock()
        self._life = trio.CancelScope()
        self._ponged = False

    def post(self, audio: bytes) -> None:
        """Take the caller's next audio; up to `queue_size_limit` bytes of it are kept while the provider is away."""
        self._audio.append(audio)
        self._voice.post(audio, trio.current_time())
        self._posted.unpark_all()
        if self._audio.lost_s:
            self._overflowed.unpark_all()

    async def run(self) -> None:
        """Hold a connection until cancelled or retired; returns after a fatal `ProviderError`.

        Then an open turn has ended with what was final of it; `retire` gives the audio of the rest.
        """
        with self._life:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._tell_losses)
                await self._socket.serve(self._session)
                nursery.cancel_scope.cancel()
            await self._tell(self._end())

    @property
    def unanswered_since(self) -> float:
        return math.inf if self._waiting_since() == math.inf else self._voice.voice_at

    def retire(self) -> Owed:
        """Another takes over: return the events that were not read yet, the end of an open turn with what is final of it,
        and the audio after that. `run` ends, and nothing more is emitted. May be called after a fatal error, too.
        """
        unread = self._unread()  # which lets those finish who wait to emit; whoever is cancelled keeps what is untold
        self._life.cancel()
        hearings = [*unread, *self._untold, *self._end()]
        self._untold.clear()
        kept = [hearing for hearing in hearings if not (isinstance(hearing, ProviderError) and hearing.fatal)]
        return Owed(tuple(kept), self._audio.kept)

    @abstractmethod
    async def _session(self, connection: Connection[MessageT]) -> None:
        """Serve one connection."""

    @abstractmethod
    def _end(self) -> Iterable[Hearing]:
        """End an open turn with what is final of it, whose audio is settled."""

    @abstractmethod
    def _waiting_since(self) -> float:
        """Since when the caller waits for this provider, `math.inf` if not."""

    async def _resume(self) -> None:
        """Begin to send again, on a new connection, what is not settled; and tell what cannot be sent again."""
        if (lost_s := self._audio.rewind()) and not self._loss_told:
            await self._report(self._loss(lost_s))
        self._loss_told = False

    async def _tell_losses(self) -> None:
        """Tell as soon as audio begins to be lost."""
        while True:
            if (lost_s := self._audio.lost_s) and not self._loss_told:
                self._loss_told = True
                await self._report(self._loss(lost_s))
            await self._overflowed.park()

    def _loss(self, lost_s: float) -> ProviderError:
        text = f"{self._provider} was away for too long: {lost_s:.1f} s of the caller's audio were lost so far"
        return ProviderError(text, code="audio_lost")

    async def _ping(self, connection: Connection[MessageT]) -> None:
        """Leave a server that answers pings no more; one that never did may be alive all the same."""
        try:
            while True:
                await trio.sleep(PING_S)
                if await connection.answers(PONG_S):
                    self._ponged = True
                elif self._ponged:
                    raise ConnectionLost("stall", f"no answer to a ping for {PONG_S:.0f} s")
        except (ConnectionClosed, LocalProtocolError):
            return  # whoever receives reads why

    async def _report(self, error: ProviderError) -> None:
        await self._tell([error])

    async def _tell(self, hearings: Iterable[Hearing]) -> None:
        """Emit, in the order of the calls whoever makes them."""
        self._untold.extend(hearings)
        async with self._telling:
            while self._untold:
                hearing = self._untold.popleft()  # so it is either here or in the channel when `retire` looks
                try:
                    await self.emit(hearing)
                except trio.Cancelled:
                    self._untold.appendleft(hearing)
                    raise

    def _unread(self) -> list[Hearing]:
        unread: list[Hearing] = []
        try:
            while True:
                unread.append(self.events.receive_nowait())
        except (trio.WouldBlock, trio.EndOfChannel, trio.ClosedResourceError):
            return unread
