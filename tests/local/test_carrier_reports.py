"""What the phone company tells of a call and of its streams, in the order in which it happens."""

import trio

from dialog_local.carrier.company import PhoneCompany
from dialog_local.carrier.events import Ended, Problem, StreamStarted
from tests.local.customer import SID, Customer, place, run, until


def told_stream(customer: Customer, **attributes: str) -> str:
    """Return a document with a stream that is reported on at /stream."""
    given = {"statusCallback": customer.url + "/stream"} | attributes
    return customer.stream().replace("<Stream", "<Stream" + "".join(f' {name}="{value}"' for name, value in given.items()))


async def test_a_call_is_told_from_ringing_to_its_end_as_far_as_wished(company: PhoneCompany, customer: Customer) -> None:
    customer.documents |= {"/voice": "<Pause length='0.1'/>", "/status": ""}
    await run(
        place(company, customer, status_url=customer.url + "/status", status_events=("ringing", "answered", "completed"))
    )
    told = customer.reports("/status")
    assert [each["CallStatus"] for each in told] == ["ringing", "in-progress", "completed"]
    assert [each["SequenceNumber"] for each in told] == ["0", "1", "2"]
    assert ["CallDuration" in each for each in told] == [False, False, True]
    assert {each["CallbackSource"] for each in told} == {"call-progress-events"}
    assert all(each["Timestamp"].endswith(" +0000") for each in told)


async def test_a_call_that_fails_is_told_as_failed(company: PhoneCompany, customer: Customer) -> None:
    customer.documents |= {"/voice": 500, "/status": ""}
    await run(place(company, customer, status_url=customer.url + "/status"))
    assert [told["CallStatus"] for told in customer.reports("/status")] == ["failed"]


async def test_a_stream_is_told_from_start_to_stop_before_the_calls_end(company: PhoneCompany, customer: Customer) -> None:
    customer.documents |= {"/voice": told_stream(customer, name="desk"), "/stream": "", "/status": ""}
    call = place(company, customer, status_url=customer.url + "/status")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run, call)
        sid = (await until(call, StreamStarted)).stream_sid
        call.caller.hang_up()
    started, stopped = customer.reports("/stream")
    common = {"AccountSid": SID, "CallSid": call.sid, "StreamSid": sid, "StreamName": "desk"}
    assert common.items() <= started.items()
    assert common.items() <= stopped.items()
    assert (started["StreamEvent"], stopped["StreamEvent"]) == ("stream-started", "stream-stopped")
    assert customer.paths == ["/voice", "/stream", "/stream", "/status"]


async def test_a_stream_that_cannot_be_opened_is_told_as_an_error(company: PhoneCompany, customer: Customer) -> None:
    nowhere = told_stream(customer).replace("/media/t", "/nowhere")
    customer.documents |= {"/voice": nowhere, "/stream": ""}
    await run(place(company, customer))
    [told] = customer.reports("/stream")
    assert (told["StreamEvent"], told["StreamName"]) == ("stream-error", told["StreamSid"])
    assert told["StreamError"].startswith("31920: ")


async def test_a_report_that_is_not_taken_is_a_problem_of_the_call_which_goes_on(
    company: PhoneCompany, customer: Customer
) -> None:
    customer.documents |= {"/voice": told_stream(customer), "/stream": 404}
    call = place(company, customer)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run, call)
        problem = await until(call, Problem)
        assert not call.ended
        call.caller.hang_up()
    assert (problem.code, problem.http_status) == (11200, 404)
    assert isinstance(call.log.history[-1], Ended)
