"""A call that is one too many, or comes while none is taken: answered politely and at once, logged and counted once."""

import re

import pytest
import trio

from dialog_supervisor.admission import Admission
from tests.conftest import StartDialogd
from tests.e2e.control import PATIENCE_S
from tests.e2e.daemon import Dialogd
from tests.e2e.twilio_client import PhoneCall, Twilio, verbs

FALLBACK = ["Say", "Hangup"]
ANSWER_S = 0.05  # a caller's share of Twilio's 15 s for a webhook, however busy the line is
FRAMES = 30


@pytest.fixture(scope="module")
def shared(start_shared_dialogd: StartDialogd) -> Dialogd:
    """A dialogd that takes one call at a time."""
    return start_shared_dialogd(calls={"max_calls": 1, "ending_timeout": 1})


@pytest.fixture
async def dialogd(shared: Dialogd) -> Dialogd:
    """That dialogd, with no call left of the test before."""
    with trio.fail_after(PATIENCE_S):
        while (await shared.ask("/status"))["calls"]:  # noqa: ASYNC110 - another process
            await trio.sleep(0.02)
    return shared


async def test_one_call_too_many_is_given_the_fallback(dialogd: Dialogd) -> None:
    async with Twilio(dialogd) as twilio, twilio.streaming() as call:
        assert verbs(await PhoneCall(twilio).ring()) == FALLBACK
        await call.echo()
    await dialogd.ended(call.sid)


async def test_a_load_balancer_is_told_that_there_is_no_room_though_dialogd_is_well(dialogd: Dialogd) -> None:
    async def told(path: str) -> tuple[int, str]:
        answer = await twilio.request("GET", twilio.public_url + path, headers={})
        return answer.status_code, answer.text

    async with Twilio(dialogd) as twilio:
        async with twilio.streaming() as call:
            assert await told("/readyz") == (503, "max_calls\n")
            assert await told("/healthz") == (200, "ok\n")
        await dialogd.ended(call.sid)
        assert await told("/readyz") == (200, "ok\n")


async def test_a_call_is_taken_again_when_another_has_ended(dialogd: Dialogd) -> None:
    async with Twilio(dialogd) as twilio:
        async with twilio.streaming() as first:
            later = PhoneCall(twilio)
            assert verbs(await later.ring()) == FALLBACK
        await dialogd.ended(first.sid)
        assert verbs(await later.ring()) == ["Connect"]
        await later.after("completed")
    await dialogd.ended(later.sid)


async def test_the_webhook_of_a_call_that_was_taken_may_come_again(dialogd: Dialogd) -> None:
    async with Twilio(dialogd) as twilio, twilio.streaming() as call:
        assert verbs(await call.ring()) == ["Connect"]
    await dialogd.ended(call.sid)


async def test_a_refused_call_is_logged_and_counted_once_though_its_webhook_comes_again(dialogd: Dialogd) -> None:
    before = (await dialogd.ask("/status"))["refused"]["max_calls"]
    async with Twilio(dialogd) as twilio, twilio.streaming() as call:
        refused = PhoneCall(twilio)
        await refused.ring()
        await refused.ring()
        line = await dialogd.logged(event="call refused", call=refused.sid, level="warning")
        status = await dialogd.ask("/status")
        shown = (await dialogd.ctl("status")).stdout
    assert (line["reason"], line["calls"]) == ("max_calls", 1)
    assert (status["refused"]["max_calls"], status["max_calls"]) == (before + 1, 1)
    assert f"refused since the start: {before + 1} max_calls" in shown
    await dialogd.ended(call.sid)  # and with it all that was logged before
    assert dialogd.find(event="call refused", call=refused.sid) == [line]


async def test_a_call_that_comes_while_none_is_taken_is_logged_with_that_reason(dialogd: Dialogd) -> None:
    async with Twilio(dialogd) as twilio:
        await dialogd.ask("/drain", "POST")
        call = PhoneCall(twilio)
        assert verbs(await call.ring()) == FALLBACK
        await dialogd.ask("/undrain", "POST")
    assert await dialogd.logged(event="call refused", call=call.sid, reason="draining")


async def test_a_refusal_takes_less_than_50_ms_and_the_call_under_way_notices_nothing(dialogd: Dialogd) -> None:
    took: list[float] = []
    async with Twilio(dialogd) as twilio, Twilio(dialogd) as others, twilio.streaming() as call:
        await call.echo()

        async def refusals() -> None:
            while True:
                began_at = trio.current_time()
                await PhoneCall(others).ring()
                took.append(trio.current_time() - began_at)
                await trio.sleep(0.01)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(refusals)
            for _ in range(FRAMES):
                await call.echo()
                await trio.sleep(0.02)
            nursery.cancel_scope.cancel()
    ended = await dialogd.ended(call.sid)
    assert (ended["frames_in"], ended["frames_out"], ended["media_dropped"]) == (FRAMES + 1, FRAMES + 1, 0)
    assert sorted(took)[len(took) // 2] < ANSWER_S  # the median: the machine's own pauses are not dialogd's


def test_refused_calls_are_not_remembered_for_ever() -> None:
    admission = Admission(max_calls=1)
    assert admission.refuse("first", "max_calls")
    assert not admission.refuse("first", "max_calls")
    for number in range(1000):
        assert admission.refuse(str(number), "max_calls")
    assert admission.refuse("first", "max_calls")
    assert admission.refused["max_calls"] == 1002


# The machine's part

WANTED = 1 << 60  # bytes, of which no machine has as many free


@pytest.fixture(scope="module")
def poor(start_shared_dialogd: StartDialogd) -> Dialogd:
    """A dialogd on a machine with too little memory."""
    fallback = {"say": "Something went wrong.", "busy_say": "We are busy."}
    return start_shared_dialogd(calls={"min_free_memory": WANTED}, fallback=fallback)


async def test_a_call_that_the_machine_has_no_memory_for_is_told_so_and_counted(poor: Dialogd) -> None:
    async with Twilio(poor) as twilio:
        call = PhoneCall(twilio)
        answer = await call.ring()
    assert verbs(answer) == FALLBACK
    assert answer[0].text == "We are busy."
    line = await poor.logged(event="call refused", call=call.sid, reason="memory")
    assert line["remedy"].endswith("calls.min_free_memory is what must be left")
    status = await poor.ask("/status")
    assert status["refused"]["memory"] == 1
    assert 0 < line["free_memory"] < WANTED
    assert status["machine"]["load"] >= 0
    shown = (await poor.ctl("status")).stdout
    assert "refused since the start: 1 memory" in shown
    assert re.search(r"^\d+ MB of memory free, load \d+\.\d for each CPU$", shown, re.MULTILINE)


@pytest.mark.parametrize(
    ("fallback", "given"),
    [
        ({"dial": "+15551234567"}, "+15551234567"),
        ({"dial": "+15551234567", "busy_dial": "+15557654321"}, "+15557654321"),
        ({"dial": "+15551234567", "busy_dial": "", "busy_say": "We are busy."}, "We are busy."),
    ],
    ids=["as any fallback", "to another number", "to none"],
)
async def test_whom_nobody_has_time_for_is_dialled_through(
    start_dialogd: StartDialogd, fallback: dict[str, str], given: str
) -> None:
    dialogd = start_dialogd(calls={"min_free_memory": WANTED}, fallback=fallback)
    async with Twilio(dialogd) as twilio:
        assert (await PhoneCall(twilio).ring())[0].text == given
