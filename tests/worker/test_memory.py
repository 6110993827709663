"""What an OpenAI agent remembers for a worker that takes over, and how that goes on."""

from typing import Any

import pytest
import trio

from dialog_worker import STT, TTS, TwilioVoIPOpenAIAgent, VoIP, tool
from dialog_worker.agent.memory import LOST_RESULT, Memory, Saying, recall, with_every_result
from dialog_worker.participant import Word
from dialog_worker.testing import ScriptedCall, scripted_call
from protocol.messages import MessageDispatched, Restored, StartRecording, Transcript

from .desk import Desk, Receptionist, spoken
from .model_server import ModelServer, model_server, text, tool_call

WORDS = tuple(Word(word, 100 * n, 100 * n + 100) for n, word in enumerate(["one", "two", "three", "four"]))
SAYING = Saying("u1", 1, "one two three four", WORDS)


async def died(call: ScriptedCall) -> bytes:
    """Return the last state that was saved, once nothing more is."""
    await trio.sleep(0.2)
    return call.saved[-1]


class Successor(Desk):
    def __init__(self, server: ModelServer, checkpoint: bytes, **playing: int) -> None:
        super().__init__(server)
        self.checkpoint, self.playing = checkpoint, playing

    def __call__(self, voip: VoIP, stt: STT, tts: TTS) -> Receptionist:
        assert isinstance(voip, ScriptedCall)
        voip.first = Restored(self.checkpoint, self.playing)
        return super().__call__(voip, stt, tts)


def test_a_memory_is_recalled_as_it_was() -> None:
    memory = Memory([{"role": "user", "content": "hello"}], (SAYING,))
    assert recall(memory.encode()) == memory


def test_no_checkpoint_is_an_empty_memory() -> None:
    assert recall(b"") == Memory()


@pytest.mark.parametrize(
    ("ms", "voiced", "rest"),
    [(0, "", "one two three four"), (250, "one two", "three four"), (400, "one two three four", "")],
)
def test_what_is_left_of_a_sentence_begins_with_the_word_that_was_cut(ms: int, voiced: str, rest: str) -> None:
    assert (SAYING.voiced(ms), SAYING.rest(ms)) == (voiced, rest)


def test_a_tool_call_without_a_result_is_given_one() -> None:
    calls: list[dict[str, Any]] = [
        {"id": "1", "type": "function", "function": {}},
        {"id": "2", "type": "function", "function": {}},
    ]
    history: list[dict[str, Any]] = [
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "1", "content": "done"},
    ]
    mended = with_every_result(history)
    assert [(entry.get("tool_call_id"), entry["content"]) for entry in mended[1:]] == [("2", LOST_RESULT), ("1", "done")]


async def test_a_sentence_that_was_cut_is_finished_and_nothing_said_twice() -> None:
    memory = Memory([{"role": "user", "content": "count"}, {"role": "assistant", "content": ""}], (SAYING,))
    async with model_server() as server, scripted_call(desk := Successor(server, memory.encode(), u1=200)) as call:
        assert (await call.until("saying")).text == "three four"
        await call.tell(call.dispatched("u1", 200))
        await call.next_said()
        await call.next_said()
        await trio.sleep(0.1)
        assert spoken(desk.agent.history) == [("user", "count"), ("assistant", "one two three four")]
    assert server.requests == []


async def test_an_answer_that_was_heard_before_a_worker_had_taken_over_is_remembered_when_the_caller_speaks() -> None:
    memory = Memory([{"role": "user", "content": "count"}, {"role": "assistant", "content": ""}], (SAYING,))

    class Slow(Receptionist):
        async def on_restored(self, restored: Restored) -> None:
            await trio.sleep(0.1)
            await super().on_restored(restored)

    class SlowSuccessor(Successor):
        kind = Slow

    async with model_server() as server, scripted_call(desk := SlowSuccessor(server, memory.encode(), u1=400)) as call:
        await call.tell(MessageDispatched("u1", 400, 400, interrupted=False))
        with trio.fail_after(5):
            await call.until("said")
        server.scripts = [text("You are welcome.")]
        await call.caller_says("thank you")
        assert await call.next_said() == "You are welcome."
        assert spoken(desk.agent.history)[:2] == [("user", "count"), ("assistant", "one two three four")]


async def test_a_question_without_an_answer_is_answered() -> None:
    memory = Memory([{"role": "user", "content": "are you there"}])
    async with model_server() as server:
        server.scripts = [text("Yes.")]
        async with scripted_call(desk := Successor(server, memory.encode())) as call:
            assert await call.next_said() == "Yes."
            assert spoken(desk.agent.history) == [("user", "are you there"), ("assistant", "Yes.")]


async def test_a_tool_whose_result_was_lost_is_not_called_again_unasked() -> None:
    async with model_server() as server:
        server.scripts = [tool_call("book_table", '{"people":2,"time":"20:00"}')]

        class Stuck(Receptionist):
            @tool
            async def book_table(self, people: int, time: str) -> str:
                """Book, for ever."""
                await trio.sleep_forever()
                return f"{people} at {time}"

        async with scripted_call(lambda voip, stt, tts: Stuck(voip=voip, stt=stt, tts=tts, url=server.url)) as call:
            await call.caller_says("book it")
            await call.until("said")
            checkpoint = await died(call)
        server.scripts = [text("I am not sure that it was booked.")]
        async with scripted_call(Successor(server, checkpoint)) as call:
            assert await call.next_said() == "I am not sure that it was booked."
        assert server.requests[-1]["messages"][-1]["content"] == LOST_RESULT


async def test_a_tools_result_is_saved_before_anything_else_happens() -> None:
    async with model_server() as server:
        server.scripts = [tool_call("book_table", '{"people":2,"time":"20:00"}'), text("It is booked.")]
        async with scripted_call(Desk(server)) as call:
            await call.caller_says("book it")
            await call.until("tool")
            assert recall(call.saved[-1]).history[-1]["role"] == "tool"


async def test_a_restored_agent_does_not_greet_again() -> None:
    class Greeter(Receptionist):
        greeting = "Hi."

    async with model_server() as server:
        async with scripted_call(lambda voip, stt, tts: Greeter(voip=voip, stt=stt, tts=tts, url=server.url)) as call:
            assert await call.next_said() == "Hi."
            checkpoint = await died(call)
        async with scripted_call(Successor(server, checkpoint)) as call:
            await trio.sleep(0.3)
            assert call.said == []


async def test_a_memory_that_was_left_out_begins_anew_and_silences_what_was_being_said() -> None:
    async with model_server() as server, scripted_call(desk := Successor(server, b"", u1=500)) as call:
        await trio.sleep(0.1)
        assert desk.agent.history == []
        assert call.aborted == ["u1"]


async def test_the_record_of_a_call_is_kept_and_not_begun_twice() -> None:
    async with model_server() as server:

        def make(voip: VoIP, stt: STT, tts: TTS) -> TwilioVoIPOpenAIAgent:
            return TwilioVoIPOpenAIAgent(voip=voip, stt=stt, tts=tts, model="m", api_key="k", base_url=server.url)

        async with scripted_call(make) as call:
            await call.requested(StartRecording)
            await call.tell(Transcript("Hello.", "inbound", True, sequence=1))
            checkpoint = await died(call)
        agents: list[TwilioVoIPOpenAIAgent] = []

        def make_again(voip: VoIP, stt: STT, tts: TTS) -> TwilioVoIPOpenAIAgent:
            assert isinstance(voip, ScriptedCall)
            voip.first = Restored(checkpoint)
            agents.append(make(voip, stt, tts))
            return agents[0]

        async with scripted_call(make_again) as call:
            await trio.sleep(0.1)
            assert [utterance.text for utterance in agents[0].transcript] == ["Hello."]
            assert call.requests == []
