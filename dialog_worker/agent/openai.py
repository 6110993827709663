"""An agent that thinks with a chat-completions model: OpenAI's, or any that speaks its protocol.

Sentences go to the voice as the model writes them. The history holds what the caller said and what the caller heard, never
what was cut off.
"""

import logging
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import httpx2
import msgspec
import openai
import trio
from openai import AsyncOpenAI, AsyncStream
from openai.types.chat import ChatCompletionChunk

from dialog_worker.agent.base import QUEUE_SIZE_LIMIT, Agent, new_uuid
from dialog_worker.agent.tools import Tool, tools_of
from dialog_worker.agent.utterance import Utterance
from dialog_worker.provider import tls_context
from dialog_worker.stt.base import STT
from dialog_worker.tts.base import TTS
from dialog_worker.voip import VoIP
from protocol.messages import Message, StreamingStarted

MAX_ROUNDS = 8  # of tool calls in one turn
MAX_FAILED_TURNS = 3  # one after another; then the caller has heard enough apologies
CONNECT_TIMEOUT_S = 2.5
FIRST_CHUNK_TIMEOUT_S = 10.0  # for the model to think; the caller is told to wait meanwhile
CHUNK_TIMEOUT_S = 3.0  # between chunks of an answer that has begun: the model has stalled, and the caller hears nothing
END_TIMEOUT_S = 2.0  # for a stream to end once its last chunk has come
KEEPALIVE_S = 120.0  # a conversation's pauses; the default of 5 s would shake hands anew in every turn
_UNMENDABLE = (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError)
_PASSING = (openai.APIConnectionError, openai.InternalServerError, openai.RateLimitError)
_SENTENCE_END = re.compile(r"[.!?…]['\")\]]*\s+|\n+|[。！？]")
_MIN_SENTENCE = 8  # characters; "Dr. " and "1. " are no sentences

log = logging.getLogger("agent")


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


class OpenAIAgent(Agent):
    """A conversation with a chat-completions model. Subclass it, say who it is, and give it tools.

    `options` go into every request as they are, such as `temperature` or `reasoning_effort`. The key and the address come
    from OPENAI_API_KEY and OPENAI_BASE_URL unless given.

    When the model or a tool takes longer than `patience_s`, the agent says `holding`, which is no part of the history;
    when the model fails, `apology`.
    """

    system: str = ""
    greeting: str = ""
    apology: str = "I am sorry, I did not get that. Could you say it again?"
    holding: str = "One moment, please."
    patience_s: float = 2.5

    def __init__(
        self,
        *,
        voip: VoIP,
        stt: STT | Sequence[STT],
        tts: TTS | Sequence[TTS],
        model: str,
        api_key: str | None = None,
        base_url: str | None = None,
        options: dict[str, Any] | None = None,
        queue_size_limit: int = QUEUE_SIZE_LIMIT,
    ) -> None:
        super().__init__(voip=voip, stt=stt, tts=tts, queue_size_limit=queue_size_limit)
        self.model = model
        self.options = options or {}
        self.history: list[dict[str, Any]] = []
        self.tools = tools_of(self)
        self.openai = _client(api_key, base_url)
        self._failed_turns = 0

    async def run(self) -> None:
        """Serve the call; the connection to the model is opened at once, and given back at the end."""
        try:
            async with self.openai:
                await super().run()
        finally:
            self.voip.trace("history", msgspec.json.encode(self._said()).decode())

    def activate(self) -> None:
        super().activate()
        self.nursery.start_soon(self._warm_up)

    async def _warm_up(self) -> None:
        """Open a connection to the model, so that the first turn does not pay for the handshakes."""
        try:
            await self.openai.models.list()
        except openai.APIConnectionError as error:
            log.warning("the model at %s cannot be reached: %s", self.openai.base_url, error.__cause__ or error)
        except openai.APIError as error:
            log.debug("the model's server does not list its models: %s", error)

    async def on_streaming_started(self, started: StreamingStarted) -> None:
        """Greet, unless the conversation has begun before; what else happens on the line is heard meanwhile."""
        if not self.history:
            self.nursery.start_soon(self.greet)

    async def greet(self, allow_interrupt: bool = True) -> None:
        """Say the greeting, if there is one, and remember what was heard of it."""
        if not self.greeting:
            return
        utterance = self.utter(new_uuid(), allow_interrupt)
        with self._remembered(utterance):
            utterance.say(self.greeting)
            utterance.finish()
            await self.heard(utterance)

    async def inference(self, message: Message[str]) -> None:
        """Answer with the model, as often as it asks for tools; then put what was heard into the history."""
        self.history.append({"role": "user", "content": message.data})
        with self.uninterrupted(), ExitStack() as remembered:
            utterances: list[Utterance] = []
            try:
                with self._holding_the_line():
                    await self._rounds(message.uuid, utterances, remembered)
                self._failed_turns = 0
            except openai.APIError as error:
                await self._model_failed(error)
            for utterance in utterances:
                utterance.finish()
                await self.heard(utterance)
        self.history[:] = self._said()

    async def _model_failed(self, error: openai.APIError) -> None:
        """Apologise, or give up where the next turn would fail like this one."""
        log.error("the model failed: %s", _explain(error))
        self._failed_turns += 1
        if isinstance(error, _UNMENDABLE) or self._failed_turns >= MAX_FAILED_TURNS:
            await self.give_up(f"the model failed: {_explain(error)}")
        else:
            await self.dispatch_message(Message(new_uuid(), self.apology, done=True))

    @contextmanager
    def _holding_the_line(self) -> Iterator[None]:
        """Inside, a caller who has to wait long is told so: a silent line is taken for a dead one."""
        scope = trio.CancelScope()
        self.nursery.start_soon(self._ask_for_patience, scope)
        try:
            yield
        finally:
            scope.cancel()

    async def _ask_for_patience(self, scope: trio.CancelScope) -> None:
        waiting_since = trio.current_time()
        with scope:
            while not self.interrupted:
                await trio.sleep_until(max(waiting_since, self._voice.quiet_from) + self.patience_s)
                if trio.current_time() < self._voice.quiet_from + self.patience_s or self.interrupted:
                    continue
                waiting_since = trio.current_time()
                if self.holding and not self._voice.speaking:
                    aside = self.utter(new_uuid())
                    aside.say(self.holding)
                    aside.finish()
                    self.nursery.start_soon(self.heard, aside)

    @contextmanager
    def _remembered(self, utterance: Utterance) -> Iterator[dict[str, Any]]:
        """Give an utterance its place in the history; what was heard of it ends up there, however the call ends."""
        entry: dict[str, Any] = {"role": "assistant", "content": ""}
        self.history.append(entry)
        try:
            yield entry
        finally:
            entry["content"] = utterance.heard_now

    async def _rounds(self, uuid: str, utterances: list[Utterance], remembered: ExitStack) -> None:
        for _ in range(MAX_ROUNDS):
            utterances.append(utterance := self.utter(uuid))
            entry = remembered.enter_context(self._remembered(utterance))
            answer = await self._ask_model(utterance)
            entry["content"] = utterance.text.strip()  # for the model's next round; what was heard replaces it
            if not answer.tool_calls or self.interrupted:
                return
            entry["tool_calls"] = [call.as_message() for call in answer.tool_calls]
            for call in answer.tool_calls:
                result = await self._call_tool(call)
                self.history.append({"role": "tool", "tool_call_id": call.id, "content": result})
            if self.interrupted:
                return
            uuid = new_uuid()
        log.warning("the model asked for tools %d times in one turn; it is not asked again", MAX_ROUNDS)

    async def _ask_model(self, utterance: Utterance) -> Answer:
        """Have the model answer the history, and say its sentences as they come, until it is done or interrupted."""
        answer = Answer()
        with self.interruptible():
            request: dict[str, Any] = {"model": self.model, "messages": self.messages(), "stream": True} | self.options
            if self.tools:
                request["tools"] = [one.definition() for one in self.tools.values()]
            try:
                await self._answer(request, utterance, answer)
            except _PASSING as error:  # a second connection often works, and nothing was said yet
                if utterance.text or isinstance(error, openai.APITimeoutError):
                    raise
                log.warning("the model is asked again: %s", _explain(error))
                answer = Answer()
                await self._answer(request, utterance, answer)
        return answer

    async def _answer(self, request: dict[str, Any], utterance: Utterance, answer: Answer) -> None:
        stream = await self.openai.chat.completions.create(**request)
        try:
            await self._say(utterance, answer, stream)
        finally:
            self.nursery.start_soon(self._finish, stream, answer.finish_reason is not None)

    async def _say(self, utterance: Utterance, answer: Answer, stream: AsyncStream[ChatCompletionChunk]) -> None:
        sentences = Sentences()
        patience_s = math.inf  # for the first chunk, the client's own timeout counts
        while (text := await _next_text(stream, answer, patience_s)) is not None:
            patience_s = CHUNK_TIMEOUT_S
            for sentence in sentences.feed(text):
                utterance.say(sentence)
            if answer.finish_reason is not None:  # the stream's own end may come 100 ms later
                break
        utterance.say(sentences.rest())
        utterance.finish()

    @staticmethod
    async def _finish(stream: AsyncStream[ChatCompletionChunk], complete: bool) -> None:
        """Close a stream. A complete one is read to its end first, so that its connection serves the next turn too."""
        async with stream:
            if complete:
                with trio.move_on_after(END_TIMEOUT_S):
                    async for _ in stream:
                        pass

    async def dispatch_stream(
        self, uuid: str, stream: AsyncStream[ChatCompletionChunk], allow_interrupt: bool = True
    ) -> str:
        """Say what a stream of yours brings, wait until all was played or cut, and return what the caller heard of it."""
        with self.uninterrupted():
            utterance, answer = self.utter(uuid, allow_interrupt), Answer()
            with self.interruptible() if allow_interrupt else nullcontext():
                await self._say(utterance, answer, stream)
            utterance.finish()
            await self._finish(stream, answer.finish_reason is not None)
            return await self.heard(utterance)

    def messages(self) -> list[dict[str, Any]]:
        """Return what the model is sent: who it is, and the conversation as the caller knows it."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, *self._said()]

    def _said(self) -> list[dict[str, Any]]:
        """Return the history without the answers of which nothing was heard."""
        return [entry for entry in self.history if entry.get("content") or entry.get("tool_calls")]

    async def _call_tool(self, call: ToolCall) -> str:
        found: Tool | None = self.tools.get(call.name)
        result = await found.call(call.arguments) if found else f"error: there is no tool {call.name}"
        self.voip.trace("tool", "", {"name": call.name, "arguments": call.arguments, "result": result})
        return result


def _client(api_key: str | None, base_url: str | None) -> AsyncOpenAI:
    """Return a client that suits a telephone call: HTTP/1.1 kept alive over its pauses, no silent retries.

    HTTP/2 would go on generating, and billing, after a cancelled stream: httpcore sends no RST_STREAM.
    """
    http = openai.DefaultAsyncHttpxClient(
        verify=tls_context(),
        timeout=httpx2.Timeout(FIRST_CHUNK_TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
        limits=httpx2.Limits(max_connections=16, max_keepalive_connections=4, keepalive_expiry=KEEPALIVE_S),
    )
    try:
        return AsyncOpenAI(api_key=api_key, base_url=base_url, max_retries=0, http_client=http)
    except openai.OpenAIError as error:
        raise ValueError(f"{error}; put OPENAI_API_KEY into .env, or api_key= into the agent") from None


async def _next_text(stream: AsyncStream[ChatCompletionChunk], answer: Answer, patience_s: float) -> str | None:
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


def _explain(error: openai.APIError) -> str:
    status = f"{error.status_code} " if isinstance(error, openai.APIStatusError) else ""
    return f"{status}{error.__cause__ or error}"
