"""The ears and the voice of the bench: Deepgram's and Cartesia's wire protocols, saying what the talks have planned."""

import os
from collections.abc import Mapping
from itertools import pairwise

import msgspec
import trio
from websockets.frames import Opcode

from dialog_local.speech import cartesia
from dialog_local.speech.models import spread
from scripts.benches.turn_sockets import DatedConnection, accepted
from scripts.benches.turn_talk import Delays, Talk
from scripts.benches.turn_websocket import accept, frame, messages

BYTES_PER_S = 8000  # of mu-law
CHARACTERS_PER_S = 15.0  # of speech
CHUNK_S = 0.2  # of audio, in one of the voice's messages
CHUNK_PAUSE_S = 0.05  # between them: a voice is several times faster than it speaks
KEY_BYTES = 16  # at a chunk's beginning, by which it is known again
_LOUD = b"\x2a"


class Ears:
    """Deepgram's `/v1/listen`."""

    def __init__(self, talks: Mapping[str, Talk]) -> None:
        self._talks = talks

    async def serve(self, stream: trio.SocketStream) -> None:
        """Serve one call's connection."""
        connection = accepted(stream)
        with connection:
            try:
                upgrade = await accept(connection)
                ear = _Ear(connection)
                if talk := self._talks.get(upgrade.query.get("tag", "")):
                    talk.ear = ear
                    talk.ready["ear"].set()
                async for opcode, payload in messages(connection):
                    if opcode == Opcode.BINARY:
                        ear.heard_bytes += len(payload)
            except OSError:
                return


class _Ear:
    def __init__(self, connection: DatedConnection) -> None:
        self._connection = connection
        self._began_s = 0.0
        self.heard_bytes = 0

    def speech_started(self) -> float:
        self._began_s = self.heard_bytes / BYTES_PER_S
        return self._tell({"type": "SpeechStarted", "channel": [0], "timestamp": self._began_s})

    def interim(self, text: str) -> float:
        return self._tell(self._results(text, final=False))

    def final(self, text: str) -> float:
        return self._tell(self._results(text, final=True))

    def _results(self, text: str, *, final: bool) -> dict[str, object]:
        end_s = self.heard_bytes / BYTES_PER_S
        words = [
            {"word": timing.word.lower().strip(",?."), "punctuated_word": timing.word, "confidence": 0.99}
            | {"start": round(timing.start, 3), "end": round(timing.end, 3)}
            for timing in spread(text.split(), self._began_s, end_s)
        ]
        return {
            "type": "Results",
            "channel_index": [0, 1],
            "start": self._began_s,
            "duration": end_s - self._began_s,
            "is_final": final,
            "speech_final": final,
            "from_finalize": False,
            "channel": {"alternatives": [{"transcript": text, "confidence": 0.99, "words": words}]},
        }

    def _tell(self, message: dict[str, object]) -> float:
        return self._connection.send(frame(msgspec.json.encode(message)))


class Voice:
    """Cartesia's `/tts/websocket`."""

    def __init__(self, talks: Mapping[str, Talk], delays: Delays) -> None:
        self._talks = talks
        self._delay_s = delays.voice_ms / 1000

    async def serve(self, stream: trio.SocketStream) -> None:
        """Serve one call's connection."""
        connection = accepted(stream)
        with connection:
            try:
                upgrade = await accept(connection)
                talk = self._talks.get(upgrade.headers.get("x-bench-call", ""))
                if talk:
                    talk.ready["voice"].set()
                async with trio.open_nursery() as nursery:
                    await self._listen(connection, talk, nursery)
                    nursery.cancel_scope.cancel()
            except* OSError:
                pass  # the call is over

    async def _listen(self, connection: DatedConnection, talk: Talk | None, nursery: trio.Nursery) -> None:
        contexts: dict[str, _Context] = {}
        async for _, payload in messages(connection):
            request = cartesia.parse_message(payload)
            if isinstance(request, cartesia.Cancel):
                if context := contexts.pop(request.context_id, None):
                    context.scope.cancel()
                continue
            if talk and request.transcript.strip():
                talk.text_to_say(connection.arrived_at)
            if (context := contexts.get(request.context_id)) is None:
                context = contexts[request.context_id] = _Context(request.context_id, connection, talk)
                nursery.start_soon(context.run, self._delay_s)
            context.add(request.transcript, last=not request.continues)


class _Context:
    """One utterance: its text comes in pieces, its audio leaves in chunks, faster than it is spoken."""

    def __init__(self, context_id: str, connection: DatedConnection, talk: Talk | None) -> None:
        self.scope = trio.CancelScope()
        self._id = context_id
        self._connection = connection
        self._talk = talk
        self._send, self._pieces = trio.open_memory_channel[str](64)
        self._said_s = 0.0

    def add(self, text: str, *, last: bool) -> None:
        if text.strip():
            self._send.send_nowait(text)
        if last:
            self._send.close()

    async def run(self, delay_s: float) -> None:
        with self.scope:
            await trio.sleep(delay_s)
            async for piece in self._pieces:
                await self._say(piece)
            self._write(cartesia.done(self._id))

    async def _say(self, text: str) -> None:
        seconds = len(text) / CHARACTERS_PER_S
        self._write(cartesia.timestamps(self._id, spread(text.split(), self._said_s, self._said_s + seconds)))
        self._said_s += seconds
        chunks = max(1, round(seconds / CHUNK_S))
        for begin, end in pairwise(round(seconds * BYTES_PER_S * part / chunks) for part in range(chunks + 1)):
            key = os.urandom(KEY_BYTES)
            at = self._write(cartesia.chunk(self._id, key + _LOUD * (end - begin - KEY_BYTES), 1.0, 1))
            if self._talk:
                self._talk.audio_written(key, at)
            await trio.sleep(CHUNK_PAUSE_S)

    def _write(self, message: str) -> float:
        return self._connection.send(frame(message.encode()))
