"""One call: the carrier's leg, the worker's process, and what happens when either ends.

A call goes `ringing` (its webhook is being answered), `connecting` (the carrier is to open a media socket), `streaming`,
`ending` (one side is done, the other is given time) and `ended`. Every state but the last has a deadline.
"""

import math
import secrets
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from enum import StrEnum

import structlog
import trio
from msgspec import Struct

from dialog_supervisor.carriers.base import CarrierError, Leg, StreamEnd, Unsupported
from dialog_supervisor.config import CallsConfig, TransferConfig
from dialog_supervisor.generation import Generation, NoWorker
from dialog_supervisor.transfer import is_allowed
from dialog_supervisor.websocket import MediaSocket
from dialog_supervisor.worker import Worker
from protocol.framing import ProtocolError
from protocol.link import LinkClosed, OutboxFull
from protocol.messages import (
    Abort,
    Command,
    Dispose,
    Error,
    Event,
    Failure,
    Hangup,
    Heartbeat,
    Media,
    Metadata,
    Post,
    RemoveRecording,
    Reply,
    Request,
    SendDtmf,
    StartRecording,
    StartTranscript,
    StopRecording,
    StreamingStopped,
    Trace,
    TransferTo,
)

MAX_REQUESTS = 16  # a worker's requests under way at a time
MAX_REQUEST_S = 600.0
STEPS_KEPT = 512  # of the conversation's steps, for whoever begins to watch later
_LAST_WORDS_S = 0.5  # for what an ended worker still had in the pipe
_WATCHER_STEPS = 1024  # not yet read by a watcher, who then loses the call

log = structlog.get_logger("call")


class State(StrEnum):
    """Where a call is."""

    RINGING = "ringing"
    CONNECTING = "connecting"
    STREAMING = "streaming"
    ENDING = "ending"
    ENDED = "ended"


class Next(StrEnum):
    """What the carrier shall do with a caller."""

    CONNECT = "connect"
    FALLBACK = "fallback"
    HANGUP = "hangup"


class Refused(Exception):
    """A request that the operator does not permit."""


class Step(Struct, frozen=True):
    """Something that happened in a call, for whoever watches it. `t` is in seconds since the call began."""

    t: float
    kind: str
    text: str
    fields: dict[str, str] = {}


class Call:
    """A call from its webhook to the last trace of it."""

    def __init__(
        self,
        metadata: Metadata,
        make_leg: Callable[[Callable[[Event], None]], Leg],
        generation: Generation,
        config: CallsConfig,
        transfer: TransferConfig,
    ) -> None:
        self.id = metadata.call_id
        self.metadata = metadata
        self.generation = generation.name
        self.started_at = trio.current_time()
        self.token = secrets.token_urlsafe(24)
        self.leg = make_leg(self._tell)
        self.worker = Worker(generation.name, self.id)
        self.state = State.RINGING
        self.reason = ""
        self._config = config
        self._transfer = transfer
        self._generation = generation
        self._deadline = math.inf
        self._changed = trio.Event()
        self._over = trio.Event()  # the conversation is over
        self._released = trio.Event()  # the carrier needs nothing more from us
        self._worked = trio.Event()  # the worker is gone and all it said is read
        self._returning = False  # the carrier is about to stop the stream, and to open another
        self._parting = ""  # why the carrier is about to stop the stream, if this side asked for it
        self._asked_in_vain = False  # the carrier has had its time to ask what comes after a lost stream
        self._fallback = False
        self._streams = 0
        self._requests = 0
        self._dropped = 0
        self._steps: deque[Step] = deque(maxlen=STEPS_KEPT)
        self._watchers: set[trio.MemorySendChannel[Step]] = set()
        self._enter(State.RINGING, config.connect_timeout)

    # Its states

    def _enter(self, state: State, timeout: float = math.inf) -> None:
        self.state = state
        self._deadline = trio.current_time() + timeout
        self._changed.set()
        self._changed = trio.Event()
        self._step("state", state.value)

    def answered(self) -> str:
        """The carrier is being told to connect: return the one-use token of the media socket that it will open."""
        if self.state is State.RINGING:
            self._enter(State.CONNECTING, self._config.connect_timeout)
        return self.token

    def claim(self, token: str) -> bool:
        """Use up the token. Return False when it is not this call's, or was used, or the call is over."""
        if self._over.is_set() or not secrets.compare_digest(token, self.token):
            return False
        self.token = secrets.token_urlsafe(24)
        return True

    def end(self, reason: str, *, fallback: bool = False) -> None:
        """The conversation is over. With `fallback`, the caller is still there and must not be left in silence."""
        if self._over.is_set():
            return
        self.reason, self._fallback = reason, fallback
        self._enter(State.ENDING)
        self._over.set()

    def stream_ended(self, *, gone: bool) -> None:
        """The carrier says that its stream is no more. `gone`: nor is the caller."""
        if gone:
            self._fallback = False
            self.end("the caller hung up")
        else:
            self.leg.release()

    def next_step(self) -> Next:
        """Answer the carrier's question what to do with the caller."""
        if not self._over.is_set():
            return Next.CONNECT
        self._released.set()
        return Next.FALLBACK if self._fallback else Next.HANGUP

    async def run(self) -> None:
        """Live. Returns when nothing of the call is left."""
        with structlog.contextvars.bound_contextvars(call=self.id):
            log.info("call begins", caller=self.metadata.caller, callee=self.metadata.callee, generation=self.generation)
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._work)
                    nursery.start_soon(self._keep_deadlines)
                    await self._over.wait()
                    await self._close()
                    nursery.cancel_scope.cancel()
            finally:
                self.leg.release()
                self.worker.close()
                self._enter(State.ENDED)
                for watcher in self._watchers:
                    watcher.close()
                seconds = round(trio.current_time() - self.started_at, 1)
                log.info("call ended", reason=self.reason, seconds=seconds, media_dropped=self._dropped, **self.leg.counts)

    async def _keep_deadlines(self) -> None:
        last = self.started_at + self._config.max_duration
        while not self._over.is_set():
            changed, state = self._changed, self.state
            with trio.move_on_at(min(self._deadline, last)) as scope:
                await changed.wait()
            if scope.cancelled_caught and trio.current_time() >= last:
                self.end(f"it lasted {self._config.max_duration:g} s (calls.max_duration)")
            elif scope.cancelled_caught:
                self._asked_in_vain = self._streams > 0
                self.end(f"no media socket was opened in time while {state}", fallback=True)

    async def _close(self) -> None:
        """Take leave of both sides at once: the worker within its grace, the carrier within `ending_timeout`."""
        self.leg.interrupted()
        self._tell(StreamingStopped(self.reason))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.worker.stop, self.reason, self._config.shutdown_grace)
            self.leg.release()
            await self._release_line()
        with trio.move_on_after(_LAST_WORDS_S):
            await self._worked.wait()

    async def _release_line(self) -> None:
        """Wait until the carrier has asked what comes after the stream; if it does not ask, end the call by its API."""
        with trio.move_on_after(0 if self._asked_in_vain else self._config.ending_timeout):
            if self._streams or self._fallback:
                await self._released.wait()
            return
        try:
            with trio.fail_after(self._config.ending_timeout):
                await self.leg.hangup()
        except (CarrierError, trio.TooSlowError) as error:
            log.warning("the carrier neither asked what comes after the stream, nor could be told", reason=str(error))

    # The carrier's side

    async def stream(self, socket: MediaSocket) -> None:
        """Serve a media socket of this call until it ends."""
        if self._over.is_set():
            return
        with structlog.contextvars.bound_contextvars(call=self.id):
            self._streams += 1
            self._enter(State.STREAMING)
            mine = self._streams
            try:
                end = await self.leg.stream(socket)
            except Exception:  # the call's boundary on this side
                log.exception("media stream failed")
                self.end("media stream failed", fallback=True)
                return
            if mine != self._streams:
                return
            if end is StreamEnd.STOPPED and self._returning:
                self._returning = False
                self._enter(State.CONNECTING, self._config.connect_timeout)
            elif end is StreamEnd.STOPPED:
                self._released.set()
                self.end(self._parting or "the carrier stopped the stream")
            elif self.state is State.STREAMING:
                log.warning("media socket lost; waiting for the carrier to ask what now")
                self._enter(State.CONNECTING, self._config.reconnect_timeout)

    def _tell(self, event: Event) -> None:
        """Pass an event to the worker. Speech that it does not take in time is dropped, oldest first."""
        link = self.worker.link
        try:
            link.post(event, droppable=isinstance(event, Media))
        except LinkClosed:
            return  # the worker's end is noticed, and acted on, where its process is watched
        except OutboxFull as error:
            log.error("worker does not read and is killed", reason=str(error))
            self.worker.kill()
        if link.dropped != self._dropped:
            self._dropped = link.dropped
            if self._dropped % 50 == 1:
                log.warning("worker is behind; its oldest audio is dropped", frames=self._dropped)
                with suppress(LinkClosed, OutboxFull):
                    link.post(Error("media_dropped", f"{self._dropped} frames of the caller's audio were dropped"))

    # The worker's side

    async def _work(self) -> None:
        """Fork the worker and do what it asks for, until it is gone."""
        self._tell(self.metadata)
        try:
            async with self._generation.worker(self.worker), trio.open_nursery() as nursery:
                nursery.start_soon(self._report_exit)
                await self._obey(nursery)
                await self.worker.exited.wait()
        except NoWorker as error:
            log.error("no worker for this call", reason=str(error))
            self.end("no worker", fallback=True)
        except Exception:  # the call's boundary on this side
            log.exception("what the worker asked for failed")
            self.end("internal error", fallback=True)
        self._worked.set()

    async def _obey(self, nursery: trio.Nursery) -> None:
        try:
            await self.worker.link.introduced()
            self._step("worker", "ready", {"pid": str(self.worker.pid)})
            async for command in self.worker.link:
                await self._do(command, nursery)
        except (ProtocolError, LinkClosed) as error:
            if not self._over.is_set():
                log.error("worker breaks the protocol and is killed", error=type(error).__name__, reason=str(error))
            self.worker.kill()

    async def _report_exit(self) -> None:
        await self.worker.exited.wait()
        code = self.worker.exit_code
        if not self._over.is_set():
            log.error("worker died in mid-call", pid=self.worker.pid, exit_code=code)
            self.end(f"worker died ({code})", fallback=True)

    async def _do(self, command: Command, nursery: trio.Nursery) -> None:
        if isinstance(command, Post):
            self.leg.post(command.message)
            if not self.leg.has_room:
                with self.worker.held_back():
                    await self.leg.room()
        elif isinstance(command, Heartbeat):
            self.worker.heartbeat(command.lag_ms)
        elif isinstance(command, Abort):
            self.leg.abort(command.uuid)
        elif isinstance(command, Trace):
            self._trace(command)
        elif isinstance(command, Request):
            if self._requests < MAX_REQUESTS:
                nursery.start_soon(self._answer, command)
            else:
                self._tell(Reply(command.id, Failure("refused", f"more than {MAX_REQUESTS} requests are under way")))

    async def _answer(self, request: Request) -> None:
        """Carry a request out and reply; a failure is the agent's to handle, and never only logged."""
        self._requests += 1
        failure = None
        try:
            with trio.fail_after(request.timeout_s if 0 < request.timeout_s < MAX_REQUEST_S else MAX_REQUEST_S):
                await self._carry_out(request)
        except trio.TooSlowError:
            failure = Failure("timeout", f"not done within {request.timeout_s:g} s")
        except Unsupported as error:
            failure = Failure("unsupported", f"{error} is not supported yet")
        except Refused as error:
            failure = Failure("refused", str(error))
        except CarrierError as error:
            failure = Failure("carrier", str(error), error.code, error.status)
        finally:
            self._requests -= 1
        name = type(request).__name__
        if failure is not None:
            log.warning("request failed", request=name, kind=failure.kind, code=failure.code, reason=failure.message)
        self._tell(Reply(request.id, failure))
        if failure is None:
            self._done(request)

    def _done(self, request: Request) -> None:
        """Draw the consequence of a request that was carried out: some end the conversation."""
        if isinstance(request, Dispose):
            self.end("the agent let go of the line")
        elif self._parting:
            self._released.set()
            self.end(self._parting)

    @contextmanager
    def _parts(self, reason: str) -> Iterator[None]:
        """Inside, the carrier is asked to take the call away; it may stop the stream before it answers."""
        self._parting = reason
        try:
            yield
        except BaseException:
            self._parting = ""
            raise

    async def _carry_out(self, request: Request) -> None:
        match request:
            case Hangup(after_playout=after_playout):
                if after_playout:
                    await self.leg.played()
                with self._parts("the agent hung up"):
                    await self.leg.hangup()
            case TransferTo(destination=destination, after_playout=after_playout):
                if not is_allowed(destination, self._transfer.allow):
                    raise Refused(f"no entry of [transfer] allow covers {destination!r}; the operator decides")
                if after_playout:
                    await self.leg.played()
                with self._parts("the agent transferred the caller"):
                    await self.leg.transfer_to(destination)
            case SendDtmf(digits=digits):
                await self.leg.played()
                self._returning = True
                try:
                    await self.leg.send_dtmf(digits)
                except CarrierError:
                    self._returning = False
                    raise
            case StartRecording():
                await self.leg.start_recording()
            case StopRecording():
                await self.leg.stop_recording()
            case RemoveRecording():
                await self.leg.remove_recording()
            case StartTranscript():
                await self.leg.start_transcript()

    # Whoever watches

    def _trace(self, trace: Trace) -> None:
        if trace.kind == "log":
            level = trace.fields.get("level", "info")
            say = getattr(log, level if level in ("debug", "info", "warning", "error") else "info")
            say(trace.text, logger=trace.fields.get("logger", "agent"))
        elif trace.text:
            log.info(trace.kind, text=trace.text, speech=True)
        self._step(trace.kind, trace.text, trace.fields)

    def _step(self, kind: str, text: str, fields: dict[str, str] | None = None) -> None:
        step = Step(round(trio.current_time() - self.started_at, 4), kind, text, fields or {})
        self._steps.append(step)
        for watcher in tuple(self._watchers):
            try:
                watcher.send_nowait(step)
            except (trio.WouldBlock, trio.BrokenResourceError):
                self._watchers.discard(watcher)
                watcher.close()

    def watch(self) -> trio.MemoryReceiveChannel[Step]:
        """Return a channel of the call's steps, from those still remembered on; it ends with the call."""
        watcher, steps = trio.open_memory_channel[Step](_WATCHER_STEPS)
        for step in self._steps:
            watcher.send_nowait(step)
        self._watchers.add(watcher)
        return steps
