"""One test for each row of Dialog for TypeScript's surface, named for it. Here: speech, agents and the rest."""

import importlib
import logging
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from dialog_supervisor.config import ConfigError, load
from dialog_worker import (
    STT,
    TTS,
    Agent,
    CartesiaTTS,
    DeepgramSTT,
    ElevenLabsTTS,
    Message,
    OpenAIAgent,
    OpenAISTT,
    TwilioVoIPOpenAIAgent,
    VoIP,
)
from dialog_worker.participant import Participant
from dialog_worker.stt.base import Final, SpeechEnded, SpeechStarted
from dialog_worker.testing import TextSTT, TextTTS, scripted_call
from protocol.messages import MessageDispatched, Metadata, RecordingUrl, StreamingStarted, StreamingStopped, Transcript
from tests.conftest import StartDialogd
from tests.e2e.twilio_client import Twilio
from tests.from_dialog.table import PAGE, ROOT
from tests.supervisor.configuration import Write, writer

NOWHERE = "ws://127.0.0.1:9"  # the discard port: refuses connections, and never leaves this machine

LOGS = """
import logging
from dialog_worker import Agent, VoIP

def create(voip: VoIP) -> Agent:
    logging.getLogger("mine").warning("careful")
    return Agent(voip=voip)
"""


@pytest.fixture
def write(tmp_path: Path) -> Write:
    return writer(tmp_path)


# STT, TTS, Message


async def test_stt_post_message_and_vad(autojump_clock: MockClock) -> None:
    spoken: list[bool] = []

    class Listener(Agent):
        async def on_vad(self, speaking: bool) -> None:
            spoken.append(speaking)

    async with scripted_call(lambda voip, stt, tts: Listener(voip=voip, stt=stt, tts=tts)) as call:
        await call.caller_says("hello")
        assert (await call.until("heard")).text == "hello"
        await trio.sleep(0.1)
    assert spoken == [True, False]


async def test_tts_post_abort_and_a_terminal_chunk(autojump_clock: MockClock) -> None:
    voice = TextTTS()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(voice.serve)
        voice.abort("unknown")
        voice.post(Message("u1", "Good evening."))
        voice.post(Message("u1", "", done=True))
        said = [await anext(voice.events) for _ in range(4)]
        nursery.cancel_scope.cancel()
    assert [message.done for message in said if isinstance(message, Message)] == [False, True]


def test_message_is_uuid_data_done() -> None:
    message = Message("u1", "Good evening.", done=True)
    assert (message.uuid, message.data, message.done) == ("u1", "Good evening.", True)
    with pytest.raises(AttributeError):
        message.data = "Good night."  # type: ignore[misc]  # that is the point: participants share nothing they may change


@pytest.mark.parametrize(
    "participant",
    [
        lambda: DeepgramSTT(api_key="k", options={"numerals": True}, queue_size_limit=240_000),
        lambda: OpenAISTT(api_key="k", queue_size_limit=240_000),
        lambda: CartesiaTTS(voice="v", api_key="k", url=NOWHERE, headers={"x": "y"}, timeout_s=1, queue_size_limit=9),
        lambda: ElevenLabsTTS("v", api_key="k", url=NOWHERE, headers={"x": "y"}, query={"a": "b"}, timeout_s=1),
    ],
    ids=["DeepgramSTT", "OpenAISTT", "CartesiaTTS", "ElevenlabsTTS"],
)
def test_provider_options(participant: object) -> None:
    """Their behaviour has tests of its own, tests/worker/test_*.py; a call with each, tests/e2e/test_providers.py."""
    assert callable(participant)
    assert isinstance(participant(), Participant)


# Agents


class Answering(Agent):
    async def inference(self, message: Message[str]) -> None:
        await self.dispatch_message(Message(message.uuid, f"You said {message.data}.", done=True))


def answering(voip: VoIP, stt: STT, tts: TTS) -> Agent:
    return Answering(voip=voip, stt=stt, tts=tts)


async def test_agent_inference(autojump_clock: MockClock) -> None:
    async with scripted_call(answering) as call:
        await call.caller_says("hello")
        assert await call.next_said() == "You said hello."


async def test_agent_activate_and_deactivate(autojump_clock: MockClock) -> None:
    agents: list[Agent] = []

    def make(voip: VoIP, stt: STT, tts: TTS) -> Agent:
        agents.append(answering(voip, stt, tts))
        return agents[0]

    async with scripted_call(make) as call:
        await trio.sleep(0.1)
        agents[0].deactivate()
        agents[0].set_stt(ear := TextSTT())
        agents[0].set_tts(TextTTS())
        agents[0].activate()
        for hearing in (SpeechStarted(), Final("again"), SpeechEnded()):
            await ear.emit(hearing)
        assert await call.next_said() == "You said again."


@pytest.mark.parametrize(
    "name",
    ["post", "dispatch_stream", "dispatch_message", "abort", "dispose", "set_tts", "set_stt", "activate", "deactivate"],
)
def test_openai_agent(name: str) -> None:
    """What each does is told in tests/worker: test_agent.py, test_openai_agent.py, test_openai_stream.py, test_swap.py."""
    assert callable(getattr(OpenAIAgent, name))
    assert getattr(OpenAIAgent, name).__doc__ or getattr(Agent, name).__doc__


async def test_openai_agent_inferences_run_one_at_a_time(autojump_clock: MockClock) -> None:
    running: list[int] = []

    class Slow(Agent):
        async def inference(self, message: Message[str]) -> None:
            running.append(running[-1] + 1 if running else 1)
            with self.uninterrupted():
                await trio.sleep(1)
            running.append(running[-1] - 1)

    async with scripted_call(lambda voip, stt, tts: Slow(voip=voip, stt=stt, tts=tts)) as call:
        await call.caller_says("one")
        await call.caller_says("two")
        await trio.sleep(5)
    assert max(running) == 1


async def test_openai_agent_what_may_not_be_interrupted_survives_abort(autojump_clock: MockClock) -> None:
    class Firm(Agent):
        async def inference(self, message: Message[str]) -> None:
            await self.dispatch_message(Message("u", "one two three four five six", done=True), allow_interrupt=False)

    async with scripted_call(lambda voip, stt, tts: Firm(voip=voip, stt=stt, tts=tts)) as call:
        await call.caller_says("go")
        await trio.sleep(0.5)
        await call.caller_speaks()
        assert await call.next_said() == "one two three four five six"


def test_twilio_voip_openai_agent() -> None:
    """What it does is told in tests/worker/test_twilio_openai.py, and in a call in tests/e2e."""
    assert issubclass(TwilioVoIPOpenAIAgent, OpenAIAgent)
    assert TwilioVoIPOpenAIAgent.recording == {"download": True}


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (Metadata, ("call_id", "carrier", "caller", "callee", "fields", "parameters")),
        (Transcript, ("text", "track", "final", "confidence")),
        (RecordingUrl, ("url", "duration_s", "sid", "channels", "path")),
        (MessageDispatched, ("uuid", "played_ms", "total_ms", "interrupted")),
        (StreamingStarted, ("stream_id", "encoding", "sample_rate")),
        (StreamingStopped, ("reason",)),
    ],
)
def test_twilio_message_types_and_guards_are_typed_structs(kind: type, fields: tuple[str, ...]) -> None:
    names: tuple[str, ...] = kind.__struct_fields__  # type: ignore[attr-defined]  # of msgspec's
    assert names[: len(fields)] == fields


async def test_mutex_one_at_a_time_with_a_limit(autojump_clock: MockClock, caplog: pytest.LogCaptureFixture) -> None:
    class Slow(Agent):
        async def inference(self, message: Message[str]) -> None:
            with self.uninterrupted():
                await trio.sleep(60)

    def make(voip: VoIP, stt: STT, tts: TTS) -> Agent:
        return Slow(voip=voip, stt=stt, tts=tts, queue_size_limit=1)

    async with scripted_call(make) as call:
        for word in ("one", "two", "three"):
            await call.caller_says(word)
            await trio.sleep(0.1)
    assert "queue_full" in caplog.text


async def test_stream_buffer_and_request_buffer_bodies_are_bounded(start_dialogd: StartDialogd) -> None:
    dialogd = start_dialogd(gateway={"request_size_limit": 1000})
    async with Twilio(dialogd) as twilio:
        response = await twilio.post(f"{dialogd.public_url}/twilio/voice", {"From": "1" * 2000})
    assert response.status_code == 413


async def test_log_what_an_agent_logs_is_written_with_its_call(start_dialogd: StartDialogd) -> None:
    dialogd = start_dialogd(agent=LOGS)
    async with Twilio(dialogd) as twilio, twilio.streaming() as call:
        line = await dialogd.logged(event="careful", logger="mine")
    assert (line["call"], line["level"]) == (call.sid, "warning")


@pytest.mark.parametrize("level", ["debug", "info", "notice", "warning", "error"])
def test_syslog_level(write: Write, level: str) -> None:
    assert load(write(f'[log]\nlevel = "{level}"'), {"TWILIO_AUTH_TOKEN": "t"}).log.level == level
    assert isinstance(logging.getLevelName("WARNING"), int)


@pytest.mark.parametrize("example", ["custom_agent", "worker_bridge", "minimal"])
def test_examples_have_an_agent_a_configuration_and_an_env_template(example: str) -> None:
    """That each runs as its README says is told in tests/examples."""
    folder = ROOT / "examples" / example
    for name in ("agent.py", "dialog.toml", ".env.template", "README.md"):
        assert (folder / name).is_file(), f"{folder / name} is missing"


def test_telnyx_is_still_to_come_and_says_so(write: Write) -> None:
    with pytest.raises(ConfigError, match="telnyx is not a known key"):
        load(write('[telnyx]\napi_key = "k"'), {"TWILIO_AUTH_TOKEN": "t"})
    assert importlib.import_module("dialog_supervisor.carriers.base").Leg.__abstractmethods__
    assert "Telnyx" in PAGE.read_text()


def test_troubleshooting_answers_each_of_the_originals_entries() -> None:
    """That each answer is true is told in tests/docs."""
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    entries = "certificate", "403", "400", "404", "8 kHz", "done", "request_size_limit", "message_size_limit", "timeout"
    assert [entry for entry in entries if entry not in text] == []
