"""A caller who asks one question after another, and knows how long each answer has to be: what it hears, and how soon."""

from collections.abc import Iterator
from itertools import count

import trio
from msgspec import Struct

from dialog_local.carrier.line import FRAME_BYTES, FRAME_SECONDS, Line, audible_span
from dialog_local.carrier.phonecall import Call, CallEnded
from dialog_local.carrier.playout import BYTES_PER_SECOND
from tests.chaos.days import DAYS, GREETING, answer, question

PATIENCE_S = 12.0  # for an answer; a worker that hangs costs 5 s, and one that begins anew some more
ASKS_AGAIN_AFTER_S = 9.0  # of silence, where the line may have lost the question; before, it might be heard by halves
REPEATED = 2  # how often it is asked again
COMPLETE = 0.8  # of an answer's length: resumed in mid-sentence, it is spoken a little faster or slower
TWICE = 1.45  # of an answer's length: more than was to be said
PAUSE_S = 0.5  # of the agent's, after which it has said what it had to say
_LOOK_S = 0.1


class Exchange(Struct):
    """A question and its answer, in the call's seconds. `answered_at`: its end; None when it did not come.

    `heard_s`: of the agent's voice. `silence_s`: the longest stretch in which the caller waited and heard nothing.
    """

    day: str
    asked_at: float
    said_at: float = 0.0
    answered_at: float | None = None
    heard_s: float = 0.0
    silence_s: float = 0.0
    times: int = 1
    expected_s: float = 0.0
    open: bool = True


class Voices(Struct, frozen=True):
    """The callers' and the agent's sentences as audio, made beforehand."""

    questions: dict[str, bytes]
    answers: dict[str, bytes]
    greeting: bytes

    @staticmethod
    def texts() -> Iterator[str]:
        """Yield what has to be synthesised."""
        yield GREETING
        for day in DAYS:
            yield question(day)
            yield answer(day)

    @classmethod
    def of(cls, audio: dict[str, bytes]) -> "Voices":
        """Take what was synthesised, by text."""
        questions = {day: audio[question(day)] for day in DAYS}
        return cls(questions, {day: audio[answer(day)] for day in DAYS}, audio[GREETING])


def audible_s(audio: bytes) -> float:
    """Return for how long something is to be heard in mu-law audio."""
    frames = range(0, len(audio), FRAME_BYTES)
    return FRAME_SECONDS * sum(audible_span(audio[at : at + FRAME_BYTES]) is not None for at in frames)


class Ear:
    """What is heard of the agent from a moment of the call on."""

    def __init__(self, line: Line, begin: float) -> None:
        self.heard_s = 0.0
        self.quiet_s = 0.0  # since the last sound
        self.last_at = begin
        self._line = line
        self._at = begin

    def listen(self) -> None:
        """Take what has been played meanwhile."""
        heard = self._line.tracks["agent"].read(self._at)
        for at in range(0, len(heard) - FRAME_BYTES + 1, FRAME_BYTES):
            self._frame(audible_span(heard[at : at + FRAME_BYTES]) is not None)

    def _frame(self, audible: bool) -> None:
        self._at += FRAME_SECONDS
        if audible:
            self.heard_s += FRAME_SECONDS
            self.quiet_s, self.last_at = 0.0, self._at
        else:
            self.quiet_s += FRAME_SECONDS

    def report(self, exchange: Exchange) -> None:
        """Enter what was heard of an answer."""
        exchange.heard_s = self.heard_s
        if self.heard_s < COMPLETE * exchange.expected_s:
            exchange.silence_s = max(exchange.silence_s, self.quiet_s)


class Caller:
    """Talks in one call, from the greeting until it has had `enough`. `exchanges` grows."""

    def __init__(self, call: Call, voices: Voices, first_day: int, *, repeats: bool) -> None:
        self.call = call
        self.exchanges: list[Exchange] = []
        self.enough = trio.Event()
        self._voices = voices
        self._first_day = first_day
        self._repeats = repeats
        self._over = False
        self._happened = trio.Event()

    async def run(self) -> None:
        """Talk, and hang up; returns early when the call ends before."""
        try:
            await self._hear_out(Exchange("", 0.0, expected_s=audible_s(self._voices.greeting)))
            for number in count(self._first_day):
                if self.enough.is_set():
                    break
                await self._exchange(DAYS[number % len(DAYS)])
            self.call.caller.hang_up()
        except CallEnded:
            pass  # the judge says what that means
        finally:
            self._over = True
            self._tell()

    @property
    def through(self) -> int:
        """How many questions were answered, or given up."""
        return len(self.exchanges) - (not self._over and bool(self.exchanges) and self.exchanges[-1].open)

    async def until_through(self, number: int) -> None:
        """Wait until so many questions are through, or the call is over."""
        while self.through < number and not self._over:
            await self._happened.wait()

    async def _exchange(self, day: str) -> None:
        exchange = Exchange(day, self.call.now(), expected_s=audible_s(self._voices.answers[day]))
        self.exchanges.append(exchange)
        await self._ask(exchange)
        while exchange.answered_at is None and self._repeats and exchange.times <= REPEATED:
            exchange.times += 1
            await self._ask(exchange)
        exchange.open = False
        self._tell()

    def _tell(self) -> None:
        self._happened.set()
        self._happened = trio.Event()

    async def _ask(self, exchange: Exchange) -> None:
        audio = self._voices.questions[exchange.day]
        await self.call.caller.speak(audio)
        _, last = audible_span(audio) or (0, len(audio))
        exchange.said_at = self.call.now() - (len(audio) - last) / BYTES_PER_SECOND
        await self._hear_out(exchange)

    async def _hear_out(self, exchange: Exchange) -> None:
        """Listen until the agent has said as much as it has to, and a little longer, or for as long as patience lasts."""
        assert self.call.line is not None
        ear = Ear(self.call.line, exchange.said_at)
        while ear.quiet_s < (ASKS_AGAIN_AFTER_S if self._repeats else PATIENCE_S):
            if self.call.ended:
                raise CallEnded(f"call {self.call.sid} has ended")
            if ear.heard_s >= COMPLETE * exchange.expected_s and ear.quiet_s >= PAUSE_S:
                exchange.answered_at = ear.last_at
                break
            await trio.sleep(_LOOK_S)
            ear.listen()
            ear.report(exchange)
