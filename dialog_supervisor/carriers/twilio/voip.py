"""One call's line at Twilio: its media messages in and out, and what can be asked of Twilio about the call."""

import re
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Literal

import msgspec
import structlog
import trio
from msgspec import Struct
from twilio.twiml.voice_response import Connect, VoiceResponse
from websockets.frames import CloseCode

from dialog_supervisor.carriers.base import CarrierError, Leg, StreamEnd
from dialog_supervisor.carriers.twilio import callbacks, wire
from dialog_supervisor.carriers.twilio.addresses import Addresses
from dialog_supervisor.carriers.twilio.recordings import (
    Recordings,
    RecordingsState,
    Transcription,
    TranscriptionState,
)
from dialog_supervisor.carriers.twilio.rest import TwilioRest
from dialog_supervisor.config import Config
from dialog_supervisor.websocket import MediaSocket, MediaSocketClosed
from protocol.messages import Dtmf, Event, Media, Metadata, StartRecording, StartTranscript, StreamingStarted, StreamStatus

START_TIMEOUT_S = 10.0  # Twilio sends `start` right after `connected`
MAX_UNREADABLE = 100  # messages that are nothing of Twilio's; more is not a slip but another program
_ENCODING = "audio/x-mulaw"
_DIGITS = re.compile(r"[0-9*#wW]{1,32}")  # Twilio docs, <Play digits>

log = structlog.get_logger("twilio")


class _NotOurs(Exception):
    """The socket belongs to another call, or to no call: it is closed with 1008, or the code given."""

    def __init__(self, reason: str, code: int = CloseCode.POLICY_VIOLATION) -> None:
        super().__init__(reason)
        self.code = code


class TwilioLine(Struct, frozen=True, forbid_unknown_fields=True):
    """What is under way at Twilio of a call that another dialogd goes on with."""

    stream_sid: str
    recordings: RecordingsState
    transcription: TranscriptionState


class TwilioLeg(Leg):
    """A call at Twilio. `connect` returns the verb that opens another stream for it.

    What its socket sends that makes no sense is counted and dropped; `docs/carriers.md` has the whole list.
    """

    __slots__ = (
        "_connect",
        "_encoder",
        "_heard_at",
        "_metadata",
        "_recordings",
        "_rest",
        "_serving",
        "_silence_s",
        "_stream_sid",
        "_transcription",
    )

    def __init__(
        self,
        metadata: Metadata,
        rest: TwilioRest,
        config: Config,
        connect: Callable[[], Connect],
        emit: Callable[[Event], None],
    ) -> None:
        super().__init__(emit)
        self._connect = connect
        self._metadata = metadata
        self._rest = rest
        self._silence_s = config.calls.silence_timeout
        sid, addresses = metadata.call_id, Addresses(config.gateway)
        self._recordings = Recordings(sid, self, rest, config.recordings, addresses.callback("recording"))
        self._transcription = Transcription(sid, self, rest, addresses.callback("transcript"))
        self._encoder = wire.Encoder("")
        self._stream_sid = ""
        self._heard_at = 0.0
        self._serving = trio.CancelScope()

    def _carried(self) -> bytes:
        recordings, transcription = self._recordings.state(), self._transcription.state()
        return msgspec.msgpack.encode(TwilioLine(self._stream_sid, recordings, transcription))

    def _take_up(self, carried: bytes) -> None:
        line = msgspec.msgpack.decode(carried, type=TwilioLine)
        self._stream_sid = line.stream_sid
        self._encoder = wire.Encoder(self._stream_sid)
        self._recordings.take_up(line.recordings)
        self._transcription.take_up(line.transcription)

    # Out

    def _send_media(self, audio: bytes) -> None:
        if self._socket is not None:
            self._socket.send(self._encoder.media(audio))

    def _send_mark(self, name: str) -> None:
        if self._socket is not None:
            self._socket.send(self._encoder.mark(name))

    def _send_clear(self) -> None:
        if self._socket is not None:
            self._socket.send(self._encoder.clear)

    # In

    async def stream(self, socket: MediaSocket) -> StreamEnd:
        self.release()  # a socket that came later is the one that Twilio uses
        self._heard_at = trio.current_time()
        ends: list[StreamEnd] = []

        async def until(end: Callable[[], Awaitable[StreamEnd]]) -> None:
            ends.append(await end())
            nursery.cancel_scope.cancel()

        try:
            async with trio.open_nursery() as nursery:
                self._serving = nursery.cancel_scope
                nursery.start_soon(until, self._silence)
                await until(partial(self._serve, socket))
        finally:
            if self._socket is socket:
                self._socket = None
                self.closed()
        return ends[0] if ends else StreamEnd.RELEASED

    def release(self) -> None:
        self._serving.cancel()

    async def _serve(self, socket: MediaSocket) -> StreamEnd:
        try:
            await self._begin(socket)
            await self._listen(socket)
        except MediaSocketClosed as closed:
            log.info("media socket closed", code=int(closed.code), reason=closed.reason)
        except trio.TooSlowError:
            log.warning("media socket refused", reason=f"no start within {START_TIMEOUT_S:g} s")
            socket.close(CloseCode.POLICY_VIOLATION, "no start")
        except _NotOurs as problem:
            log.warning("media socket refused", code=int(problem.code), reason=str(problem))
            socket.close(problem.code, str(problem))
        else:
            return StreamEnd.STOPPED
        return StreamEnd.LOST

    async def _listen(self, socket: MediaSocket) -> None:
        """Pass on what comes, until Twilio stops the stream."""
        await socket.each(self._hear)

    def _hear(self, data: bytes, text: bool) -> bool:
        """Act on a message; return whether it is the last."""
        message = self._read(data, text)
        if isinstance(message, wire.Media):
            self._media(message)
        elif isinstance(message, wire.Mark):
            self.marked(message.mark.name)
        elif isinstance(message, wire.Dtmf):
            self.emit(Dtmf(message.dtmf.digit))
        elif isinstance(message, wire.Stop):
            return True
        elif message is not None:
            self.counts["unexpected"] += 1  # a second `connected` or `start`
        return False

    async def _start(self, socket: MediaSocket) -> wire.Start:
        starts: list[wire.Start] = []

        def take(data: bytes, text: bool) -> bool:
            message = self._read(data, text)
            if isinstance(message, wire.Start):
                starts.append(message)
            elif message is not None and not isinstance(message, wire.Connected):
                self.counts["before_start"] += 1
            return bool(starts)

        await socket.each(take)
        (message,) = starts
        start = message.start
        if start.call_sid != self._metadata.call_id:
            raise _NotOurs("the stream is another call's")
        account_sid = self._metadata.fields.get("AccountSid")
        if start.account_sid and account_sid and start.account_sid != account_sid:
            raise _NotOurs("the stream is another account's")
        if start.media_format.encoding != _ENCODING or start.media_format.sample_rate != 8000:
            raise _NotOurs(f"the stream's format is {start.media_format.encoding}", CloseCode.UNSUPPORTED_DATA)
        return message

    async def _begin(self, socket: MediaSocket) -> None:
        """Wait until the stream has begun, unless that was told to another process, and take part in it."""
        message = None
        if not self._taken_over:
            self._opening = True
            try:
                with trio.fail_after(START_TIMEOUT_S):
                    message = await self._start(socket)
            finally:
                self._opening = False
        self._taken_over = False
        self._socket = socket
        self._heard_at = trio.current_time()
        if message is not None:
            self._introduce(message)
        self.open = True
        self.opened()

    def _introduce(self, message: wire.Start) -> None:
        start = message.start
        self._stream_sid = start.stream_sid or message.stream_sid
        self._encoder = wire.Encoder(self._stream_sid)
        if not self.introduced:
            self.introduced = True
            known = self._metadata
            self.emit(
                Metadata(known.call_id, known.carrier, known.caller, known.callee, known.fields, start.custom_parameters)
            )
            self.emit(StreamingStarted(self._stream_sid, _ENCODING, 8000))

    def _read(self, data: bytes, text: bool) -> wire.Incoming | None:
        """Return the message, or None for one that was counted and dropped."""
        now = self._now
        self._heard_at = now()
        if text:
            try:
                return wire.decode(data)
            except wire.Malformed as error:
                log.debug("message dropped", reason=str(error))
        self._unreadable()
        return None

    def _media(self, message: wire.Media) -> None:
        """Pass a frame on, in the order of arrival: TCP keeps it, and Twilio's numbers add nothing."""
        media = message.media
        if message.stream_sid not in ("", self._stream_sid) or not media.track.startswith("inbound"):
            self.counts["foreign"] += 1
            return
        self.counts["frames_in"] += 1
        if media.payload:
            emit = self.emit
            emit(Media(media.timestamp, media.payload))

    def _unreadable(self) -> None:
        self.counts["unreadable"] += 1
        if self.counts["unreadable"] > MAX_UNREADABLE:
            raise _NotOurs(f"more than {MAX_UNREADABLE} messages cannot be read")

    async def _silence(self) -> StreamEnd:
        """When nothing has come for long, ask Twilio whether there is still a call; when Twilio cannot say, go on."""
        while True:
            await trio.sleep_until(self._heard_at + self._silence_s)
            if trio.current_time() < self._heard_at + self._silence_s:
                continue
            self.counts["silences"] += 1
            try:
                return await self._end_of_silence()
            except CarrierError as error:
                log.warning("nothing comes from the carrier, and its API does not say why", reason=str(error))
            await trio.sleep(self._silence_s)

    async def _end_of_silence(self) -> StreamEnd:
        """Return how a silent stream is to end: for good, or so that Twilio asks what now and opens another."""
        if await self._rest.is_over(self._metadata.call_id):
            log.warning("the call is over at Twilio, which has not said so on the media socket")
            return StreamEnd.STOPPED
        log.warning("nothing comes from the carrier, although the call lives: its media socket is given up for another")
        return StreamEnd.LOST

    # The line

    async def hangup(self) -> None:
        await self._rest.complete(self._metadata.call_id)

    async def transfer_to(self, destination: str) -> None:
        await self._rest.dial(self._metadata.call_id, destination)

    async def send_dtmf(self, digits: str) -> None:
        """Have Twilio press keys. That replaces the call's document, so the same call comes back on a new stream."""
        if not _DIGITS.fullmatch(digits):
            raise CarrierError(f"{len(digits)} characters are no digits; use 0-9, *, #, w (0.5 s) and W (1 s), at most 32")
        document = VoiceResponse()
        document.play(digits=digits)
        document.append(self._connect())
        await self._rest.replace(self._metadata.call_id, document)

    async def start_recording(self, request: StartRecording) -> None:
        await self._recordings.start(request)

    async def pause_recording(self, behavior: Literal["silence", "skip"]) -> None:
        await self._recordings.pause(behavior)

    async def resume_recording(self) -> None:
        await self._recordings.resume()

    async def stop_recording(self) -> None:
        await self._recordings.stop()

    async def remove_recording(self) -> None:
        await self._recordings.remove()

    async def start_transcript(self, request: StartTranscript) -> None:
        await self._transcription.start(request)

    async def stop_transcript(self) -> None:
        await self._transcription.stop()

    async def run_errands(self) -> None:
        await self._recordings.run()

    def callback(self, about: str, fields: Mapping[str, str]) -> None:
        match about:
            case "recording":
                self._recordings.callback(fields)
            case "transcript":
                self._transcription.callback(fields)
            case "stream":
                self._stream_reported(callbacks.stream(fields))
            case "status":
                self.emit(callbacks.call(fields))

    def _stream_reported(self, report: StreamStatus) -> None:
        if report.status == "error":
            log.warning("Twilio reports an error of the media stream", stream=report.stream_id, reason=report.message)
        self.emit(report)
