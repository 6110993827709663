"""An agent that thinks with a chat-completions model: OpenAI's, or any that speaks its protocol.

Sentences go to the voice as the model writes them. The history holds what the caller said and what the caller heard, never
what was cut off.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import httpx2
import msgspec
import openai
import trio
from openai import AsyncStream
from openai.types.chat import ChatCompletionChunk

from dialog_worker.agent.base import QUEUE_SIZE_LIMIT, Agent, new_uuid
from dialog_worker.agent.completion import (
    Answer,
    Sentences,
    ToolCall,
    explain,
    make_client,
    make_http,
    next_text,
    practise,
    request_of,
)
from dialog_worker.agent.memory import Memory, Saying, recall, with_every_result
from dialog_worker.agent.tools import Tool, tools_of
from dialog_worker.agent.turn import Question
from dialog_worker.agent.utterance import Utterance
from dialog_worker.participant import ProviderError
from dialog_worker.stt.base import STT, Hearing, SpeechEnded, SpeechStarted
from dialog_worker.tts.base import TTS
from dialog_worker.voip import VoIP
from protocol.messages import Message, StreamingStarted

MAX_ROUNDS = 8  # of tool calls in one turn
MAX_FAILED_TURNS = 3  # one after another; then the caller has heard enough apologies
CHUNK_TIMEOUT_S = 3.0  # between chunks of an answer that has begun: the model has stalled, and the caller hears nothing
SAVE_AFTER_S = 0.05  # of a change; a voice takes longer for its first sample
WATCH_S = 0.1  # while an ear is being mended, between two looks at whether the caller waits for it
COOL_S = 4.0  # without a request; servers that close idle connections give them 5 s at least, uvicorn for one
PRACTISE_AFTER_S = 0.1  # of speech: what it interrupts is interrupted by then, and few words are shorter
END_TIMEOUT_S = 2.0  # for a stream to end once its last chunk has come
_UNMENDABLE = (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError)
_PASSING = (openai.APIConnectionError, openai.InternalServerError, openai.RateLimitError)

log = logging.getLogger("agent")


class OpenAIAgent(Agent):
    """A conversation with a chat-completions model. Subclass it, say who it is, and give it tools.

    `options` go into every request as they are, such as `temperature` or `reasoning_effort`. The key and the address come
    from OPENAI_API_KEY and OPENAI_BASE_URL unless given.

    When the model or a tool takes longer than `patience_s`, or an ear that has failed, the agent says `holding`, which is no
    part of the history; when the model fails, `apology`.
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
        self._http = make_http()
        self.openai = make_client(api_key, base_url, self._http)
        self._failed_turns = 0
        self._asked_at = 0.0  # when its server was last sent a request
        self._practised = False
        self._mending = trio.CancelScope()  # while an ear that has failed is not known to hear again
        self._mending.cancel()
        self._saying: dict[str, tuple[dict[str, Any], Utterance]] = {}
        self._unsaved = trio.Event()
        self._voice.progressed = self._unsaved_change

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
        self.nursery.start_soon(self._keep_saved)

    # What a worker that takes over has to know

    def checkpoint(self) -> bytes:
        """Return the conversation. Who keeps more in `self` puts it around this, and takes it off again in `restore`."""
        places = {id(entry): place for place, entry in enumerate(self.history)}
        saying = [
            Saying(utterance.uuid, places[id(entry)], utterance.text, utterance.words)
            for entry, utterance in self._saying.values()
            if id(entry) in places
        ]
        return Memory(self.history, tuple(saying)).encode()

    async def restore(self, checkpoint: bytes, playing: dict[str, int]) -> None:
        """Go on with the conversation: say what was left to be said, and answer what was left to be answered."""
        memory = recall(checkpoint)
        for uuid in playing.keys() - {saying.uuid for saying in memory.saying}:
            self.voip.abort(uuid)  # an aside, or of a conversation that is forgotten
        taken_up = [(memory.history[saying.entry], saying) for saying in memory.saying]
        self.history = with_every_result(memory.history)
        for entry, saying in taken_up:
            self._take_up(entry, saying, playing.get(saying.uuid, 0))
        said = self._said()
        if said and said[-1]["role"] in ("user", "tool"):
            self._ask.send_nowait(Question(Message(new_uuid(), "", done=True)))

    def _take_up(self, entry: dict[str, Any], saying: Saying, ms: int) -> None:
        """Have said what is left of an utterance, right behind what the carrier still plays of it."""
        parts: list[Utterance] = []
        if saying.uuid and ms and (adopted := self._voice.adopt(saying.uuid, saying.voiced(ms), saying.words)):
            parts.append(adopted)
        if rest := saying.rest(ms):
            parts.append(utterance := self.utter(new_uuid()))
            utterance.say(rest)
            utterance.finish()
        entry["content"] = saying.text.strip()
        self.nursery.start_soon(self._hear_out, entry, parts)

    async def _hear_out(self, entry: dict[str, Any], parts: list[Utterance]) -> None:
        entry["content"] = " ".join([heard for part in parts if (heard := await self.heard(part))])
        self._unsaved_change()

    def _unsaved_change(self) -> None:
        self._unsaved.set()

    async def _keep_saved(self) -> None:
        """Save after every change; several in quick succession at once."""
        while True:
            await self._unsaved.wait()
            await trio.sleep(SAVE_AFTER_S)
            self._unsaved = trio.Event()
            self.save()

    async def _warm_up(self) -> None:
        """Have an open connection to the model, so that the next turn does not pay for the handshakes.

        It is asked for past the SDK, which would touch half a megabyte for it.
        """
        self._asked_at = trio.current_time()
        try:
            answer = await self._http.get(self.openai.base_url.join("models"), headers=self.openai.auth_headers)
        except httpx2.HTTPError as error:
            log.warning("the model at %s cannot be reached: %s", self.openai.base_url, str(error) or type(error).__name__)
        else:
            log.debug("the model's server was asked for its models: %d", answer.status_code)

    def _be_ready_to_answer(self) -> None:
        """Somebody speaks, and will have said it soon."""
        if trio.current_time() > self._asked_at + COOL_S:
            self.nursery.start_soon(self._warm_up)
        if not self._practised:
            self._practised = True
            self.nursery.start_soon(self._practise)

    @staticmethod
    async def _practise() -> None:
        await trio.sleep(PRACTISE_AFTER_S)
        await practise()

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
        if message.data:  # nothing, where an earlier worker left a question unanswered
            self.history.append({"role": "user", "content": message.data})
        self._unsaved_change()
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
        log.error("the model failed: %s", explain(error))
        self.failed_to_answer()
        self._failed_turns += 1
        if isinstance(error, _UNMENDABLE) or self._failed_turns >= MAX_FAILED_TURNS:
            await self.give_up(f"the model failed: {explain(error)}")
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
                self._say_holding()

    def _say_holding(self) -> None:
        if self.holding and not self._voice.speaking:
            aside = self._voice.begin(new_uuid(), interruptible=True)  # no part of an answer, nor of its delay
            aside.say(self.holding)
            aside.finish()
            self.nursery.start_soon(self.heard, aside)

    async def _hear(self, hearing: Hearing) -> None:
        if isinstance(hearing, ProviderError) and self._mending.cancel_called:
            self._mending = trio.CancelScope()
            self.nursery.start_soon(self._mind_the_ear, self._mending)
        elif isinstance(hearing, SpeechStarted):
            self._be_ready_to_answer()
        elif isinstance(hearing, SpeechEnded):
            self._mending.cancel()
        await super()._hear(hearing)

    async def _mind_the_ear(self, scope: trio.CancelScope) -> None:
        """From an ear's failure until it has understood something: have a caller who waits for it told so."""
        told_at = -math.inf
        with scope:
            while True:
                unanswered_since = self.stt.unanswered_since if self.stt is not None else math.inf
                due_at = max(unanswered_since, self._voice.quiet_from, told_at) + self.patience_s
                if trio.current_time() >= due_at:
                    told_at = trio.current_time()
                    self._say_holding()
                await trio.sleep(WATCH_S)

    @contextmanager
    def _remembered(self, utterance: Utterance) -> Iterator[dict[str, Any]]:
        """Give an utterance its place in the history; what was heard of it ends up there, however the call ends."""
        entry: dict[str, Any] = {"role": "assistant", "content": ""}
        self.history.append(entry)
        self._saying[utterance.uuid] = entry, utterance
        try:
            yield entry
        finally:
            entry["content"] = utterance.heard_now
            del self._saying[utterance.uuid]
            self._unsaved_change()

    async def _rounds(self, uuid: str, utterances: list[Utterance], remembered: ExitStack) -> None:
        for _ in range(MAX_ROUNDS):
            utterances.append(utterance := self.utter(uuid))
            entry = remembered.enter_context(self._remembered(utterance))
            answer = await self._ask_model(utterance)
            entry["content"] = utterance.text.strip()  # for the model's next round; what was heard replaces it
            if not answer.tool_calls or self.interrupted:
                return
            entry["tool_calls"] = [call.as_message() for call in answer.tool_calls]
            self.save()  # before anything is done that should not be done twice
            for call in answer.tool_calls:
                result = await self._call_tool(call)
                self.history.append({"role": "tool", "tool_call_id": call.id, "content": result})
                self.save()  # at once: a result that is lost may have it done twice
            if self.interrupted:
                return
            uuid = new_uuid()
        log.warning("the model asked for tools %d times in one turn; it is not asked again", MAX_ROUNDS)

    async def _ask_model(self, utterance: Utterance) -> Answer:
        """Have the model answer the history, and say its sentences as they come, until it is done or interrupted."""
        answer = Answer()
        with self.interruptible():
            tools = [one.definition() for one in self.tools.values()]
            request = request_of(self.model, self.messages(), tools, self.options)
            try:
                await self._answer(request, utterance, answer)
            except _PASSING as error:  # a second connection often works, and nothing was said yet
                if utterance.text or isinstance(error, openai.APITimeoutError):
                    raise
                log.warning("the model is asked again: %s", explain(error))
                answer = Answer()
                await self._answer(request, utterance, answer)
        return answer

    async def _answer(self, request: dict[str, Any], utterance: Utterance, answer: Answer) -> None:
        self._asked_at = trio.current_time()
        try:
            stream = await self.openai.chat.completions.create(**request)
            try:
                await self._say(utterance, answer, stream)
            finally:
                self.nursery.start_soon(self._finish, stream, answer.finish_reason is not None)
        except trio.Cancelled:
            self.nursery.start_soon(self._warm_up)  # an interruption has taken the connection along, and the caller speaks
            raise

    async def _say(self, utterance: Utterance, answer: Answer, stream: AsyncStream[ChatCompletionChunk]) -> None:
        sentences = Sentences()
        patience_s = math.inf  # for the first chunk, the client's own timeout counts
        while (text := await next_text(stream, answer, patience_s)) is not None:
            patience_s = CHUNK_TIMEOUT_S
            for sentence in sentences.feed(text):
                utterance.say(sentence)
                self._unsaved_change()
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
