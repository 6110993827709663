"""What OpenAI's transcription sessions send and are sent, and how their items become an agent's turns. No I/O.

Wire facts: OpenAI docs, "Realtime transcription" guide and Realtime API reference (server and client events).
"""

import math
from collections import deque
from collections.abc import Iterator
from typing import Any

from msgspec import Struct

from dialog_worker.participant import ProviderError
from dialog_worker.stt.base import Final, Hearing, Interim, SpeechEnded, SpeechStarted

REMEMBERED_ITEMS = 64  # closed ones, of which news may still come


class Append(Struct, frozen=True, tag_field="type", tag="input_audio_buffer.append"):
    """More audio; base64 on the wire."""

    audio: bytes


class Commit(Struct, frozen=True, tag_field="type", tag="input_audio_buffer.commit"):
    """The audio so far is one item: transcribe it."""

    event_id: str


class Incoming(Struct, frozen=True, tag_field="type"):
    """Base of what OpenAI sends."""


class Session(Struct, frozen=True):
    """What we read of a session; `expires_at` is in seconds since the epoch."""

    expires_at: float | None = None


class SessionCreated(Incoming, frozen=True, tag="session.created"):
    """The first message of a connection."""

    session: Session = Session()


class SessionUpdated(Incoming, frozen=True, tag="session.updated"):
    """A `session.update` was taken."""


class VoiceStarted(Incoming, frozen=True, tag="input_audio_buffer.speech_started"):
    """The server heard a voice, from this time of the session's audio on (padding included)."""

    item_id: str
    audio_start_ms: float = 0.0


class VoiceStopped(Incoming, frozen=True, tag="input_audio_buffer.speech_stopped"):
    """The server heard it end."""

    item_id: str
    audio_end_ms: float = 0.0


class Committed(Incoming, frozen=True, tag="input_audio_buffer.committed"):
    """Audio became an item, which will be transcribed."""

    item_id: str


class Delta(Incoming, frozen=True, tag="conversation.item.input_audio_transcription.delta"):
    """More of an item's transcript; some models send it while the item is still being spoken."""

    item_id: str
    delta: str | None = ""


class LogProb(Struct, frozen=True):
    """How sure the model was of one token."""

    logprob: float


class Completed(Incoming, frozen=True, tag="conversation.item.input_audio_transcription.completed"):
    """An item's whole transcript. Items may be completed in any order."""

    item_id: str
    transcript: str = ""
    logprobs: tuple[LogProb, ...] | None = None

    @property
    def confidence(self) -> float | None:
        """The tokens' mean probability, if the session includes it."""
        known = [token.logprob for token in self.logprobs or ()]
        return math.exp(sum(known) / len(known)) if known else None


class Problem(Struct, frozen=True):
    """What went wrong; `event_id` names the client's event that it answers."""

    type: str | None = None
    code: str | None = None
    message: str | None = None
    event_id: str | None = None

    def told(self) -> ProviderError:
        """In an agent's words."""
        return ProviderError(f"OpenAI: {self.message or 'no description'}", code=self.code or self.type or "error")


class ItemFailed(Incoming, frozen=True, tag="conversation.item.input_audio_transcription.failed"):
    """An item cannot be transcribed."""

    item_id: str
    error: Problem = Problem()


class Failure(Incoming, frozen=True, tag="error"):
    """A client's event was refused, or the server is in trouble; mostly the session goes on."""

    error: Problem = Problem()


class Item(Struct, eq=False):
    """One stretch of speech on its way to a transcript; times in seconds of the connection's audio."""

    began_s: float
    item_id: str = ""  # known at once if the server found the speech, and with its first news if we did
    serial: int = 0  # our own number, for a commit that is refused
    ended_s: float = math.inf
    text: str = ""
    shown: str = ""  # of the text, as the last Interim
    told: bool = False
    unheard: bool = False  # on this connection: it began on the one before
    due_at: float = math.inf
    owed_since: float = math.inf  # when its end was heard
    asked_again: bool = False  # for its transcript, on another connection
    done: bool = False
    confidence: float | None = None
    error: ProviderError | None = None


class Turns:
    """Makes of a session's items what an agent hears: one after the other as they were spoken. No I/O.

    While an item waits for its transcript the next keeps its news to itself, since a turn ends with its transcript.
    `due_at` is the time by which `expire` should be called; an item is given `timeout_s` from its end, or its last news.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._items = deque[Item]()
        self._closed = deque[str](maxlen=REMEMBERED_ITEMS)
        self._nameless = 0  # closed before the server told their ids
        self._done_s = 0.0
        self._serial = 0

    @property
    def idle(self) -> bool:
        """Nobody speaks, and every transcript has come."""
        return not self._items

    @property
    def due_at(self) -> float:
        """When the first transcript is overdue."""
        return min((item.due_at for item in self._items), default=math.inf)

    @property
    def owed_since(self) -> float:
        """Since when a transcript is waited for."""
        return min((item.owed_since for item in self._items), default=math.inf)

    @property
    def done_s(self) -> float:
        """Audio up to here has its transcripts."""
        return self._done_s

    def missing(self, now: float) -> Item | None:
        """The utterance whose transcript is overdue, if there is nothing of it."""
        head = self._items[0] if self._items else None
        return None if head is None or head.unheard or head.due_at > now or head.text.strip() else head

    def settled_s(self, judged_s: float) -> float:
        """Audio up to here need not be sent again on another connection; in what comes before `judged_s` all speech is
        found.
        """
        return self._items[0].began_s if self._items else max(self._done_s, judged_s)

    def began(self, at_s: float, item_id: str = "") -> Iterator[Hearing]:
        """Speech began; without an id if it was found on our side."""
        if item_id and (item_id in self._closed or self._known(item_id)):
            return
        self._open(at_s, item_id)
        yield from self._news()

    def stopped(self, at_s: float, now: float, item_id: str = "") -> int:
        """Speech ended; returns the item's serial number, 0 if it is over already."""
        item = self._find(item_id) if item_id else self._spoken()
        if item is None:
            return 0
        item.ended_s = at_s
        item.due_at = now + self._timeout_s
        item.owed_since = min(item.owed_since, now)
        return item.serial

    def committed(self, item_id: str, now: float) -> Iterator[Hearing]:
        """The server has an item's whole audio."""
        if (item := self._find(item_id)) and not item.done:
            item.due_at = now + self._timeout_s
        yield from self._news()

    def delta(self, item_id: str, text: str, now: float) -> Iterator[Hearing]:
        """More of a transcript."""
        if (item := self._find(item_id)) and not item.done:
            item.text += text
            if not math.isinf(item.due_at):
                item.due_at = now + self._timeout_s
        yield from self._news()

    def completed(self, item_id: str, transcript: str, confidence: float | None) -> Iterator[Hearing]:
        """A whole transcript."""
        if (item := self._find(item_id)) and not item.done:
            item.text, item.confidence = transcript, confidence
            _close(item)
        yield from self._news()

    def failed(self, item_id: str, error: ProviderError) -> Iterator[Hearing]:
        """No transcript will come; what there is of it is better than nothing."""
        if (item := self._find(item_id)) and not item.done:
            _close(item, error)
        yield from self._news()

    def refused(self, serial: int, error: ProviderError) -> Iterator[Hearing]:
        """The server did not take our commit, so that the item gets no id."""
        item = next((item for item in self._items if item.serial == serial), None)
        if item is None:
            self._nameless = max(0, self._nameless - 1)
            yield error
            return
        item.item_id = item.item_id or f"refused {serial}"
        _close(item, error)
        yield from self._news()

    def expire(self, now: float) -> Iterator[Hearing]:
        """Close the items whose transcripts are overdue with what there is of them."""
        for item in self._items:
            if item.due_at <= now:
                text = f"OpenAI: no transcript within {self._timeout_s:g} s of the end of an utterance"
                _close(item, None if item.text.strip() else ProviderError(text, code="timeout"))
        yield from self._news()

    def reconnected(self, now: float) -> None:
        """A new connection hears all that is not settled again, and gives it new ids."""
        head = self._items[0] if self._items else None
        self._items.clear()
        self._closed.clear()
        self._nameless, self._done_s = 0, 0.0
        if head is not None:  # its beginning has been told, so it must end whatever happens
            again = Item(0.0, text=head.text, shown=head.shown, told=True, unheard=True, asked_again=head.asked_again)
            again.due_at, again.owed_since = now + self._timeout_s, head.owed_since
            self._items.append(again)

    def stop(self) -> Iterator[Hearing]:
        """End the open turn; its transcript is left to whoever hears its audio again."""
        was_open = bool(self._items)
        self._items.clear()
        if was_open:
            yield SpeechEnded()

    def _open(self, at_s: float, item_id: str) -> Item:
        if self._items and self._items[-1].unheard:
            item = self._items[-1]
            item.began_s, item.item_id, item.text, item.unheard, item.due_at = at_s, item_id, "", False, math.inf
        else:
            item = Item(at_s, item_id)
            self._items.append(item)
        self._serial += 1
        item.serial = self._serial
        return item

    def _spoken(self) -> Item | None:
        return next((item for item in self._items if math.isinf(item.ended_s) and not item.unheard), None)

    def _known(self, item_id: str) -> Item | None:
        return next((item for item in self._items if item.item_id == item_id), None)

    def _find(self, item_id: str) -> Item | None:
        """The item of this id; one found on our side gets it now, and one that was never announced begins now."""
        if item_id in self._closed:
            return None
        if item := self._known(item_id):
            return item
        if self._nameless:
            self._nameless -= 1
            self._closed.append(item_id)
            return None
        for item in self._items:
            if not item.item_id and not item.unheard:
                item.item_id = item_id
                return item
        return self._open(self._done_s, item_id)

    def _news(self) -> Iterator[Hearing]:
        while self._items:
            head = self._items[0]
            if not head.told:
                head.told = True
                yield SpeechStarted()
            if not head.done:
                text = head.text.strip()
                if text and text != head.shown and not head.unheard:
                    head.shown = text
                    yield Interim(text)
                return
            self._items.popleft()
            self._forget(head)
            yield from _ending(head)

    def _forget(self, item: Item) -> None:
        if not math.isinf(item.ended_s):
            self._done_s = max(self._done_s, item.ended_s)
        if item.item_id:
            self._closed.append(item.item_id)
        elif not item.unheard:
            self._nameless += 1


def _close(item: Item, error: ProviderError | None = None) -> None:
    item.done, item.due_at, item.owed_since, item.error = True, math.inf, math.inf, error


def _ending(item: Item) -> Iterator[Hearing]:
    if item.error is not None:
        yield item.error
    if text := item.text.strip():
        yield Final(text, item.confidence)
    yield SpeechEnded()


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with `changes`, object by object."""
    result = dict(base)
    for name, value in changes.items():
        before = result.get(name)
        result[name] = merged(before, value) if isinstance(before, dict) and isinstance(value, dict) else value
    return result
