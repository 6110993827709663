"""Run an agent in-process against a scripted call: what the caller says is text, and time may be virtual.

async def test_it_books(autojump_clock):
    async with scripted_call(lambda voip, stt, tts: Receptionist(voip=voip, stt=stt, tts=tts, …)) as call:
        await call.caller_says("a table for two at eight")
        assert "booked" in await call.next_said()
"""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import trio

from dialog_worker.agent.base import Agent
from dialog_worker.participant import Word
from dialog_worker.stt.base import STT, Final, SpeechEnded, SpeechStarted
from dialog_worker.tts.base import TTS, WordTimings
from dialog_worker.voip import VoIP
from protocol.link import RequestFailed
from protocol.messages import (
    Event,
    Failure,
    Hangup,
    Message,
    MessageDispatched,
    Metadata,
    Request,
    Shutdown,
    StreamingStarted,
    StreamingStopped,
    Trace,
    Turn,
)

BYTES_PER_S = 8000
CHARACTER_S = 1 / 15  # how long the scripted voice takes for a character
_EVENTS = 1000


class TextSTT(STT):
    """Recognises what the script says."""

    def post(self, audio: bytes) -> None:
        """Ignore audio."""

    async def run(self) -> None:
        await trio.sleep_forever()


class TextTTS(TTS):
    """Says text as silence of a fitting length, with word timings, as fast as a real voice on a good day."""

    def __init__(self) -> None:
        super().__init__()
        self._post, self._posted = trio.open_memory_channel[Message[str]](_EVENTS)
        self._aborted: set[str] = set()
        self._position: dict[str, float] = {}

    def post(self, message: Message[str]) -> None:
        self._post.send_nowait(message)

    def abort(self, uuid: str) -> None:
        self._aborted.add(uuid)

    async def run(self) -> None:
        async for message in self._posted:
            if message.uuid in self._aborted:
                continue
            start = self._position.get(message.uuid, 0.0)
            words, at = [], start
            for word in message.data.split():
                end = at + (len(word) + 1) * CHARACTER_S
                words.append(Word(word, round(at * 1000), round(end * 1000)))
                at = end
            self._position[message.uuid] = at
            await self.emit(WordTimings(message.uuid, tuple(words)))
            await self.emit(Message(message.uuid, b"\xff" * round((at - start) * BYTES_PER_S), message.done))


class ScriptedCall(VoIP):
    """A phone line whose caller is the test. `said` are the utterances as heard; `traces`, `turns`,
    `requests`, `saved` states and `aborted` messages all that there were.
    """

    def __init__(self, metadata: Metadata) -> None:
        self.stt, self.tts = TextSTT(), TextTTS()
        self.traces: list[Trace] = []
        self.turns: list[Turn] = []
        self.said: list[str] = []
        self.requests: list[Request] = []
        self.saved: list[bytes] = []
        self.aborted: list[str] = []
        self.first: Event | None = None  # what happens before the line opens, such as `Restored`
        self.failure: Failure | None = None  # what every request is answered with
        self._metadata = metadata
        self._emit, self._events = trio.open_memory_channel[Event](_EVENTS)
        self._post, self._posted = trio.open_memory_channel[Message[bytes]](_EVENTS)
        self._total: dict[str, int] = {}
        self._played: dict[str, float] = {}
        self._playing = trio.CancelScope()
        self._playing_uuid = ""
        self._changed = trio.Event()
        self._read: dict[str, int] = {}  # up to which trace, by kind, `until` has come

    # As the agent sees it

    @property
    def metadata(self) -> Metadata:
        return self._metadata

    async def __anext__(self) -> Event:
        return await anext(self._events)

    def post(self, message: Message[bytes]) -> None:
        self._total[message.uuid] = self._total.get(message.uuid, 0) + len(message.data)
        self._post.send_nowait(message)

    async def room(self) -> None:
        await trio.lowlevel.checkpoint()

    def abort(self, uuid: str) -> None:
        self.aborted.append(uuid)
        if uuid not in self._total:
            return
        if self._playing_uuid == uuid:
            self._playing.cancel()
        else:
            self._dispatched(uuid, interrupted=True)

    def trace(self, kind: str, text: str, fields: dict[str, str] | None = None) -> None:
        self.traces.append(Trace(kind, text, fields or {}))
        if kind == "said":
            self.said.append(text)
        self._notify()

    def report(self, turn: Turn) -> None:
        self.turns.append(turn)
        self._notify()

    def save(self, state: bytes, audio_ms: int) -> None:
        self.saved.append(state)

    async def request(self, kind: type[Request], *, timeout_s: float, **fields: Any) -> str:
        self.requests.append(kind(len(self.requests), timeout_s, **fields))
        self._notify()
        await trio.lowlevel.checkpoint()
        if self.failure is not None:
            raise RequestFailed(kind.__name__, self.failure)
        if kind is Hangup:
            await self.caller_hangs_up()
        return ""

    # As the script acts

    async def tell(self, event: Event) -> None:
        """Have an event of your own happen on the line."""
        await self._emit.send(event)

    async def caller_speaks(self) -> None:
        """Begin to speak: an agent that is speaking should stop."""
        await self.stt.emit(SpeechStarted())

    async def caller_says(self, text: str) -> None:
        """Speak a whole utterance, in no time."""
        await self.caller_speaks()
        await self.stt.emit(Final(text))
        await self.stt.emit(SpeechEnded())

    async def caller_hangs_up(self) -> None:
        """End the call."""
        await self.tell(StreamingStopped("the caller hung up"))
        await self.tell(Shutdown("the caller hung up", 5.0))

    async def next_said(self) -> str:
        """Wait for the agent's next utterance to be played or cut, and return what of it was heard."""
        return (await self.until("said")).text

    async def until(self, kind: str) -> Trace:
        """Return the next trace of a kind, of those that this has not returned yet."""
        while True:
            for index in range(self._read.get(kind, 0), len(self.traces)):
                if self.traces[index].kind == kind:
                    self._read[kind] = index + 1
                    return self.traces[index]
            await self._changed.wait()

    @staticmethod
    def dispatched(uuid: str, ms: int) -> MessageDispatched:
        """Return the report that a message was heard to its end."""
        return MessageDispatched(uuid, ms, ms, interrupted=False)

    async def requested(self, kind: type[Request]) -> Request:
        """Return the first request of a kind, when the agent has made it."""
        while True:
            for request in self.requests:
                if isinstance(request, kind):
                    return request
            await self._changed.wait()

    async def turned(self, count: int = 1) -> list[Turn]:
        """Return the first turns of the call, when so many are over."""
        while len(self.turns) < count:
            await self._changed.wait()
        return self.turns[:count]

    # The line

    async def play(self) -> None:
        """Play what is posted, in real or virtual time, and say when it was heard."""
        async for message in self._posted:
            uuid = message.uuid
            if uuid not in self._total:
                continue
            began = trio.current_time()
            self._playing_uuid = uuid
            with trio.CancelScope() as self._playing:
                await trio.sleep(len(message.data) / BYTES_PER_S)
            self._playing_uuid = ""
            self._played[uuid] = self._played.get(uuid, 0.0) + trio.current_time() - began
            if self._playing.cancelled_caught or message.done:
                self._dispatched(uuid, interrupted=self._playing.cancelled_caught)

    def _dispatched(self, uuid: str, *, interrupted: bool) -> None:
        total_ms = self._total.pop(uuid) * 1000 // BYTES_PER_S
        played_ms = round(self._played.pop(uuid, 0.0) * 1000) if interrupted else total_ms
        self._emit.send_nowait(MessageDispatched(uuid, played_ms, total_ms, interrupted))

    def _notify(self) -> None:
        self._changed.set()
        self._changed = trio.Event()


@asynccontextmanager
async def scripted_call(
    make: Callable[[VoIP, STT, TTS], Agent], metadata: Metadata | None = None
) -> AsyncIterator[ScriptedCall]:
    """Run the agent that `make` returns for the length of the block, on an open line; then the caller hangs up."""
    call = ScriptedCall(metadata or Metadata("CA" + "0" * 32, "scripted", "+15550001111", "+15550002222"))
    agent = make(call, call.stt, call.tts)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(call.play)
        async with trio.open_nursery() as agents:
            agents.start_soon(agent.run)
            await call.tell(call.metadata)
            if call.first is not None:
                await call.tell(call.first)
            await call.tell(StreamingStarted("MZ" + "0" * 32))
            yield call
            await call.caller_hangs_up()
        nursery.cancel_scope.cancel()
