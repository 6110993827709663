"""Calls as Twilio makes them: the webhook, the media socket, what comes after."""

import re
from pathlib import Path

import pytest
import trio
from trio_websocket import ConnectionRejected

from tests.conftest import StartDialogd
from tests.e2e.daemon import AUTH_TOKEN, Dialogd
from tests.e2e.twilio_client import CALLER, FORM, PhoneCall, Twilio, sign, verbs

ORIGIN = "http://voice.test:8080"
VOICE = ORIGIN + "/twilio/voice"
ECHO = Path(__file__).parents[2] / "examples" / "echo"


@pytest.fixture(scope="module")
def dialogd(start_shared_dialogd: StartDialogd) -> Dialogd:
    return start_shared_dialogd(gateway={"public_url": ORIGIN}, calls={"shutdown_grace": 2})


async def test_every_frame_comes_back(dialogd: Dialogd) -> None:
    frames = [bytes([number]) * 160 for number in range(256)]
    async with Twilio(dialogd) as twilio, twilio.streaming() as call, trio.open_nursery() as nursery:

        async def talk() -> None:
            for frame in frames:
                await call.say(frame)

        nursery.start_soon(talk)
        assert [await call.hear() for _ in frames] == frames


async def test_the_echo_example_echoes(start_dialogd: StartDialogd) -> None:
    async with Twilio(start_dialogd(agent=ECHO)) as twilio, twilio.streaming() as call:
        await call.echo()


async def test_the_webhooks_fields_and_the_streams_parameters_reach_the_agent(dialogd: Dialogd) -> None:
    async with Twilio(dialogd) as twilio:
        call = PhoneCall(twilio)
        await call.ring(CallerName="Zoë & Sons", FromCity="")
        async with call.stream(table="four"):
            rung, streaming = await dialogd.steps(call.sid, 2, kind="metadata")
        await call.after("completed")
    assert rung["text"] == CALLER
    assert rung["fields"] == call.fields(CallerName="Zoë & Sons", FromCity="")
    assert streaming["fields"] == rung["fields"] | {"table": "four"}


async def test_stop_ends_the_call_and_after_answers_hangup(dialogd: Dialogd) -> None:
    async with Twilio(dialogd) as twilio, twilio.streaming() as call:
        await call.echo()
        await call.stop()
        assert await call.closed() == 1000
        ended = await dialogd.ended(call.sid)
        assert verbs(await call.after("completed")) == ["Hangup"]
    assert ended["reason"] == "the carrier stopped the stream"


async def test_after_from_a_caller_who_hung_up_ends_the_call(dialogd: Dialogd) -> None:
    async with Twilio(dialogd) as twilio, twilio.streaming() as call:
        await call.echo()
        assert verbs(await call.after("completed")) == ["Hangup"]
        assert (await dialogd.ended(call.sid))["reason"] == "the caller hung up"


async def test_two_webhooks_with_one_call_sid_are_one_call_with_one_token(dialogd: Dialogd) -> None:
    async with Twilio(dialogd) as twilio:
        call = PhoneCall(twilio)
        await call.ring()
        first = call.stream_url
        await call.ring()
        assert call.stream_url == first
        calls = [one["id"] for one in await dialogd.ask("/calls")]
        await call.after("completed")
    assert calls.count(call.sid) == 1


async def test_a_token_opens_one_media_socket(dialogd: Dialogd) -> None:
    async with Twilio(dialogd) as twilio, twilio.streaming() as call:
        with pytest.raises(ConnectionRejected) as refusal:
            async with twilio.websocket(call.stream_url):
                pass
        await call.echo()
    assert refusal.value.status_code == 404


@pytest.mark.parametrize("signature", [sign(VOICE, token="another token"), "garbage", "Zoë", "=" * 5000])
async def test_a_webhook_with_a_wrong_signature_is_answered_403(dialogd: Dialogd, signature: str) -> None:
    async with Twilio(dialogd) as twilio:
        headers = {"Content-Type": FORM, "X-Twilio-Signature": signature.encode("latin-1").decode("latin-1")}
        raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
        response = await twilio.request("POST", VOICE, headers=raw, content=b"CallSid=CA1")
    assert response.status_code == 403


async def test_a_webhook_without_a_signature_is_answered_400(dialogd: Dialogd) -> None:
    async with Twilio(dialogd) as twilio:
        response = await twilio.request("POST", VOICE, headers={"Content-Type": FORM}, content=b"CallSid=CA1")
    assert response.status_code == 400


async def test_a_changed_field_breaks_the_webhooks_signature(dialogd: Dialogd) -> None:
    async with Twilio(dialogd) as twilio:
        fields = PhoneCall(twilio).fields()
        response = await twilio.post(VOICE, fields | {"From": "+14155550000"}, signature=sign(VOICE, fields))
    assert response.status_code == 403


@pytest.mark.parametrize("signed", [VOICE, VOICE.replace(":8080", "")])
async def test_a_webhook_may_be_signed_with_or_without_the_port(dialogd: Dialogd, signed: str) -> None:
    async with Twilio(dialogd) as twilio:
        call = PhoneCall(twilio)
        response = await twilio.post(VOICE, call.fields(), signature=sign(signed, call.fields()))
        await twilio.post(ORIGIN + "/twilio/after", call.fields(CallStatus="completed"))
    assert response.status_code == 200


async def test_the_query_is_part_of_what_is_signed(dialogd: Dialogd) -> None:
    url = VOICE + "?tenant=a%20b"
    async with Twilio(dialogd) as twilio:
        call = PhoneCall(twilio)
        refused = await twilio.post(url, call.fields(), signature=sign(VOICE, call.fields()))
        accepted = await twilio.post(url, call.fields())
        await twilio.post(ORIGIN + "/twilio/after", call.fields(CallStatus="completed"))
    assert (refused.status_code, accepted.status_code) == (403, 200)


async def _handshake_status(twilio: Twilio, call: PhoneCall, signature: str) -> int:
    """Return how a media socket with this signature is answered: 101, or the refusal."""
    try:
        async with twilio.websocket(call.stream_url, signature=signature):
            return 101
    except ConnectionRejected as refusal:
        return refusal.status_code


@pytest.mark.parametrize(("old", "new"), [("", ""), (":8080", ""), ("", "/")])
async def test_a_media_socket_may_be_signed_with_or_without_port_and_slash(dialogd: Dialogd, old: str, new: str) -> None:
    async with Twilio(dialogd) as twilio:
        call = PhoneCall(twilio)
        await call.ring()
        signed = call.stream_url + new if not old else call.stream_url.replace(old, new)
        assert await _handshake_status(twilio, call, sign(signed)) == 101
        await call.after("completed")


@pytest.mark.parametrize("scheme", ["https", "http", "wss"])
async def test_a_media_socket_signed_for_another_scheme_is_answered_403(dialogd: Dialogd, scheme: str) -> None:
    async with Twilio(dialogd) as twilio:
        call = PhoneCall(twilio)
        await call.ring()
        signed = call.stream_url.replace("ws", scheme, 1)
        assert await _handshake_status(twilio, call, sign(signed)) == 403
        await call.after("completed")


async def test_a_media_socket_without_a_signature_is_answered_400(dialogd: Dialogd) -> None:
    async with Twilio(dialogd) as twilio:
        call = PhoneCall(twilio)
        await call.ring()
        assert await _handshake_status(twilio, call, "") == 400
        await call.after("completed")


async def test_a_refused_media_socket_does_not_use_up_the_token(dialogd: Dialogd) -> None:
    async with Twilio(dialogd) as twilio:
        call = PhoneCall(twilio)
        await call.ring()
        await _handshake_status(twilio, call, "wrong")
        async with call.stream():
            await call.echo()
        await call.after("completed")


@pytest.mark.parametrize(
    ("method", "path", "content_type", "status"),
    [
        ("POST", "/", FORM, 404),
        ("POST", "/twilio/voices", FORM, 404),
        ("POST", "/twilio", FORM, 404),
        ("GET", "/twilio/voice", FORM, 405),
        ("PUT", "/twilio/after", FORM, 405),
        ("POST", "/twilio/voice", "application/json", 415),
        ("POST", "/twilio/voice", "multipart/form-data; boundary=x", 415),
        ("GET", "/healthz", "", 200),
        ("HEAD", "/healthz", "", 200),
        ("GET", "/readyz", "", 200),
        ("POST", "/readyz", FORM, 404),
        ("POST", "/n/1/twilio/voice", FORM, 404),
        ("HEAD", "/twilio/voice", "", 405),
        ("HEAD", "/", "", 404),
        ("GET", "/twilio/media/token", "", 426),
    ],
)
async def test_what_is_no_webhook_is_refused(
    dialogd: Dialogd, method: str, path: str, content_type: str, status: int
) -> None:
    async with Twilio(dialogd) as twilio:
        response = await twilio.request(method, ORIGIN + path, headers={"Content-Type": content_type})
    assert response.status_code == status


async def test_a_form_that_is_not_utf8_is_answered_400(dialogd: Dialogd) -> None:
    async with Twilio(dialogd) as twilio:
        headers = {"Content-Type": FORM, "X-Twilio-Signature": "x"}
        response = await twilio.request("POST", VOICE, headers=headers, content=b"CallSid=%ff\xff")
    assert response.status_code == 400


async def test_a_media_socket_that_drops_is_followed_by_another_to_the_same_worker(dialogd: Dialogd) -> None:
    async with Twilio(dialogd) as twilio:
        call = PhoneCall(twilio)
        await call.ring()
        async with call.stream():
            await call.echo()
            first, worker = call.stream_url, (await dialogd.ask(f"/calls/{call.sid}"))["worker_pid"]
        await dialogd.logged(event="media socket lost; waiting for the carrier to ask what now", call=call.sid)
        assert verbs(await call.after()) == ["Connect"]
        assert call.stream_url != first
        async with call.stream():
            await call.echo_again()
            assert (await dialogd.ask(f"/calls/{call.sid}"))["worker_pid"] == worker
        await call.after("completed")


async def test_after_a_stream_that_dialogd_believes_open_is_followed_by_another(dialogd: Dialogd) -> None:
    async with Twilio(dialogd) as twilio, twilio.streaming() as call:
        await call.echo()
        assert verbs(await call.after()) == ["Connect"]
        async with call.stream():
            await call.echo_again()


async def test_an_agent_far_ahead_of_the_callers_ear_is_held_back_and_lives(dialogd: Dialogd) -> None:
    async with Twilio(dialogd) as twilio, twilio.streaming() as call, trio.open_nursery() as nursery:
        worker = (await dialogd.ask(f"/calls/{call.sid}"))["worker_pid"]

        async def listen() -> None:
            while True:
                await call.receive()

        nursery.start_soon(listen)
        await call.press("7")
        await trio.sleep(6.5)  # a worker that is not heard of for five seconds is killed
        assert (await dialogd.ask(f"/calls/{call.sid}"))["worker_pid"] == worker
        nursery.cancel_scope.cancel()
    assert dialogd.find(event="worker hangs and is killed", call=call.sid) == []


async def test_the_worker_hears_of_a_hangup_by_the_operator(dialogd: Dialogd) -> None:
    async with Twilio(dialogd) as twilio, twilio.streaming() as call:
        await dialogd.ask(f"/calls/{call.sid}/hangup", "POST")
        assert await call.closed() == 1000
        assert verbs(await call.after()) == ["Hangup"]
        assert (await dialogd.ended(call.sid))["reason"] == "hung up by the operator"


async def test_no_secret_of_the_carriers_is_in_a_template_or_a_worker(dialogd: Dialogd) -> None:
    async with Twilio(dialogd) as twilio, twilio.streaming() as call:
        await call.echo()
        others = set(dialogd.processes()) - {dialogd.pid}
        environments = [await trio.Path(f"/proc/{pid}/environ").read_bytes() for pid in others]
    assert len(environments) >= 2
    assert not any(AUTH_TOKEN.encode() in environ or b"TWILIO" in environ for environ in environments)


async def test_a_calls_lines_in_the_log_carry_its_id_and_no_number(dialogd: Dialogd) -> None:
    async with Twilio(dialogd) as twilio, twilio.streaming() as call:
        await call.echo()
        await call.press("1")
        await dialogd.logged(event="worker died in mid-call, and another takes over", call=call.sid)
        await call.stop()
        await dialogd.ended(call.sid)
    lines = [line for line in dialogd.log if line.get("call") == call.sid]
    begins = next(line for line in lines if line["event"] == "call begins")
    assert begins["caller"] == "…23"
    assert {"call begins", "call ended"} <= {line["event"] for line in lines}
    assert not any(re.search(r"\d{7}", line["event"] + line.get("caller", "")) for line in lines)
    dialogd.expects_traceback = True  # the agent's own


async def test_a_call_whose_stream_nobody_opens_leaves_nothing(start_dialogd: StartDialogd) -> None:
    dialogd = start_dialogd(calls={"connect_timeout": 0.3, "ending_timeout": 0.3})
    async with Twilio(dialogd) as twilio:
        call = PhoneCall(twilio)
        await call.ring()
        await dialogd.ended(call.sid)
    status = await dialogd.ask("/status")
    assert (status["calls"], status["workers"]) == (0, 0)


async def test_a_call_whose_stream_nobody_opens_again_leaves_nothing(start_dialogd: StartDialogd) -> None:
    dialogd = start_dialogd(calls={"reconnect_timeout": 0.3, "ending_timeout": 0.3})
    async with Twilio(dialogd) as twilio, twilio.streaming() as call:
        await call.echo()
        assert verbs(await call.after()) == ["Connect"]
        await dialogd.ended(call.sid)
    status = await dialogd.ask("/status")
    assert (status["calls"], status["workers"]) == (0, 0)
