"""The phone company's REST API, asked by the carrier's own package."""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
import trio
from twilio.base.exceptions import TwilioRestException
from twilio.http import AsyncHttpClient
from twilio.http.response import Response as TwilioResponse
from twilio.rest import Client

from dialog_local.carrier.company import PhoneCompany
from dialog_local.carrier.events import (
    Ended,
    Said,
    StreamStarted,
)
from tests.local.customer import SID, TOKEN, Customer, events, place, run, until

# REST


class HttpxForTwilio(AsyncHttpClient):  # type: ignore[misc]  # the package is untyped
    """The Twilio package's HTTP on httpx, sent to the phone company instead of api.twilio.com."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        super().__init__(logging.getLogger(__name__), True)
        self._client = client

    async def request(self, method: str, url: str, **options: Any) -> TwilioResponse:
        path = url.removeprefix("https://api.twilio.com")
        answer = await self._client.request(method, path, data=options.get("data"), auth=options.get("auth"))
        return TwilioResponse(answer.status_code, answer.text)


@asynccontextmanager
async def twilio_client(company: PhoneCompany, token: str = TOKEN) -> AsyncIterator[Client]:
    async with company.serve() as url, httpx.AsyncClient(base_url=url, trust_env=False) as client:
        yield Client(SID, token, http_client=HttpxForTwilio(client))


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
