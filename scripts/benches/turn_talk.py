"""One call as it is planned: what its caller says and when, and whether it lets the agent finish."""

import math
import os
from dataclasses import dataclass
from random import Random
from typing import Protocol

import trio

from scripts.benches.turn_shares import Share, Shares

PATIENCE_S = 8.0  # for whatever a turn waits for
SETTLE_S = 1.0  # from the last of a call's connections until its first word: the model's is made beside them
_SYLLABLES = ("ba", "de", "fi", "go", "lu", "ma", "ne", "po", "ri", "su", "ta", "vo", "we", "xi", "ya", "ze")


@dataclass(frozen=True)
class Delays:
    """How long the providers take: the model until its first token and between two, the voice until its first audio."""

    model_ms: float = 80.0
    token_ms: float = 12.0
    voice_ms: float = 90.0


class Ear(Protocol):
    """What the talk has the recogniser tell; each returns the date just before it was written."""

    def speech_started(self) -> float:
        """Somebody speaks."""

    def interim(self, text: str) -> float:
        """What it seems to be so far."""

    def final(self, text: str) -> float:
        """What it was."""


class TurnFailed(Exception):
    """Something did not come in time; the message says what."""


class Talk:
    """A call's conversation. The providers and the line tell it what arrives, and look up what the turn is to be like."""

    def __init__(self, number: int, shares: Shares, random: Random, pause_s: float) -> None:
        self.number = number
        self.sid = "CA" + os.urandom(16).hex()
        self.failures: list[str] = []
        self.turn = 0
        self.final_at = 0.0
        self.cold_turns = 0  # whose request had to wait for a handshake
        self.first_s = math.nan  # the first turn's `Share.REQUEST`
        self.writes_on = False  # the model is to be interrupted while it still writes
        self.ear: Ear | None = None
        self.ready = {what: trio.Event() for what in ("ear", "voice", "line")}
        self.voiced = trio.Event()
        self.played = trio.Event()
        self._shares = shares
        self._random = random
        self._pause_s = pause_s
        self._cut = True
        self._audio: set[bytes] = set()

    # What it says

    async def run(self, turns: int) -> None:
        """Talk for so many turns. Of four, one is interrupted while the voice speaks, one while the model still writes."""
        try:
            for what, event in self.ready.items():
                await self._wait(event, f"the call's {what}")
            await trio.sleep(SETTLE_S + self._random.random())
            for turn in range(1, turns + 1):
                await self._turn(turn, interrupts=turn > 1 and turn % 4 in (3, 1))
                self.writes_on = turn % 4 == 0
                await self._ask()
                if turn % 4 in (1, 3):
                    await self._wait(self.played, "the end of the answer")
                    await trio.sleep(self._pause_s if turn == 3 else self._random.uniform(0.2, 0.6))
                else:
                    await trio.sleep(self._random.uniform(0.3, 0.8))
        except TurnFailed as failure:
            self.failures.append(f"call {self.number}, turn {self.turn}: no {failure} within {PATIENCE_S:g} s")
        self._interrupt()

    def _interrupt(self) -> None:
        """From now on audio may be thrown away instead of being played."""
        self._cut = True
        for key in self._audio:
            self._shares.forget(Share.AUDIO, key)
        self._audio.clear()

    async def _turn(self, turn: int, *, interrupts: bool) -> None:
        """The caller begins to speak, perhaps while the agent does."""
        assert self.ear is not None
        self._interrupt()
        self.turn = turn
        self.voiced, self.played = trio.Event(), trio.Event()
        at = self.ear.speech_started()
        if interrupts:
            self._shares.begin(Share.CLEAR, self.sid, at)
        await trio.sleep(self._random.uniform(0.15, 0.25))
        self.ear.interim(f"{self.text.partition(' ')[0]}")
        await trio.sleep(self._random.uniform(0.15, 0.25))

    async def _ask(self) -> None:
        """The caller has spoken, and waits for the answer's first sound."""
        assert self.ear is not None
        self._cut = False
        self.final_at = self.ear.final(self.text)
        self._shares.begin(Share.REQUEST, (self.sid, self.turn), self.final_at)
        await self._wait(self.voiced, "answer")

    @staticmethod
    async def _wait(event: trio.Event, what: str) -> None:
        with trio.move_on_after(PATIENCE_S) as waiting:
            await event.wait()
        if waiting.cancelled_caught:
            raise TurnFailed(what)

    @property
    def text(self) -> str:
        """What the caller says in this turn; no other call and no other turn has it."""
        first, second = divmod(self.number * 251 + self.turn, 16)
        name = _SYLLABLES[first // 16 % 16] + _SYLLABLES[first % 16] + _SYLLABLES[second]
        return f"Can you tell me more about number {self.turn} of {name}, please?"

    @property
    def answer(self) -> str:
        """What the model says to it."""
        return f"Number {self.turn} is what most guests like best. Shall I put you down for it?"

    # What the others tell it

    def asked(self, text: str, at: float, *, warm_since: float) -> None:
        """A request is at the model, on a connection that was ready at `warm_since`."""
        if text != self.text or not self._shares.end(Share.REQUEST, (self.sid, self.turn), at):
            self.failures.append(f"call {self.number}, turn {self.turn}: the model was asked {text!r}")
        self.cold_turns += warm_since > self.final_at
        if self.turn == 1:
            self.first_s = at - self.final_at

    def sentence_written(self, at: float) -> None:
        """The model has written as much as the first sentence takes."""
        self._shares.begin(Share.SENTENCE, (self.sid, self.turn), at)

    def text_to_say(self, at: float) -> None:
        """Text is at the voice; only a turn's first counts."""
        self._shares.end(Share.SENTENCE, (self.sid, self.turn), at)

    def audio_written(self, key: bytes, at: float) -> None:
        """The voice has written audio, which may be thrown away when the caller has begun to speak."""
        if not self._cut:
            self._audio.add(key)
            self._shares.begin(Share.AUDIO, key, at)

    def audio_heard(self, key: bytes, at: float) -> None:
        """Audio is at the carrier."""
        if key in self._audio:
            self._audio.discard(key)
            self._shares.end(Share.AUDIO, key, at)
            self.voiced.set()

    def cleared(self, at: float) -> None:
        """The carrier was told to forget what it has to play."""
        self._shares.end(Share.CLEAR, self.sid, at)
