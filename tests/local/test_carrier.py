"""The phone company against a small customer of it: a web server with a voice webhook and a media socket."""

import base64
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import parse_qsl

import httpx
import pytest
import trio
from hypercorn.config import Config
from hypercorn.trio import serve
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect
from twilio.base.exceptions import TwilioRestException
from twilio.http import AsyncHttpClient
from twilio.http.response import Response as TwilioResponse
from twilio.request_validator import RequestValidator
from twilio.rest import Client

from dialog_local.carrier import playout, twiml
from dialog_local.carrier.company import PhoneCompany
from dialog_local.carrier.events import (
    AgentAudioBegan,
    AgentAudioEnded,
    Answered,
    Cleared,
    Dialed,
    Ended,
    Event,
    MarkReturned,
    Said,
    StreamEnded,
    StreamStarted,
    VoiceBegan,
    VoiceEnded,
)
from dialog_local.carrier.line import audible_span
from dialog_local.carrier.phonecall import Call, CallEnded
from dialog_local.carrier.playout import Playout
from dialog_local.carrier.webhooks import signature

SID, TOKEN = "AC" + "1" * 32, "secret"
LOUD = bytes([0x80, 0x00]) * 80  # 20 ms of the loudest square wave
Conversation = Callable[[WebSocket, str], Awaitable[None]]


class Customer:
    """Answers webhooks from `documents` (path to TwiML) and remembers them; talks on media sockets as `converse` says."""

    def __init__(self) -> None:
        self.documents: dict[str, str | int] = {}
        self.requests: list[tuple[str, dict[str, str], dict[str, str]]] = []
        self.converse: Conversation = listen
        self.messages: list[dict[str, Any]] = []
        self.handshakes: list[dict[str, str]] = []
        self.url = ""

    @property
    def paths(self) -> list[str]:
        return [path for path, _, _ in self.requests]

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                WebSocketRoute("/media/{token}", self._media),
                Route("/{path:path}", self._answer, methods=["GET", "POST"]),
            ]
        )

    async def _answer(self, request: Request) -> Response:
        params = dict(parse_qsl((await request.body()).decode(), keep_blank_values=True))
        self.requests.append((request.url.path, dict(request.headers), params))
        document = self.documents.get(request.url.path, 404)
        if isinstance(document, int):
            return Response(status_code=document)
        return Response(f"<Response>{document}</Response>", media_type="text/xml")

    async def _media(self, websocket: WebSocket) -> None:
        self.handshakes.append(dict(websocket.headers))
        await websocket.accept()
        try:
            while True:
                message = json.loads(await websocket.receive_text())
                self.messages.append(message)
                if message["event"] == "start":
                    break
            await self.converse(websocket, message["streamSid"])
            while True:
                self.messages.append(json.loads(await websocket.receive_text()))
        except (WebSocketDisconnect, RuntimeError):
            return  # the phone company, or `converse`, closed it

    def stream(self, inside: str = "", **attributes: str) -> str:
        given = "".join(f' {name}="{value}"' for name, value in attributes.items())
        return f'<Connect{given}><Stream url="{self.url.replace("http", "ws")}/media/t?lost=1">{inside}</Stream></Connect>'

    def received(self, event: str) -> list[dict[str, Any]]:
        return [message for message in self.messages if message["event"] == event]


async def listen(_websocket: WebSocket, _sid: str) -> None:
    """Say nothing."""


def media(sid: str, audio: bytes) -> str:
    return json.dumps({"event": "media", "streamSid": sid, "media": {"payload": base64.b64encode(audio).decode()}})


def mark(sid: str, name: str) -> str:
    return json.dumps({"event": "mark", "streamSid": sid, "mark": {"name": name}})


@asynccontextmanager
async def open_customer() -> AsyncIterator[Customer]:
    customer = Customer()
    config = Config()
    config.bind = ["127.0.0.1:0"]
    config.accesslog = config.errorlog = None
    config.graceful_timeout = 0.1
    async with trio.open_nursery() as nursery:
        [customer.url] = await nursery.start(serve, customer.app(), config)
        yield customer
        nursery.cancel_scope.cancel()


@pytest.fixture
async def customer() -> AsyncIterator[Customer]:
    async with open_customer() as opened:
        yield opened


@pytest.fixture
def company() -> PhoneCompany:
    return PhoneCompany(SID, TOKEN)


def place(company: PhoneCompany, customer: Customer, **options: Any) -> Call:
    return company.call(customer.url + "/voice", "+15550001111", "+15550002222", **options)


async def run(call: Call, seconds: float = 5) -> None:
    with trio.fail_after(seconds):
        await call.run()


async def until(call: Call, kind: type[Event], count: int = 1) -> Any:
    with trio.fail_after(5):
        async for event in call.log:
            if isinstance(event, kind):
                count -= 1
                if not count:
                    return event
    raise AssertionError(f"the call ended without {kind.__name__}: {call.log.history}")


def events(call: Call, kind: type[Any]) -> list[Any]:
    return [event for event in call.log.history if isinstance(event, kind)]


# Playout, on a clock of its own


def test_a_mark_is_reached_when_the_audio_before_it_has_been_played() -> None:
    buffer = Playout()
    buffer.append(b"x" * 800, 10.0)
    buffer.mark("m", 10.0)
    assert not any(isinstance(each, playout.MarkReached) for each in buffer.advance(10.099))
    [reached] = [each for each in buffer.advance(12.0) if isinstance(each, playout.MarkReached)]
    assert (reached.name, reached.cleared, round(reached.at, 6)) == ("m", False, 10.1)


def test_a_mark_is_reached_at_once_when_nothing_is_buffered() -> None:
    assert Playout().mark("m", 3.0) == [playout.MarkReached(3.0, "m", cleared=False)]


def test_clear_returns_all_marks_and_tells_what_was_dropped() -> None:
    buffer = Playout()
    buffer.append(b"x" * 800, 0.0)
    buffer.mark("a", 0.0)
    buffer.append(b"y" * 800, 0.0)
    buffer.mark("b", 0.0)
    happened = buffer.clear(0.15)
    assert playout.Emptied(0.15, 400) in happened
    marks = [(each.name, each.cleared) for each in happened if isinstance(each, playout.MarkReached)]
    assert marks == [("a", False), ("b", True)]
    assert buffer.buffered_bytes == 0


def test_audio_is_played_in_order_without_a_gap_however_it_is_cut() -> None:
    buffer, heard = Playout(), []
    for step, piece in enumerate([b"a" * 100, b"b" * 333, b"c" * 7]):
        heard += buffer.append(piece, step * 0.01)
    for step in range(10):
        heard += buffer.advance(0.03 + step * 0.02)
    pieces = [each for each in heard if isinstance(each, playout.Heard)]
    assert b"".join(each.audio for each in pieces) == b"a" * 100 + b"b" * 333 + b"c" * 7
    assert [round(each.at * 8000) for each in pieces[1:]] == [
        round(each.at * 8000) + len(each.audio) for each in pieces[:-1]
    ]


def test_audio_beyond_ten_minutes_is_discarded() -> None:
    buffer = Playout()
    buffer.append(b"x" * playout.BUFFER_LIMIT_BYTES, 0.0)
    assert buffer.append(b"y" * 160, 0.01)[-1] == playout.Overflowed(0.01, 160)
    assert buffer.buffered_bytes == playout.BUFFER_LIMIT_BYTES - 80


def test_audio_after_a_pause_begins_when_it_comes() -> None:
    buffer = Playout()
    buffer.append(b"x" * 80, 0.0)
    happened = buffer.append(b"y" * 80, 1.0)
    assert happened[-1] == playout.Began(1.0)
    assert any(isinstance(each, playout.Emptied) and round(each.at, 6) == 0.01 for each in happened)


# TwiML


@pytest.mark.parametrize(
    ("document", "code"),
    [
        ("no xml", 12100),
        ("<Answer/>", 12100),
        ("<Response><Sing>la</Sing></Response>", 12200),
        ("<Response><Pause length='long'/></Response>", 12200),
        ("<Response><Connect><Stream url='https://x/y'/></Connect></Response>", 31922),
        ("<Response><Connect><Stream url='wss:///y'/></Connect></Response>", 31923),
        ("<Response><Connect><Stream url='wss://x' track='both_tracks'/></Connect></Response>", 31941),
    ],
)
def test_a_document_that_twilio_would_refuse_is_an_error_with_its_number(document: str, code: int) -> None:
    with pytest.raises(twiml.DocumentError) as raised:
        twiml.parse(document, "https://x/voice")
    assert raised.value.code == code


def test_relative_addresses_refer_to_the_document() -> None:
    [redirect] = twiml.parse("<Response><Redirect>next</Redirect></Response>", "https://x/a/b")
    assert redirect == twiml.Redirect(twiml.Reference("https://x/a/next"))


# Signatures


def test_the_signature_is_the_one_in_twilios_documentation() -> None:
    params = {"CallSid": "CA1234567890ABCDE", "Caller": "+14158675310", "Digits": "1234"}
    params |= {"From": "+14158675310", "To": "+18005551212"}
    assert signature("12345", "https://example.com/myapp.php?foo=1&bar=2", params) == "L/OH5YylLD5NRKLltdqwSvS0BnU="


def test_https_is_signed_without_port_and_http_with_it() -> None:
    assert signature("t", "https://u:p@x:8443/a", {}) == signature("t", "https://x/a", {})
    assert signature("t", "http://x:8080/a", {}) != signature("t", "http://x/a", {})


# Webhooks


async def test_the_webhook_is_signed_and_says_who_calls(company: PhoneCompany, customer: Customer) -> None:
    customer.documents["/voice"] = "<Hangup/>"
    call = place(company, customer)
    await run(call)
    [(_, headers, params)] = customer.requests
    assert RequestValidator(TOKEN).validate(customer.url + "/voice", params, headers["x-twilio-signature"])
    assert params["CallSid"] == call.sid
    assert (params["From"], params["To"], params["CallStatus"]) == ("+15550001111", "+15550002222", "ringing")
    assert call.status == "completed"


async def test_a_public_address_is_signed_while_another_is_connected_to(company: PhoneCompany, customer: Customer) -> None:
    customer.documents["/voice"] = '<Connect><Stream url="wss://voice.example.com/media/t"/></Connect>'
    customer.converse = lambda websocket, _sid: websocket.close()
    public = "https://voice.example.com/voice"
    call = company.call(public, "+1", "+2", via=customer.url)
    await run(call)
    [(_, headers, params)] = customer.requests
    assert headers["host"] == "voice.example.com"
    assert RequestValidator(TOKEN).validate(public, params, headers["x-twilio-signature"])
    [handshake] = customer.handshakes
    assert handshake["host"] == "voice.example.com"
    assert RequestValidator(TOKEN).validate("wss://voice.example.com/media/t", {}, handshake["x-twilio-signature"])


async def test_a_refused_connection_is_tried_again_with_the_same_token_and_fails(company: PhoneCompany) -> None:
    with trio.socket.socket() as closed_port:
        await closed_port.bind(("127.0.0.1", 0))
        port = closed_port.getsockname()[1]
        call = company.call(f"http://127.0.0.1:{port}/voice", "+1", "+2")
        await run(call)
    assert [(problem.code, problem.http_status) for problem in call.problems] == [(11205, 0)]
    assert call.status == "failed"


async def test_the_fallback_url_is_told_what_failed(company: PhoneCompany, customer: Customer) -> None:
    customer.documents |= {"/voice": 500, "/fallback": "<Say>Sorry.</Say>"}
    call = place(company, customer, fallback_url=customer.url + "/fallback")
    await run(call)
    _, (_, _, params) = customer.requests
    assert (params["ErrorCode"], params["ErrorUrl"]) == ("11200", customer.url + "/voice")
    assert [said.text for said in events(call, Said)] == ["Sorry."]


async def test_a_refusal_names_the_status(company: PhoneCompany, customer: Customer) -> None:
    customer.documents["/voice"] = 403
    call = place(company, customer)
    await run(call)
    assert [(problem.code, problem.http_status) for problem in call.problems] == [(11200, 403)]


async def test_the_status_callback_comes_at_the_end(company: PhoneCompany, customer: Customer) -> None:
    customer.documents |= {"/voice": "<Hangup/>", "/status": ""}
    await run(place(company, customer, status_url=customer.url + "/status"))
    path, headers, params = customer.requests[-1]
    assert (path, params["CallStatus"], params["CallDuration"]) == ("/status", "completed", "1")
    assert RequestValidator(TOKEN).validate(customer.url + "/status", params, headers["x-twilio-signature"])


async def test_verbs_are_carried_out_in_order_until_one_leads_away(company: PhoneCompany, customer: Customer) -> None:
    customer.documents |= {
        "/voice": "<Say>One</Say><Redirect>/more</Redirect><Say>never</Say>",
        "/more": "<Pause length='0.1'/><Say>Two</Say><Dial><Number>+15550003333</Number></Dial><Say>never</Say>",
    }
    call = place(company, customer)
    await run(call)
    assert [said.text for said in events(call, Said)] == ["One", "Two"]
    assert [dialed.targets for dialed in events(call, Dialed)] == [("+15550003333",)]


# Media streams


async def test_a_stream_begins_as_twilio_begins_it(company: PhoneCompany, customer: Customer) -> None:
    customer.documents["/voice"] = customer.stream('<Parameter name="k" value="v"/>')

    async def converse(websocket: WebSocket, _sid: str) -> None:
        await websocket.close()

    customer.converse = converse
    call = place(company, customer)
    await run(call)
    connected, start = customer.messages[:2]
    assert connected == {"event": "connected", "protocol": "Call", "version": "1.0.0"}
    sid = start["streamSid"]
    assert start == {
        "event": "start",
        "sequenceNumber": "1",
        "streamSid": sid,
        "start": {
            "accountSid": SID,
            "streamSid": sid,
            "callSid": call.sid,
            "tracks": ["inbound"],
            "mediaFormat": {"encoding": "audio/x-mulaw", "sampleRate": 8000, "channels": 1},
            "customParameters": {"k": "v"},
        },
    }
    [handshake] = customer.handshakes
    url = customer.url.replace("http", "ws") + "/media/t"  # the query string is gone
    assert RequestValidator(TOKEN).validate(url, {}, handshake["x-twilio-signature"])


async def test_frames_come_every_20_ms_and_are_silence_until_the_caller_speaks(
    company: PhoneCompany, customer: Customer
) -> None:
    customer.documents["/voice"] = customer.stream()
    call = place(company, customer)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run, call)
        await until(call, StreamStarted)
        await trio.sleep(0.3)
        began = trio.current_time()
        await call.caller.speak(LOUD * 10)
        assert trio.current_time() - began == pytest.approx(0.2, abs=0.15)
        call.caller.press("5")
        call.caller.hang_up()
    frames = customer.received("media")
    assert [frame["media"]["chunk"] for frame in frames] == [str(number) for number in range(1, len(frames) + 1)]
    assert [frame["media"]["timestamp"] for frame in frames] == [str(20 * number) for number in range(len(frames))]
    audio = [base64.b64decode(frame["media"]["payload"]) for frame in frames]
    assert {len(frame) for frame in audio} == {160}
    assert audio[0] == b"\xff" * 160
    assert b"".join(audio).strip(b"\xff") == LOUD * 10
    [dtmf] = customer.received("dtmf")
    assert dtmf["dtmf"] == {"track": "inbound_track", "digit": "5"}
    numbers = [int(message["sequenceNumber"]) for message in customer.messages[1:]]
    assert numbers == list(range(1, len(numbers) + 1))
    assert customer.messages[-1]["event"] == "stop"
    assert call.log.history[-1].__class__ is Ended


async def test_marks_come_back_when_played_and_the_recording_has_both_sides(
    company: PhoneCompany, customer: Customer
) -> None:
    customer.documents["/voice"] = customer.stream()

    async def converse(websocket: WebSocket, sid: str) -> None:
        await websocket.send_text(mark(sid, "first"))
        await websocket.send_text(media(sid, LOUD * 10))
        await websocket.send_text(mark(sid, "second"))

    customer.converse = converse
    call = place(company, customer)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run, call)
        ended = await until(call, AgentAudioEnded)
        await trio.sleep(0.1)
        call.caller.hang_up()
    assert [message["mark"]["name"] for message in customer.received("mark")] == ["first", "second"]
    [began] = events(call, AgentAudioBegan)
    first, second = events(call, MarkReturned)
    assert (first.cleared, second.cleared) == (False, False)
    assert second.at - began.at == pytest.approx(0.2, abs=0.0005)
    assert call.line is not None
    assert call.line.tracks["agent"].read(began.at, ended.at) == LOUD * 10
    assert len(call.line.tracks["agent"].read()) == len(call.line.tracks["caller"].read())


async def test_clear_stops_playout_and_returns_every_mark(company: PhoneCompany, customer: Customer) -> None:
    customer.documents["/voice"] = customer.stream()

    async def converse(websocket: WebSocket, sid: str) -> None:
        await websocket.send_text(media(sid, LOUD * 100))
        await websocket.send_text(mark(sid, "never heard"))
        await trio.sleep(0.2)
        await websocket.send_text(json.dumps({"event": "clear", "streamSid": sid}))

    customer.converse = converse
    call = place(company, customer)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run, call)
        cleared = await until(call, Cleared)
        await until(call, VoiceEnded)
        call.caller.hang_up()
    assert cleared.dropped_ms == pytest.approx(1800, abs=150)
    assert [(each.name, each.cleared) for each in events(call, MarkReturned)] == [("never heard", True)]
    began, ended = events(call, VoiceBegan)[0], events(call, VoiceEnded)[0]
    assert ended.at - began.at == pytest.approx(0.2, abs=0.15)


async def test_what_twilio_does_not_understand_is_warned_of_once_a_stream(company: PhoneCompany, customer: Customer) -> None:
    customer.documents["/voice"] = customer.stream()

    async def converse(websocket: WebSocket, sid: str) -> None:
        await websocket.send_text(json.dumps({"event": "clear", "streamSid": sid, "extra": 1}))
        await websocket.send_text(json.dumps({"event": "media", "streamSid": sid}))
        await websocket.send_text(json.dumps({"event": "sing", "streamSid": sid}))
        await websocket.send_text(json.dumps({"event": "clear", "streamSid": "MZ" + "0" * 32}))
        await websocket.send_bytes(LOUD)
        await websocket.send_bytes(LOUD)
        await websocket.close()

    customer.converse = converse
    call = place(company, customer)
    await run(call)
    assert [warning.code for warning in call.warnings] == [31951, 31950]


async def test_after_the_socket_the_action_is_asked(company: PhoneCompany, customer: Customer) -> None:
    customer.documents |= {"/voice": customer.stream(action="/after"), "/after": "<Say>Bye</Say><Hangup/>"}
    customer.converse = lambda websocket, _sid: websocket.close()
    call = place(company, customer)
    await run(call)
    [stream] = events(call, StreamEnded)
    path, headers, params = customer.requests[-1]
    assert (path, params["StreamSid"], params["CallStatus"]) == ("/after", stream.stream_sid, "in-progress")
    assert RequestValidator(TOKEN).validate(customer.url + "/after", params, headers["x-twilio-signature"])
    assert [said.text for said in events(call, Said)] == ["Bye"]


async def test_without_an_action_the_next_verb_follows(company: PhoneCompany, customer: Customer) -> None:
    customer.documents["/voice"] = customer.stream() + "<Say>Next</Say>"
    customer.converse = lambda websocket, _sid: websocket.close()
    call = place(company, customer)
    await run(call)
    assert [said.text for said in events(call, Said)] == ["Next"]


async def test_a_refused_handshake_is_error_31920_and_the_action_follows(company: PhoneCompany, customer: Customer) -> None:
    url = customer.url.replace("http", "ws") + "/nothing/here"
    customer.documents |= {"/voice": f'<Connect action="/after"><Stream url="{url}"/></Connect>', "/after": "<Hangup/>"}
    call = place(company, customer)
    await run(call)
    assert [problem.code for problem in call.problems] == [31920]
    assert customer.paths == ["/voice", "/after"]


async def test_a_socket_lost_without_a_word_is_an_error_and_the_action_follows(
    company: PhoneCompany, customer: Customer
) -> None:
    customer.documents |= {"/voice": customer.stream(action="/after"), "/after": "<Hangup/>"}
    call = place(company, customer)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run, call)
        await until(call, StreamStarted)
        assert call.socket is not None
        await call.socket.drop()
    assert [problem.code for problem in call.problems] == [31903]
    assert customer.paths == ["/voice", "/after"]


async def test_faults_can_be_caused_on_the_socket(company: PhoneCompany, customer: Customer) -> None:
    customer.documents["/voice"] = customer.stream()
    call = place(company, customer)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run, call)
        await until(call, StreamStarted)
        assert call.socket is not None
        call.socket.muted = True
        await call.socket.send_raw('{"event": "nonsense"}')
        await trio.sleep(0.1)
        frames = len(customer.received("media"))
        await trio.sleep(0.1)
        assert len(customer.received("media")) == frames
        call.caller.hang_up()
    assert customer.received("nonsense")


async def test_a_caller_cannot_speak_in_a_call_that_is_over(company: PhoneCompany, customer: Customer) -> None:
    customer.documents["/voice"] = "<Pause length='0.1'/>"
    call = place(company, customer)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run, call)
        await until(call, Answered)
        with trio.fail_after(3), pytest.raises(CallEnded, match="the document came to its end"):
            await call.caller.speak(LOUD * 500)


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


# Sound


def test_silence_and_faint_noise_are_not_audible() -> None:
    assert audible_span(b"\xff\x7f\xfe\x7e" * 40) is None


def test_the_audible_span_is_found_to_the_sample() -> None:
    assert audible_span(b"\xff" * 30 + b"\x00" * 5 + b"\xff" * 10) == (30, 34)


async def test_a_port_in_use_is_told_as_such(company: PhoneCompany) -> None:
    async with company.serve() as url:
        port = int(url.rpartition(":")[2])
        with pytest.raises(OSError, match="in use"):
            async with PhoneCompany(SID, TOKEN).serve("127.0.0.1", port):
                pass
