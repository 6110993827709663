"""What a worker asks of its line: each request is carried out beside the others, within its deadline, and answered."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeAlias

import structlog
import trio
from msgspec import Struct
from msgspec.structs import replace

from dialog_supervisor.carriers.base import CarrierError, Leg, Unsupported
from dialog_supervisor.sections import TransferConfig
from dialog_supervisor.telemetry.metrics import Party
from dialog_supervisor.transfer import is_allowed
from protocol.messages import (
    Dispose,
    Event,
    Failure,
    Hangup,
    PauseRecording,
    RemoveRecording,
    Reply,
    Request,
    ResumeRecording,
    SendDtmf,
    StartRecording,
    StartTranscript,
    StopRecording,
    StopTranscript,
    TransferTo,
)

MAX_REQUESTS = 16  # a worker's requests under way at a time
MAX_REQUEST_S = 600.0

Asked: TypeAlias = Hangup | TransferTo | SendDtmf  # which wait for the caller to have heard what was said

log = structlog.get_logger("call")


class Refused(Exception):
    """A request that the operator does not permit."""


class End(Protocol):
    """How a request ends the conversation. `fallback`: the caller is still there; `released`: the carrier asks no more."""

    def __call__(self, reason: str, *, by: Party, fallback: bool = False, released: bool = False) -> None:
        """End it."""


class RequestsState(Struct, frozen=True, forbid_unknown_fields=True):
    """A worker's requests on their way to a process that takes them over. `waiting`: nothing was done for them yet."""

    parting: str
    returning: bool
    waiting: tuple[Asked, ...]


def _patience_s(request: Request) -> float:
    return request.timeout_s if 0 < request.timeout_s < MAX_REQUEST_S else MAX_REQUEST_S


class Requests:
    """One worker's requests about one line."""

    def __init__(self, leg: Leg, transfer: TransferConfig, tell: Callable[[Event], None], end: End) -> None:
        self.parting = ""  # why the carrier is about to stop the stream, if the agent asked for it
        self.returning = False  # the carrier is about to stop the stream, and to open another
        self._leg = leg
        self._transfer = transfer
        self._tell = tell
        self._end = end
        self._under_way: dict[int, tuple[Request, float]] = {}  # by a number of ours, with its deadline
        self._taken = 0
        self._waiting: set[int] = set()  # of those, for the caller to have heard what was said
        self._answered = trio.Event()  # one of them was

    def hand_over(self, now: float) -> RequestsState | None:
        """Return what another process needs to go on: nothing while the carrier is being asked for something."""
        if self._under_way.keys() - self._waiting:
            return None
        waiting = [(request, at) for request, at in self._under_way.values() if isinstance(request, Asked)]
        asked = tuple(replace(request, timeout_s=at - now) for request, at in waiting)
        return RequestsState(self.parting, self.returning, asked)

    def take_over(self, state: RequestsState, nursery: trio.Nursery) -> None:
        """Go on as another process left it, in `nursery`."""
        self.parting, self.returning = state.parting, state.returning
        for request in state.waiting:
            self.take(request, nursery)

    def returned(self) -> bool:
        """A stream has ended: return whether another was to follow it, which is true of one only."""
        returning, self.returning = self.returning, False
        return returning

    async def answered(self) -> None:
        """Wait until all that were taken are answered."""
        while self._under_way:
            await self._answered.wait()

    def take(self, request: Request, nursery: trio.Nursery) -> None:
        """Carry a request out in `nursery`, or refuse it at once when too many are under way."""
        if len(self._under_way) < MAX_REQUESTS:
            self._taken += 1
            self._under_way[self._taken] = request, trio.current_time() + _patience_s(request)
            nursery.start_soon(self._answer, self._taken)
        else:
            self._tell(Reply(request.id, Failure("refused", f"more than {MAX_REQUESTS} requests are under way")))

    async def _answer(self, number: int) -> None:
        """Carry a request out and reply; a failure is the agent's to handle, and never only logged."""
        failure = None
        request, deadline = self._under_way[number]
        try:
            with trio.fail_at(deadline):
                await self._carry_out(number, request)
        except trio.TooSlowError:
            failure = Failure("timeout", f"not done within {_patience_s(request):g} s")
        except Unsupported as error:
            failure = Failure("unsupported", f"{error} is not supported")
        except Refused as error:
            failure = Failure("refused", str(error))
        except CarrierError as error:
            failure = Failure("carrier", str(error), error.code, error.status)
        finally:
            del self._under_way[number]
            self._answered.set()
            self._answered = trio.Event()
        name = type(request).__name__
        if failure is not None:
            log.warning("request failed", request=name, kind=failure.kind, code=failure.code, reason=failure.message)
        self._tell(Reply(request.id, failure))
        if failure is None:
            self._conclude(request)

    def _conclude(self, request: Request) -> None:
        """Draw the consequence of a request that was carried out: some end the conversation."""
        if isinstance(request, Dispose):
            self._end("the agent let go of the line", by="agent", fallback=request.fallback)
        elif isinstance(request, Hangup | TransferTo):
            self._end(self.parting, by="agent", released=True)

    async def _played(self, number: int) -> None:
        """Wait until the caller has heard everything; another process could wait as well."""
        self._waiting.add(number)
        try:
            await self._leg.played()
        finally:
            self._waiting.discard(number)

    async def _carry_out(self, number: int, request: Request) -> None:
        match request:
            case Hangup(after_playout=after_playout):
                if after_playout:
                    await self._played(number)
                with self._parts("the agent hung up"):
                    await self._leg.hangup()
            case TransferTo():
                await self._transfer_to(number, request)
            case SendDtmf(digits=digits):
                await self._played(number)
                await self._send_dtmf(digits)
            case StartRecording():
                await self._leg.start_recording(request)
            case PauseRecording(behavior=behavior):
                await self._leg.pause_recording(behavior)
            case ResumeRecording():
                await self._leg.resume_recording()
            case StopRecording():
                await self._leg.stop_recording()
            case RemoveRecording():
                await self._leg.remove_recording()
            case StartTranscript():
                await self._leg.start_transcript(request)
            case StopTranscript():
                await self._leg.stop_transcript()

    async def _transfer_to(self, number: int, request: TransferTo) -> None:
        if not is_allowed(request.destination, self._transfer.allow):
            raise Refused(f"no entry of [transfer] allow covers {request.destination!r}; the operator decides")
        if request.after_playout:
            await self._played(number)
        with self._parts("the agent transferred the caller"):
            await self._leg.transfer_to(request.destination)

    async def _send_dtmf(self, digits: str) -> None:
        self.returning = True
        try:
            await self._leg.send_dtmf(digits)
        except (CarrierError, Unsupported):
            self.returning = False
            raise

    @contextmanager
    def _parts(self, reason: str) -> Iterator[None]:
        """Inside, the carrier is asked to take the call away; it may stop the stream before it answers."""
        self.parting = reason
        try:
            yield
        except BaseException:
            self.parting = ""
            raise
