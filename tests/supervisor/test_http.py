"""The public listener against requests that no carrier sends: each gets its answer, and nobody else notices."""

import socket
import ssl
import subprocess
from pathlib import Path

import pytest
import trio
import trio.lowlevel

from tests.conftest import StartDialogd
from tests.e2e.daemon import Dialogd
from tests.e2e.raw import connect, exchange
from tests.e2e.twilio_client import PhoneCall, Twilio, verbs

REQUEST_TIMEOUT_S = 0.5
SIZE_LIMIT = 5000
GET = b"GET /healthz HTTP/1.1\r\nHost: voice.test\r\n\r\n"
POST = b"POST /twilio/voice HTTP/1.1\r\nHost: voice.test\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n"


@pytest.fixture(scope="module")
def dialogd(start_shared_dialogd: StartDialogd) -> Dialogd:
    limits = {"request_timeout": REQUEST_TIMEOUT_S, "idle_timeout": 1, "request_size_limit": SIZE_LIMIT}
    return start_shared_dialogd(gateway=limits)


@pytest.fixture(autouse=True)
async def _alive_afterwards(dialogd: Dialogd):  # type: ignore[no-untyped-def]  # pytest-trio's fixtures are generators
    yield
    async with Twilio(dialogd) as twilio, twilio.streaming() as call:
        await call.echo()


AMBIGUOUS = {
    "a header folded over two lines": b"GET / HTTP/1.1\r\nHost: a\r\nX-A: 1\r\n 2\r\n\r\n",
    "a header folded with a tab": b"GET / HTTP/1.1\r\nHost: a\r\nX-A: 1\r\n\t2\r\n\r\n",
    "a bare LF between headers": b"GET / HTTP/1.1\r\nHost: a\nX-A: 1\r\n\r\n",
    "bare LFs only": b"GET / HTTP/1.1\nHost: a\n\n",
    "a bare CR in a header": b"GET / HTTP/1.1\r\nHost: a\rX-A: 1\r\n\r\n",
    "Content-Length and Transfer-Encoding": POST + b"Content-Length: 5\r\n" + CHUNKED + b"\r\n0\r\n\r\n",
    "the two with a space before the colon": POST + b"Content-Length : 5\r\n" + CHUNKED + b"\r\n0\r\n\r\n",
    "two lengths that differ": POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
    "two lengths in one header": POST + b"Content-Length: 5, 6\r\n\r\nhello",
    "a negative length": POST + b"Content-Length: -5\r\n\r\nhello",
    "a length that is no number": POST + b"Content-Length: 0x5\r\n\r\nhello",
    "a length with a sign": POST + b"Content-Length: +5\r\n\r\nhello",
    "a chunk whose size is no number": POST + CHUNKED + b"\r\nzz\r\nhello\r\n",
    "a chunk longer than its size": POST + CHUNKED + b"\r\n2\r\nhello\r\n0\r\n\r\n",
    "no Host": b"GET /healthz HTTP/1.1\r\n\r\n",
    "two Hosts": b"GET /healthz HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
    "a header without a colon": b"GET / HTTP/1.1\r\nHost a\r\n\r\n",
    "a NUL in a header": b"GET / HTTP/1.1\r\nHost: a\0b\r\n\r\n",
    "a space in the target": b"GET / a HTTP/1.1\r\nHost: a\r\n\r\n",
    "a target that is not ASCII": "GET /ä HTTP/1.1\r\nHost: a\r\n\r\n".encode(),
    "no HTTP at all": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    "words": b"hello, is anybody there?\r\n\r\n",
    "HEAD with both framings": b"HEAD / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n" + CHUNKED + b"\r\n",
}


@pytest.mark.parametrize("request_bytes", AMBIGUOUS.values(), ids=AMBIGUOUS)
async def test_a_request_that_two_parsers_may_read_differently_is_answered_400(
    dialogd: Dialogd, request_bytes: bytes
) -> None:
    with trio.fail_after(REQUEST_TIMEOUT_S - 0.1):  # at once, not when a deadline says so
        async with await connect(dialogd) as wire:
            await wire.send(request_bytes)
            status, body = await wire.response()
    assert (status, bool(body)) == (400, True)


async def test_an_unknown_transfer_encoding_is_answered_501(dialogd: Dialogd) -> None:
    status, _ = await exchange(dialogd, POST + b"Transfer-Encoding: gzip\r\n\r\n")
    assert status == 501


@pytest.mark.parametrize("ending", [b"", b"\r\n\r\n"], ids=["unfinished", "finished"])
async def test_a_head_over_16_kb_is_answered_400(dialogd: Dialogd, ending: bytes) -> None:
    status, body = await exchange(dialogd, GET[:-2] + b"X-Long: " + b"a" * (17 << 10) + ending)
    assert status == 400
    assert b"16384" in body


@pytest.mark.parametrize("size", [SIZE_LIMIT + 1, 4_000_000, 10**19])
async def test_a_body_announced_over_the_limit_is_answered_413(dialogd: Dialogd, size: int) -> None:
    status, body = await exchange(dialogd, POST + b"Content-Length: %d\r\n\r\n" % size)
    assert status == 413
    assert b"gateway.request_size_limit" in body


async def test_a_client_that_sends_all_of_a_large_body_first_can_read_the_413(dialogd: Dialogd) -> None:
    status, _ = await exchange(dialogd, POST + b"Content-Length: 3000000\r\n\r\n" + b"a" * 3_000_000)
    assert status == 413


async def test_a_chunked_body_over_the_limit_is_answered_413(dialogd: Dialogd) -> None:
    chunk = b"%x\r\n" % 1000 + b"a" * 1000 + b"\r\n"
    status, _ = await exchange(dialogd, POST + CHUNKED + b"\r\n" + chunk * 300 + b"0\r\n\r\n")
    assert status == 413


async def test_a_body_of_exactly_the_limit_is_read(dialogd: Dialogd) -> None:
    async with await connect(dialogd) as wire:
        await wire.send(POST + b"Content-Length: %d\r\n\r\n" % SIZE_LIMIT + b"a" * SIZE_LIMIT)
        assert (await wire.response())[0] == 415


@pytest.mark.parametrize(
    "sent",
    [b"", b"GET /healthz HTTP/1.1\r\nHost: voi", POST + b"Content-Length: 9\r\n\r\nabc", POST + CHUNKED + b"\r\n5\r\nab"],
)
async def test_a_client_that_does_not_finish_its_request_is_answered_408(dialogd: Dialogd, sent: bytes) -> None:
    assert (await exchange(dialogd, sent))[0] == 408


async def test_a_client_that_drips_is_answered_408(dialogd: Dialogd) -> None:
    async with await connect(dialogd) as wire, trio.open_nursery() as nursery:

        async def drip() -> None:
            for byte in GET:
                await wire.send(bytes([byte]))
                await trio.sleep(0.1)

        nursery.start_soon(drip)
        status, _ = await wire.response()
        nursery.cancel_scope.cancel()
    assert status == 408


async def test_a_kept_alive_connection_that_stays_silent_is_closed_without_a_word(dialogd: Dialogd) -> None:
    async with await connect(dialogd) as wire:
        await wire.send(GET)
        await wire.response()
        assert await wire.rest() == b""


async def test_several_requests_on_one_connection_are_answered(dialogd: Dialogd) -> None:
    async with await connect(dialogd) as wire:
        for _ in range(5):
            await wire.send(GET)
            assert await wire.response() == (200, b"ok\n")


async def test_pipelined_requests_are_answered_in_order(dialogd: Dialogd) -> None:
    post = POST + b"Content-Length: 5\r\n\r\nhello"
    chunked = POST + CHUNKED + b"\r\n5\r\nhello\r\n0\r\n\r\n"
    async with await connect(dialogd) as wire:
        await wire.send(b"\r\n" + GET + post + GET + chunked + b"\r\n" + GET)
        assert [(await wire.response())[0] for _ in range(5)] == [200, 415, 200, 415, 200]


async def test_requests_split_anywhere_are_put_together(dialogd: Dialogd) -> None:
    request = POST + b"Content-Length: 5\r\n\r\nhello"
    async with await connect(dialogd) as wire:
        for split in range(1, len(request), 7):
            await wire.send(request[:split])
            await trio.lowlevel.checkpoint()
            await wire.send(request[split:])
            assert (await wire.response())[0] == 415


@pytest.mark.parametrize("head", [b"GET /healthz HTTP/1.0\r\n\r\n", GET[:-2] + b"Connection: close\r\n\r\n"])
async def test_a_client_that_wants_to_be_closed_is(dialogd: Dialogd, head: bytes) -> None:
    assert await exchange(dialogd, head) == (200, b"ok\n")


async def test_a_refusal_after_a_head_request_has_its_reason(dialogd: Dialogd) -> None:
    async with await connect(dialogd) as wire:
        await wire.send(b"HEAD /healthz HTTP/1.1\r\nHost: voice.test\r\n\r\n")
        assert (await wire.until(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
        await wire.send(b"GET / HTTP/1.1\n\n")
        status, body = await wire.response()
    assert (status, bool(body)) == (400, True)


async def test_a_client_that_expects_100_continue_is_told(dialogd: Dialogd) -> None:
    async with await connect(dialogd) as wire:
        await wire.send(POST + b"Content-Length: 5\r\nExpect: 100-continue\r\n\r\n")
        assert (await wire.until(b"\r\n\r\n")).startswith(b"HTTP/1.1 100 ")
        await wire.send(b"hello")
        assert (await wire.response())[0] == 415


@pytest.mark.parametrize(
    "sent", [b"", b"GET /hea", POST + b"Content-Length: 9\r\n\r\nabc", GET, POST + CHUNKED + b"\r\n5\r\nab"]
)
async def test_a_client_may_vanish_at_any_stage(dialogd: Dialogd, sent: bytes) -> None:
    for reset in (False, True):
        wire = await connect(dialogd)
        await wire.send(sent)
        if reset:
            assert isinstance(wire.stream, trio.SocketStream)
            linger = (1).to_bytes(4, "little") + bytes(4)  # struct linger: on, for no time, so that closing resets
            wire.stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        await wire.close()


async def test_a_hundred_connections_opened_and_dropped_leave_no_descriptor(dialogd: Dialogd) -> None:
    before = (await dialogd.ask("/status"))["connections"]
    for _ in range(100):
        await (await connect(dialogd)).close()
    with trio.fail_after(5):
        while (await dialogd.ask("/status"))["connections"] > before:
            await trio.lowlevel.checkpoint()


async def test_one_connection_too_many_is_answered_503(start_dialogd: StartDialogd) -> None:
    crowded = start_dialogd(gateway={"max_connections": 3})
    first, *others = [await connect(crowded) for _ in range(3)]
    for wire in (first, *others):
        await wire.send(GET)
        await wire.response()
    assert (await exchange(crowded, b""))[0] == 503
    await first.close()
    await crowded.logged(event="too many connections")
    with trio.fail_after(5):
        while (await crowded.ask("/status"))["connections"] > 2:
            await trio.lowlevel.checkpoint()
    async with await connect(crowded) as wire:
        await wire.send(GET)
        assert (await wire.response())[0] == 200
    for wire in others:
        await wire.close()


# TLS


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with cert.pem and key.pem for voice.test, signed by itself."""
    directory = tmp_path_factory.mktemp("tls")
    kind = ["-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    name = ["-subj", "/CN=voice.test", "-addext", "subjectAltName=DNS:voice.test"]
    files = ["-keyout", f"{directory}/key.pem", "-out", f"{directory}/cert.pem"]
    subprocess.run(["openssl", "req", *kind, *name, *files], check=True, capture_output=True)
    return directory


@pytest.fixture(scope="module")
def secure(start_shared_dialogd: StartDialogd, certificate: Path) -> Dialogd:
    files = {"certificate": str(certificate / "cert.pem"), "key": str(certificate / "key.pem")}
    gateway = {"public_url": "https://voice.test", "request_size_limit": SIZE_LIMIT, **files}
    dialogd = start_shared_dialogd(gateway=gateway)
    dialogd.tls = ssl.create_default_context(cafile=certificate / "cert.pem")
    return dialogd


async def test_a_whole_call_goes_over_tls(secure: Dialogd) -> None:
    async with Twilio(secure) as twilio, twilio.streaming() as call:
        assert call.stream_url.startswith("wss://voice.test/")
        for number in range(50):
            await call.echo(bytes([number]) * 160)
        await call.stop()
        assert await call.closed() == 1000
        assert verbs(await call.after("completed")) == ["Hangup"]
        await secure.ended(call.sid)


@pytest.mark.parametrize("noise", [b"", GET, b"\x16\x03\x01", bytes(300), b"\x16\x03\x01\x00\x05hello"])
async def test_noise_instead_of_a_tls_handshake_harms_nobody(secure: Dialogd, noise: bytes) -> None:
    async with await connect(secure) as wire:
        await wire.send(noise)
    async with Twilio(secure) as twilio:
        call = PhoneCall(twilio)
        assert verbs(await call.ring()) == ["Connect"]
    await secure.ask(f"/calls/{call.sid}/hangup", "POST")


async def test_a_413_can_be_read_over_tls(secure: Dialogd) -> None:
    async with Twilio(secure) as twilio:
        url = secure.public_url + "/twilio/voice"
        response = await twilio.request("POST", url, headers={}, content=b"a" * 2_000_000)
    assert response.status_code == 413


async def test_a_media_socket_over_tls_that_drops_is_noticed(secure: Dialogd) -> None:
    async with Twilio(secure) as twilio:
        call = PhoneCall(twilio)
        await call.ring()
        async with call.stream():
            await call.echo()
        await secure.logged(event="media socket closed", call=call.sid, code=1006)
        assert verbs(await call.after("completed")) == ["Hangup"]


async def test_what_was_agreed_on_by_tls_cannot_be_handed_to_another_version(secure: Dialogd) -> None:
    response = await secure.post("/upgrade")
    assert response.status_code == 409
    assert "let a proxy do TLS, or restart" in response.json()["error"]
