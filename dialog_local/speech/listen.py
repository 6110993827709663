"""Serves Deepgram's `/v1/listen`: the live WebSocket and the pre-recorded POST, on a shared recogniser."""

import json
import time
from dataclasses import dataclass, replace
from typing import TypeAlias

import trio
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.websockets import WebSocket, WebSocketDisconnect

from dialog_local.speech.audio import Resampler, Samples, StreamDecoder, UnreadableAudio, decode, read_wav, resample
from dialog_local.speech.deepgram import (
    CloseStream,
    Finalize,
    Messages,
    Options,
    Refused,
    SchemaError,
    authorize,
    parse_control,
    parse_options,
)
from dialog_local.speech.hearing import RATE, Happening, Segment, Segmenter, SpeechStarted, UtteranceEnded
from dialog_local.speech.models import Recogniser

SILENT_CLIENT_SECONDS = 10.0  # Deepgram docs, audio keep alive: then 1011 NET-0001
PENDING_HAPPENINGS = 8  # waiting for the recogniser; beyond, the socket is not read until it has caught up
MAX_RECORDING_BYTES = 32 << 20  # an hour of telephone audio
_INTERIM_SECONDS = 0.3
_INTERIM_SHARE = 4  # an interim result may cost this stream at most a quarter of the recogniser's time
_PAUSE_SECONDS = 0.12  # a pause this long may become the end: transcribe now, so that the final result is ready then


class Ear:
    """The recogniser as the streams share it: one call at a time, first come first served."""

    def __init__(self, recogniser: Recogniser) -> None:
        self._recogniser = recogniser
        self._turn = trio.CapacityLimiter(1)

    @property
    def busy(self) -> bool:
        """Somebody is using it, so what is not urgent should not queue."""
        return self._turn.borrowed_tokens > 0

    async def transcribe(self, audio: Samples) -> str:
        """Return what is said in audio at 16 kHz."""
        return await trio.to_thread.run_sync(self._recogniser.transcribe, audio, limiter=self._turn)


@dataclass(frozen=True, eq=False)
class _Draft:
    """A segment that is still being spoken, to be transcribed as far as it has come."""

    segment: Segment


_Work: TypeAlias = Happening | _Draft


class Stream:
    """One live stream: `hear` takes audio in, `run` sends what comes of it. The two meet in a bounded queue.

    Audio is judged at once (that is cheap) and transcribed in a thread. Drafts are skipped while anything else waits;
    final segments never are: when `PENDING_HAPPENINGS` of them wait, `hear` waits too.
    """

    def __init__(self, socket: WebSocket, options: Options, ear: Ear) -> None:
        endpointing, utterance_end = options.endpointing_ms, options.utterance_end_ms
        self.messages = Messages(options)
        self._socket = socket
        self._options = options
        self._ear = ear
        self._decoder = StreamDecoder(options.encoding)
        self._resampler = Resampler(options.sample_rate, RATE)
        self._segmenter = Segmenter(
            endpointing_s=None if endpointing is None else endpointing / 1000,
            utterance_end_s=None if utterance_end is None or not options.interim_results else utterance_end / 1000,
        )
        self._work, self._todo = trio.open_memory_channel[_Work](PENDING_HAPPENINGS)
        self._drafting = False
        self._drafted: tuple[float, float, str] | None = None  # start and voice end of what was transcribed, and the text
        self._next_draft = 0.0
        self._said_something = False  # since the last UtteranceEnd

    @property
    def seconds(self) -> float:
        """Audio heard."""
        return self._segmenter.now

    async def hear(self, data: bytes) -> None:
        """Take a binary frame."""
        self.messages.count(data)
        for happening in self._segmenter.feed(self._resampler.feed(self._decoder.feed(data))):
            await self._work.send(happening)
        self._maybe_draft()

    async def finalize(self, *, answer: bool) -> None:
        """Transcribe what is open; `answer` also when nothing is, as Deepgram mostly does after Finalize."""
        segment = self._segmenter.finalize()
        if segment is None and answer:
            now = self._segmenter.now
            segment = Segment(_NOTHING, now, now, now, from_finalize=True)
        if segment is not None:
            await self._work.send(segment)

    def finish(self) -> None:
        """Let `run` end when it has done what is queued."""
        self._work.close()

    async def run(self) -> None:
        """Send results until `finish`."""
        async for work in self._todo:
            match work:
                case SpeechStarted(at):
                    self._next_draft = at + _INTERIM_SECONDS
                    if self._options.vad_events:
                        await self._socket.send_text(self.messages.speech_started(at))
                case _Draft(segment):
                    await self._send_draft(segment)
                case Segment():
                    await self._send_final(work)
                case UtteranceEnded(voice_end):
                    if self._said_something:
                        await self._socket.send_text(self.messages.utterance_end(voice_end))
                    self._said_something = False

    def _maybe_draft(self) -> None:
        if self._drafting or self._ear.busy or self._todo.statistics().current_buffer_used:
            return
        segment = self._segmenter.open_segment()
        if segment is None or self._already(segment) is not None:
            return
        due = self._options.interim_results and segment.end >= self._next_draft
        if due or self._segmenter.quiet_s >= _PAUSE_SECONDS:
            self._drafting = True
            self._work.send_nowait(_Draft(segment))

    def _already(self, segment: Segment) -> str | None:
        """The text of all the voice in a segment, if a draft has it."""
        if self._drafted is None or self._drafted[:2] != (segment.start, segment.voice_end):
            return None
        return self._drafted[2]

    async def _send_draft(self, segment: Segment) -> None:
        began = time.monotonic()
        text = await self._ear.transcribe(segment.audio)
        self._next_draft = segment.end + max(_INTERIM_SECONDS, _INTERIM_SHARE * (time.monotonic() - began))
        if segment.end - segment.voice_end >= _PAUSE_SECONDS:  # otherwise its last sound may still be fading
            self._drafted = (segment.start, segment.voice_end, text)
        self._drafting = False
        if text and self._options.interim_results:
            await self._socket.send_text(self.messages.results(segment, text, is_final=False))

    async def _send_final(self, segment: Segment) -> None:
        text = self._already(segment)
        if text is None:
            text = await self._ear.transcribe(segment.audio) if len(segment.audio) else ""
        self._said_something = self._said_something or bool(text)
        await self._socket.send_text(self.messages.results(segment, text, is_final=True))


_NOTHING = decode(b"", "pcm_mulaw")


async def listen(socket: WebSocket, ear: Ear | None) -> None:
    """Serve one WebSocket; `ear` is None while the recogniser is being loaded."""
    try:
        authorize(socket.headers)
        options = parse_options(socket.query_params)
        ear = _ready(ear)
    except Refused as refused:
        await socket.send_denial_response(refusal(refused))
        return
    stream = Stream(socket, options, ear)
    await socket.accept(headers=[(b"dg-request-id", stream.messages.request_id.encode())])
    try:
        await _serve(socket, stream)
    except* WebSocketDisconnect:
        pass  # the client has gone; whatever it had said is of no use to anybody


async def _serve(socket: WebSocket, stream: Stream) -> None:
    timed_out = False
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream.run)
        try:
            await _read(socket, stream)
            await stream.finalize(answer=False)
            stream.finish()
        except trio.TooSlowError:
            timed_out = True
            nursery.cancel_scope.cancel()
    if timed_out:
        reason = "NET-0001: did not receive audio data or a text message within the timeout window"
        await socket.close(1011, reason)
        return
    await socket.send_text(json.dumps({"type": "Metadata", **stream.messages.metadata(stream.seconds)}))
    await socket.close(1000)


async def _read(socket: WebSocket, stream: Stream) -> None:
    """Read until the client closes the stream. Raises `WebSocketDisconnect`, or `trio.TooSlowError` if it falls silent."""
    with trio.fail_after(SILENT_CLIENT_SECONDS) as patience:
        while True:
            data = await _receive(socket)
            patience.deadline = float("inf")  # the client waits for us now, not we for it
            if isinstance(data, bytes):
                if not data:
                    return
                await stream.hear(data)
            elif await _control(socket, stream, data):
                return
            patience.deadline = trio.current_time() + SILENT_CLIENT_SECONDS


async def _control(socket: WebSocket, stream: Stream, text: str) -> bool:
    """Obey a text frame; True if it closes the stream."""
    try:
        control = parse_control(text)
    except SchemaError as error:
        await socket.send_text(stream.messages.error(str(error)))
        return False
    if isinstance(control, Finalize):
        await stream.finalize(answer=True)
    return isinstance(control, CloseStream)


async def _receive(socket: WebSocket) -> str | bytes:
    message = await socket.receive()
    if message["type"] == "websocket.disconnect":
        raise WebSocketDisconnect(message.get("code", 1005))
    text: str | None = message.get("text")
    return message["bytes"] if text is None else text


async def transcribe_recording(request: Request, ear: Ear | None) -> Response:
    """Serve `POST /v1/listen`: a WAV file, or raw audio as the query describes it."""
    try:
        authorize(request.headers)
        ear = _ready(ear)
        body = await _body(request)
        is_wav = body.startswith(b"RIFF")
        options = parse_options(request.query_params, raw_audio=not is_wav)
        audio = await trio.to_thread.run_sync(_recording, body, options, is_wav)
    except Refused as refused:
        return refusal(refused)
    except UnreadableAudio as error:
        return refusal(Refused(400, "Bad Request", f"corrupt or unsupported data: {error}"))
    segments = await trio.to_thread.run_sync(_segments, audio)
    parts = [(segment, text) for segment in segments if (text := await ear.transcribe(segment.audio))]
    messages = Messages(options)
    messages.count(body)
    alternative = messages.alternative(" ".join(text for _, text in parts), parts)
    return JSONResponse(
        {"metadata": messages.metadata(len(audio) / RATE), "results": {"channels": [{"alternatives": [alternative]}]}}
    )


async def _body(request: Request) -> bytes:
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > MAX_RECORDING_BYTES:
            raise Refused(413, "Payload Too Large", f"the recording is over {MAX_RECORDING_BYTES >> 20} MiB")
    if not body:
        raise Refused(400, "Bad Request", "the body is empty; send audio")
    return bytes(body)


def _recording(body: bytes, options: Options, is_wav: bool) -> Samples:
    samples, rate = read_wav(body) if is_wav else (decode(body, options.encoding), options.sample_rate)
    return resample(samples, rate, RATE)


def _segments(audio: Samples) -> list[Segment]:
    segmenter = Segmenter()
    found = [happening for happening in segmenter.feed(audio) if isinstance(happening, Segment)]
    last = segmenter.finalize()
    return [*found, replace(last, from_finalize=False)] if last else found


def _ready(ear: Ear | None) -> Ear:
    if ear is None:
        raise Refused(503, "NOT_READY", "the recogniser is still being loaded; /healthz tells when it is ready")
    return ear


def refusal(refused: Refused) -> JSONResponse:
    """Answer what cannot be served, as Deepgram does: the reason is in `dg-error` too, for upgrades show no body."""
    request_id = Messages(Options()).request_id
    headers = {"dg-error": str(refused).replace("\n", " "), "dg-request-id": request_id}
    body = {"err_code": refused.code, "err_msg": str(refused), "request_id": request_id}
    return JSONResponse(body, refused.status, headers)
