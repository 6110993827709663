"""One answer of a chat-completions model: its client, and its chunks put together to sentences and tool calls."""

import math
import re
from typing import Any

import httpx2
import msgspec
import openai
import trio
from openai import AsyncOpenAI, AsyncStream
from openai.types.chat import ChatCompletionChunk

from dialog_worker.provider import tls_context

CONNECT_TIMEOUT_S = 2.5
FIRST_CHUNK_TIMEOUT_S = 10.0  # for the model to think; the caller is told to wait meanwhile
KEEPALIVE_S = 120.0  # a conversation's pauses; the default of 5 s would shake hands anew in every turn
_MIN_SENTENCE = 8  # characters; "Dr. " and "1. " are no sentences
_SENTENCE_END = re.compile(r"[.!?…]['\")\]]*\s+|\n+|[。！？]")

_PRACTICE = (
    b'data: {"id":"1","object":"chat.completion.chunk","created":1,"model":"m","choices":'
    b'[{"index":0,"delta":{"role":"assistant","content":"Let us see. "},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'
)

_spare: list[httpx2.AsyncClient] = []


class Sentences:
    """Cuts a stream of text where sentences end, so that the voice can begin with the first. No I/O."""

    def __init__(self) -> None:
        self._text = ""

    def feed(self, text: str) -> list[str]:
        """Return the sentences that are complete now, with the space behind them."""
        self._text += text
        complete, start = [], 0
        for end in _SENTENCE_END.finditer(self._text):
            if end.end() - start >= _MIN_SENTENCE:
                complete.append(self._text[start : end.end()])
                start = end.end()
        self._text = self._text[start:]
        return complete

    def rest(self) -> str:
        """Return what is left at the end of the stream."""
        text, self._text = self._text, ""
        return text


class ToolCall(msgspec.Struct):
    """A tool call as it is assembled from a stream's pieces."""

    id: str = ""
    name: str = ""
    arguments: str = ""

    def as_message(self) -> dict[str, Any]:
        """Return it in the form that the history has it."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


class Answer:
    """One response of the model, assembled from its chunks. No I/O."""

    def __init__(self) -> None:
        self.finish_reason: str | None = None
        self._calls: dict[int, ToolCall] = {}

    @property
    def tool_calls(self) -> list[ToolCall]:
        """The calls it asks for; those of a response that was cut short are not complete, and not made."""
        return list(self._calls.values()) if self.finish_reason in ("tool_calls", "stop", "function_call") else []

    def feed(self, chunk: ChatCompletionChunk) -> str:
        """Take a chunk and return the text in it. A chunk without choices carries usage figures."""
        if not chunk.choices:
            return ""
        choice = chunk.choices[0]
        self.finish_reason = choice.finish_reason or self.finish_reason
        if choice.delta is None:  # some servers' last chunk
            return ""
        for piece in choice.delta.tool_calls or ():
            call = self._calls.setdefault(piece.index, ToolCall())
            call.id = piece.id or call.id
            if piece.function is not None:
                call.name = piece.function.name or call.name
                call.arguments += piece.function.arguments or ""
        return choice.delta.content or ""


def make_http() -> httpx2.AsyncClient:
    """Return an HTTP client that suits a telephone call: HTTP/1.1 kept alive over its pauses.

    HTTP/2 would go on generating, and billing, after a cancelled stream: httpcore sends no RST_STREAM.
    """
    return _spare.pop() if _spare else _make_http()


def make_client(api_key: str | None, base_url: str | None, http: httpx2.AsyncClient) -> AsyncOpenAI:
    """Return a model's client that uses `http`, and retries nothing in silence."""
    try:
        client = AsyncOpenAI(api_key=api_key, base_url=base_url, max_retries=0, http_client=http)
    except openai.OpenAIError as error:
        raise ValueError(f"{error}; put OPENAI_API_KEY into .env, or api_key= into the agent") from None
    client._platform = "Linux"  # else the SDK asks in a thread, which each worker would have for 10 s
    return client


def lay_in() -> None:
    """Before a fork: have the client's HTTP ready for each worker, whose own half a megabyte it would else be."""
    _spare[:] = [_make_http()]


def _make_http() -> httpx2.AsyncClient:
    return openai.DefaultAsyncHttpxClient(
        verify=tls_context(),
        timeout=httpx2.Timeout(FIRST_CHUNK_TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
        limits=httpx2.Limits(max_connections=16, max_keepalive_connections=4, keepalive_expiry=KEEPALIVE_S),
    )


def request_of(
    model: str, messages: list[dict[str, Any]], tools: list[dict[str, Any]], options: dict[str, Any]
) -> dict[str, Any]:
    """Return the SDK's arguments for a streamed answer.

    The conversation goes as `extra_body`, which the SDK sends as it is: given as arguments, every message would be searched
    for types to convert, of which it has none, and a long conversation takes many milliseconds.
    """
    said: dict[str, Any] = {"messages": messages} | ({"tools": tools} if tools else {})
    arguments: dict[str, Any] = {"model": model, "messages": (), "stream": True} | options
    return arguments | {"extra_body": said | (options.get("extra_body") or {})}


async def next_text(stream: AsyncStream[ChatCompletionChunk], answer: Answer, patience_s: float) -> str | None:
    """Take a stream's next chunk into the answer and return the text in it, or None at the stream's end.

    Raises `APITimeoutError` when it does not come in time, and `APIConnectionError` when it cannot be read: the SDK checks
    nothing, and lets such errors pass for ours.
    """
    request = stream.response.request
    with trio.move_on_after(patience_s):
        try:
            chunk = await anext(stream, None)
            return None if chunk is None else answer.feed(chunk)
        except (ValueError, TypeError, AttributeError, LookupError) as error:
            raise openai.APIConnectionError(message=f"the answer cannot be read: {error}", request=request) from error
    raise openai.APITimeoutError(request)


async def practise() -> None:
    """Go once through a request and its answer, without asking anybody.

    A process that was forked copies each page that it writes to for the first time, which takes the first request a
    millisecond longer than the others.
    """
    nobody = httpx2.MockTransport(lambda _: httpx2.Response(200, content=_PRACTICE))
    http = httpx2.AsyncClient(transport=nobody, trust_env=False)
    async with make_client("key", "http://practice.invalid", http) as client:
        stream = await client.chat.completions.create(**request_of("m", [], [], {}))
        answer, sentences = Answer(), Sentences()
        while (text := await next_text(stream, answer, math.inf)) is not None:
            sentences.feed(text)


def explain(error: openai.APIError) -> str:
    """Return what went wrong in a user's words."""
    status = f"{error.status_code} " if isinstance(error, openai.APIStatusError) else ""
    return f"{status}{error.__cause__ or error}"
