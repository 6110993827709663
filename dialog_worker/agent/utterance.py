"""One thing that an agent says: its text on the way to the voice, and afterwards what the caller really heard of it."""

import math
import re

import trio

from dialog_worker.participant import Word
from dialog_worker.tts.base import TTS
from dialog_worker.voip import VoIP, sendable
from protocol.messages import Message, MessageDispatched

REPORT_TIMEOUT_S = 2.0  # for the report on an aborted utterance, which the supervisor sends at once
_SPOKEN_CHARACTERS_PER_S = 15  # English at an even pace, where a voice gives no word timings
_HEARD_SHARE = 0.5  # of a word, to count as heard
_BYTES_PER_MS = 8  # of mu-law at 8 kHz
_WORD_REACH = 24  # characters between a word and the next: one said otherwise than written is not looked for further on
_WORD = re.compile(r"\S+")


class Utterance:
    """Text in by `say`, ended by `finish` or `cut`; then `heard` tells what became of it."""

    def __init__(self, uuid: str, voip: VoIP, tts: TTS, *, interruptible: bool) -> None:
        self.uuid = uuid
        self.spoken_as = uuid  # its name at the voice
        self.interruptible = interruptible
        self.text = ""
        self.tts = tts
        self.resumed = 0
        self.written_at = math.inf  # when its first words came
        self.voiced_at = math.inf  # when its first audio was on the way to the caller
        self._audio_bytes = 0
        self._resumed_at_ms = 0
        self._words: list[Word] = []
        self._voip = voip
        self._ended = False
        self._was_cut = False
        self._reported = trio.Event()
        self._report: MessageDispatched | None = None

    def say(self, text: str) -> None:
        """Have the next piece said; after the end, nothing."""
        text = sendable(text)
        if self._ended or not text:
            return
        if not self.text:
            self.written_at = trio.current_time()
        self.text += text
        self.tts.post(Message(self.spoken_as, text))
        self._voip.trace("saying", text.strip(), {"uuid": self.uuid})

    def finish(self) -> None:
        """There is no more to say."""
        if self._ended:
            return
        self._ended = True
        if self.text:
            self.tts.post(Message(self.spoken_as, "", done=True))
        else:
            self.report(MessageDispatched(self.uuid, 0, 0, interrupted=False))

    def cut(self) -> None:
        """Stop it, wherever it is: at the voice, in the pipe, in the carrier's buffer."""
        if self._was_cut or self._reported.is_set():
            return
        self._ended = self._was_cut = True
        self.tts.abort(self.spoken_as)
        self._voip.abort(self.uuid)
        if self.voiced_at == math.inf:
            self.report(MessageDispatched(self.uuid, 0, 0, interrupted=True))

    def voiced(self, audio: bytes) -> None:
        """Its next audio is on the way to the caller."""
        if self.voiced_at == math.inf:
            self.voiced_at = trio.current_time()
        self._audio_bytes += len(audio)

    @property
    def _audio_ms(self) -> int:
        return self._audio_bytes // _BYTES_PER_MS

    def timed(self, words: tuple[Word, ...]) -> None:
        """When its next words are said, counted from where its present voice began."""
        begin = self._resumed_at_ms
        self._words += [Word(word.text, begin + word.start_ms, begin + word.end_ms) for word in words]

    def adopted(self, text: str, words: tuple[Word, ...]) -> None:
        """Another worker had it said, and this is all of it; what is left is to be heard."""
        self.text = text
        self._words = list(words)
        self.voiced_at = trio.current_time()
        self._ended = True

    @property
    def words(self) -> tuple[Word, ...]:
        """When its words are said, as far as that is known."""
        return tuple(self._words)

    @property
    def over(self) -> bool:
        """Whether nothing more of it is to be said."""
        return self._was_cut or self._reported.is_set()

    def resume(self, tts: TTS, spoken_as: str) -> None:
        """Have what is not voiced yet said by this voice, under another name; a word that was cut is said again."""
        said = heard_text(self.text, self._words, self._audio_ms, share=1.0)
        self.tts, self.spoken_as, self.resumed = tts, spoken_as, self.resumed + 1
        self._resumed_at_ms = self._audio_ms
        self._words = [word for word in self._words if word.end_ms <= self._audio_ms]
        if rest := self.text[self.text.find(said) + len(said) :].lstrip():
            tts.post(Message(spoken_as, rest))
        if self._ended:
            tts.post(Message(spoken_as, "", done=True))

    def report(self, report: MessageDispatched) -> None:
        """What the supervisor says of it."""
        if self._report is not None:
            return
        self._report = report
        self._reported.set()
        whole = self.text.strip()
        cut = str(self.heard_now != whole).lower()
        self._voip.trace("said", self.heard_now, {"uuid": self.uuid, "interrupted": cut, "total": whole})
        if report.interrupted and not self._was_cut:  # the line was lost: what is still to come has nobody to hear it
            self._ended = self._was_cut = True
            self.tts.abort(self.spoken_as)
            self._voip.abort(self.uuid)

    @property
    def heard_now(self) -> str:
        """What of its text the caller is known to have heard; nothing while there is no report."""
        if self._report is None:
            return ""
        if not self._report.interrupted:
            return self.text.strip()
        return heard_text(self.text, self._words, self._report.played_ms)

    async def heard(self) -> str:
        """Wait until it was played or cut, and return what of its text the caller heard."""
        await self._played_or_cut()
        return self.heard_now

    async def _played_or_cut(self) -> None:
        while not self._reported.is_set():
            with trio.move_on_after(REPORT_TIMEOUT_S):
                await self._reported.wait()
            if self._was_cut:
                return


def heard_text(text: str, words: list[Word], played_ms: int, share: float = _HEARD_SHARE) -> str:
    """Return the beginning of `text` that takes `played_ms` to say, to the nearest word.

    With word timings, which may cover only the part that was synthesised so far, a word counts when `share` of it was
    played: half, unless told otherwise.
    """
    if not words:
        return _first_words(text, round(played_ms / 1000 * _SPOKEN_CHARACTERS_PER_S))
    heard = sum(1 for word in words if word.start_ms + (word.end_ms - word.start_ms) * share <= played_ms)
    end = 0
    for word in words[:heard]:
        found = text.find(word.text, end, end + len(word.text) + _WORD_REACH)
        end = found + len(word.text) if found != -1 else _next_word_end(text, end)
    return _up_to_word_end(text, end)


def _first_words(text: str, characters: int) -> str:
    """Return the words of which at least the greater part lies within so many characters."""
    end = 0
    for word in _WORD.finditer(text):
        if (word.start() + word.end()) / 2 > characters:
            break
        end = word.end()
    return text[:end].strip()


def _next_word_end(text: str, start: int) -> int:
    word = _WORD.search(text, start)
    return word.end() if word else len(text)


def _up_to_word_end(text: str, end: int) -> str:
    """Return `text` up to `end` and the punctuation that clings to it there."""
    tail = re.match(r"[^\w\s]*", text[end:]) if end else None
    return text[: end + (tail.end() if tail else 0)].strip()
