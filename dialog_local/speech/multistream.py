"""Serves ElevenLabs's `/v1/text-to-speech/{voice_id}/multi-stream-input` on a shared voice.

Each whole sentence is spoken at once, as with `auto_mode`; the chunk schedule of the other mode is not imitated.
"""

import math

import trio
from starlette.responses import JSONResponse
from starlette.websockets import WebSocket, WebSocketDisconnect

from dialog_local.speech import elevenlabs
from dialog_local.speech.audio import BYTES_PER_SAMPLE
from dialog_local.speech.cartesia import TextBuffer, bytes_per_second
from dialog_local.speech.elevenlabs import Input, Options, Refused
from dialog_local.speech.models import Timing
from dialog_local.speech.speak import Mouth, Outbox

MAX_CONTEXTS = 5  # of a socket, not to be configured (ElevenLabs docs, multi-context guide)
MAX_QUEUED_FRAMES = 1024  # of one context
PARTING_SECONDS = 0.2
_CHUNK_SECONDS = 0.25


class Context:
    """One context: frames come in by `post`; `run` speaks them in order until the close, or until long after the last."""

    def __init__(self, first: Input, options: Options, mouth: Mouth, outbox: Outbox) -> None:
        self.context_id = first.context_id
        self._options = options
        self._speed = first.voice_settings.speed if first.voice_settings else 1.0
        self._mouth = mouth
        self._outbox = outbox
        self._inbox, self._frames = trio.open_memory_channel[Input](MAX_QUEUED_FRAMES)
        self._buffer = TextBuffer()
        self._unflushed = False
        self._dropped = False

    def post(self, frame: Input) -> None:
        """Queue a frame. Raises `Refused`."""
        self._unflushed = (self._unflushed or bool(frame.text.strip())) and not frame.flush
        self._dropped |= frame.close_context and self._unflushed  # a close alone is how a client interrupts
        try:
            self._inbox.send_nowait(frame)
        except trio.WouldBlock:
            raise Refused("rate_limited", f"{MAX_QUEUED_FRAMES} frames of this context are waiting to be spoken") from None

    async def run(self) -> None:
        """Speak until the context ends."""
        while True:
            with trio.move_on_after(self._options.inactivity_s) as patience:
                frame = await self._frames.receive()
            if patience.cancelled_caught:
                return
            await self._speak(self._buffer.push(frame.text))
            if frame.flush:
                await self._speak(self._buffer.rest())
            if frame.close_context:
                return

    async def _speak(self, sentences: list[str]) -> None:
        for sentence in sentences:
            if self._dropped:
                return
            audio, timings = await self._mouth.say(sentence, self._options.form, self._speed)
            await self._send(audio, timings)

    async def _send(self, audio: bytes, timings: list[Timing]) -> None:
        form = self._options.form
        size = BYTES_PER_SAMPLE[form.encoding] * int(form.sample_rate * _CHUNK_SECONDS)
        spelled = elevenlabs.characters(timings)
        for start in range(0, len(audio), size):
            begin_s = start / bytes_per_second(form)
            end_s = begin_s + _CHUNK_SECONDS if start + size < len(audio) else math.inf
            said = [character for character in spelled if begin_s <= character[1] < end_s]
            aligned = said if self._options.aligned else None
            await self._outbox.send(elevenlabs.audio(self.context_id, audio[start : start + size], aligned, begin_s))


class Contexts:
    """The contexts of one socket."""

    def __init__(self, options: Options, mouth: Mouth, outbox: Outbox, nursery: trio.Nursery) -> None:
        self._options = options
        self._mouth = mouth
        self._outbox = outbox
        self._nursery = nursery
        self._open: dict[str | None, Context] = {}

    def handle(self, frame: Input) -> None:
        """Bring a frame to its context. Any frame for an unknown one opens it, but a close. Raises `Refused`."""
        context = self._open.get(frame.context_id)
        if context is None:
            if frame.close_context and not frame.text.strip():
                return
            context = self._begin(frame)
        elif frame.voice_settings is not None:
            raise Refused("invalid_input_message", "voice_settings may only be in the first message of a context")
        context.post(frame)

    def _begin(self, frame: Input) -> Context:
        if len(self._open) >= MAX_CONTEXTS:
            text = (
                f"Maximum simultaneous contexts per WebSocket connection exceeded ({MAX_CONTEXTS}). "
                "Please close an existing context before opening a new one."
            )
            raise Refused("max_active_conversations", text)
        context = self._open[frame.context_id] = Context(frame, self._options, self._mouth, self._outbox)
        self._nursery.start_soon(self._run, context)
        return context

    async def _run(self, context: Context) -> None:
        await context.run()
        del self._open[context.context_id]  # only now, after its last audio, is its place free
        await self._outbox.send(elevenlabs.final(context.context_id))


async def multi_stream_input(socket: WebSocket, mouth: Mouth | None) -> None:
    """Serve one WebSocket; `mouth` is None while the voice is being loaded."""
    try:
        elevenlabs.authorize(socket.headers)
        options = elevenlabs.parse_options(socket.query_params)
        if mouth is None:
            raise Refused("not_ready", "the voice is still being loaded; /healthz tells when it is ready", 503)
    except Refused as refused:
        await socket.send_denial_response(JSONResponse(refused.body(), refused.status))
        return
    await socket.accept()
    refusals: list[Refused] = []
    outbox = Outbox(socket)
    try:
        async with trio.open_nursery() as nursery:
            refusals += await _read(socket, options, Contexts(options, mouth, outbox, nursery))
            nursery.cancel_scope.cancel()
        if not refusals:
            await _part(socket)
        for refusal in refusals:
            await outbox.send(refusal.frame())
        await socket.close(1008 if refusals else 1000, refusals[0].code if refusals else "")
    except* WebSocketDisconnect:
        pass  # the client has gone, and its contexts with it


async def _part(socket: WebSocket) -> None:
    """Let the client close first. Raises `WebSocketDisconnect` if it does.

    Clients close right after `close_socket`, and Hypercorn cannot answer a close while the application sends one: both
    write to the same stream without a lock, for which trio ends the whole server.
    """
    with trio.move_on_after(PARTING_SECONDS):
        while (message := await socket.receive())["type"] != "websocket.disconnect":
            pass
        raise WebSocketDisconnect(message.get("code", 1005))


async def _read(socket: WebSocket, options: Options, contexts: Contexts) -> list[Refused]:
    """Read until the socket shall be closed: why, if not because the client asked. Raises `WebSocketDisconnect`."""
    while True:
        with trio.move_on_after(options.inactivity_s) as patience:
            message = await socket.receive()
        if patience.cancelled_caught:
            text = f"Have not received a new text input within the timeout of {options.inactivity_s} seconds."
            return [Refused("input_timeout_exceeded", text)]
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(message.get("code", 1005))
        text = message.get("text") or message.get("bytes") or ""
        try:
            frame = elevenlabs.parse_input(text)
            if frame.close_socket:
                return []
            if frame.text or frame.context_id:  # else it keeps the socket alive, and that is all
                contexts.handle(frame)
        except Refused as refused:
            return [refused]
