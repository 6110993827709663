"""What twilio-python sends its requests with: httpx on trio, and patience where Twilio says that it is asked too often."""

import logging
import random
from typing import Any

import httpx
import structlog
import trio
from twilio.http import AsyncHttpClient
from twilio.http.response import Response

PRODUCTION_URL = "https://api.twilio.com"
TOO_MANY_REQUESTS = 429  # Twilio docs, error 20429: never processed, so safe to send again
ATTEMPTS = 5
BACKOFF_S = 0.25
BACKOFF_LIMIT_S = 4.0

log = structlog.get_logger("twilio")


class HttpxTransport(AsyncHttpClient):  # type: ignore[misc]  # twilio-python has no types
    """What twilio-python sends its requests with, in place of aiohttp, which needs asyncio.

    Requests for the production host go to `base_url` instead. One that Twilio refuses with 429 is sent again, up to
    `ATTEMPTS` times and within `timeout_s` in all.
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
        request = self._client.build_request(
            method,
            url.replace(PRODUCTION_URL, self._base_url, 1),
            params=params,  # type: ignore[arg-type]  # httpx takes what twilio-python passes: str, int, float, bool, lists
            headers=headers,
            timeout=timeout or self.timeout,
            **body,
        )
        response = await self._patiently(request, auth, allow_redirects)
        return Response(response.status_code, response.text, response.headers)

    async def _patiently(self, request: httpx.Request, auth: tuple[str, str] | None, redirects: bool) -> httpx.Response:
        """Send a request until Twilio takes it; its last refusal is returned when it does not in time."""
        give_up_at = trio.current_time() + self.timeout
        attempt = 0
        while True:
            response = await self._client.send(request, auth=auth, follow_redirects=redirects)
            attempt += 1
            wait_s = _wait_s(response, attempt)
            if response.status_code != TOO_MANY_REQUESTS or attempt == ATTEMPTS:
                return response
            if trio.current_time() + wait_s > give_up_at:
                return response
            log.warning(
                "Twilio is asked too often; asking again", path=request.url.path, attempt=attempt, wait_s=round(wait_s, 2)
            )
            await trio.sleep(wait_s)


def _wait_s(response: httpx.Response, attempt: int) -> float:
    """As long as Twilio says, else doubling; scattered so that calls do not come back all at once."""
    said = response.headers.get("retry-after", "")
    if said.isascii() and said.isdigit():
        return float(said)
    return float(min(BACKOFF_LIMIT_S, BACKOFF_S * 2**attempt) * random.uniform(0.5, 1.0))
