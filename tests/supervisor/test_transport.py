"""Twilio's REST API when it is slow, busy, gone or not itself: what is tried again, and what is said of it in the end."""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import httpx
import pytest
import structlog
import trio
from trio.testing import MockClock

from dialog_supervisor.carriers.base import CarrierError
from dialog_supervisor.carriers.twilio.rest import TwilioRest
from dialog_supervisor.carriers.twilio.transport import ATTEMPTS
from dialog_supervisor.sections import Secret, TwilioConfig
from tests.e2e.daemon import NOWHERE
from tests.e2e.twilio_api import TwilioApi, refusal, twilio_api

ACCOUNT = "AC" + "5" * 32
BUSY = (429, 20429, "Too Many Requests")
HTML = "<html>a proxy speaks</html>"


@pytest.fixture
def api() -> Iterator[TwilioApi]:
    with twilio_api() as api:
        yield api


@asynccontextmanager
async def connected(
    url: str, timeout: float = 5, transport: httpx.AsyncBaseTransport | None = None
) -> AsyncIterator[TwilioRest]:
    """Have a client of the API at `url`."""
    config = TwilioConfig(account_sid=ACCOUNT, auth_token=Secret("token"), api_url=url, timeout=timeout)
    async with httpx.AsyncClient(transport=transport) as http:
        yield TwilioRest(config, http)


async def failure(url: str, timeout: float = 5) -> CarrierError:
    """Return how a hangup fails."""
    async with connected(url, timeout) as rest:
        with pytest.raises(CarrierError) as caught:
            await rest.complete("CA1")
    return caught.value


# Too many requests


async def test_a_request_that_came_too_often_is_sent_again_as_soon_as_twilio_says(api: TwilioApi) -> None:
    api.answers += [refusal(*BUSY, retry_after="0")] * (ATTEMPTS - 1)
    async with connected(api.url) as rest:
        await rest.complete("CA1")
    assert [asked.form for asked in api.asked] == [{"Status": "completed"}] * ATTEMPTS


async def test_each_attempt_is_logged(api: TwilioApi) -> None:
    api.answers += [refusal(*BUSY, retry_after="0")] * 2
    async with connected(api.url) as rest:
        with structlog.testing.capture_logs() as lines:
            await rest.complete("CA1")
    assert [(line["event"], line["attempt"]) for line in lines] == [
        ("Twilio is asked too often; asking again", 1),
        ("Twilio is asked too often; asking again", 2),
    ]


async def test_what_always_comes_too_often_fails_with_twilios_code(api: TwilioApi) -> None:
    api.answers += [refusal(*BUSY, retry_after="0")] * (ATTEMPTS + 1)
    error = await failure(api.url)
    assert (error.code, error.status, len(api.asked)) == (20429, 429, ATTEMPTS)
    assert "Too Many Requests" in str(error)


class Busy:
    """An API that refuses so often, without a socket, so that its time can be a virtual one."""

    def __init__(self, times: int, **headers: str) -> None:
        self.asked_at: list[float] = []
        self._times = times
        self._headers = headers

    async def answer(self, request: httpx.Request) -> httpx.Response:
        self.asked_at.append(trio.current_time())
        if len(self.asked_at) > self._times:
            return httpx.Response(200, json={"status": "completed"})
        return httpx.Response(429, json={"code": 20429, "message": "Too Many Requests"}, headers=self._headers)

    @property
    def waits_s(self) -> list[float]:
        """The times between the requests."""
        return [after - before for before, after in zip(self.asked_at, self.asked_at[1:], strict=False)]


@pytest.mark.parametrize("headers", [{}, {"retry-after": "Wed, 21 Oct 2026 07:28:00 GMT"}, {"retry-after": "-1"}])
async def test_when_twilio_does_not_say_how_long_the_waits_double(
    headers: dict[str, str], autojump_clock: MockClock
) -> None:
    busy = Busy(3, **headers)
    async with connected("http://api.test", 60, httpx.MockTransport(busy.answer)) as rest:
        await rest.complete("CA1")
    for wait_s, longest_s in zip(busy.waits_s, (0.5, 1, 2), strict=True):
        assert longest_s / 2 <= wait_s <= longest_s + 0.01


async def test_a_wait_is_as_long_as_twilio_says(autojump_clock: MockClock) -> None:
    busy = Busy(1, **{"retry-after": "3"})
    async with connected("http://api.test", 10, httpx.MockTransport(busy.answer)) as rest:
        await rest.complete("CA1")
    assert busy.waits_s == [pytest.approx(3, abs=0.01)]


@pytest.mark.parametrize("retry_after", ["11", "9" * 400])
async def test_a_wait_beyond_the_timeout_is_not_begun(retry_after: str, autojump_clock: MockClock) -> None:
    busy = Busy(1, **{"retry-after": retry_after})
    begun = trio.current_time()
    async with connected("http://api.test", 10, httpx.MockTransport(busy.answer)) as rest:
        with pytest.raises(CarrierError) as caught:
            await rest.complete("CA1")
    assert (caught.value.code, trio.current_time()) == (20429, begun)


async def test_an_error_of_another_kind_is_not_tried_again(api: TwilioApi) -> None:
    api.fail(503, 20503, "Service Unavailable")
    assert (await failure(api.url)).code == 20503
    assert len(api.asked) == 1


# Out of reach


async def test_an_api_that_does_not_answer_is_named(api: TwilioApi) -> None:
    api.speaks.clear()
    error = await failure(api.url, 0.5)
    assert str(error) == f"Twilio's API at {api.url} cannot be reached: ReadTimeout"
    assert (error.code, error.status) == (None, None)


async def test_an_api_that_is_not_there_is_named() -> None:
    error = await failure(NOWHERE)
    assert str(error).startswith(f"Twilio's API at {NOWHERE} cannot be reached: ")
    assert (error.code, error.status) == (None, None)


# What else it may answer


async def test_wrong_credentials_are_named_and_never_shown(api: TwilioApi) -> None:
    api.fail(401, 20003, "Authenticate")
    error = await failure(api.url)
    assert (error.code, error.status) == (20003, 401)
    assert "Authenticate" in str(error)
    assert "token" not in str(error)


async def test_an_error_in_the_newer_form_has_its_code_too(api: TwilioApi) -> None:
    api.status = 400
    api.body = '{"type": "https://x.test/21220", "title": "Bad", "detail": "not in-progress", "status": 400, "code": 21299}'
    error = await failure(api.url)
    assert (str(error), error.code, error.status) == ("Twilio answered 400: Bad: not in-progress", 21299, 400)


async def test_an_error_page_of_a_proxys_has_a_status_and_no_code_of_twilios(api: TwilioApi) -> None:
    api.status, api.body = 502, HTML
    error = await failure(api.url)
    assert (error.code, error.status) == (None, 502)


@pytest.mark.parametrize("body", [HTML, "", "[]", "null", '"completed"', "{"])
async def test_an_answer_that_is_no_json_object_is_named(api: TwilioApi, body: str) -> None:
    api.body = body
    error = await failure(api.url)
    assert str(error).startswith(f"Twilio's API at {api.url} answered something else than a JSON object: ")


# What is asked


@pytest.mark.parametrize("over", ["completed", "busy", "failed", "no-answer", "canceled"])
async def test_a_call_that_is_over_is_known_to_be(api: TwilioApi, over: str) -> None:
    api.body = f'{{"status": "{over}"}}'
    async with connected(api.url) as rest:
        assert await rest.is_over("CA1")


async def test_a_call_that_twilio_does_not_know_is_over(api: TwilioApi) -> None:
    api.fail(404, 20404, "The requested resource was not found")
    async with connected(api.url) as rest:
        assert await rest.is_over("CA1")


@pytest.mark.parametrize("destination", ["sip:desk@example.com", "SIPS:desk@example.com"])
async def test_a_sip_address_is_dialled_as_one(api: TwilioApi, destination: str) -> None:
    async with connected(api.url) as rest:
        await rest.dial("CA1", destination)
    assert f"<Dial><Sip>{destination}</Sip></Dial>" in api.asked[0].form["Twiml"]


async def test_what_is_dialled_cannot_become_markup(api: TwilioApi) -> None:
    async with connected(api.url) as rest:
        await rest.dial("CA1", "sip:a@b.test?x=1&y=<Hangup/>")
    assert "&amp;y=&lt;Hangup/&gt;" in api.asked[0].form["Twiml"]
