"""docs/participants.md: each of its modules is typed, tidy, short, and works against something real."""

import importlib
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest
import trio
import trio.testing
from trio.testing import MockClock

from dialog_worker import (
    STT,
    TTS,
    Agent,
    Media,
    Message,
    MessageDispatched,
    ProviderError,
    RequestFailed,
    StreamingStarted,
)
from dialog_worker.participant import Participant
from dialog_worker.stt.base import Final, SpeechEnded, SpeechStarted
from tests.docs.page import DOCS, modules
from tests.docs.services import http, http_server
from tests.local.sockets import CARTESIA, MULAW, words
from tests.worker.telephone import FRAME, SECOND, silence, speech

PATIENCE_S = 10.0
LONGEST = 100  # lines of an example
QUESTION = "When are you open?"
MODULES = modules("participants.md")
Load = Callable[[str], ModuleType]


@pytest.fixture
def load(participants: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Load]:
    """Return a function that imports one of the page's modules."""
    monkeypatch.syspath_prepend(participants)
    yield importlib.import_module
    for name in MODULES:
        sys.modules.pop(name.removesuffix(".py"), None)


def test_the_modules_pass_mypy_strict(participants: Path) -> None:
    files = [str(participants / name) for name in MODULES]
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file", "pyproject.toml", "--no-error-summary", *files]
    environ = {"MYPYPATH": str(participants), "PATH": ""}
    done = subprocess.run(command, cwd=DOCS.parent, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr  # 2: it could not look
    assert [line for line in done.stdout.splitlines() if str(participants) in line] == []


def test_the_modules_pass_ruff(participants: Path) -> None:
    for verb in (["check", "--per-file-ignores", "test_*.py:D103"], ["format", "--check"]):
        command = [
            str(Path(sys.executable).with_name("ruff")),
            *verb,
            "--config",
            "pyproject.toml",
            "--quiet",
            str(participants),
        ]
        done = subprocess.run(command, cwd=DOCS.parent, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", MODULES)
def test_a_module_is_short(name: str) -> None:
    assert len(MODULES[name].splitlines()) <= LONGEST


# The services


@pytest.fixture(scope="module")
def question(server: str) -> bytes:
    """The question, in mu-law."""
    body = {"model_id": "sonic", "voice": {"id": "joe"}, "transcript": QUESTION, "output_format": MULAW}
    response = httpx.post(f"http://{server}/tts/bytes", json=body, headers=CARTESIA, trust_env=False, timeout=30)
    return response.raise_for_status().content


TRANSCRIPT = http(200, b'{"results": {"channels": [{"alternatives": [{"transcript": "hello"}]}]}}')


@asynccontextmanager
async def served(participant: Participant[Any]) -> AsyncIterator[None]:
    with trio.fail_after(PATIENCE_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(participant.serve)
            yield
            nursery.cancel_scope.cancel()


async def read(participant: Participant[Any], until: Callable[[Any], bool]) -> list[Any]:
    """Return events up to the first that `until` is true of."""
    found: list[Any] = []
    async for event in participant.events:
        found.append(event)
        if until(event):
            return found
    raise AssertionError(f"the events ended after {found}")


def post(stt: STT, audio: bytes) -> None:
    for start in range(0, len(audio), FRAME):
        stt.post(audio[start : start + FRAME])


def kinds(events: list[Any]) -> list[type]:
    return [type(event) for event in events]


# Ears


@pytest.fixture
def ears(load: Load) -> Callable[..., STT]:
    made: Callable[..., STT] = load("batch_stt").BatchSTT
    return made


async def test_the_ears_recognise_a_voice(ears: Callable[..., STT], server: str, question: bytes) -> None:
    stt = ears(f"http://{server}/v1/listen", "k")
    async with served(stt):
        post(stt, silence(0.4) + question + silence(1.0))
        started, final, ended = await read(stt, lambda event: isinstance(event, SpeechEnded))
    assert kinds([started, final, ended]) == [SpeechStarted, Final, SpeechEnded]
    assert words(final.text) == ["when", "are", "you", "open"]


async def test_the_ears_try_again_what_failed_in_passing(ears: Callable[..., STT]) -> None:
    async with http_server(http(503), TRANSCRIPT) as url:
        stt = ears(url, "k")
        async with served(stt):
            post(stt, silence(0.4) + speech(1.0) + silence(1.0))
            events = await read(stt, lambda event: isinstance(event, SpeechEnded))
    assert kinds(events) == [SpeechStarted, ProviderError, Final, SpeechEnded]
    assert (events[1].code, events[1].fatal, events[2].text) == ("503", False, "hello")


async def test_the_ears_hand_over_what_a_service_that_refuses_them_has_not_heard(ears: Callable[..., STT]) -> None:
    spoken = silence(0.2) + speech(1.0)
    async with http_server(http(401)) as url:
        stt = ears(url, "k")
        async with served(stt):
            post(stt, spoken + silence(1.0) + b"\x01" * 80)
            events = await read(stt, lambda event: isinstance(event, ProviderError))
    owed = stt.retire()
    assert (events[-1].code, events[-1].fatal) == ("401", True)
    assert kinds(list(owed.hearings)) == [SpeechEnded]
    assert speech(1.0) in owed.audio
    assert owed.audio.endswith(b"\x01" * 80)


async def test_the_ears_drop_and_tell_what_is_beyond_their_limit(ears: Callable[..., STT]) -> None:
    stt = ears("http://127.0.0.1:9/", "k", queue_size_limit=SECOND)
    post(stt, silence(3.0))
    async with served(stt):
        [told] = await read(stt, lambda event: True)
    assert (told.message, told.code) == ("2.0 s of the caller's audio were lost", "audio_lost")


# The voice


@pytest.fixture
def voice(load: Load) -> Callable[..., TTS]:
    made: Callable[..., TTS] = load("http_tts").HttpTTS
    return made


def is_done(event: Any) -> bool:
    return isinstance(event, Message) and event.done


def audio_of(events: list[Any]) -> bytes:
    return b"".join(event.data for event in events if isinstance(event, Message))


async def test_the_voice_says_utterances_in_their_order(voice: Callable[..., TTS], server: str) -> None:
    tts = voice(f"http://{server}/tts/bytes", "k", "joe")
    async with served(tts):
        tts.post(Message("a", "Good evening."))
        tts.post(Message("a", "", done=True))
        tts.post(Message("b", "Goodbye.", done=True))
        first, second = await read(tts, is_done), await read(tts, is_done)
    assert {event.uuid for event in first} == {"a"}
    assert {event.uuid for event in second} == {"b"}
    assert len(audio_of(first)) > SECOND / 2
    assert len(audio_of(second)) > SECOND / 4


async def test_nothing_of_an_aborted_utterance_follows(voice: Callable[..., TTS]) -> None:
    async with http_server(b"", http(200, b"\xff" * 80)) as url:
        tts = voice(url, "k", "joe")
        async with served(tts):
            tts.post(Message("a", "One. "))
            await trio.testing.wait_all_tasks_blocked(0.05)
            tts.abort("a")
            tts.post(Message("a", "Two.", done=True))
            tts.post(Message("b", "Three.", done=True))
            events = await read(tts, is_done)
    assert {event.uuid for event in events} == {"b"}


async def test_a_failure_costs_the_voice_one_utterance(voice: Callable[..., TTS]) -> None:
    async with http_server(http(500), http(200, b"\xff" * 80)) as url:
        tts = voice(url, "k", "joe")
        async with served(tts):
            for uuid in ("a", "b"):
                tts.post(Message(uuid, "One.", done=True))
            failed, done = await read(tts, is_done)
            said = await read(tts, is_done)
    assert (failed.code, failed.uuid, failed.fatal) == ("500", "a", False)
    assert done == Message("a", b"", done=True)
    assert audio_of(said) == b"\xff" * 80


async def test_a_voice_that_is_refused_ends_every_utterance(voice: Callable[..., TTS]) -> None:
    async with http_server(http(403)) as url:
        tts = voice(url, "k", "joe")
        async with served(tts):
            tts.post(Message("a", "One.", done=True))
            fatal, failed, _ = await read(tts, is_done)
            tts.post(Message("b", "Two.", done=True))
            again, done = await read(tts, is_done)
    assert (fatal.fatal, fatal.uuid) == (True, "")
    assert [(error.code, error.uuid, error.fatal) for error in (failed, again)] == [("403", "a", False), ("403", "b", False)]
    assert done == Message("b", b"", done=True)


async def test_a_voice_with_too_much_to_say_ends_the_utterance(voice: Callable[..., TTS]) -> None:
    tts = voice("http://127.0.0.1:9/", "k", "joe", queue_size_limit=2)
    for _ in range(3):
        tts.post(Message("a", "One."))
    async with served(tts):
        failed, done = await read(tts, is_done)
    assert (failed.code, failed.uuid) == ("queue_full", "a")
    assert done == Message("a", b"", done=True)


# The line


async def converse(line: Any, agent: Agent) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(line.run)
        nursery.start_soon(agent.run)


class Echo(Agent):
    def on_media(self, media: Media) -> None:
        self.voip.post(Message("echo", media.payload))


class Speaker(Agent):
    """Has much to say at once, and stops itself after two seconds of it."""

    async def on_streaming_started(self, started: StreamingStarted) -> None:
        self.voip.post(Message("short", b"\xff" * FRAME * 5, done=True))
        self.voip.post(Message("long", b"\xff" * SECOND * 9, done=True))
        await trio.sleep(2.1)
        self.voip.abort("long")

    async def on_message_dispatched(self, dispatched: MessageDispatched) -> None:
        told.append(dispatched)


told: list[MessageDispatched] = []


async def test_an_echo_comes_back_on_the_line(load: Load, autojump_clock: MockClock) -> None:
    line = load("recorded_line").RecordedLine(speech(1.0), patience_s=1.0)
    await converse(line, Echo(voip=line))
    assert line.heard["echo"] == speech(1.0)


async def test_the_line_tells_what_was_heard_of_a_message(load: Load, autojump_clock: MockClock) -> None:
    told.clear()
    line = load("recorded_line").RecordedLine(b"", patience_s=5.0)
    await converse(line, Speaker(voip=line))
    assert told == [MessageDispatched("short", 100, 100, False), MessageDispatched("long", 2000, 9000, True)]


async def test_the_line_is_hung_up_after_what_was_posted_is_heard(load: Load, autojump_clock: MockClock) -> None:
    line = load("recorded_line").RecordedLine(b"", patience_s=60.0)
    agent = Speaker(voip=line)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(converse, line, agent)
        await trio.sleep(0.1)
        await agent.hangup()
        assert trio.current_time() == pytest.approx(2.1, abs=0.05)
    assert len(line.heard["short"]) == FRAME * 5


async def test_the_line_refuses_what_a_recording_cannot_do(load: Load, autojump_clock: MockClock) -> None:
    line = load("recorded_line").RecordedLine(b"", patience_s=1.0)
    with pytest.raises(RequestFailed, match="can only be hung up on"):
        await line.transfer_to("+15551234567")


async def test_who_posts_much_waits_for_room_on_the_line(load: Load, autojump_clock: MockClock) -> None:
    line = load("recorded_line").RecordedLine(b"", patience_s=60.0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(line.run)
        line.post(Message("long", b"\xff" * SECOND * 9))
        await line.room()
        assert trio.current_time() == pytest.approx(4.0, abs=0.1)
        nursery.cancel_scope.cancel()


# The agent


@pytest.mark.parametrize("test", re.findall(r"async def (test_\w+)", MODULES["test_clerk.py"]))
async def test_the_clerks_own_test(load: Load, test: str, autojump_clock: MockClock) -> None:
    await getattr(load("test_clerk"), test)(autojump_clock)


async def test_all_four_in_a_call(load: Load, server: str, question: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    line = load("recorded_line").RecordedLine(silence(0.2) + question + silence(0.8), patience_s=3.0)
    stt = load("batch_stt").BatchSTT(f"http://{server}/v1/listen", "k")
    tts = load("http_tts").HttpTTS(f"http://{server}/tts/bytes", "k", "joe")
    clerk = load("clerk").Clerk(voip=line, stt=stt, tts=tts)
    with trio.fail_after(PATIENCE_S):
        await converse(line, clerk)
    seen = [line.split(maxsplit=2)[1:] for line in capsys.readouterr().out.splitlines()]
    assert [words(text) for kind, *rest in seen for text in rest if kind == "heard"] == [["when", "are", "you", "open"]]
    assert ["saying", "We are open from noon until ten, every day but Monday."] in seen
    assert any(len(audio) > SECOND / 2 for uuid, audio in line.heard.items() if uuid != "greeting")


def test_create_gives_everyone_a_successor(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DEEPGRAM_API_KEY", "CARTESIA_API_KEY", "CARTESIA_VOICE"):
        monkeypatch.setenv(name, "k")
    for name in ("BATCH_STT_URL", "HTTP_TTS_URL"):
        monkeypatch.setenv(name, "http://127.0.0.1:9/")
    line = load("recorded_line").RecordedLine(b"", patience_s=1.0)
    agent = load("agent").create(line)
    assert isinstance(agent.stt, load("batch_stt").BatchSTT)
    assert isinstance(agent.tts, load("http_tts").HttpTTS)
