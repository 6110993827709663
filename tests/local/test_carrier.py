"""The phone company against a small customer of it: a web server with a voice webhook and a media socket."""

import base64
import json

import pytest
import trio
from starlette.websockets import WebSocket
from twilio.request_validator import RequestValidator

from dialog_local.carrier.company import PhoneCompany
from dialog_local.carrier.events import (
    AgentAudioBegan,
    AgentAudioEnded,
    Answered,
    Cleared,
    Dialed,
    Ended,
    MarkReturned,
    Said,
    StreamEnded,
    StreamStarted,
    VoiceBegan,
    VoiceEnded,
)
from dialog_local.carrier.phonecall import CallEnded
from tests.local.customer import (
    LOUD,
    SID,
    TOKEN,
    Customer,
    events,
    mark,
    media,
    place,
    run,
    until,
)

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
