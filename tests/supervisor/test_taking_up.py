"""A call that another dialogd had to leave is taken up: its first worker is introduced to it, as a successor is."""

import os
from typing import Any, NoReturn

import msgspec
import trio
from trio.testing import MockClock

from dialog_supervisor.call import Call
from dialog_supervisor.carriers.base import Unsettled
from dialog_supervisor.recovery import CallState
from dialog_supervisor.sections import CallsConfig, EventsConfig, TransferConfig
from dialog_supervisor.tally import Tally
from dialog_supervisor.telemetry.event_logs import EventLogs
from dialog_supervisor.template_process import NoWorker
from dialog_supervisor.worker import Worker
from protocol.framing import FrameDecoder
from protocol.messages import Event, Hello, MessageDispatched, Metadata, Restored, StreamingStarted
from tests.supervisor.line import QuietLeg

METADATA = Metadata("CA1", "twilio", "+14155550123", "+14155550199")
STARTED = StreamingStarted("MZ1")
REPORT = MessageDispatched("u1", 400, 1000, interrupted=True)


class Stillborn:
    """A generation whose workers read what they are told first, and are no more."""

    name = "stillborn.1"

    def __init__(self) -> None:
        self.told: list[Event] = []
        self.tally = Tally()
        self.tally.begin(METADATA.call_id)

    def worker(self, worker: Worker) -> NoReturn:
        self.told += FrameDecoder[Event](Event).feed(os.read(worker.theirs[0], 1 << 16))
        raise NoWorker("it was only to listen")


async def first_told(state: CallState | None, leg: QuietLeg) -> list[Event]:
    """Return what the first worker of a call is told first, when the call begins with this state."""
    generation: Any = Stillborn()
    call = Call(
        METADATA, lambda emit: leg, generation, CallsConfig(), TransferConfig(), event_logs=EventLogs(EventsConfig())
    )
    if state is not None:
        call.take_up(state, Unsettled(owed=("RE1",)), 60.0)
        assert call.worker_leg.recovery_state(audio=True) == msgspec.structs.replace(state, deaths=(0.0,), died_here=1)
        assert trio.current_time() - call.started_at == 60.0
    await call.run()
    told: list[Event] = generation.told
    return [event for event in told if not isinstance(event, Hello)]


async def test_a_new_calls_worker_is_told_of_the_call(autojump_clock: MockClock) -> None:
    leg = QuietLeg()
    assert await first_told(None, leg) == [METADATA]
    assert not leg.introduced


async def test_a_call_taken_up_has_a_worker_that_is_introduced_and_a_line_that_is_not(autojump_clock: MockClock) -> None:
    leg = QuietLeg()
    state = CallState(metadata=METADATA, started=STARTED, checkpoint=b"state", reports=(REPORT,))
    assert await first_told(state, leg) == [METADATA, Restored(b"state", {"u1": 400}), STARTED, REPORT]
    assert leg.introduced
    assert leg.owed == ("RE1",)


async def test_a_call_taken_up_before_it_had_a_stream_has_its_line_introduced_when_there_is_one(
    autojump_clock: MockClock,
) -> None:
    leg = QuietLeg()
    assert await first_told(CallState(metadata=METADATA), leg) == [METADATA, Restored(b"")]
    assert not leg.introduced
