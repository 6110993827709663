"""Faults without a server: how they are written, when an answer begins, and a connection that outlives Hypercorn's races."""

import json
import socket
from typing import Any

import pytest
import trio
from hypercorn.config import Config
from hypercorn.events import Closed, RawData
from hypercorn.trio.worker_context import WorkerContext
from starlette.applications import Starlette
from starlette.types import Message, Receive, Scope, Send
from trio.testing import MockClock, wait_all_tasks_blocked

from dialog_local.misbehaviour.exchange import Exchange
from dialog_local.misbehaviour.faults import (
    Close,
    Drop,
    Fault,
    Garbage,
    Refuse,
    Slow,
    Stall,
    Unreadable,
    parse_fields,
    parse_spec,
)
from dialog_local.misbehaviour.providers import PROVIDERS
from dialog_local.speech.connection import Connection


@pytest.mark.parametrize(
    ("spec", "fields", "fault"),
    [
        ("refuse", {"what": "refuse"}, Refuse(503)),
        ("refuse=429,times=2", {"what": "refuse", "status": 429, "times": 2}, Refuse(429, 2)),
        ("drop=1.5", {"what": "drop", "after_s": 1.5}, Drop(1.5)),
        ("stall", {"what": "stall", "after_s": 0}, Stall(0)),
        ("garbage,times=1", {"what": "garbage", "times": 1}, Garbage(0, 1)),
        ("close=1011", {"what": "close", "code": 1011}, Close(1011, 1.0)),
        (
            "close=1008,0,reason=quota",
            {"what": "close", "code": 1008, "after_s": 0, "reason": "quota"},
            Close(1008, 0, "quota"),
        ),
        ("slow=2", {"what": "slow", "delay_s": 2}, Slow(2)),
    ],
)
def test_a_url_and_a_control_call_say_the_same(spec: str, fields: dict[str, Any], fault: Fault) -> None:
    assert parse_spec(spec) == parse_fields(fields) == fault


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("", "Invalid value ''"),
        ("drop=soon", "Expected `float`, got `str` - at `$.after_s`"),
        ("drop=-1", "Expected `float` >= 0.0"),
        ("drop=1,2", "drop takes after_s, and no value more"),
        ("refuse=200", "Expected `int` >= 400"),
        ("refuse,times=0", "Expected `int` >= 1 - at `$.times`"),
        ("close", "missing required field `code`"),
        ("close=1006", "code 1006 is never sent; use drop"),
        (f"close=1000,reason={'x' * 124}", "the reason is over 123 bytes"),
        ("slow", "missing required field `delay_s`"),
    ],
)
def test_what_cannot_be_read_is_told_with_the_syntax(spec: str, reason: str) -> None:
    with pytest.raises(Unreadable) as caught:
        parse_spec(spec)
    assert str(caught.value).startswith(f"misbehaviour {spec}: ")
    assert reason in str(caught.value)
    assert "expected refuse[=STATUS], drop[=N]," in str(caught.value)


class Played:
    """A provider that sends given messages, one each second, and what reached the client when."""

    def __init__(self, provider: str, messages: list[dict[str, Any]]) -> None:
        [self._provider] = [known for known in PROVIDERS if known.name == provider]
        self._messages = messages
        self._begun = trio.current_time()
        self.times: list[float] = []

    async def serve(self, fault: Fault) -> None:
        exchange = Exchange(self._provider, {"type": "websocket"}, self._receive, self._note)
        exchange.suffer(fault)
        await exchange.serve(self._app)

    async def _app(self, _scope: Scope, _receive: Receive, send: Send) -> None:
        await send({"type": "websocket.accept"})
        for message in self._messages:
            await trio.sleep(1)
            await send({"type": "websocket.send", "text": json.dumps(message)})

    async def _note(self, message: Message) -> None:
        if message["type"] == "websocket.send":
            self.times.append(round(trio.current_time() - self._begun, 3))

    async def _receive(self) -> Message:
        return {"type": "websocket.disconnect"}


def result(text: str, *, final: bool = False) -> dict[str, Any]:
    channel = {"alternatives": [{"transcript": text}]}
    return {"type": "Results", "channel": channel, "speech_final": final, "from_finalize": False}


async def test_each_utterances_first_result_with_words_is_slow(autojump_clock: MockClock) -> None:
    started = {"type": "SpeechStarted"}
    utterance = [started, result(""), result("hello"), result("hello there", final=True)]
    played = Played("deepgram", [*utterance, *utterance])
    await played.serve(Slow(10))
    assert played.times == [1, 2, 13, 14, 15, 16, 27, 28]


async def test_each_items_first_transcript_is_slow(autojump_clock: MockClock) -> None:
    kind = "conversation.item.input_audio_transcription"
    item = [{"type": f"{kind}.delta", "item_id": "a"}, {"type": f"{kind}.completed", "item_id": "a"}]
    other = {"type": f"{kind}.completed", "item_id": "b"}
    played = Played("openai-realtime", [{"type": "session.created"}, *item, other])
    await played.serve(Slow(10))
    assert played.times == [1, 12, 13, 24]


@pytest.mark.parametrize(("fault", "times"), [(Stall(2.5), [1, 2]), (Garbage(2.5), [1, 2, 3, 3, 4, 4])])
async def test_a_fault_begins_so_long_after_the_connection(
    fault: Fault, times: list[float], autojump_clock: MockClock
) -> None:
    played = Played("cartesia", [{"type": "error"}] * 4)
    await played.serve(fault)
    assert played.times == times


async def connection() -> tuple[Connection, trio.SocketStream]:
    """One on a pair of sockets, and the client's end."""
    listener = trio.SocketListener(trio.socket.from_stdlib_socket(socket.create_server(("127.0.0.1", 0))))
    async with listener:
        client = await trio.open_tcp_stream(*listener.socket.getsockname())
        served = await listener.accept()
    return Connection(Starlette(), Config(), WorkerContext(None), served), client


async def test_saying_goodbye_while_another_task_sends_is_no_error() -> None:
    for _ in range(20):  # the two begin in either order, and only one of them is dangerous
        served, client = await connection()
        async with client, trio.open_nursery() as serving:
            serving.start_soon(served.run)
            await wait_all_tasks_blocked()
            async with trio.open_nursery() as racing:
                racing.start_soon(served.protocol_send, Closed())
                racing.start_soon(served.protocol_send, RawData(b"x"))
            serving.cancel_scope.cancel()


async def test_what_fails_on_a_connection_stays_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    served, client = await connection()

    async def fail(_data: bytes) -> None:
        raise RuntimeError("spilled coffee")

    async with client:
        monkeypatch.setattr(served.stream, "send_all", fail)
        await client.send_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        with trio.fail_after(5):
            await served.run()
    assert "spilled coffee" in capsys.readouterr().err
