"""The phone company's REST API, asked by the carrier's own package."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from twilio.base.exceptions import TwilioRestException

from dialog_local.carrier.company import PhoneCompany
from dialog_local.carrier.events import Ended, Said, StreamStarted
from dialog_local.carrier.faults import RestError
from tests.local.carrier_api import twilio_client
from tests.local.customer import SID, TOKEN, Customer, events, place, run, until


async def test_rest_ends_a_call_and_stops_its_stream(company: PhoneCompany, customer: Customer) -> None:
    customer.documents |= {"/voice": customer.stream(action="/after") + "<Say>never</Say>", "/after": "<Say>never</Say>"}
    call = place(company, customer)
    async with twilio_client(company) as client, trio.open_nursery() as nursery:
        nursery.start_soon(run, call)
        await until(call, StreamStarted)
        assert (await client.calls(call.sid).fetch_async()).status == "in-progress"
        await client.calls(call.sid).update_async(status="completed")
        await until(call, Ended)
        assert (await client.calls(call.sid).fetch_async()).status == "completed"
        assert customer.messages[-1]["event"] == "stop"
    assert customer.paths == ["/voice"]


async def test_rest_replaces_the_document(company: PhoneCompany, customer: Customer) -> None:
    customer.documents |= {"/voice": customer.stream(action="/after"), "/other": "<Say>Other</Say>"}
    call = place(company, customer)
    async with twilio_client(company) as client, trio.open_nursery() as nursery:
        nursery.start_soon(run, call)
        await until(call, StreamStarted)
        twiml_text = f"<Response><Play digits='12'/>{customer.stream()}</Response>"
        await client.calls(call.sid).update_async(twiml=twiml_text)
        again = await until(call, StreamStarted, 2)
        await client.calls(call.sid).update_async(url=customer.url + "/other")
    first = events(call, StreamStarted)[0]
    assert again.stream_sid != first.stream_sid
    assert [said.text for said in events(call, Said)] == ["Other"]
    assert customer.paths == ["/voice", "/other"]


async def test_rest_refuses_as_twilio_does(company: PhoneCompany, customer: Customer) -> None:
    customer.documents["/voice"] = "<Hangup/>"
    call = place(company, customer)
    await run(call)
    async with twilio_client(company) as client:
        with pytest.raises(TwilioRestException) as over:
            await client.calls(call.sid).update_async(status="completed")
        with pytest.raises(TwilioRestException) as unknown:
            await client.calls("CA" + "0" * 32).fetch_async()
    async with twilio_client(company, token="wrong") as stranger:
        with pytest.raises(TwilioRestException) as denied:
            await stranger.calls(call.sid).fetch_async()
    assert [(error.value.status, error.value.code) for error in (over, unknown, denied)] == [
        (400, 21220),
        (404, 20404),
        (401, 20003),
    ]


async def test_a_port_in_use_is_told_as_such(company: PhoneCompany) -> None:
    async with company.serve() as url:
        port = int(url.rpartition(":")[2])
        with pytest.raises(OSError, match="in use"):
            async with PhoneCompany(SID, TOKEN).serve("127.0.0.1", port):
                pass


# TimeLimit


async def test_a_call_ends_when_its_time_limit_is_over(company: PhoneCompany, customer: Customer) -> None:
    customer.documents["/voice"] = customer.stream()
    call = place(company, customer)
    async with twilio_client(company) as client, trio.open_nursery() as nursery:
        nursery.start_soon(run, call)
        await until(call, StreamStarted)
        await client.calls(call.sid).update_async(time_limit=60)
        await client.calls(call.sid).update_async(time_limit=1)
        ended = await until(call, Ended)
    assert ended.reason == "its TimeLimit of 1 s is over"
    assert 0.9 < ended.at < 1.5


async def test_a_later_time_limit_replaces_the_one_before(company: PhoneCompany, customer: Customer) -> None:
    customer.documents["/voice"] = customer.stream()
    call = place(company, customer)
    async with twilio_client(company) as client, trio.open_nursery() as nursery:
        nursery.start_soon(run, call)
        await until(call, StreamStarted)
        await client.calls(call.sid).update_async(time_limit=1)
        await client.calls(call.sid).update_async(time_limit=60)
        await call.caller.speak(b"\xff" * 9600)  # 1.2 s
        call.caller.hang_up()
    assert events(call, Ended)[0].reason == "the caller hung up"


async def test_a_time_limit_must_be_a_number_of_seconds(company: PhoneCompany, customer: Customer) -> None:
    async with rung(company, customer) as client:
        with pytest.raises(TwilioRestException, match="TimeLimit='0' is not a number of seconds") as refused:
            await client.update_async(time_limit=0)
    assert (refused.value.status, refused.value.code) == (400, 20001)


# Faults


@asynccontextmanager
async def rung(company: PhoneCompany, customer: Customer) -> AsyncIterator[Any]:
    """Give a call that has begun at Twilio's package; it is hung up at the end of the block."""
    customer.documents["/voice"] = customer.stream()
    call = place(company, customer)
    async with twilio_client(company) as client, trio.open_nursery() as nursery:
        nursery.start_soon(run, call)
        await until(call, StreamStarted)
        yield client.calls(call.sid)
        call.caller.hang_up()


async def test_a_busy_company_takes_so_many_requests_not(company: PhoneCompany, customer: Customer) -> None:
    async with rung(company, customer) as call:
        company.faults.busy = 2
        for _ in range(2):
            with pytest.raises(TwilioRestException) as busy:
                await call.fetch_async()
            assert (busy.value.status, busy.value.code) == (429, 20429)
        assert (await call.fetch_async()).status == "in-progress"


async def test_an_outage_lasts_until_it_is_over(company: PhoneCompany, customer: Customer) -> None:
    async with rung(company, customer) as call:
        company.faults.out = True
        with pytest.raises(TwilioRestException) as out:
            await call.fetch_async()
        company.faults.out = False
        assert (await call.fetch_async()).status == "in-progress"
    assert out.value.status == 503


async def test_a_silent_company_never_answers(company: PhoneCompany, customer: Customer) -> None:
    async with rung(company, customer) as call:
        company.faults.silent = True
        with trio.move_on_after(0.2) as patience:
            await call.fetch_async()
    assert patience.cancelled_caught


async def test_one_resource_can_be_refused_while_the_others_work(company: PhoneCompany, customer: Customer) -> None:
    async with rung(company, customer) as call:
        company.faults.refusals["Recordings"] = RestError(400, 21220, "not now")
        with pytest.raises(TwilioRestException, match="not now"):
            await call.recordings.create_async()
        assert (await call.fetch_async()).status == "in-progress"
