"""The providers of text-to-speech as scripted servers with one face, and the adapters that talk with them."""

from base64 import b64encode
from collections import deque
from collections.abc import Callable
from typing import Any, ClassVar

import trio

from dialog_worker.participant import Word
from dialog_worker.tts.base import Speaking, WordTimings
from dialog_worker.tts.cartesia import CartesiaTTS
from dialog_worker.tts.elevenlabs import ElevenLabsTTS
from dialog_worker.tts.streaming import StreamingTTS
from protocol.messages import Message

from .scripted_provider import Peer, ScriptedProvider, events_until

WORD_S = 0.25  # which every word takes to say
WORD = bytes(round(WORD_S * 8000))


class Voice:
    """One connection as its server sees it: what it is to say, and what it says."""

    Adapter: ClassVar[Callable[..., StreamingTTS[Any]]]
    path = "/speech"

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self._heard: deque[tuple[str, str | None]] = deque()
        self._words: dict[str, int] = {}

    def take(self, frame: dict[str, Any]) -> list[tuple[str, str | None]]:
        """The context of a frame with its text, and with None where that ends it."""
        raise NotImplementedError

    async def send_word(self, context_id: str, word: str, begin_s: float) -> None:
        """Say one word, which begins so long after the context's first sample."""
        raise NotImplementedError

    async def finish(self, context_id: str) -> None:
        """All of it is said."""
        raise NotImplementedError

    async def fail(self, context_id: str, code: str) -> None:
        """It cannot be said."""
        raise NotImplementedError

    async def spoil(self, context_id: str) -> None:
        """Something that cannot be read, instead of audio."""
        raise NotImplementedError

    async def next(self) -> tuple[str, str | None]:
        """The next text with its context, or None for that context's end."""
        while not self._heard:
            self._heard += self.take(await self.peer.receive_json())
        return self._heard.popleft()

    async def text(self) -> tuple[str, str]:
        """The next text with its context."""
        while (heard := await self.next())[1] is None:
            pass
        return heard[0], (heard[1] or "").strip()

    async def whole(self) -> tuple[str, str]:
        """A context with all of its text, as soon as that is complete."""
        text = ""
        while (heard := await self.next())[1] is not None:
            text += heard[1] or ""
        return heard[0], text.strip()

    async def end(self) -> str:
        """The next context that is ended."""
        while (heard := await self.next())[1] is not None:
            pass
        return heard[0]

    async def say(self, context_id: str, text: str) -> None:
        """Some words, each `WORD_S` long."""
        for word in text.split():
            begin_s = WORD_S * self._words.get(context_id, 0)
            self._words[context_id] = self._words.get(context_id, 0) + 1
            await self.send_word(context_id, word, begin_s)


class Cartesia(Voice):
    """Cartesia, which times words from the context's first sample."""

    Adapter = CartesiaTTS

    def take(self, frame: dict[str, Any]) -> list[tuple[str, str | None]]:
        context_id = frame["context_id"]
        text = [(context_id, frame["transcript"])] if frame.get("transcript") else []
        return [*text, (context_id, None)] if frame.get("cancel") or not frame["continue"] else [*text]

    async def send_word(self, context_id: str, word: str, begin_s: float) -> None:
        times = {"words": [word], "start": [begin_s], "end": [begin_s + WORD_S]}
        await self.peer.send({"type": "timestamps", "context_id": context_id, "word_timestamps": times})
        await self.peer.send({"type": "chunk", "context_id": context_id, "data": b64encode(WORD).decode()})

    async def finish(self, context_id: str) -> None:
        await self.peer.send({"type": "done", "context_id": context_id, "done": True})

    async def fail(self, context_id: str, code: str) -> None:
        await self.peer.send({"type": "error", "context_id": context_id, "error_code": code, "message": "No."})

    async def spoil(self, context_id: str) -> None:
        await self.peer.send({"type": "chunk", "context_id": context_id, "data": "not base64!"})


class ElevenLabs(Voice):
    """ElevenLabs, which times characters from the frame's first sample."""

    Adapter = ElevenLabsTTS
    path = ""

    def take(self, frame: dict[str, Any]) -> list[tuple[str, str | None]]:
        if "close_context" in frame:
            return [(frame["context_id"], None)]
        return [(frame["context_id"], frame["text"])] if frame.get("text", "").strip() else []

    async def send_word(self, context_id: str, word: str, begin_s: float) -> None:
        each_ms = 1000 * WORD_S / len(word)
        starts = [round(each_ms * i) for i in range(len(word))] + [round(1000 * WORD_S)]
        times = {"chars": [*word, " "], "charStartTimesMs": starts, "charDurationsMs": [round(each_ms)] * len(word) + [0]}
        await self.peer.send({"audio": b64encode(WORD).decode(), "contextId": context_id, "alignment": times})

    async def finish(self, context_id: str) -> None:
        await self.peer.send({"isFinal": True, "contextId": context_id})

    async def fail(self, context_id: str, code: str) -> None:
        await self.peer.send({"message": "No.", "error": code, "code": 1008, "contextId": context_id})

    async def spoil(self, context_id: str) -> None:
        await self.peer.send({"audio": "not base64!", "contextId": context_id})


VOICES = [Cartesia, ElevenLabs]


class Stage:
    """An adapter at work, and the provider that it talks with."""

    def __init__(self, kind: type[Voice], provider: ScriptedProvider, nursery: trio.Nursery) -> None:
        self.kind = kind
        self.provider = provider
        self._nursery = nursery
        self.tts: StreamingTTS[Any] = self.open()

    def open(self, **options: Any) -> StreamingTTS[Any]:
        """Construct the adapter anew; it does not run yet."""
        url = self.provider.url.removesuffix("/speech") + self.kind.path
        self.tts = self.kind.Adapter("voice", "key", url=url, **options)
        return self.tts

    def run(self) -> StreamingTTS[Any]:
        """Begin the call."""
        self._nursery.start_soon(self.tts.run)
        return self.tts

    async def accept(self) -> Voice:
        """The next connection."""
        return self.kind(await self.provider.accept())

    async def begin(self) -> Voice:
        """Begin the call and accept its first connection."""
        self.run()
        return await self.accept()

    def post(self, uuid: str, text: str, *, done: bool = True) -> None:
        """Have something said."""
        self.tts.post(Message(uuid, text, done))

    async def until_done(self) -> list[Speaking]:
        """What is emitted up to the end of an utterance."""
        return await events_until(self.tts, is_last)

    async def until_told(self, word: str) -> list[Speaking]:
        """What is emitted up to the timing of this word."""
        return await events_until(self.tts, lambda event: word in [w.text for w in words_of([event])])


def is_last(event: Speaking) -> bool:
    """Whether this is the end of an utterance."""
    return isinstance(event, Message) and event.done


def audio_of(events: list[Speaking]) -> bytes:
    """All of the audio."""
    return b"".join(event.data for event in events if isinstance(event, Message))


def words_of(events: list[Speaking]) -> list[Word]:
    """All of the words."""
    return [word for event in events if isinstance(event, WordTimings) for word in event.words]


def spaced(text: str) -> list[Word]:
    """The words of a text that were each said in `WORD_S`."""
    each_ms = round(1000 * WORD_S)
    return [Word(word, i * each_ms, (i + 1) * each_ms) for i, word in enumerate(text.split())]
