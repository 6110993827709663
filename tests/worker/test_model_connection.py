"""The connection to the model: it is open before the caller has spoken, and after each interruption."""

import time
from types import SimpleNamespace

import pytest
import trio
import trio.testing
from httpcore2._async import http11

from dialog_worker.agent import openai as agent_module
from dialog_worker.agent.completion import KEEPALIVE_S, make_client, make_http, request_of
from dialog_worker.agent.completion import practise as really_practise
from dialog_worker.agent.openai import PRACTISE_AFTER_S
from dialog_worker.testing import scripted_call

from .desk import Desk
from .model_server import ModelServer, model_server, text

PATIENCE_S = 5.0
CUSHION_S = 0.05


async def until_tried(server: ModelServer, times: int) -> None:
    """Wait until the agent has tried its connection so often, and has read the answer."""
    with trio.fail_after(PATIENCE_S):
        while server.listed < times:  # noqa: ASYNC110 - another task's counter
            await trio.sleep(0.01)
    await trio.testing.wait_all_tasks_blocked(CUSHION_S)


# The connection


async def test_turns_share_one_warm_connection() -> None:
    async with model_server() as server:
        server.scripts = [text(f"{number}.") for number in range(5)]
        async with scripted_call(Desk(server)) as call:
            await until_tried(server, 1)
            for number in range(5):
                await call.caller_says("next")
                assert await call.next_said() == f"{number}."
        assert server.connections == 1


async def test_a_connection_outlives_the_pauses_of_a_conversation(monkeypatch: pytest.MonkeyPatch) -> None:
    late = SimpleNamespace(monotonic=time.monotonic)
    monkeypatch.setattr(http11, "time", late)
    async with model_server() as server, make_client("k", server.url, make_http()) as client:
        for _ in range(3):
            await client.models.list()
            monkeypatch.setattr(late, "monotonic", lambda now=late.monotonic: now() + KEEPALIVE_S - 1)
        assert (server.listed, server.connections) == (3, 1)


async def test_the_connection_that_an_interruption_costs_is_replaced_before_the_next_turn() -> None:
    async with model_server() as server:
        server.scripts = [text("One two three four. ", 5.0, "Five."), text("Well.")]
        async with scripted_call(Desk(server)) as call:
            await until_tried(server, 1)
            await call.caller_says("count")
            await call.until("saying")
            await call.caller_speaks()
            await until_tried(server, 2)
            assert server.connections == 2
            await call.caller_says("enough")
            while await call.next_said() != "Well.":
                pass
        assert server.connections == 2


async def test_so_is_one_lost_to_a_caller_who_goes_on_while_the_model_thinks() -> None:
    async with model_server() as server:
        server.scripts = [text(5.0, "Too late."), text("Yes.")]
        async with scripted_call(Desk(server)) as call:
            await until_tried(server, 1)
            await call.caller_says("a table")
            with trio.fail_after(PATIENCE_S):
                while not server.requests:  # noqa: ASYNC110 - another task's list
                    await trio.sleep(0.01)
            await call.caller_speaks()
            await until_tried(server, 2)
            assert server.connections == 2
            await call.caller_says("for four")
            while await call.next_said() != "Yes.":
                pass
        assert server.connections == 2


async def test_a_caller_who_speaks_after_a_silence_finds_a_connection_that_was_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with model_server() as server:
        async with scripted_call(Desk(server)) as call:
            await until_tried(server, 1)
            monkeypatch.setattr(agent_module, "COOL_S", -1.0)
            await call.caller_speaks()
            await until_tried(server, 2)
        assert server.connections == 1


async def test_a_caller_who_speaks_soon_after_does_not_have_it_tried_again() -> None:
    async with model_server() as server:
        server.scripts = [text("Yes.")]
        async with scripted_call(Desk(server)) as call:
            await until_tried(server, 1)
            await call.caller_says("hello")
            assert await call.next_said() == "Yes."
        assert server.listed == 1


async def test_a_model_that_cannot_be_reached_is_told_of_before_the_caller_has_asked(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with model_server() as gone:
        pass
    async with scripted_call(Desk(gone)):
        with trio.fail_after(PATIENCE_S):
            while f"the model at {gone.url}/ cannot be reached: " not in caplog.text:  # noqa: ASYNC110 - another task's
                await trio.sleep(0.01)


async def test_the_first_time_a_caller_speaks_the_request_is_practised_and_nobody_is_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    practised: list[float] = []

    async def practise() -> None:
        await really_practise()
        practised.append(trio.current_time())

    monkeypatch.setattr(agent_module, "practise", practise)
    async with model_server() as server, scripted_call(Desk(server)) as call:
        await until_tried(server, 1)
        assert practised == []
        for _ in range(2):
            began_at = trio.current_time()
            await call.caller_speaks()
            await trio.sleep(2 * PRACTISE_AFTER_S)
        assert len(practised) == 1
        assert practised[0] < began_at
    assert (server.requests, server.connections) == ([], 1)


# The request


async def test_a_request_has_the_conversation_the_tools_and_the_options() -> None:
    said, tools = [{"role": "user", "content": "hi"}], [{"type": "function", "function": {"name": "book"}}]
    async with model_server() as server, make_client("k", server.url, make_http()) as client:
        server.scripts = [text("Yes.")]
        options = {"temperature": 0.2, "extra_body": {"top_k": 5}}
        async for _ in await client.chat.completions.create(**request_of("m", said, tools, options)):
            pass
        expected = {"model": "m", "messages": said, "tools": tools, "stream": True, "temperature": 0.2, "top_k": 5}
        assert server.requests == [expected]


def test_without_tools_none_are_offered() -> None:
    assert "tools" not in request_of("m", [], [], {})["extra_body"]
