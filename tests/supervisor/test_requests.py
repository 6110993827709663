"""What a worker asks of its line: carried out, answered within its deadline, and never a burden to others."""

import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import pytest
import structlog
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from dialog_supervisor.carriers.base import CarrierError, Unsupported
from dialog_supervisor.requests import MAX_REQUEST_S, MAX_REQUESTS, Requests
from dialog_supervisor.sections import TransferConfig
from dialog_supervisor.telemetry.metrics import Party
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
from tests.supervisor.line import QuietLeg

FRIEND = "+15557654321"


@dataclass
class Desk:
    """Where one worker's requests are taken: `told` are the replies, `ends` how the conversation was ended."""

    nursery: trio.Nursery
    leg: QuietLeg = field(default_factory=QuietLeg)
    told: list[Event] = field(default_factory=list)
    ends: list[tuple[str, bool, bool]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.requests = Requests(self.leg, TransferConfig(allow=(FRIEND,)), self.told.append, self.end)

    def end(self, reason: str, *, by: Party, fallback: bool = False, released: bool = False) -> None:
        assert by == "agent"
        self.ends.append((reason, fallback, released))

    async def ask(self, request: Request) -> Failure | None:
        """Have a request carried out and return why not."""
        self.requests.take(request, self.nursery)
        await wait_all_tasks_blocked()
        reply = self.told.pop()
        assert isinstance(reply, Reply)
        assert reply.id == request.id
        return reply.failure


@pytest.fixture
async def desk(nursery: trio.Nursery) -> Desk:
    return Desk(nursery)


def failing(error: Exception) -> Callable[[], Awaitable[object]]:
    """Return what a line does that cannot do what it is asked for."""

    async def fail() -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    ("request_", "asked"),
    [
        (Hangup(1, 5), "hangup"),
        (TransferTo(1, 5, FRIEND), f"transfer_to {FRIEND}"),
        (SendDtmf(1, 5, "1w2"), "send_dtmf 1w2"),
        (StartRecording(1, 5, "mono", "inbound"), "start_recording mono inbound"),
        (PauseRecording(1, 5, "skip"), "pause_recording skip"),
        (ResumeRecording(1, 5), "resume_recording"),
        (StopRecording(1, 5), "stop_recording"),
        (RemoveRecording(1, 5), "remove_recording"),
        (StartTranscript(1, 5, engine="google", language="de-DE"), "start_transcript google de-DE"),
        (StopTranscript(1, 5), "stop_transcript"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Request) else "",
)
async def test_each_request_is_asked_of_the_line_once_and_granted(desk: Desk, request_: Request, asked: str) -> None:
    assert await desk.ask(request_) is None
    assert desk.leg.asked == [asked]


@pytest.mark.parametrize(
    ("request_", "end"),
    [
        (Hangup(1, 5), ("the agent hung up", False, True)),
        (TransferTo(1, 5, FRIEND), ("the agent transferred the caller", False, True)),
        (Dispose(1, 5), ("the agent let go of the line", False, False)),
        (Dispose(1, 5, fallback=True), ("the agent let go of the line", True, False)),
    ],
)
async def test_some_requests_end_the_conversation(desk: Desk, request_: Request, end: tuple[str, bool, bool]) -> None:
    await desk.ask(request_)
    assert desk.ends == [end]


async def test_a_hangup_that_fails_does_not_end_the_conversation(desk: Desk) -> None:
    desk.leg.act = failing(CarrierError("Twilio answered 500"))
    await desk.ask(Hangup(1, 5))
    assert (desk.ends, desk.requests.parting) == ([], "")


async def test_another_request_granted_during_a_hangup_does_not_end_the_conversation_in_its_place(desk: Desk) -> None:
    desk.leg.act = trio.sleep_forever
    desk.requests.take(Hangup(1, 5), desk.nursery)
    await wait_all_tasks_blocked()
    desk.leg.act = trio.lowlevel.checkpoint
    assert await desk.ask(StopRecording(2, 5)) is None
    assert desk.ends == []


@pytest.mark.parametrize(
    ("error", "failure"),
    [
        (CarrierError("no", code=21220, status=400), Failure("carrier", "no", 21220, 400)),
        (Unsupported("this line's keys"), Failure("unsupported", "this line's keys is not supported")),
    ],
)
async def test_a_failure_reaches_the_agent_with_the_carriers_code_and_the_operator_by_the_log(
    desk: Desk, error: Exception, failure: Failure
) -> None:
    desk.leg.act = failing(error)
    with structlog.testing.capture_logs() as lines:
        assert await desk.ask(StopRecording(1, 5)) == failure
    assert [(line["event"], line["log_level"], line["request"], line["kind"], line["code"]) for line in lines] == [
        ("request failed", "warning", "StopRecording", failure.kind, failure.code)
    ]


async def test_a_request_ends_at_its_deadline(desk: Desk, autojump_clock: MockClock) -> None:
    desk.leg.act = trio.sleep_forever
    desk.requests.take(StopRecording(1, 1.5), desk.nursery)
    await trio.sleep(1.6)
    assert desk.told == [Reply(1, Failure("timeout", "not done within 1.5 s"))]


@pytest.mark.parametrize("timeout_s", [0, -1, math.inf, math.nan, 1e9])
async def test_a_deadline_that_is_none_is_the_longest_permitted(
    desk: Desk, timeout_s: float, autojump_clock: MockClock
) -> None:
    desk.leg.act = trio.sleep_forever
    desk.requests.take(StopRecording(1, timeout_s), desk.nursery)
    await trio.sleep(MAX_REQUEST_S + 1)
    assert desk.told == [Reply(1, Failure("timeout", "not done within 600 s"))]


async def test_one_more_request_than_permitted_is_refused_at_once(desk: Desk) -> None:
    desk.leg.act = trio.sleep_forever
    for number in range(MAX_REQUESTS + 1):
        desk.requests.take(StopRecording(number, 5), desk.nursery)
    assert desk.told == [Reply(MAX_REQUESTS, Failure("refused", "more than 16 requests are under way"))]


async def test_requests_that_were_answered_make_room(desk: Desk) -> None:
    for number in range(3 * MAX_REQUESTS):
        assert await desk.ask(StopRecording(number, 5)) is None


async def test_a_transfer_that_the_operator_does_not_permit_is_not_asked_of_the_line(desk: Desk) -> None:
    failure = await desk.ask(TransferTo(1, 5, "+881234567890"))
    assert failure is not None
    assert failure.kind == "refused"
    assert desk.leg.asked == []


async def test_while_keys_are_pressed_the_line_is_known_to_come_back(desk: Desk) -> None:
    assert await desk.ask(SendDtmf(1, 5, "1")) is None
    assert desk.requests.returning


@pytest.mark.parametrize("error", [CarrierError("no"), Unsupported("keys")])
async def test_keys_that_were_not_pressed_let_nobody_wait_for_the_line(desk: Desk, error: Exception) -> None:
    desk.leg.act = failing(error)
    await desk.ask(SendDtmf(1, 5, "1"))
    assert not desk.requests.returning
