"""The socket that all adapters share, against a real server on loopback."""

import ssl
from collections.abc import AsyncIterator

import msgspec
import pytest
import trio
from trio_websocket import ConnectionClosed, ConnectionRejected

from dialog_worker.participant import ProviderError
from dialog_worker.provider import (
    BACKOFF_LIMIT_S,
    ConfigurationError,
    Connection,
    ConnectionLost,
    Decoder,
    Endpoint,
    ProviderSocket,
    backoff_s,
    describe,
    find_key,
    find_url,
    tls_context,
)

from .scripted_provider import ScriptedProvider, scripted_provider


class Hello(msgspec.Struct, tag_field="type", tag="hello"):
    text: str = ""


class Harness:
    """A `ProviderSocket` whose sessions gather what they are told."""

    def __init__(self, url: str, give_up_s: float = 15.0) -> None:
        self.errors: list[ProviderError] = []
        self.heard: list[str] = []
        self.connected = trio.Event()
        self.spoken_to = trio.lowlevel.ParkingLot()
        endpoint = Endpoint("Acme", url, {"Authorization": "Token k"}, "ACME_KEY", farewell="bye")
        self.socket = ProviderSocket(endpoint, Decoder(Hello), self.report, give_up_s=give_up_s)

    async def report(self, error: ProviderError) -> None:
        self.errors.append(error)

    async def session(self, connection: Connection[Hello]) -> None:
        self.connected.set()
        while True:
            self.heard.append((await connection.receive()).text)
            connection.prove()
            self.spoken_to.unpark_all()

    async def run(self) -> ProviderError:
        return await self.socket.serve(self.session)


@pytest.fixture
async def provider() -> AsyncIterator[ScriptedProvider]:
    async with scripted_provider() as provider:
        yield provider


async def until_heard(harness: Harness, count: int) -> None:
    with trio.fail_after(5):
        while len(harness.heard) < count:
            await harness.spoken_to.park()


async def test_the_socket_is_opened_at_once_with_the_headers(provider: ScriptedProvider, nursery: trio.Nursery) -> None:
    nursery.start_soon(Harness(provider.url).run)
    assert (await provider.accept()).headers["authorization"] == "Token k"


async def test_a_dropped_connection_is_replaced_and_told_once(provider: ScriptedProvider, nursery: trio.Nursery) -> None:
    harness = Harness(provider.url)
    nursery.start_soon(harness.run)
    first = await provider.accept()
    await first.send({"type": "hello", "text": "one"})
    await until_heard(harness, 1)
    provider.refusals = [503, 429]
    await first.close(1011, "NET-0001")
    second = await provider.accept()
    await second.send({"type": "hello", "text": "two"})
    await until_heard(harness, 2)
    assert [(error.code, error.fatal) for error in harness.errors] == [("1011", False)]
    assert "NET-0001" in harness.errors[0].message


async def test_a_second_outage_is_told_again(provider: ScriptedProvider, nursery: trio.Nursery) -> None:
    harness = Harness(provider.url)
    nursery.start_soon(harness.run)
    for count in (1, 2):
        peer = await provider.accept()
        await peer.send({"type": "hello"})
        await until_heard(harness, count)
        await peer.close()
    await provider.accept()
    assert len(harness.errors) == 2


@pytest.mark.parametrize("status", [401, 403])
async def test_a_refused_key_is_fatal_and_names_the_variable(provider: ScriptedProvider, status: int) -> None:
    provider.refusals = [status]
    provider.refusal_headers = [(b"dg-error", b"Invalid credentials.")]
    with trio.fail_after(5):
        error = await Harness(provider.url).run()
    assert error.fatal
    assert error.code == str(status)
    assert "ACME_KEY" in error.message
    assert "Invalid credentials." in error.message
    assert provider.attempts == 1


async def test_a_request_that_will_always_be_refused_is_not_repeated(provider: ScriptedProvider) -> None:
    provider.refusals = [400]
    with trio.fail_after(5):
        error = await Harness(provider.url).run()
    assert (error.code, error.fatal) == ("400", True)


async def test_an_outage_longer_than_the_limit_is_fatal(provider: ScriptedProvider) -> None:
    provider.refusals = [503] * 50
    harness = Harness(provider.url, give_up_s=0.3)
    with trio.fail_after(5):
        await harness.run()
    assert [error.fatal for error in harness.errors] == [False, True]
    assert "gave up" in harness.errors[1].message


async def test_a_server_that_is_not_there_is_told_as_such() -> None:
    harness = Harness("ws://127.0.0.1:9/speech", give_up_s=0.1)
    with trio.fail_after(5):
        error = await harness.run()
    assert (error.code, error.fatal) == ("connect", True)
    assert "127.0.0.1:9" in error.message


async def test_a_failed_tls_handshake_is_told_as_such_and_soon(provider: ScriptedProvider) -> None:
    harness = Harness(provider.url.replace("ws://", "wss://"), give_up_s=0.1)
    with trio.fail_after(3):
        assert (await harness.run()).code == "tls"


async def test_a_flapping_server_is_given_up(nursery: trio.Nursery) -> None:
    async with scripted_provider() as provider:

        async def flap() -> None:
            while True:
                await (await provider.accept()).close()

        nursery.start_soon(flap)
        with trio.fail_after(5):
            assert (await Harness(provider.url, give_up_s=0.5).run()).fatal


async def test_frames_that_cannot_be_read_are_ignored_and_told_once(
    provider: ScriptedProvider, nursery: trio.Nursery
) -> None:
    harness = Harness(provider.url)
    nursery.start_soon(harness.run)
    peer = await provider.accept()
    for garbage in ("{", b"\xff\x00", "[1]", '{"type":"hello","text":7}', '{"type":{}}'):
        await peer.send(garbage)
    await peer.send('{"type":"news","of":"tomorrow"}')
    await peer.send('{"type":"hello","text":"still here","more":[1]}')
    await until_heard(harness, 1)
    assert harness.heard == ["still here"]
    assert [error.code for error in harness.errors] == ["garbage"]


async def test_a_cancelled_call_says_farewell_and_closes(provider: ScriptedProvider) -> None:
    harness = Harness(provider.url)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(harness.run)
        peer = await provider.accept()
        await harness.connected.wait()
        nursery.cancel_scope.cancel()
    assert await peer.receive() == "bye"
    with trio.fail_after(1):
        await peer.ended.wait()


async def test_a_session_may_declare_its_connection_lost(provider: ScriptedProvider, nursery: trio.Nursery) -> None:
    harness = Harness(provider.url)

    async def impatient(connection: Connection[Hello]) -> None:
        if provider.attempts == 1:
            raise ConnectionLost("stall", "nothing came")
        await harness.session(connection)

    nursery.start_soon(harness.socket.serve, impatient)
    await provider.accept()
    await provider.accept()
    assert [(error.code, error.message) for error in harness.errors] == [("stall", "Acme: nothing came")]


async def test_an_error_of_our_own_ends_the_call_instead_of_being_retried(provider: ScriptedProvider) -> None:
    async def broken(connection: Connection[Hello]) -> None:
        raise ZeroDivisionError

    with pytest.RaisesGroup(ZeroDivisionError, flatten_subgroups=True, allow_unwrapped=True):
        await Harness(provider.url).socket.serve(broken)


def test_backoff_doubles_to_a_limit() -> None:
    assert 0.05 <= backoff_s(0) <= 0.1
    assert 0.2 <= backoff_s(2) <= 0.4
    assert backoff_s(1000) <= BACKOFF_LIMIT_S


def test_a_missing_key_names_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ACME_KEY", raising=False)
    with pytest.raises(ConfigurationError, match="set ACME_KEY"):
        find_key(None, "ACME_KEY", "Acme")
    monkeypatch.setenv("ACME_KEY", " secret\n")
    assert find_key(None, "ACME_KEY", "Acme") == "secret"
    assert find_key("mine", "ACME_KEY", "Acme") == "mine"


def test_the_url_comes_from_the_argument_then_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACME_URL", "ws://there:1/x")
    assert find_url(None, "ACME_URL", "wss://default/") == "ws://there:1/x"
    assert find_url("ws://here/", "ACME_URL", "wss://default/") == "ws://here/"
    with pytest.raises(ConfigurationError, match="https://wrong"):
        find_url("https://wrong", "ACME_URL", "wss://default/")


def test_there_is_one_tls_context() -> None:
    assert tls_context() is tls_context()
    assert tls_context().verify_mode is ssl.CERT_REQUIRED


def test_an_abnormal_close_has_the_code_1006() -> None:
    endpoint = Endpoint("Acme", "ws://x/", {}, "ACME_KEY")
    assert describe(endpoint, ConnectionClosed(None)).code == "1006"
    assert not describe(endpoint, ConnectionRejected(502, (), None)).fatal
