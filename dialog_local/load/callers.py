"""The callers of a load test: each places a call and talks on its media socket; one task keeps the time for all of them."""

import heapq
import os
import time
from functools import partial

import msgspec
import trio
from websockets.frames import Opcode

from dialog_local.carrier import media, twiml
from dialog_local.load.timer import Timer
from dialog_local.load.wire import FRAME_BYTES, STAMP, CallFailed, Connection, Stream, Target, ask, connect, mark, upgrade
from protocol.readiness import when_readable

FRAME_S = 0.02  # Twilio sends 50 frames a second
SETUP_S = 15.0  # Twilio docs, webhooks connection overrides: the longest that a webhook may take
FIRST_ECHO_S = 5.0  # from `start`; an agent that echoes answers within milliseconds
CLOSE_S = 5.0  # from `stop` to the end of the connection
STRAGGLERS_S = 1.0  # for frames that are under way when no more are sent
CALLER = "+15550001111"
_decoder: msgspec.json.Decoder[media.Request] = msgspec.json.Decoder(media.Request)


async def dial(target: Target, call_sid: str, caller: str = CALLER) -> twiml.Connect:
    """Tell the webhook of a call, and return how its stream is to be opened. Raises `CallFailed` or `OSError`."""
    numbers = {"From": caller, "To": "+15550002222", "Caller": caller, "Called": "+15550002222"}
    params = {"CallSid": call_sid, "AccountSid": target.account_sid, **numbers}
    params |= {"CallStatus": "ringing", "Direction": "inbound", "ApiVersion": "2010-04-01"}
    document = await ask(target, params)
    try:
        verbs = twiml.parse(document, target.url)
    except twiml.DocumentError as error:
        raise CallFailed(str(error)) from error
    if not verbs or not isinstance(verbs[0], twiml.Connect):
        raise CallFailed(f"the webhook's answer does not begin with <Connect><Stream>: {document[:200]}")
    return verbs[0]


class Meter:
    """What all callers measure. Times are in seconds, by `time.perf_counter`; frames count while the window is open."""

    def __init__(self) -> None:
        self.webhooks: list[float] = []
        self.first_echoes: list[float] = []  # from `start`
        self.echoes: list[float] = []
        self.sent = 0
        self.complete = trio.Event()  # the window is closed and every frame of it has come back
        self._opened_at = self._closed_at = float("inf")

    @property
    def lost(self) -> int:
        """Frames of the window that have not come back."""
        return self.sent - len(self.echoes)

    def open(self) -> None:
        """Count what is sent from now on."""
        self._opened_at = time.perf_counter()

    def close(self) -> float:
        """Count nothing that is sent from now on, and return how many seconds the window was open."""
        self._closed_at = time.perf_counter()
        self._check()
        return self._closed_at - self._opened_at

    def count_sent(self, sent_at: float) -> None:
        """A frame leaves."""
        if self._opened_at <= sent_at < self._closed_at:
            self.sent += 1

    def count_echo(self, sent_at: float, now: float) -> None:
        """A frame has come back."""
        if self._opened_at <= sent_at < self._closed_at:
            self.echoes.append(now - sent_at)
            self._check()

    def _check(self) -> None:
        if self._closed_at < float("inf") and self.lost == 0:
            self.complete.set()


class Pacer:
    """Sends every call's frames when they are due, 20 ms after the ones before, however late those were."""

    def __init__(self) -> None:
        self._due: list[tuple[float, int, LoadCall]] = []
        self._count = 0
        self._timer: Timer | None = None

    def add(self, call: "LoadCall") -> None:
        """Keep the time for a call that has just sent its first frame, until it sends no more."""
        self._count += 1
        heapq.heappush(self._due, (time.perf_counter() + FRAME_S, self._count, call))
        self._set()

    async def run(self) -> None:
        """Serve until cancelled."""
        with Timer() as timer:
            self._timer = timer
            self._set()
            try:
                await when_readable(timer.fd, self._send)
            finally:
                self._timer = None

    def _set(self) -> None:
        if self._timer is not None and self._due:
            self._timer.set(self._due[0][0])

    def _send(self) -> bool:
        """Send what is due. Return whether that was the last: never."""
        if self._timer is not None:
            self._timer.take()
        now = time.perf_counter()
        while self._due and self._due[0][0] <= now:
            due, number, call = self._due[0]
            if call.send_frame():
                heapq.heapreplace(self._due, (due + FRAME_S, number, call))
            else:
                heapq.heappop(self._due)
        self._set()
        return False


class LoadCall:
    """One caller, from the webhook to the end of the media socket. `error` says what went wrong, if something did."""

    def __init__(self, target: Target, meter: Meter, pacer: Pacer) -> None:
        self.settled = trio.Event()  # audio has come back, or none ever will
        self.answered = False
        self.error = ""
        self.sid = "CA" + os.urandom(16).hex()
        self.verb: twiml.Connect | None = None  # what the webhook was answered with
        self.stream: Stream | None = None  # once it has begun
        self._target = target
        self._meter = meter
        self._pacer = pacer
        self._away: dict[bytes, float] = {}  # when the frames that have not come back were sent, by their marks
        self._frames = 0
        self._quiet = False  # no more frames are sent
        self._home = trio.Event()  # and all have come back
        self._leaving = False
        self._patience = trio.CancelScope()
        self._started_at = 0.0
        self._connection: Connection | None = None

    async def run(self, arrives_at: float) -> None:
        """Place the call at a time of trio's clock, and talk until `stop`."""
        await trio.sleep_until(arrives_at)
        try:
            with trio.fail_after(SETUP_S):
                url, parameters = await self._dial()
                connection = await connect(self._target.address)
            with connection:
                with trio.fail_after(SETUP_S):
                    rest = await upgrade(connection, url, self._target.token)
                await self._talk(connection, Stream(self._target.account_sid, self.sid, parameters), rest)
        except trio.TooSlowError:
            self.error = f"it was not connected within {SETUP_S:g} s"
        except CallFailed as error:
            self.error = str(error)
        except OSError as error:
            host, port = self._target.address
            self.error = f"the connection to {host}:{port} failed after {self._frames} frames: {error}"
        finally:
            self._connection = None
            self.settled.set()

    async def _dial(self) -> tuple[str, dict[str, str]]:
        """Ask the webhook, and return the media socket's URL and parameters."""
        asked_at = time.perf_counter()
        self.verb = await dial(self._target, self.sid)
        self._meter.webhooks.append(time.perf_counter() - asked_at)
        return self.verb.url, self.verb.parameters

    async def _talk(self, connection: Connection, stream: Stream, data: bytes) -> None:
        connection.write(stream.connected())
        self._started_at = time.perf_counter()
        connection.write(stream.start())
        self.stream, self._connection = stream, connection
        self._patience.deadline = trio.current_time() + FIRST_ECHO_S
        if self.send_frame():
            self._pacer.add(self)
        with self._patience:
            await self._read(connection, stream, data)
        if self._patience.cancelled_caught and self._leaving:
            raise CallFailed(f"the server did not close the media socket within {CLOSE_S:g} s of `stop`")
        if self._patience.cancelled_caught:
            self.stop()
            with trio.move_on_after(CLOSE_S):
                await self._read(connection, stream, b"")
            raise CallFailed(f"no frame came back within {FIRST_ECHO_S:g} s; does the agent echo? examples/echo does")
        if not self._leaving:
            raise CallFailed(f"the server closed the connection after {self._frames} frames")

    async def _read(self, connection: Connection, stream: Stream, data: bytes) -> None:
        """Act on what was received and on what comes, until the server, which does so last, ends the connection."""
        self._take(connection, stream, data)
        await connection.each(partial(self._take, connection, stream))

    def send_frame(self) -> bool:
        """Send a frame. Return False when the call sends no more."""
        if self.stream is None or self._connection is None or self._quiet or self._leaving:
            return False
        now = time.perf_counter()
        self._frames += 1
        self._away[mark(STAMP.pack(now))] = now
        self._meter.count_sent(now)
        try:
            self._connection.write(self.stream.media(now))
        except OSError:
            return False  # the reader finds the end of the connection, and says so
        return True

    async def finish(self) -> None:
        """Send no more frames, give those under way the time to come back, and `stop`."""
        self._quiet = True
        if self._away:
            with trio.move_on_after(STRAGGLERS_S):
                await self._home.wait()
        self.stop()

    def stop(self) -> None:
        """Say `stop` and close; `run` returns when the server has closed too."""
        if self.stream is None or self._connection is None:
            return
        self._leaving = True
        self._patience.deadline = trio.current_time() + CLOSE_S
        try:
            self._connection.write(self.stream.stop())
        except OSError as error:
            self.error = f"the connection was lost at `stop`: {error}"

    def _take(self, connection: Connection, stream: Stream, data: bytes) -> None:
        """Act on what was received."""
        for opcode, payload in stream.receive(data):
            if opcode == Opcode.TEXT:
                self._message(connection, stream, payload)
            elif opcode == Opcode.PING:
                connection.write(stream.pong(payload))
            elif opcode == Opcode.CLOSE and not self._leaving:
                code, reason = int.from_bytes(payload[:2], "big"), payload[2:].decode(errors="replace")
                raise CallFailed(f"the server closed the media socket with {code} {reason}, after {self._frames} frames")

    def _message(self, connection: Connection, stream: Stream, text: bytes) -> None:
        try:
            message = _decoder.decode(text)
        except msgspec.DecodeError as error:
            raise CallFailed(f"the server sent what is no message of Media Streams: {error}: {text[:120]!r}") from error
        if isinstance(message, media.Media):
            self._heard(message.media.payload)
        elif isinstance(message, media.Mark) and not self._leaving:
            connection.write(stream.mark(message.mark.name))

    def _heard(self, audio: bytes) -> None:
        """Account for the frames in a piece of audio that are ours."""
        now = time.perf_counter()
        for at in range(0, len(audio) - FRAME_BYTES + 1, FRAME_BYTES):
            sent_at = self._away.pop(mark(audio[at : at + STAMP.size]), None)
            if sent_at is None:
                continue
            self._meter.count_echo(sent_at, now)
            if not self.answered:
                self.answered = True
                self._patience.deadline = float("inf")
                self._meter.first_echoes.append(now - self._started_at)
                self.settled.set()
        if self._quiet and not self._away:
            self._home.set()
