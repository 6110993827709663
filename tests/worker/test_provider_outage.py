"""How long an outage may last, and who decides that: on a virtual clock, against a real server on loopback."""

import math
import socket
from collections.abc import AsyncIterator

import msgspec
import pytest
import trio
from trio.testing import MockClock

from dialog_worker.participant import ProviderError
from dialog_worker.provider import Connection, ConnectionLost, Decoder, Endpoint, ProviderSocket

from .scripted_provider import ScriptedProvider, scripted_provider


class Hello(msgspec.Struct, tag_field="type", tag="hello"):
    """Says that the server works."""


class Client:
    """A `ProviderSocket` for which somebody waits since `waiting_since`."""

    def __init__(self, url: str) -> None:
        self.waiting_since = math.inf
        self.errors: list[ProviderError] = []
        self.greeted = trio.Event()
        endpoint = Endpoint("Acme", url, {}, "ACME_KEY")
        self.socket = ProviderSocket(endpoint, Decoder(Hello), self.report, waiting_since=lambda: self.waiting_since)

    async def report(self, error: ProviderError) -> None:
        self.errors.append(error)

    async def session(self, connection: Connection[Hello]) -> None:
        while True:
            await connection.receive()
            connection.prove()
            self.greeted.set()

    async def run(self) -> float:
        """The seconds until the outage was fatal."""
        began = trio.current_time()
        await self.socket.serve(self.session)
        return trio.current_time() - began


@pytest.fixture
def clock() -> MockClock:
    return MockClock(autojump_threshold=0.003)  # real seconds, in which loopback is sure to answer


@pytest.fixture
async def provider() -> AsyncIterator[ScriptedProvider]:
    async with scripted_provider() as provider:
        yield provider


async def test_an_outage_that_nobody_notices_is_fatal_after_15_s(provider: ScriptedProvider, clock: MockClock) -> None:
    provider.refusals = [503] * 100
    client = Client(provider.url)
    assert await client.run() == pytest.approx(15, abs=0.2)
    assert [error.fatal for error in client.errors] == [False, True]


async def test_who_has_waited_since_ever_is_not_kept_waiting_by_long_pauses(
    provider: ScriptedProvider, clock: MockClock
) -> None:
    provider.refusals = [503] * 100
    client = Client(provider.url)
    client.waiting_since = -math.inf
    await client.run()
    assert 100 - len(provider.refusals) >= 8  # of which pauses that double leave room for 7 at most


async def test_an_outage_is_fatal_once_somebody_has_waited_3_s(provider: ScriptedProvider, clock: MockClock) -> None:
    provider.refusals = [503] * 100
    client = Client(provider.url)
    client.waiting_since = trio.current_time() - 60  # which was not this outage's fault
    assert await client.run() == pytest.approx(3, abs=0.2)
    assert client.errors[-1].message.endswith("gave up after 3 s")


async def test_somebody_who_begins_to_wait_in_an_outage_is_noticed(
    provider: ScriptedProvider, nursery: trio.Nursery, clock: MockClock
) -> None:
    provider.refusals = [503] * 100
    client = Client(provider.url)

    async def begin_to_wait() -> None:
        await trio.sleep(6)
        client.waiting_since = trio.current_time()

    nursery.start_soon(begin_to_wait)
    assert await client.run() == pytest.approx(9, abs=0.2)


async def test_retries_come_quickly_while_somebody_waits(
    provider: ScriptedProvider, nursery: trio.Nursery, clock: MockClock
) -> None:
    provider.refusals = [503] * 100
    client = Client(provider.url)
    nursery.start_soon(client.run)
    await trio.sleep(10)  # by now the pauses take 2.5 to 5 s
    client.waiting_since = trio.current_time()
    provider.refusals.clear()
    with trio.fail_after(0.7):
        await provider.accept()


async def test_a_server_that_accepts_but_does_not_work_is_left_when_patience_ends(
    provider: ScriptedProvider, clock: MockClock
) -> None:
    provider.refusals = [503]
    client = Client(provider.url)
    client.waiting_since = trio.current_time()
    assert await client.run() == pytest.approx(3.2, abs=0.3)  # with the time to close
    assert provider.attempts == 2


async def test_a_server_that_accepts_while_nobody_waits_is_kept(
    provider: ScriptedProvider, nursery: trio.Nursery, clock: MockClock
) -> None:
    provider.refusals = [503]
    client = Client(provider.url)
    nursery.start_soon(client.run)
    peer = await provider.accept()
    with trio.move_on_after(60):
        await peer.ended.wait()
    assert not peer.ended.is_set()


async def test_a_server_that_proves_to_work_ends_the_outage(
    provider: ScriptedProvider, nursery: trio.Nursery, clock: MockClock
) -> None:
    provider.refusals = [503]
    client = Client(provider.url)
    client.waiting_since = trio.current_time()
    nursery.start_soon(client.run)
    peer = await provider.accept()
    await peer.send({"type": "hello"})
    await client.greeted.wait()
    await trio.sleep(60)
    assert [error.code for error in client.errors] == ["503"]


async def test_words_that_prove_nothing_do_not_end_an_outage(
    provider: ScriptedProvider, nursery: trio.Nursery, clock: MockClock
) -> None:
    client = Client(provider.url)

    async def talk_and_hang_up() -> None:
        while True:
            peer = await provider.accept()
            await peer.send({"type": "weather"})
            await peer.close()

    nursery.start_soon(talk_and_hang_up)
    assert await client.run() == pytest.approx(15, abs=0.5)
    assert [error.fatal for error in client.errors] == [False, True]


async def test_a_server_that_does_not_answer_is_given_up_when_patience_ends(clock: MockClock) -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        client = Client(f"ws://127.0.0.1:{deaf.getsockname()[1]}/")
        client.waiting_since = trio.current_time()
        assert await client.run() == pytest.approx(3, abs=0.2)
    assert client.errors[0] == ProviderError("Acme: no answer to the upgrade within 2 s", code="connect")


async def test_an_adapter_may_say_that_no_retry_will_mend_it(provider: ScriptedProvider, clock: MockClock) -> None:
    client = Client(provider.url)

    async def refuse(connection: Connection[Hello]) -> None:
        raise ConnectionLost("no_voice", "there is no such voice", fatal=True)

    error = await client.socket.serve(refuse)
    assert error == ProviderError("Acme: there is no such voice", code="no_voice", fatal=True)
    assert client.errors == [error]


async def test_a_ping_tells_a_living_server_from_a_dead_one(
    provider: ScriptedProvider, nursery: trio.Nursery, clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = Client(provider.url)
    answers = []
    asked = trio.Event()

    async def ask(connection: Connection[Hello]) -> None:
        answers.append(await connection.answers(3))
        peer.freeze(monkeypatch)
        answers.append(await connection.answers(3))
        asked.set()

    nursery.start_soon(client.socket.serve, ask)
    peer = await provider.accept()
    await asked.wait()
    assert answers == [True, False]
