"""The local providers failing on demand, over real sockets; the server outlives it, and silently (see its fixture)."""

import json
import random
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager
from typing import Any
from urllib.parse import urlencode

import httpx
import pytest
import trio
from trio_websocket import ConnectionClosed, ConnectionRejected, WebSocketConnection

from tests.local.sockets import BOOKING, CARTESIA, MULAW, TELEPHONY, TOKEN, connected, rejection

BEARER = {"Authorization": "Bearer any-key"}
ELEVEN = {"xi-api-key": "any-key"}
DEEPGRAM_PATH = f"/v1/listen?{urlencode(TELEPHONY)}"
ELEVEN_QUERY = "model_id=eleven_flash_v2_5&output_format=ulaw_8000"
SOCKETS = {
    "deepgram": (DEEPGRAM_PATH, TOKEN),
    "openai-realtime": ("/v1/realtime?intent=transcription", BEARER),
    "cartesia": ("/tts/websocket", CARTESIA),
    "elevenlabs": (f"/v1/text-to-speech/any/multi-stream-input?{ELEVEN_QUERY}", ELEVEN),
}
ANSWERED = {  # what each server answers at once
    "deepgram": '{"type":"Nonsense"}',
    "openai-realtime": '{"type":"input_audio_buffer.clear"}',
    "cartesia": '{"context_id":"c","nonsense":1}',
}
PATIENCE_S = 0.3  # for what shall not come


@pytest.fixture(autouse=True)
def healed(server: str) -> Iterator[None]:
    """Nothing that a test broke stays broken for the next."""
    yield
    httpx.delete(f"http://{server}/misbehave", trust_env=False)


@asynccontextmanager
async def socket_of(server: str, provider: str, fault: str = "") -> AsyncIterator[WebSocketConnection]:
    path, headers = SOCKETS[provider]
    async with connected(server, f"/misbehave/{fault}{path}" if fault else path, headers) as socket:
        yield socket


async def message(socket: WebSocketConnection) -> Any:
    with trio.fail_after(5):
        return json.loads(await socket.get_message())


async def close_of(socket: WebSocketConnection) -> tuple[int, str | None]:
    with trio.fail_after(5), pytest.raises(ConnectionClosed) as closed:
        await read_on(socket)
    assert closed.value.reason is not None
    return closed.value.reason.code, closed.value.reason.reason


async def read_on(socket: WebSocketConnection) -> None:
    while True:
        await socket.get_message()


async def chat(
    client: httpx.AsyncClient, fault: str = "", *, stream: bool = True, said: str = "Thank you, bye."
) -> AsyncGenerator[str]:
    """The lines of an answer, as they come."""
    body = {"model": "m", "stream": stream, "messages": [{"role": "user", "content": said}]}
    prefix = f"/misbehave/{fault}" if fault else ""
    async with client.stream("POST", f"{prefix}/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line:
                yield line


async def first_line(client: httpx.AsyncClient, fault: str = "") -> str:
    async with aclosing(chat(client, fault)) as lines:
        return await anext(lines)


async def lines_before(client: httpx.AsyncClient, fault: str, error: type[Exception]) -> list[str]:
    """What comes of a long answer before an error."""
    lines = []

    async def read() -> None:
        async for line in chat(client, fault, said="What is on the menu?"):
            lines.append(line)

    with pytest.raises(error):
        await read()
    return lines


@pytest.fixture
async def client(server: str) -> AsyncIterator[httpx.AsyncClient]:
    timeout = httpx.Timeout(5, read=1.0)
    async with httpx.AsyncClient(base_url=f"http://{server}", headers=BEARER, timeout=timeout, trust_env=False) as opened:
        yield opened


async def order(client: httpx.AsyncClient, provider: str, what: str, **values: Any) -> None:
    response = await client.post("/misbehave", json={"provider": provider, "what": what, **values})
    assert response.status_code == 200, response.text


async def refused(server: str, path: str, headers: dict[str, str]) -> ConnectionRejected:
    with pytest.raises(ExceptionGroup) as caught:
        async with connected(server, path, headers):
            raise AssertionError(f"{path} was accepted")
    return rejection(caught)


@pytest.mark.parametrize(
    ("provider", "field", "word"),
    [
        ("openai-realtime", "error.code", "rate_limit_exceeded"),
        ("cartesia", "error_code", "concurrency_limited"),
        ("elevenlabs", "detail.status", "too_many_concurrent_requests"),
        ("deepgram", "err_code", "TOO_MANY_REQUESTS"),
    ],
)
async def test_an_upgrade_is_refused_in_the_providers_words(server: str, provider: str, field: str, word: str) -> None:
    path, headers = SOCKETS[provider]
    error = await refused(server, f"/misbehave/refuse=429{path}", headers)
    assert error.body is not None
    value = json.loads(error.body)
    for name in field.split("."):
        value = value[name]
    assert (error.status_code, value) == (429, word)


async def test_a_refusal_is_503_unless_told_and_deepgrams_reason_is_in_a_header(server: str) -> None:
    error = await refused(server, f"/misbehave/refuse{DEEPGRAM_PATH}", TOKEN)
    assert error.status_code == 503
    assert error.headers is not None
    assert "Service Unavailable" in dict(error.headers)[b"dg-error"].decode()


async def test_a_chat_request_is_refused_as_openai_does(client: httpx.AsyncClient) -> None:
    with pytest.raises(httpx.HTTPStatusError) as caught:
        await first_line(client, "refuse=401")
    assert caught.value.response.status_code == 401


@pytest.mark.parametrize("provider", SOCKETS)
async def test_a_drop_comes_on_time_and_without_a_close_frame(server: str, provider: str) -> None:
    async with socket_of(server, provider, "drop=0.2") as socket:
        began = trio.current_time()
        code, _ = await close_of(socket)
        assert code == 1006
        assert trio.current_time() - began == pytest.approx(0.2, abs=0.15)


async def test_a_drop_resets_the_connection(server: str) -> None:
    host, _, port = server.partition(":")
    head = f"GET /misbehave/drop=0.05{SOCKETS['cartesia'][0]} HTTP/1.1\r\nhost: x\r\nupgrade: websocket\r\n"
    head += "connection: upgrade\r\nsec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
    head += "".join(f"{name}: {value}\r\n" for name, value in CARTESIA.items())
    async with await trio.open_tcp_stream(host, int(port)) as stream:
        await stream.send_all(f"{head}\r\n".encode())
        assert (await stream.receive_some()).endswith(b"\r\n\r\n")  # the upgrade, and no frame after it
        with pytest.raises(trio.BrokenResourceError), trio.fail_after(5):
            await stream.receive_some()


async def test_a_request_can_be_dropped_before_its_answer(server: str) -> None:
    host, _, port = server.partition(":")
    head = "POST /misbehave/drop/v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer k\r\ncontent-length: 2\r\n"
    async with await trio.open_tcp_stream(host, int(port)) as stream:
        await stream.send_all(f"{head}\r\n{{}}".encode())
        with pytest.raises(trio.BrokenResourceError), trio.fail_after(5):
            await stream.receive_some()


async def test_an_answer_can_be_dropped_in_the_middle(client: httpx.AsyncClient) -> None:
    lines = await lines_before(client, "drop=0.4", httpx.ReadError)
    assert lines[-1] != "data: [DONE]"


@pytest.mark.parametrize("provider", ANSWERED)
async def test_a_stalled_socket_is_open_but_says_nothing(server: str, provider: str) -> None:
    async with socket_of(server, provider, "stall") as socket:
        await socket.send_message(ANSWERED[provider])
        with trio.move_on_after(PATIENCE_S) as patience:
            await socket.get_message()
        assert patience.cancelled_caught
        with trio.fail_after(5):
            await socket.ping()


async def test_a_socket_can_stall_after_a_while(server: str) -> None:
    async with socket_of(server, "deepgram", "stall=0.3") as socket:
        await socket.send_message(ANSWERED["deepgram"])
        assert (await message(socket))["type"] == "Error"
        await trio.sleep(0.35)
        await socket.send_message(ANSWERED["deepgram"])
        with trio.move_on_after(PATIENCE_S) as patience:
            await socket.get_message()
    assert patience.cancelled_caught


async def test_a_stalled_answer_ends_with_the_clients_patience(client: httpx.AsyncClient) -> None:
    client.timeout = httpx.Timeout(5, read=PATIENCE_S)
    with pytest.raises(httpx.ReadTimeout):
        await first_line(client, "stall")
    assert await lines_before(client, "stall=0.3", httpx.ReadTimeout)


@pytest.mark.parametrize("provider", ANSWERED)
async def test_garbage_precedes_every_message(server: str, provider: str) -> None:
    async with socket_of(server, provider, "garbage") as socket:
        frames = []
        for _ in range(2):
            await socket.send_message(ANSWERED[provider])
            frames += [await socket.get_message(), await socket.get_message()]
    with pytest.raises(json.JSONDecodeError):
        json.loads(frames[0])
    assert json.loads(frames[2])["type"] == 7
    assert isinstance(json.loads(frames[1])["type"], str)
    assert isinstance(json.loads(frames[3])["type"], str)


async def test_garbage_precedes_every_chunk_of_an_answer(client: httpx.AsyncClient) -> None:
    lines = [line.removeprefix("data: ") async for line in chat(client, "garbage")]
    assert lines[0::4] == ['{"type": "Resu'] * len(lines[0::4])
    assert all(json.loads(line)["choices"] == 3 for line in lines[2::4])
    assert (json.loads(lines[1])["object"], lines[-1]) == ("chat.completion.chunk", "[DONE]")


async def test_an_answer_that_is_one_body_is_garbage_as_a_whole(client: httpx.AsyncClient) -> None:
    [body] = [line async for line in chat(client, "garbage", stream=False)]
    assert set(body) == {"{"}


@pytest.mark.parametrize(
    ("provider", "fault", "code", "reason"),
    [
        ("deepgram", "close=1011,0.1", 1011, "NET-0000"),
        ("deepgram", "close=1008,0", 1008, "DATA-0000"),
        ("deepgram", "close=1011,0,reason=NET-0001", 1011, "NET-0001"),
        ("openai-realtime", "close=1001,0.1", 1001, "Your session hit the maximum duration of 60 minutes."),
        ("openai-realtime", "close=4000,0", 4000, "invalid_request_error.session_expired"),
        ("cartesia", "close=1013,0", 1013, "try again later"),
        ("elevenlabs", "close=1008,0.1", 1008, "input_timeout_exceeded"),
        ("elevenlabs", "close=1008,0,reason=quota_exceeded", 1008, "quota_exceeded"),
    ],
)
async def test_a_socket_is_closed_with_a_code_and_a_reason(
    server: str, provider: str, fault: str, code: int, reason: str
) -> None:
    async with socket_of(server, provider, fault) as socket:
        closed, said = await close_of(socket)
    assert closed == code
    assert (said or "").startswith(reason)


async def test_elevenlabs_says_why_before_it_closes(server: str) -> None:
    async with socket_of(server, "elevenlabs", "close=1008,0,reason=quota_exceeded") as socket:
        frame = await message(socket)
    assert (frame["error"], frame["code"]) == ("quota_exceeded", 1008)


async def audio_times(socket: WebSocketConnection, text: dict[str, Any], key: str) -> list[float]:
    """When the pieces of audio came after a text, in seconds, up to the answer's end."""
    began, times = trio.current_time(), []
    await socket.send_message(json.dumps(text))
    while not (frame := await message(socket)).get("done") and not frame.get("isFinal"):
        if frame.get(key):
            times.append(trio.current_time() - began)
    return times


@pytest.mark.parametrize(
    ("provider", "key", "text"),
    [
        ("cartesia", "data", {"model_id": "s", "voice": {"id": "v"}, "transcript": BOOKING, "output_format": MULAW}),
        ("elevenlabs", "audio", {"text": BOOKING, "flush": True, "close_context": True}),
    ],
)
async def test_slow_speech_waits_before_each_contexts_first_audio(
    server: str, provider: str, key: str, text: dict[str, Any]
) -> None:
    async with socket_of(server, provider, "slow=0.5") as socket:
        for context in ("one", "two"):
            times = await audio_times(socket, {**text, "context_id": context}, key)
            assert times[0] > 0.5
            assert times[-1] - times[0] < 0.5  # the others follow as ever


async def test_a_slow_model_waits_before_its_first_token_only(client: httpx.AsyncClient) -> None:
    began = trio.current_time()
    times = [trio.current_time() - began async for _ in chat(client, "slow=0.5")]
    assert times[0] > 0.5
    assert times[-1] - times[0] < 0.5


async def test_a_url_can_say_how_many_connections_misbehave(server: str) -> None:
    codes = []
    for _ in range(3):
        async with socket_of(server, "openai-realtime", "close=1012,0,times=2") as socket:
            with trio.move_on_after(PATIENCE_S):
                codes.append((await close_of(socket))[0])
    assert codes == [1012, 1012]


async def test_a_fault_can_be_in_the_query(server: str) -> None:
    path, headers = SOCKETS["deepgram"]
    error = await refused(server, f"{path}&misbehave=refuse%3D500%2Ctimes%3D1", headers)
    assert error.status_code == 500


async def test_elevenlabs_path_may_be_left_out(server: str) -> None:
    error = await refused(server, f"/misbehave/refuse=402?{ELEVEN_QUERY}", ELEVEN)
    assert error.status_code == 402
    async with connected(server, f"/misbehave/close=1008,0?{ELEVEN_QUERY}", ELEVEN) as socket:
        assert (await close_of(socket))[0] == 1008


async def test_a_control_call_drops_an_open_connection_now_and_leaves_the_others(
    server: str, client: httpx.AsyncClient
) -> None:
    async with socket_of(server, "deepgram") as dropped, socket_of(server, "openai-realtime") as well:
        await message(well)
        await order(client, "deepgram", "drop", after_s=0)
        assert (await close_of(dropped))[0] == 1006
        await well.send_message(ANSWERED["openai-realtime"])
        assert (await message(well))["type"] == "input_audio_buffer.cleared"
    async with socket_of(server, "deepgram") as later:
        assert (await close_of(later))[0] == 1006


async def test_a_control_call_for_one_breaks_the_oldest_and_no_other(server: str, client: httpx.AsyncClient) -> None:
    async with socket_of(server, "cartesia") as oldest, socket_of(server, "cartesia") as newer:
        await order(client, "cartesia", "close", code=1011, after_s=0, times=1)
        assert await close_of(oldest) == (1011, "internal error")
        await newer.send_message(ANSWERED["cartesia"])
        assert (await message(newer))["type"] == "error"
    response = await client.get("/misbehave")
    [shown] = response.json()["misbehaving"]
    assert (shown["provider"], shown["what"], shown["code"], shown["left"]) == ("cartesia", "close", 1011, 0)


async def test_a_control_call_refuses_the_next_requests_so_many_times(client: httpx.AsyncClient) -> None:
    await order(client, "openai", "refuse", status=500, times=1)
    with pytest.raises(httpx.HTTPStatusError, match="500"):
        await first_line(client)
    assert [line async for line in chat(client)][-1] == "data: [DONE]"


async def test_healing_ends_faults_on_open_connections_too(server: str, client: httpx.AsyncClient) -> None:
    async with socket_of(server, "deepgram", "stall") as stalled, socket_of(server, "deepgram") as doomed:
        await order(client, "deepgram", "drop", after_s=0.3)
        assert (await client.delete("/misbehave")).json() == {"misbehaving": []}
        await trio.sleep(0.4)
        for socket in (stalled, doomed):
            await socket.send_message(ANSWERED["deepgram"])
            assert (await message(socket))["type"] == "Error"


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({"provider": "acme", "what": "drop"}, "provider 'acme': expected one of deepgram, "),
        ({"provider": "openai", "what": "close", "code": 1011}, "openai has no WebSocket to close"),
        ({"provider": "deepgram", "what": "explode"}, "Invalid value 'explode'"),
        ({"provider": "deepgram", "what": "drop", "after": 3}, "unknown field `after`"),
        ([], "the body is no JSON object"),
    ],
)
async def test_an_order_for_nothing_that_there_is_is_refused(client: httpx.AsyncClient, body: Any, told: str) -> None:
    response = await client.post("/misbehave", json=body)
    assert response.status_code == 400
    assert told in response.json()["error"]


async def test_a_url_for_nothing_that_there_is_is_refused(server: str, client: httpx.AsyncClient) -> None:
    response = await client.get("/misbehave/drop/healthz")
    assert (response.status_code, response.json()["error"][:24]) == (400, "/healthz cannot misbehav")
    error = await refused(server, f"/misbehave/explode{DEEPGRAM_PATH}", TOKEN)
    assert error.status_code == 400
    assert error.body is not None
    assert "Invalid value 'explode'" in error.body.decode()


async def test_clients_that_leave_while_they_are_dropped_do_not_end_the_server(
    server: str, client: httpx.AsyncClient
) -> None:
    moments = random.Random(7)
    faults = ("drop", "drop=0.01", "drop=0.02", "close=1011,0.01", "stall=0.01", "garbage")

    async def call(provider: str, fault: str, stays_s: float) -> None:
        async with socket_of(server, provider, fault) as socket:
            with trio.move_on_after(stays_s):
                try:
                    while True:
                        await socket.send_message(ANSWERED[provider])
                        await trio.lowlevel.checkpoint()
                except ConnectionClosed:
                    pass

    for _ in range(10):
        async with trio.open_nursery() as nursery:
            for provider in ANSWERED:
                for fault in faults:
                    nursery.start_soon(call, provider, fault, moments.uniform(0, 0.03))
    assert (await client.get("/healthz")).json() == {"ready": True}
