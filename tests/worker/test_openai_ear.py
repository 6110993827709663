"""A caller who waits for ears that are being mended is told so, and only then."""

import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
from trio.testing import MockClock

from dialog_worker import STT, TTS, OpenAIAgent, VoIP
from dialog_worker.participant import ProviderError
from dialog_worker.stt.base import SpeechEnded
from dialog_worker.testing import ScriptedCall, TextSTT, scripted_call

OUTAGE = ProviderError("the line dropped", code="1006")


class Ear(TextSTT):
    """Owes an answer since `owing_since`."""

    owing_since = math.inf

    @property
    def unanswered_since(self) -> float:
        return self.owing_since


class Clerk(OpenAIAgent):
    holding = "One moment."
    patience_s = 2.5


@pytest.fixture
def ear() -> Ear:
    return Ear()


@asynccontextmanager
async def call_of(ear: Ear) -> AsyncIterator[ScriptedCall]:
    def create(voip: VoIP, _stt: STT, tts: TTS) -> Clerk:
        return Clerk(voip=voip, stt=ear, tts=tts, model="m", api_key="k", base_url="http://127.0.0.1:9/v1")

    async with scripted_call(create) as call:
        await trio.sleep(0.1)
        yield call


async def test_a_caller_who_waits_for_a_failed_ear_is_told_so(ear: Ear, autojump_clock: MockClock) -> None:
    async with call_of(ear) as call:
        ear.owing_since = began = trio.current_time()
        await trio.sleep(1.0)
        await ear.emit(OUTAGE)
        assert (await call.until("saying")).text == "One moment."
        assert trio.current_time() - began == pytest.approx(2.5, abs=0.2)


async def test_a_caller_who_waits_on_is_told_again(ear: Ear, autojump_clock: MockClock) -> None:
    async with call_of(ear) as call:
        ear.owing_since = trio.current_time()
        await ear.emit(OUTAGE)
        assert [await call.next_said() for _ in range(2)] == ["One moment."] * 2


async def test_a_caller_who_has_said_nothing_is_not_asked_to_wait(ear: Ear, autojump_clock: MockClock) -> None:
    async with call_of(ear) as call:
        await ear.emit(OUTAGE)
        await trio.sleep(10)
        assert call.said == []


async def test_once_the_ear_has_understood_something_it_is_trusted_again(ear: Ear, autojump_clock: MockClock) -> None:
    async with call_of(ear) as call:
        await ear.emit(OUTAGE)
        await ear.emit(SpeechEnded())
        await trio.sleep(0.1)
        ear.owing_since = trio.current_time()
        await trio.sleep(10)
        assert call.said == []


async def test_an_ear_that_works_may_take_its_time(ear: Ear, autojump_clock: MockClock) -> None:
    async with call_of(ear) as call:
        ear.owing_since = trio.current_time()
        await trio.sleep(10)
        assert call.said == []
