"""The probe call: before new code gets a caller, its agent is constructed and hears half a second of silence."""

from contextlib import suppress

import structlog
import trio

from dialog_supervisor.generation import Generation
from dialog_supervisor.snapshot import GenerationFailed
from dialog_supervisor.template_process import NoWorker
from dialog_supervisor.worker import Worker
from protocol.framing import ProtocolError
from protocol.link import LinkClosed, OutboxFull
from protocol.messages import (
    Command,
    Dispose,
    Hangup,
    Heartbeat,
    Media,
    Metadata,
    Reply,
    Request,
    StreamingStarted,
    StreamingStopped,
    Trace,
    TransferTo,
)

CALL_ID_PREFIX = "probe-"  # by which an agent, and who reads its log, may tell a probe from a call
_FRAMES = 25  # half a second: enough for `create` and the first handlers; providers may count it, so no more
_FRAME_MS = 20
_SILENT_FRAME = b"\xff" * 160  # 20 ms of mu-law zero (ITU-T G.711)
_CALLER, _CALLEE = "+15555550100", "+15555550199"  # 555-0100 to 555-0199 are nobody's
_REASON = "the probe call is over"
_LAST_WORDS_S = 0.5  # for what an ended worker still had in the pipe


async def probe(generation: Generation, grace_s: float) -> None:
    """Run a scripted call of half a second through the generation's agent; its requests are answered with success.

    Raises `GenerationFailed` when the agent fails, when it leaves without having ended the call, or when it has not left
    `grace_s` after its end: each would have cost a caller the conversation.
    """
    try:
        call = _ProbeCall(generation, grace_s)
    except OSError as error:
        raise GenerationFailed(f"the probe call needs a descriptor: {error.strerror}; raise LimitNOFILE") from None
    try:
        with structlog.contextvars.bound_contextvars(call=call.worker.call_id):
            await call.run()
    except NoWorker as error:
        raise GenerationFailed(f"no worker for the probe call: {error}") from None
    finally:
        call.worker.close()
    if call.failure:
        raise GenerationFailed(generation.snapshot.as_written(f"the probe call failed: {call.failure}"))


class _ProbeCall:
    """One silent call. `failure` says afterwards what went wrong, if anything did."""

    def __init__(self, generation: Generation, grace_s: float) -> None:
        self.failure = ""
        self.worker = Worker(generation.name, f"{CALL_ID_PREFIX}{generation.name}")
        self._generation = generation
        self._grace_s = grace_s
        self._errors: list[str] = []  # what the agent logged as errors, its traceback among them
        self._ended_by_agent = False
        self._begun = trio.Event()  # the worker has said Hello, or never will
        self._all_read = trio.Event()

    async def run(self) -> None:
        """Place the call, wait until its worker is gone, and judge how it went. Raises `NoWorker`."""
        async with self._generation.worker(self.worker), trio.open_nursery() as nursery:
            nursery.start_soon(self._listen)
            await self._play()
            with trio.move_on_after(_LAST_WORDS_S):
                await self._all_read.wait()
            self._judge()
            nursery.cancel_scope.cancel()

    async def _play(self) -> None:
        """Play the carrier's part, to its end or the worker's."""
        link, call_id = self.worker.link, self.worker.call_id
        try:
            link.post(_metadata(call_id))
            link.post(StreamingStarted(call_id))
            await self._begun.wait()
            for number in range(_FRAMES):
                link.post(Media(number * _FRAME_MS, _SILENT_FRAME), droppable=True)
                with trio.move_on_after(_FRAME_MS / 1000):
                    await self.worker.exited.wait()
                    return
            link.post(StreamingStopped(_REASON))
        except LinkClosed:  # it has left, and its process is about to end
            await self.worker.exited.wait()
            return
        stopped_at = trio.current_time()
        await self.worker.stop(_REASON, self._grace_s)
        if trio.current_time() - stopped_at >= self._grace_s:
            self.failure = f"the agent had not left {self._grace_s:g} s after its end (calls.shutdown_grace), and was killed"
        self._ended_by_agent = True  # in time, as far as it could know

    def _judge(self) -> None:
        code = self.worker.exit_code
        if code != 0 and not self.failure:
            last_words = "\n".join(self._errors) or "its last words are in dialogd's log"
            self.failure = f"its worker ended with exit code {code}\n{last_words}"
        elif not self._ended_by_agent:
            self.failure = "the agent left at once, without hangup(), transfer_to() or dispose()"

    async def _listen(self) -> None:
        link = self.worker.link
        try:
            await link.introduced()
            self._begun.set()
            async for command in link:
                self._take(command)
        except (ProtocolError, LinkClosed, OutboxFull) as error:
            self._errors.append(str(error))
            self.worker.kill()
        self._begun.set()
        self._all_read.set()

    def _take(self, command: Command) -> None:
        match command:
            case Heartbeat(lag_ms=lag_ms):
                self.worker.heartbeat(lag_ms)
            case Trace(kind="log", text=text, fields={"level": "error"}):
                self._errors.append(text)
            case Request(id=id_):
                self._ended_by_agent |= isinstance(command, Hangup | TransferTo | Dispose)
                with suppress(LinkClosed):
                    self.worker.link.post(Reply(id_))


def _metadata(call_id: str) -> Metadata:
    fields = {"CallSid": call_id, "From": _CALLER, "To": _CALLEE, "Direction": "inbound", "CallStatus": "ringing"}
    return Metadata(call_id, "twilio", _CALLER, _CALLEE, fields)
