"""The providers of speech-to-text as scripted servers with one face, and the adapters that talk with them."""

import base64
from collections.abc import Callable
from typing import Any, ClassVar

import msgspec
import trio

from dialog_worker.stt.deepgram import DeepgramSTT
from dialog_worker.stt.openai import OpenAISTT
from dialog_worker.stt.streaming import StreamingSTT

from .scripted_provider import Peer, ScriptedProvider
from .telephone import SECOND

BUFFER = "input_audio_buffer."
TRANSCRIPTION = "conversation.item.input_audio_transcription."


class Recogniser:
    """One connection as its server sees it: what it has heard, and what it says about that."""

    Adapter: ClassVar[Callable[..., StreamingSTT[Any]]]
    options: ClassVar[dict[str, Any]] = {}
    question: ClassVar[str]

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.audio = b""
        self.asked = trio.Event()  # for a sign of life
        self.text = ""

    async def set_up(self) -> None:
        """What comes before the audio."""

    def take(self, frame: str | bytes) -> None:
        """Take one frame."""
        if isinstance(frame, bytes):
            self.audio += frame
        elif (event := msgspec.json.decode(frame))["type"] == self.question:
            self.asked.set()
        elif "audio" in event:
            self.audio += base64.b64decode(event["audio"])

    async def hear(self, seconds: float) -> bytes:
        """The audio of this connection, as soon as there is so much of it."""
        while len(self.audio) < seconds * SECOND:
            self.take(await self.peer.receive())
        return self.audio

    async def until_asked(self) -> None:
        """Wait for the question whether the server lives."""
        while not self.asked.is_set():
            self.take(await self.peer.receive())

    async def begin(self) -> None:
        """Notice a voice."""

    async def write(self, text: str) -> None:
        """Understand some words more."""

    async def end_speech(self) -> None:
        """Notice the voice's end, where the wire has a word for it."""

    async def finish(self) -> None:
        """End the utterance."""

    async def say(self, text: str) -> None:
        """A whole utterance."""
        await self.begin()
        await self.write(text)
        await self.finish()

    async def show_life(self) -> None:
        """Answer the question whether the server lives, having found no words."""


class Deepgram(Recogniser):
    """Deepgram Nova."""

    Adapter = DeepgramSTT
    question = "Finalize"

    async def begin(self) -> None:
        self.text = ""
        await self.peer.send({"type": "SpeechStarted", "channel": [0], "timestamp": 0.1})

    async def write(self, text: str) -> None:
        self.text = f"{self.text} {text}".strip()
        await self._send(self.text)

    async def finish(self) -> None:
        await self._send(self.text, is_final=True, speech_final=True)

    async def settle(self, text: str, until_s: float) -> None:
        """A final result that does not end the utterance."""
        alternatives = [{"transcript": text, "confidence": 0.9, "words": []}]
        channel = {"alternatives": alternatives}
        await self.peer.send({"type": "Results", "start": 0.0, "duration": until_s, "is_final": True, "channel": channel})

    async def show_life(self) -> None:
        await self._send("", is_final=True, from_finalize=True)

    async def _send(self, text: str, **flags: bool) -> None:
        channel = {"alternatives": [{"transcript": text, "confidence": 0.9, "words": []}]}
        duration = len(self.audio) / SECOND
        await self.peer.send({"type": "Results", "start": 0.0, "duration": duration, "channel": channel, **flags})


class OpenAI(Recogniser):
    """OpenAI with turn detection of its own."""

    Adapter = OpenAISTT
    options: ClassVar[dict[str, Any]] = {"turn_detection": {"type": "server_vad", "silence_duration_ms": 500}}
    question = "session.update"
    count = 0

    async def set_up(self) -> None:
        await self.peer.send({"type": "session.created", "session": {}})
        assert (await self.peer.receive_json())["type"] == "session.update"
        await self.peer.send({"type": "session.updated", "session": {}})

    async def begin(self) -> None:
        OpenAI.count += 1
        self.item_id = f"item {self.count}"
        self.text = ""
        await self._send(BUFFER + "speech_started", audio_start_ms=0)

    async def write(self, text: str) -> None:
        await self._send(TRANSCRIPTION + "delta", delta=f" {text}")
        self.text = f"{self.text} {text}".strip()

    async def end_speech(self) -> None:
        await self._send(BUFFER + "speech_stopped", audio_end_ms=len(self.audio) * 1000 // SECOND)
        await self._send(BUFFER + "committed")

    async def finish(self) -> None:
        await self.end_speech()
        await self._send(TRANSCRIPTION + "completed", transcript=self.text)

    async def show_life(self) -> None:
        await self.peer.send({"type": "session.updated", "session": {}})

    async def _send(self, kind: str, **fields: Any) -> None:
        await self.peer.send({"type": kind, "item_id": self.item_id, **fields})


RECOGNISERS = [Deepgram, OpenAI]


class Line:
    """An adapter in a call, and the server that its connections arrive at."""

    def __init__(self, kind: type[Recogniser], provider: ScriptedProvider, nursery: trio.Nursery, **options: Any) -> None:
        self._kind = kind
        self._provider = provider
        self.stt = kind.Adapter("key", url=provider.url, **{**kind.options, **options})
        self.ended = trio.Event()
        nursery.start_soon(self._run)

    async def _run(self) -> None:
        await self.stt.run()
        self.ended.set()

    async def accept(self) -> Recogniser:
        """The next connection, set up."""
        recogniser = self._kind(await self._provider.accept())
        await recogniser.set_up()
        return recogniser
