"""Serves Cartesia's `/tts/websocket` and `/tts/bytes` on a shared voice."""

import io
import time
import wave
from collections import deque

import msgspec
import numpy as np
import trio
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.websockets import WebSocket, WebSocketDisconnect

from dialog_local.speech import cartesia
from dialog_local.speech.audio import BYTES_PER_SAMPLE, Samples, encode, resample
from dialog_local.speech.cartesia import Cancel, Generation, OutputFormat, Refused, TextBuffer
from dialog_local.speech.models import Timing, Voice, spread

IDLE_SOCKET_SECONDS = 300.0  # Cartesia docs, concurrency limits and timeouts
CONTEXT_EXPIRES_SECONDS = 1.0  # after its last audio (Cartesia docs, contexts)
MAX_CONTEXTS = 50
MAX_QUEUED_REQUESTS = 1024  # of one context; beyond, a request is refused
MAX_BODY_BYTES = 256 << 10
_CHUNK_SECONDS = 0.08
_REMEMBERED_CONTEXTS = 256  # ended ones of a socket, so that late input is refused instead of spoken anew
_VOICED = 0.02  # of full scale: where a sentence's sound begins and ends


class Mouth:
    """The voice as the contexts share it: one sentence at a time, first come first served, and a limit of contexts."""

    def __init__(self, voice: Voice, max_contexts: int = MAX_CONTEXTS) -> None:
        self.max_contexts = max_contexts
        self.contexts = 0
        self._voice = voice
        self._turn = trio.CapacityLimiter(1)

    async def say(self, sentence: str, form: OutputFormat, speed: float) -> tuple[bytes, list[Timing]]:
        """Return a sentence as audio, and when each of its words is said."""
        return await trio.to_thread.run_sync(self._say, sentence, form, speed, limiter=self._turn)

    def _say(self, sentence: str, form: OutputFormat, speed: float) -> tuple[bytes, list[Timing]]:
        spoken = self._voice.say(sentence, speed)
        start, end = _voiced(spoken)
        timings = spread(sentence.split(), start / self._voice.rate, end / self._voice.rate)
        return encode(resample(spoken, self._voice.rate, form.sample_rate), form.encoding), timings


def _voiced(samples: Samples) -> tuple[int, int]:
    loud = np.flatnonzero(np.abs(samples) > _VOICED)
    return (int(loud[0]), int(loud[-1])) if len(loud) else (0, len(samples))


class Context:
    """One context: text comes in by `post`, `run` speaks it in order and says `done`."""

    def __init__(self, first: Generation, mouth: Mouth, outbox: "Outbox") -> None:
        self.context_id = first.context_id
        self._first = first
        self._mouth = mouth
        self._outbox = outbox
        self._inbox, self._requests = trio.open_memory_channel[Generation](MAX_QUEUED_REQUESTS)
        self._buffer = TextBuffer()
        self._speak_at = float("inf")  # when buffered text has waited long enough
        self._expires_at = float("inf")
        self._sent_bytes = 0
        self._flushes = 0
        self._cancelled = trio.Event()

    def post(self, request: Generation) -> None:
        """Queue a request. Raises `Refused` if it does not belong here."""
        if request.fixed() != self._first.fixed():
            message = "all fields but transcript, continue and flush must stay the same within a context"
            raise Refused(400, "invalid_request", "Context changed", message, self.context_id)
        try:
            self._inbox.send_nowait(request)
        except trio.WouldBlock:
            message = f"{MAX_QUEUED_REQUESTS} requests of this context are waiting to be spoken"
            raise Refused(429, "context_full", "Context full", message, self.context_id) from None

    def cancel(self) -> None:
        """Say nothing that has not begun; a sentence that has begun is still sent (Cartesia docs, contexts)."""
        self._cancelled.set()

    async def run(self) -> None:
        """Speak until the context ends, expires or is cancelled."""
        while not self._cancelled.is_set():
            request = await self._next()
            if request is None and not self._buffer:
                break
            if request is None:
                await self._speak(self._buffer.rest())
            elif await self._take(request):
                break
        await self._outbox.send(cartesia.done(self.context_id))

    async def _next(self) -> Generation | None:
        """The next request; None when buffered text is due, the context expired or was cancelled."""
        try:
            return self._requests.receive_nowait()  # what came while a sentence was spoken is not late
        except trio.WouldBlock:
            request: Generation | None = None
        with trio.move_on_at(self._speak_at if self._buffer else self._expires_at):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_cancel_when, self._cancelled, nursery.cancel_scope)
                request = await self._requests.receive()
                nursery.cancel_scope.cancel()
        return request

    async def _take(self, request: Generation) -> bool:
        """Speak what a request completes; True if it was the last."""
        waiting = bool(self._buffer)
        sentences = self._buffer.push(request.transcript)
        if not waiting or sentences:
            self._speak_at = trio.current_time() + request.max_buffer_delay_ms / 1000
        last = not request.continues
        if last or request.flush or request.max_buffer_delay_ms == 0:
            sentences += self._buffer.rest()
        await self._speak(sentences)
        if request.flush:
            self._flushes += 1
            await self._outbox.send(cartesia.flush_done(self.context_id, self._flushes))
        return last

    async def _speak(self, sentences: list[str]) -> None:
        for sentence in sentences:
            if self._cancelled.is_set():
                return
            began = time.monotonic()
            audio, timings = await self._mouth.say(sentence, self._first.output_format, self._first.speed)
            await self._send(audio, timings, (time.monotonic() - began) * 1000)
            self._expires_at = trio.current_time() + CONTEXT_EXPIRES_SECONDS

    async def _send(self, audio: bytes, timings: list[Timing], step_time_ms: float) -> None:
        form = self._first.output_format
        if self._first.add_timestamps:
            offset = self._sent_bytes / cartesia.bytes_per_second(form)
            shifted = [Timing(timing.word, timing.start + offset, timing.end + offset) for timing in timings]
            await self._outbox.send(cartesia.timestamps(self.context_id, shifted))
        size = BYTES_PER_SAMPLE[form.encoding] * int(form.sample_rate * _CHUNK_SECONDS)
        for start in range(0, len(audio), size):
            await self._outbox.send(
                cartesia.chunk(self.context_id, audio[start : start + size], step_time_ms, self._flushes)
            )
        self._sent_bytes += len(audio)


async def _cancel_when(event: trio.Event, scope: trio.CancelScope) -> None:
    await event.wait()
    scope.cancel()


class Outbox:
    """The socket's sending side, one message after the other."""

    def __init__(self, socket: WebSocket) -> None:
        self._socket = socket
        self._lock = trio.StrictFIFOLock()

    async def send(self, message: str) -> None:
        """Send; waits while the client does not read."""
        async with self._lock:
            await self._socket.send_text(message)


class Contexts:
    """The contexts of one socket."""

    def __init__(self, mouth: Mouth, outbox: Outbox, nursery: trio.Nursery) -> None:
        self._mouth = mouth
        self._outbox = outbox
        self._nursery = nursery
        self._open: dict[str, Context] = {}
        self._ended: deque[str] = deque(maxlen=_REMEMBERED_CONTEXTS)

    def handle(self, message: Generation | Cancel) -> None:
        """Bring a message to its context, which it may open. Raises `Refused`."""
        context = self._open.get(message.context_id)
        if isinstance(message, Cancel):
            if context is not None:
                context.cancel()
            return
        (context or self._begin(message)).post(message)

    def _begin(self, message: Generation) -> Context:
        context_id = message.context_id
        if context_id in self._ended:
            text = (
                f"context {context_id!r} has ended; it does so 1 s after its last audio, when cancelled, or without continue"
            )
            raise Refused(400, "context_expired", "Context expired", text, context_id)
        if self._mouth.contexts >= self._mouth.max_contexts:
            text = f"{self._mouth.max_contexts} contexts are active, which is the limit (--max-contexts)"
            raise Refused(429, "concurrency_limited", "Too many concurrent requests", text, context_id)
        context = self._open[context_id] = Context(message, self._mouth, self._outbox)
        self._mouth.contexts += 1
        self._nursery.start_soon(self._run, context)
        return context

    async def _run(self, context: Context) -> None:
        try:
            await context.run()
        finally:
            self._mouth.contexts -= 1
            del self._open[context.context_id]
            self._ended.append(context.context_id)


async def tts_websocket(socket: WebSocket, mouth: Mouth | None) -> None:
    """Serve one WebSocket; `mouth` is None while the voice is being loaded."""
    try:
        cartesia.authorize(socket.headers, socket.query_params)
        mouth = _ready(mouth)
    except Refused as refused:
        await socket.send_denial_response(JSONResponse(refused.body(), refused.status))
        return
    await socket.accept()
    outbox = Outbox(socket)
    try:
        async with trio.open_nursery() as nursery:
            await _read(socket, Contexts(mouth, outbox, nursery), outbox)
            nursery.cancel_scope.cancel()
        await socket.close(1000, "idle for 5 minutes")
    except* WebSocketDisconnect:
        pass  # the client has gone, and its contexts with it


async def _read(socket: WebSocket, contexts: Contexts, outbox: Outbox) -> None:
    """Read until the client has been idle for too long. Raises `WebSocketDisconnect`."""
    while True:
        with trio.move_on_after(IDLE_SOCKET_SECONDS) as patience:
            message = await socket.receive()
        if patience.cancelled_caught:
            return
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(message.get("code", 1005))
        text: str | None = message.get("text")
        try:
            contexts.handle(cartesia.parse_message(message["bytes"] if text is None else text))
        except Refused as refused:
            await outbox.send(cartesia.error(refused))


async def tts_bytes(request: Request, mouth: Mouth | None) -> Response:
    """Serve `POST /tts/bytes`: the whole text at once, as raw audio or a WAV file."""
    try:
        cartesia.authorize(request.headers, request.query_params)
        mouth = _ready(mouth)
        generation = cartesia.parse_generation(await _json(request))
        form = generation.output_format
        if form.container == "wav" and form.encoding != "pcm_s16le":
            raise Refused(400, "invalid_request", "Invalid request", f"a wav file of {form.encoding}: expected pcm_s16le")
    except Refused as refused:
        return JSONResponse(refused.body(), refused.status)
    buffer, audio = TextBuffer(), bytearray()
    for sentence in [*buffer.push(generation.transcript), *buffer.rest()]:
        audio += (await mouth.say(sentence, form, generation.speed))[0]
    if form.container == "wav":
        return Response(_wav(bytes(audio), form.sample_rate), media_type="audio/wav")
    return Response(bytes(audio), media_type="application/octet-stream")


async def _json(request: Request) -> object:
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > MAX_BODY_BYTES:
            raise Refused(413, "too_large", "Payload too large", f"the body is over {MAX_BODY_BYTES >> 10} KiB")
    try:
        fields: object = msgspec.json.decode(body)
    except msgspec.DecodeError as error:
        raise Refused(400, "invalid_json", "Invalid JSON", str(error)) from error
    return fields


def _wav(audio: bytes, rate: int) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as wav:
        wav.setnchannels(1)
        wav.setsampwidth(2)
        wav.setframerate(rate)
        wav.writeframes(audio)
    return file.getvalue()


def _ready(mouth: Mouth | None) -> Mouth:
    if mouth is None:
        raise Refused(503, "not_ready", "Not ready", "the voice is still being loaded; /healthz tells when it is ready")
    return mouth
