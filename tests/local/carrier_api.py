"""The phone company's REST API asked by Twilio's own package, and by plain HTTP for what that package does not fetch."""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
from twilio.http import AsyncHttpClient
from twilio.http.response import Response as TwilioResponse
from twilio.rest import Client

from dialog_local.carrier.company import PhoneCompany
from tests.local.customer import SID, TOKEN


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


async def download(url: str, token: str = TOKEN) -> httpx.Response:
    async with httpx.AsyncClient(auth=(SID, token), trust_env=False) as client:
        return await client.get(url)
