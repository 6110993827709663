"""Serves OpenAI's `/v1/chat/completions` and `/v1/models`, with the scripted receptionist for a model.

OpenAI API reference, chat completions and streaming: chunks as server-sent events, a tool call's id and name only in its
first piece, the usage in a chunk without choices, `[DONE]` at the end.
"""

import json
import re
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import msgspec
import trio
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Send

from dialog_local.brain.offered import Tool
from dialog_local.brain.receptionist import MODEL, Answer, Call, ChatMessage, Say, answer, arguments_json

FIRST_TOKEN_MS = 80.0
_TOKEN_SECONDS = 0.012  # about as fast as a small hosted model
_ARGUMENT_PIECE = 6  # characters
MAX_BODY_BYTES = 4 << 20


class Refused(Exception):
    """A request that cannot be served, in OpenAI's words."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": "invalid_request_error", "param": param, "code": code}}


class _Offer(msgspec.Struct):
    function: Tool
    type: str = "function"


class _StreamOptions(msgspec.Struct):
    include_usage: bool = False


class Chat(msgspec.Struct):
    """A request, as far as the script looks at it."""

    model: str
    messages: list[ChatMessage]
    tools: list[_Offer] | None = None
    tool_choice: Any = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None

    @property
    def callable_tools(self) -> list[Tool]:
        """The tools that may be called."""
        return [] if self.tool_choice == "none" else [offer.function for offer in self.tools or ()]

    @property
    def include_usage(self) -> bool:
        """The stream shall end in a usage chunk."""
        return self.stream_options is not None and self.stream_options.include_usage


@dataclass(frozen=True)
class Completions:
    """The endpoint; `first_token_s` is how long the script pretends to think."""

    first_token_s: float = FIRST_TOKEN_MS / 1000

    async def chat(self, request: Request) -> Response:
        """Serve `POST /v1/chat/completions`."""
        try:
            _authorize(request)
            chat = await _read(request)
        except Refused as refused:
            return JSONResponse(refused.body, refused.status)
        reply = answer(chat.messages, chat.callable_tools)
        if chat.stream:
            return EventStream(self._events(chat, reply))
        await trio.sleep(self.first_token_s)
        return JSONResponse(_completion(chat, reply))

    async def _events(self, chat: Chat, reply: Answer) -> AsyncGenerator[str, None]:
        pause = self.first_token_s
        for piece in chunks(chat, reply):
            if piece["choices"]:
                await trio.sleep(pause)
                pause = _TOKEN_SECONDS
            yield f"data: {json.dumps(piece)}\n\n"
        yield "data: [DONE]\n\n"


class EventStream(StreamingResponse):
    """Server-sent events from a generator, which is closed also when the client leaves before the last."""

    def __init__(self, events: AsyncGenerator[str, None]) -> None:
        super().__init__(events, media_type="text/event-stream")
        self._events = events

    async def stream_response(self, send: Send) -> None:
        async with aclosing(self._events):
            await super().stream_response(send)


async def models(request: Request) -> Response:
    """Serve `GET /v1/models`."""
    try:
        _authorize(request)
    except Refused as refused:
        return JSONResponse(refused.body, refused.status)
    model = {"id": MODEL, "object": "model", "created": 0, "owned_by": "dialog-local"}
    return JSONResponse({"object": "list", "data": [model]})


def _authorize(request: Request) -> None:
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not key.strip():
        message = "You didn't provide an API key. Send the header `Authorization: Bearer KEY`; any key will do here."
        raise Refused(401, message, "invalid_api_key")


async def _read(request: Request) -> Chat:
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > MAX_BODY_BYTES:
            raise Refused(413, f"the body is over {MAX_BODY_BYTES >> 20} MiB")
    try:
        chat = msgspec.json.decode(body, type=Chat)
    except msgspec.ValidationError as error:
        raise Refused(400, f"Invalid request: {error}", "invalid_value") from error
    except msgspec.DecodeError as error:
        raise Refused(400, f"We could not parse the JSON body of your request: {error}") from error
    if not chat.messages:
        raise Refused(400, "[] is too short - 'messages'", "empty_array", "messages")
    return chat


def chunks(chat: Chat, reply: Answer) -> list[dict[str, Any]]:
    """The chunks of a streamed answer, in order."""
    frame: dict[str, Any] = {
        "id": f"chatcmpl-{uuid4().hex}",
        "object": "chat.completion.chunk",
        "created": int(time.time()),
        "model": chat.model,
        **({"usage": None} if chat.include_usage else {}),
    }

    def choice(delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        return {**frame, "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}]}

    result = [choice(delta) for delta in _deltas(reply)]
    result.append(choice({}, _finish_reason(reply)))
    if chat.include_usage:
        result.append({**frame, "choices": [], "usage": _usage(chat, reply)})
    return result


def _deltas(reply: Answer) -> list[dict[str, Any]]:
    tokens: list[dict[str, Any]] = [{"content": token} for token in _tokens(reply.text)]
    said: list[dict[str, Any]] = [{"role": "assistant", "content": "", "refusal": None}, *tokens]
    if isinstance(reply, Say):
        return said
    text = arguments_json(reply)
    pieces = [text[start : start + _ARGUMENT_PIECE] for start in range(0, len(text), _ARGUMENT_PIECE)]
    first = {"tool_calls": [{"index": 0, **_tool_call(reply, "")}]}
    return [*said, first, *({"tool_calls": [{"index": 0, "function": {"arguments": piece}}]} for piece in pieces)]


def _tool_call(call: Call, arguments: str) -> dict[str, Any]:
    return {"id": f"call_{uuid4().hex[:24]}", "type": "function", "function": {"name": call.tool, "arguments": arguments}}


def _tokens(text: str) -> list[str]:
    """Pieces about as large as a model's tokens: words with the space before them."""
    return re.findall(r"\s*\S+", text)


def _finish_reason(reply: Answer) -> str:
    return "stop" if isinstance(reply, Say) else "tool_calls"


def _usage(chat: Chat, reply: Answer) -> dict[str, int]:
    """Words counted for tokens: the script has no tokens of its own."""
    prompt = sum(len(_tokens(message.text)) for message in chat.messages)
    completion = len(_tokens(reply.text)) + (len(_tokens(arguments_json(reply))) if isinstance(reply, Call) else 0)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _completion(chat: Chat, reply: Answer) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": reply.text or None, "refusal": None}
    if isinstance(reply, Call):
        message["tool_calls"] = [_tool_call(reply, arguments_json(reply))]
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": _finish_reason(reply)}
    return {
        "id": f"chatcmpl-{uuid4().hex}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": chat.model,
        "choices": [choice],
        "usage": _usage(chat, reply),
    }
