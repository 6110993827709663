"""What Deepgram Nova sends, and how its results become an agent's turns. No I/O.

Wire facts: Deepgram docs, "Live streaming" reference, "Understand endpointing and interim results", "Utterance end".
"""

import math
from collections.abc import Iterator

from msgspec import Struct

from dialog_worker.participant import Word
from dialog_worker.stt.base import Final, Hearing, Interim, SpeechEnded, SpeechStarted


class Incoming(Struct, frozen=True, tag_field="type"):
    """Base of what Deepgram sends."""


class SpokenWord(Struct, frozen=True):
    """One word, in seconds of the connection's audio."""

    word: str
    start: float
    end: float
    punctuated_word: str | None = None

    @property
    def text(self) -> str:
        """As it is written in the transcript."""
        return self.punctuated_word or self.word


class Alternative(Struct, frozen=True):
    """What was understood."""

    transcript: str = ""
    confidence: float | None = None
    words: tuple[SpokenWord, ...] = ()


class Channel(Struct, frozen=True):
    """Readings of one channel, the likeliest first."""

    alternatives: tuple[Alternative, ...] = ()


class Results(Incoming, frozen=True, tag="Results"):
    """A stretch of audio and its transcript: the same stretch again and again, the last time with `is_final`."""

    start: float = 0.0
    duration: float = 0.0
    is_final: bool | None = False
    speech_final: bool | None = False
    from_finalize: bool | None = False
    channel: Channel = Channel()

    @property
    def best(self) -> Alternative:
        """The likeliest reading."""
        return self.channel.alternatives[0] if self.channel.alternatives else Alternative()


class VoiceDetected(Incoming, frozen=True, tag="SpeechStarted"):
    """Deepgram noticed a voice. May be missing, doubled or late."""

    timestamp: float = 0.0


class UtteranceEnd(Incoming, frozen=True, tag="UtteranceEnd"):
    """No word for `utterance_end_ms`; `last_word_end` is -1 if there was none."""

    last_word_end: float = -1.0


class Failure(Incoming, frozen=True, tag="Error"):
    """Deepgram could not do as it was asked."""

    description: str | None = None
    message: str | None = None
    variant: str | None = None


class Turn:
    """Makes of Deepgram's results what an agent hears. No I/O; times in seconds since the stream's first sample.

    `forced_until_s`: what was heard before is told, although no result of it was final.
    """

    def __init__(self) -> None:
        self.is_open = False
        self._parts: list[Final] = []
        self._interim = Final("")
        self._interim_end_s = 0.0
        self._began_s = math.inf
        self._last_word_s = -1.0
        self.forced_until_s = 0.0

    def voice_detected(self, at_s: float) -> Iterator[Hearing]:
        """A voice began; swallowed if it is this turn's, or the last one's told late."""
        if at_s >= self._last_word_s:
            yield from self._begin(at_s)

    def results(self, results: Results, offset_s: float) -> Iterator[Hearing]:
        """One transcript, of a connection whose clock began at `offset_s`."""
        heard = self._unheard(results, offset_s)
        if heard.text:
            began_s = heard.words[0].start_ms / 1000 if heard.words else results.start + offset_s
            yield from self._begin(began_s)
            yield from self._collect(heard, results, offset_s)
        elif results.is_final:
            self._interim = Final("")
        if results.speech_final or results.from_finalize:
            yield from self.end()

    def utterance_end(self, last_word_end_s: float) -> Iterator[Hearing]:
        """Silence after the last word: ends the turn, unless it is the turn before that it speaks of."""
        if last_word_end_s >= self._began_s and (self._parts or not self._interim.text):
            yield from self.end()

    def end(self, *, forced: bool = False) -> Iterator[Hearing]:
        """End the turn with what there is; when `forced`, also with what Deepgram might still have changed."""
        parts = list(self._parts)
        if forced and self._interim.text:
            parts.append(self._interim)
            self.forced_until_s = self._interim_end_s
        yield from self._close(parts)

    def stop(self) -> Iterator[Hearing]:
        """End the turn with what is final; what is not is left to whoever hears its audio again."""
        yield from self._close(self._parts)

    def _close(self, parts: list[Final]) -> Iterator[Hearing]:
        was_open, self.is_open = self.is_open, False
        self._parts, self._interim, self._began_s = [], Final(""), math.inf
        if parts:
            whole = _join(parts)
            self._last_word_s = whole.words[-1].end_ms / 1000 if whole.words else self._last_word_s
            yield whole
        if was_open:
            yield SpeechEnded()

    def forget_interim(self) -> None:
        """A new connection hears that audio again."""
        self._interim = Final("")

    def _begin(self, at_s: float) -> Iterator[Hearing]:
        self._began_s = min(self._began_s, at_s)
        if not self.is_open:
            self.is_open = True
            yield SpeechStarted()

    def _collect(self, heard: Final, results: Results, offset_s: float) -> Iterator[Hearing]:
        before = self._parts
        if results.is_final:
            self._parts, self._interim = [*before, heard], Final("")
        else:
            self._interim, self._interim_end_s = heard, offset_s + results.start + results.duration
        if not results.speech_final:
            yield Interim(_join([*before, heard]).text)

    def _unheard(self, results: Results, offset_s: float) -> Final:
        """The result in the stream's time, without words of a turn that was ended by force."""
        best, text = results.best, results.best.transcript.strip()
        words = best.words
        if results.start + offset_s < self.forced_until_s:
            words = tuple(word for word in words if (word.start + word.end) / 2 + offset_s > self.forced_until_s)
            text = " ".join(word.text for word in words)
        timed = tuple(Word(word.text, _ms(word.start + offset_s), _ms(word.end + offset_s)) for word in words)
        return Final(text, best.confidence, timed)


def _join(parts: list[Final]) -> Final:
    known = [part.confidence for part in parts if part.confidence is not None]
    confidence = sum(known) / len(known) if known else None
    return Final(" ".join(part.text for part in parts), confidence, tuple(word for part in parts for word in part.words))


def _ms(seconds: float) -> int:
    return round(seconds * 1000)
