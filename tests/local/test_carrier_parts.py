"""The phone company's parts without I/O: playout on a clock of its own, documents, signatures, sound."""

import pytest

from dialog_local.carrier import playout, twiml
from dialog_local.carrier.line import audible_span
from dialog_local.carrier.playout import Playout
from dialog_local.carrier.webhooks import signature

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


# Sound


def test_silence_and_faint_noise_are_not_audible() -> None:
    assert audible_span(b"\xff\x7f\xfe\x7e" * 40) is None


def test_the_audible_span_is_found_to_the_sample() -> None:
    assert audible_span(b"\xff" * 30 + b"\x00" * 5 + b"\xff" * 10) == (30, 34)
