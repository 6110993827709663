"""Twilio's REST API on trio: the vendor's own resources over an httpx client, with its errors as `CarrierError`."""

import logging
from typing import Any

import httpx
from twilio.base.exceptions import TwilioException, TwilioRestException
from twilio.http import AsyncHttpClient
from twilio.http.response import Response
from twilio.rest import Client
from twilio.twiml.voice_response import Dial, VoiceResponse

from dialog_supervisor.carriers.base import CarrierError
from dialog_supervisor.config import TwilioConfig

PRODUCTION_URL = "https://api.twilio.com"
_NOT_FOUND = 20404
_NOT_IN_PROGRESS = 21220
_OVER = ("completed", "busy", "failed", "no-answer", "canceled")


class HttpxTransport(AsyncHttpClient):  # type: ignore[misc]  # twilio-python has no types
    """What twilio-python sends its requests with, in place of aiohttp, which needs asyncio.

    Requests for the production host go to `base_url` instead.
    """

    def __init__(self, client: httpx.AsyncClient, base_url: str, timeout_s: float) -> None:
        super().__init__(logging.getLogger("twilio"), True, timeout_s)
        self._client = client
        self._base_url = base_url.rstrip("/")

    async def request(  # noqa: PLR0917 - twilio-python's signature
        self,
        method: str,
        url: str,
        params: dict[str, object] | None = None,
        data: dict[str, object] | None = None,
        headers: dict[str, str] | None = None,
        auth: tuple[str, str] | None = None,
        timeout: float | None = None,
        allow_redirects: bool = False,
    ) -> Response:
        """Send one request, as twilio-python's own clients do: a form, or JSON where the headers say so."""
        as_json = (headers or {}).get("Content-Type", "").startswith(("application/json", "application/scim+json"))
        body: dict[str, Any] = {"json": data} if as_json else {"data": data or None}
        response = await self._client.request(
            method,
            url.replace(PRODUCTION_URL, self._base_url, 1),
            params=params,  # type: ignore[arg-type]  # httpx takes what twilio-python passes: str, int, float, bool, lists
            headers=headers,
            auth=auth,
            timeout=timeout or self.timeout,
            follow_redirects=allow_redirects,
            **body,
        )
        return Response(response.status_code, response.text, response.headers)


class TwilioRest:
    """The requests that Dialog makes about a call."""

    def __init__(self, config: TwilioConfig, http: httpx.AsyncClient) -> None:
        transport = HttpxTransport(http, config.api_url, config.timeout)
        self._client = Client(config.account_sid, config.auth_token, http_client=transport)
        self._url = config.api_url

    async def complete(self, call_sid: str) -> None:
        """End a call. One that is over already is no error. Raises `CarrierError`."""
        try:
            await self._update(call_sid, status="completed")
        except CarrierError as error:
            if error.code not in (_NOT_FOUND, _NOT_IN_PROGRESS):
                raise

    async def dial(self, call_sid: str, destination: str) -> None:
        """Connect a call's caller to a number or SIP address, and end the call after that. Raises `CarrierError`."""
        document, dial = VoiceResponse(), Dial()
        if destination.lower().startswith(("sip:", "sips:")):
            dial.sip(destination)
        else:
            dial.number(destination)
        document.append(dial)
        await self.replace(call_sid, document)

    async def replace(self, call_sid: str, document: VoiceResponse) -> None:
        """Have a call go on with another document; the stream under way is torn down. Raises `CarrierError`."""
        await self._update(call_sid, twiml=str(document))

    async def _update(self, call_sid: str, **changes: str) -> None:
        try:
            await self._client.calls(call_sid).update_async(**changes)
        except (TwilioException, httpx.HTTPError, ValueError) as error:
            raise self._failed(error) from error

    async def is_over(self, call_sid: str) -> bool:
        """Ask whether a call has ended. Raises `CarrierError`."""
        try:
            call = await self._client.calls(call_sid).fetch_async()
        except TwilioRestException as error:
            if error.code == _NOT_FOUND:
                return True
            raise self._failed(error) from error
        except (TwilioException, httpx.HTTPError, ValueError) as error:
            raise self._failed(error) from error
        return call.status in _OVER

    def _failed(self, error: Exception) -> CarrierError:
        if isinstance(error, TwilioRestException):
            return CarrierError(f"Twilio answered {error.status}: {error.msg}", code=error.code, status=error.status)
        if isinstance(error, httpx.HTTPError):
            return CarrierError(f"Twilio's API at {self._url} cannot be reached: {error or type(error).__name__}")
        if isinstance(error, ValueError):
            return CarrierError(f"Twilio's API at {self._url} answered something else than JSON: {error}")
        return CarrierError(f"Twilio: {error}")
