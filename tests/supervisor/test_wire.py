"""Twilio's Media Streams messages as its documentation shows them, and everything else as malformed."""

import base64
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from twilio.request_validator import RequestValidator

from dialog_supervisor.carriers.twilio import wire
from dialog_supervisor.carriers.twilio.addresses import signed_urls
from protocol.framing import encode
from protocol.messages import Media

STREAM = "MZ" + "1" * 32
CALL, ACCOUNT = "CA" + "2" * 32, "AC" + "3" * 32

CONNECTED = '{"event":"connected","protocol":"Call","version":"1.0.0"}'
START = f"""{{
  "event": "start", "sequenceNumber": "1",
  "start": {{
    "accountSid": "{ACCOUNT}", "streamSid": "{STREAM}", "callSid": "{CALL}", "tracks": ["inbound"],
    "mediaFormat": {{"encoding": "audio/x-mulaw", "sampleRate": 8000, "channels": 1}},
    "customParameters": {{"FirstName": "Jane", "RemoteParty": "Bob"}}
  }},
  "streamSid": "{STREAM}"
}}"""
MEDIA = f"""{{
  "event": "media", "sequenceNumber": "3",
  "media": {{"track": "inbound", "chunk": "1", "timestamp": "52", "payload": "f39/fn8="}},
  "streamSid": "{STREAM}"
}}"""
DTMF = f'{{"event":"dtmf","streamSid":"{STREAM}","sequenceNumber":"5","dtmf":{{"track":"inbound_track","digit":"#"}}}}'
MARK = f'{{"event":"mark","sequenceNumber":"4","streamSid":"{STREAM}","mark":{{"name":"my label"}}}}'
STOP = f"""{{
  "event": "stop", "sequenceNumber": "5", "stop": {{"accountSid": "{ACCOUNT}", "callSid": "{CALL}"}}, "streamSid": "{STREAM}"
}}"""


def changed(text: str, path: str, value: Any) -> str:
    """Return a message with one field replaced, or removed when `value` is ..."""
    message = json.loads(text)
    *parents, last = path.split(".")
    place = message
    for parent in parents:
        place = place[parent]
    place[last] = value
    if value is ...:
        del place[last]
    return json.dumps(message)


def decode(text: str) -> wire.Incoming:
    return wire.decode(text.encode("utf-8", "surrogatepass"))


# In


def test_connected() -> None:
    assert decode(CONNECTED) == wire.Connected()


def test_start() -> None:
    details = wire.StartDetails(
        CALL, STREAM, ACCOUNT, ("inbound",), wire.MediaFormat(), {"FirstName": "Jane", "RemoteParty": "Bob"}
    )
    assert decode(START) == wire.Start(details, STREAM)


def test_media() -> None:
    message = decode(MEDIA)
    assert message == wire.Media(wire.MediaDetails(b"\x7f\x7f\x7f\x7e\x7f", 52, "inbound"), STREAM)


def test_dtmf() -> None:
    assert decode(DTMF) == wire.Dtmf(wire.DtmfDetails("#"), STREAM)


def test_mark() -> None:
    assert decode(MARK) == wire.Mark(wire.MarkDetails("my label"), STREAM)


def test_stop() -> None:
    assert decode(STOP) == wire.Stop(STREAM)


@pytest.mark.parametrize("number", [52, "52", 52.0])
def test_numbers_come_as_strings_or_as_numbers(number: Any) -> None:
    assert decode(changed(MEDIA, "media.timestamp", number)) == decode(MEDIA)


def test_a_sample_rate_may_be_a_string() -> None:
    assert decode(changed(START, "start.mediaFormat.sampleRate", "8000")) == decode(START)


@pytest.mark.parametrize("text", [CONNECTED, START, MEDIA, DTMF, MARK, STOP])
def test_what_twilio_may_add_is_ignored(text: str) -> None:
    assert decode(changed(text, "added", {"deep": [1, None]})) == decode(text)


MALFORMED = [
    pytest.param("", id="nothing"),
    pytest.param("hello", id="not JSON"),
    pytest.param(MEDIA[:-5], id="cut short"),
    pytest.param(MARK + "x", id="something behind it"),
    pytest.param("[]", id="an array"),
    pytest.param("null", id="null"),
    pytest.param("{}", id="no event"),
    pytest.param('{"event":"unknown"}', id="an unknown event"),
    pytest.param('{"event":7}', id="an event that is a number"),
    pytest.param('{"event":"media"}', id="media without media"),
    pytest.param(changed(MEDIA, "media.payload", ...), id="media without payload"),
    pytest.param(changed(MEDIA, "media.payload", None), id="a payload of null"),
    pytest.param(changed(MEDIA, "media.payload", 7), id="a payload that is a number"),
    pytest.param(changed(MEDIA, "media.timestamp", "soon"), id="a timestamp in words"),
    pytest.param(changed(MEDIA, "media.timestamp", "1.5"), id="a timestamp with a fraction"),
    pytest.param(changed(MEDIA, "media.timestamp", -20), id="a timestamp before the stream"),
    pytest.param(changed(MEDIA, "media.timestamp", str(2**64)), id="a timestamp that the pipe cannot carry"),
    pytest.param(changed(MEDIA, "media.timestamp", 10**30), id="a timestamp that no machine holds"),
    pytest.param(changed(MEDIA, "media.timestamp", None), id="a timestamp of null"),
    pytest.param(changed(MEDIA, "media", "f38="), id="media that is a string"),
    pytest.param(changed(START, "start.callSid", ...), id="a start without call"),
    pytest.param(changed(START, "start.customParameters", {"a": {"b": "c"}}), id="nested parameters"),
    pytest.param(changed(START, "start.tracks", "inbound"), id="tracks that are a string"),
    pytest.param(changed(START, "start.mediaFormat.sampleRate", "fast"), id="a sample rate in words"),
    pytest.param('{"event":"dtmf","dtmf":{}}', id="dtmf without digit"),
    pytest.param('{"event":"mark","mark":{"name":null}}', id="a mark without name"),
    pytest.param('{"event":"mark","mark":{"name":"\\ud800"}}', id="half a surrogate pair, escaped"),
    pytest.param('{"event":"mark","mark":{"name":"\ud800"}}', id="half a surrogate pair"),
    pytest.param('{"event":"stop","x":' + "[" * 100_000, id="endless nesting"),
]


@pytest.mark.parametrize("text", MALFORMED)
def test_everything_else_is_malformed(text: str) -> None:
    with pytest.raises(wire.Malformed):
        decode(text)


@settings(deadline=None)
@given(st.text() | st.sampled_from([START, MEDIA, DTMF, MARK]).flatmap(lambda text: st.integers(1).map(lambda n: text[:-n])))
def test_any_other_text_is_malformed(text: str) -> None:
    with pytest.raises(wire.Malformed):
        decode(text)


@pytest.mark.parametrize("payload", ["f38", "f38=x", "f3 8=", "f38é", "=", "f38=\n", "####"])
def test_a_payload_that_is_not_base64_is_malformed(payload: str) -> None:
    with pytest.raises(wire.Malformed, match="base64"):
        decode(changed(MEDIA, "media.payload", payload))


def test_the_greatest_timestamp_fits_the_pipe() -> None:
    message = decode(changed(MEDIA, "media.timestamp", str(2**53 - 1)))
    assert isinstance(message, wire.Media)
    assert encode(Media(message.media.timestamp, b""))


# Out


def test_media_to_twilio_has_exactly_the_documented_fields() -> None:
    audio = bytes(range(256))
    sent = json.loads(wire.Encoder(STREAM).media(audio))
    assert sent == {"event": "media", "streamSid": STREAM, "media": {"payload": base64.b64encode(audio).decode()}}


def test_a_mark_to_twilio_has_exactly_the_documented_fields() -> None:
    sent = json.loads(wire.Encoder(STREAM).mark("my label"))
    assert sent == {"event": "mark", "streamSid": STREAM, "mark": {"name": "my label"}}


def test_a_clear_to_twilio_has_exactly_the_documented_fields() -> None:
    assert json.loads(wire.Encoder(STREAM).clear) == {"event": "clear", "streamSid": STREAM}


@settings(deadline=None)
@given(st.text(), st.text())
def test_any_name_of_a_mark_or_a_stream_comes_back_as_it_was(name: str, stream_sid: str) -> None:
    encoder = wire.Encoder(stream_sid)
    assert wire.decode(encoder.mark(name)) == wire.Mark(wire.MarkDetails(name), stream_sid)
    assert json.loads(encoder.clear)["streamSid"] == stream_sid


@settings(deadline=None)
@given(st.binary(max_size=1000))
def test_any_audio_survives_base64(audio: bytes) -> None:
    message = wire.decode(wire.Encoder('a "quoted" ü').media(audio))
    assert isinstance(message, wire.Media)
    assert message.media.payload == audio


# The URLs that a handshake may have been signed with


def test_a_url_without_port_may_be_signed_with_and_without_it_and_a_slash() -> None:
    assert list(signed_urls("wss://voice.example.com/twilio/media/t")) == [
        "wss://voice.example.com/twilio/media/t",
        "wss://voice.example.com/twilio/media/t/",
        "wss://voice.example.com:443/twilio/media/t",
        "wss://voice.example.com:443/twilio/media/t/",
    ]


def test_a_url_with_a_port_may_be_signed_without_it() -> None:
    assert list(signed_urls("wss://voice.example.com:8443/m")) == [
        "wss://voice.example.com:8443/m",
        "wss://voice.example.com:8443/m/",
        "wss://voice.example.com/m",
        "wss://voice.example.com/m/",
    ]


def test_a_plain_url_has_port_80() -> None:
    assert "ws://127.0.0.1:80/m" in signed_urls("ws://127.0.0.1/m")


def test_an_ipv6_address_keeps_its_brackets() -> None:
    assert list(signed_urls("ws://[::1]:8080/m")) == [
        "ws://[::1]:8080/m",
        "ws://[::1]:8080/m/",
        "ws://[::1]/m",
        "ws://[::1]/m/",
    ]


def test_no_form_is_https_and_none_comes_twice() -> None:
    forms = list(signed_urls("wss://voice.example.com:443/m"))
    assert len(set(forms)) == len(forms)
    assert all(form.startswith("wss://") for form in forms)


@pytest.mark.parametrize("signed", ["wss://h.example/m/t", "wss://h.example/m/t/", "wss://h.example:443/m/t"])
def test_a_signature_over_any_form_is_found_by_the_carriers_own_validator(signed: str) -> None:
    validator = RequestValidator("token")
    signature = validator.compute_signature(signed, {})
    assert signature in [validator.compute_signature(form, {}) for form in signed_urls("wss://h.example/m/t")]
