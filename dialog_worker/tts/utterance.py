"""One utterance on its way through a provider, and the contexts that it is given there one after another. No I/O."""

import math
from collections import deque

from dialog_worker.participant import Word
from dialog_worker.tts.base import Speaking, WordTimings
from dialog_worker.tts.script import Script
from protocol.messages import Message

EARLY_S = 0.02  # before its reported end a word is said, because providers round; a frame of telephone audio


class Utterance:
    """Its text, what the provider owes of it, and what came back and is `held` until it is its turn."""

    def __init__(self, uuid: str) -> None:
        self.uuid = uuid
        self.script = Script()
        self.complete = False  # its text is all here
        self.finished = False  # its audio is all here, or will never be
        self.closed = False  # the provider knows that the text is complete
        self.closing_at = math.inf  # when a context that was probably over was closed
        self.owed_since = math.inf  # when audio began to be due
        self.refused_since = math.inf  # when the provider first had no room for it
        self.retry_at = -math.inf  # not to be sent before
        self.mended_at = -1  # where it was taken up again after a lost connection
        self.context: Context | None = None
        self.contexts = 0
        self.received = 0  # bytes of audio
        self.held: deque[Speaking] = deque()

    def is_pending(self) -> bool:
        """Whether the provider has yet to be told something."""
        return not self.finished and (bool(self.script.unsent) or (self.complete and not self.closed))

    def is_owed(self) -> bool:
        """Whether the provider has something of it to say."""
        return not self.finished and (self.context is not None or bool(self.script.unsent.strip()))

    def is_unfinished(self) -> bool:
        """Whether text or audio of it is still to come."""
        return not self.complete or self.is_owed()

    def expect(self, now: float) -> None:
        """From now on audio is due, unless it was before, or there is no reason for any yet."""
        if self.is_owed() and (self.complete or self.script.ends_a_sentence):
            self.owed_since = min(self.owed_since, now)

    def open(self) -> "Context":
        """Give it another context."""
        self.contexts += 1
        self.context = Context(f"{self.uuid}-{self.contexts}", self)
        return self.context

    def take_back(self, position: int, now: float) -> None:
        """What follows `position` will be sent again, in another context."""
        self.script.rewind(position)
        self.context, self.closed, self.closing_at = None, False, math.inf
        self.expect(now)

    def interrupted(self, idle_s: float, now: float) -> bool:
        """Its context is lost. Returns whether it can be mended: by saying again what is known not to have been said."""
        context, self.context = self.context, None
        if context is None or context.is_idle(now, idle_s):
            return True
        if not context.has_audio():
            self.take_back(context.begin, now)
            return True
        position = max(self.script.said, context.begin)
        if not context.timed or position <= self.mended_at:
            return False
        self.mended_at = position
        self.take_back(position, now)
        return True


class Context:
    """One context of an utterance, which needs another when the provider has ended the one before for want of text."""

    def __init__(self, context_id: str, utterance: Utterance) -> None:
        self.id = context_id
        self.utterance = utterance
        self.begin = utterance.script.sent  # in the text
        self.sent_at = -math.inf
        self.heard_at = -math.inf
        self.timed = False  # its words are reported
        self._base = utterance.received
        self._words: deque[tuple[str, float, float, int]] = deque()  # not heard yet; with the text's position behind them

    def has_audio(self) -> bool:
        """Whether any of it was heard."""
        return self.heard_at > -math.inf

    def is_idle(self, now: float, idle_s: float) -> bool:
        """Whether all that it was given seems to be said, and the provider to have ended it."""
        return self.heard_at >= self.sent_at and now - self.heard_at > idle_s and not self.utterance.script.lags

    def hear(self, data: bytes, now: float, rate: int) -> None:
        """Audio arrived, at `rate` bytes a second."""
        utterance = self.utterance
        if not self.has_audio():
            self._base = utterance.received
        self.heard_at = now
        utterance.owed_since = now if utterance.complete else math.inf
        utterance.closing_at = math.inf  # it was not over
        utterance.refused_since = math.inf
        utterance.received += len(data)
        utterance.script.answer()
        utterance.held.append(Message(utterance.uuid, data))
        self.tell_words(rate)

    def report(self, words: list[tuple[str, float, float]], rate: int) -> None:
        """Words are timed, in seconds since the context's first sample."""
        script = self.utterance.script
        self._words += [(text, start_s, end_s, script.follow(text)) for text, start_s, end_s in words]
        self.timed |= bool(words)
        self.tell_words(rate)

    def tell_words(self, rate: int, *, last: bool = False) -> None:
        """Tell the words whose audio is here; at the `last`, all: so what was told before a failure was really said."""
        base_s, heard_s = self._base / rate, self.utterance.received / rate
        told = []
        while self._words and (last or (self.has_audio() and base_s + self._words[0][2] <= heard_s + EARLY_S)):
            text, start_s, end_s, position = self._words.popleft()
            self.utterance.script.said = max(self.utterance.script.said, position)
            start_ms, end_ms = (min(round(1000 * (base_s + time_s)), int(1000 * heard_s)) for time_s in (start_s, end_s))
            told.append(Word(text, start_ms, end_ms))
        if told:
            self.utterance.held.append(WordTimings(self.utterance.uuid, tuple(told)))
