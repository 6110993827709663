"""What becomes of an utterance when its provider drops, stalls, refuses or sends rubbish in the middle of it."""

from collections.abc import AsyncIterator

import pytest
import trio
from trio.testing import MockClock

from dialog_worker.participant import ProviderError
from dialog_worker.tts.base import Speaking
from protocol.messages import Message

from .scripted_provider import ScriptedProvider, next_event, no_event, scripted_provider
from .voices import VOICES, WORD, Stage, Voice, audio_of, spaced, words_of

TEXT = "A table for four at seven."


@pytest.fixture
def clock() -> MockClock:
    return MockClock(autojump_threshold=0.003)  # real seconds, in which loopback is sure to answer


@pytest.fixture
async def provider() -> AsyncIterator[ScriptedProvider]:
    async with scripted_provider() as provider:
        yield provider


@pytest.fixture(params=VOICES)
def stage(request: pytest.FixtureRequest, provider: ScriptedProvider, nursery: trio.Nursery) -> Stage:
    kind: type[Voice] = request.param
    return Stage(kind, provider, nursery)


async def drop(voice: Voice, how: str) -> None:
    await (voice.peer.vanish() if how == "vanish" else voice.peer.close(int(how)))


DROPS = pytest.mark.parametrize("how", ["1000", "1011", "vanish"])


@DROPS
async def test_a_drop_before_the_first_audio_is_not_heard(stage: Stage, clock: MockClock, how: str) -> None:
    first = await stage.begin()
    stage.post("u", TEXT)
    await first.whole()
    await drop(first, how)
    second = await stage.accept()
    context_id, text = await second.whole()
    assert text == TEXT
    await second.say(context_id, text)
    await second.finish(context_id)
    lost, *events = await stage.until_done()
    assert isinstance(lost, ProviderError)
    assert (lost.uuid, lost.fatal) == ("", False)
    assert words_of(events) == spaced(TEXT)


@DROPS
async def test_after_a_drop_in_the_middle_only_the_rest_is_said(stage: Stage, clock: MockClock, how: str) -> None:
    first = await stage.begin()
    stage.post("u", TEXT)
    context_id, _ = await first.whole()
    await first.say(context_id, "A table for")
    before = await stage.until_told("for")
    await drop(first, how)
    second = await stage.accept()
    context_id, rest = await second.whole()
    assert rest == "four at seven."
    await second.say(context_id, rest)
    await second.finish(context_id)
    lost, *after = await stage.until_done()
    assert isinstance(lost, ProviderError)
    assert audio_of(before + after) == WORD * 6
    assert words_of(before + after) == spaced(TEXT)


async def test_text_that_came_in_the_outage_is_said_after_the_rest(stage: Stage, clock: MockClock) -> None:
    first = await stage.begin()
    stage.post("u", "A table for four. ", done=False)
    context_id, _ = await first.text()
    await first.say(context_id, "A table")
    await stage.until_told("table")
    stage.provider.refusals = [503]
    await drop(first, "vanish")
    await next_event(stage.tts)
    stage.post("u", "At seven.")
    assert (await (await stage.accept()).whole())[1] == "for four. At seven."


async def test_two_drops_in_one_utterance_are_told_and_mended(stage: Stage, clock: MockClock) -> None:
    voice = await stage.begin()
    stage.post("u", TEXT)
    events: list[Speaking] = []
    for said in ("A table", "for four"):
        context_id, _ = await voice.whole()
        await voice.say(context_id, said)
        events += await stage.until_told(said.split()[-1])
        await drop(voice, "vanish")
        voice = await stage.accept()
    context_id, rest = await voice.whole()
    await voice.say(context_id, rest)
    await voice.finish(context_id)
    events += await stage.until_done()
    assert words_of(events) == spaced(TEXT)
    assert [error.uuid for error in events if isinstance(error, ProviderError)] == ["", ""]


async def test_a_drop_in_a_pause_costs_nothing(stage: Stage, clock: MockClock) -> None:
    first = await stage.begin()
    stage.post("u", "One moment. ", done=False)
    context_id, _ = await first.text()
    await first.say(context_id, "One moment.")
    before = await stage.until_told("moment.")
    await trio.sleep(10)
    await drop(first, "1011")
    second = await stage.accept()
    stage.post("u", "Here.")
    context_id, text = await second.whole()
    assert text == "Here."
    await second.say(context_id, text)
    await second.finish(context_id)
    assert words_of(before + await stage.until_done()) == spaced("One moment. Here.")


@pytest.mark.parametrize("said", ["", "A table for"])
async def test_a_stall_ends_the_utterance_after_2_s(stage: Stage, clock: MockClock, said: str) -> None:
    voice = await stage.begin()
    stage.post("u", TEXT)
    context_id, _ = await voice.whole()
    began = trio.current_time()
    await voice.say(context_id, said)
    *events, error, last = await stage.until_done()
    assert trio.current_time() - began == pytest.approx(2, abs=0.1)
    assert words_of(events) == spaced(said)
    assert error == ProviderError(f"{stage.kind.__name__} fell silent for 2 s", "timeout", "u")
    assert last == Message("u", b"", True)


async def test_what_follows_a_stall_is_said_over_another_connection(
    stage: Stage, clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = await stage.begin()
    stage.post("u", TEXT)
    await first.whole()
    first.peer.freeze(monkeypatch)
    await stage.until_done()
    stage.post("u~1", TEXT)
    with trio.fail_after(0.6):
        assert (await (await stage.accept()).whole())[1] == TEXT
    assert no_event(stage.tts)


async def test_a_sentence_is_waited_for_although_more_may_come(stage: Stage, clock: MockClock) -> None:
    voice = await stage.begin()
    began = trio.current_time()
    stage.post("u", "Good evening. ", done=False)
    await voice.text()
    await trio.sleep(1)
    stage.post("u", "How are you? ", done=False)  # which is no answer
    error, last = await stage.until_done()
    assert trio.current_time() - began == pytest.approx(2, abs=0.1)
    assert isinstance(error, ProviderError)
    assert (error.code, error.uuid) == ("timeout", "u")
    assert last == Message("u", b"", True)


async def test_the_beginning_of_a_sentence_is_not_waited_for(stage: Stage, clock: MockClock) -> None:
    await stage.begin()
    stage.post("u", "Good ", done=False)
    await trio.sleep(60)
    assert no_event(stage.tts)


async def test_a_slow_first_byte_is_no_failure(stage: Stage, clock: MockClock) -> None:
    voice = await stage.begin()
    stage.post("u", "Hi.")
    context_id, text = await voice.whole()
    await trio.sleep(1.8)
    await voice.say(context_id, text)
    await voice.finish(context_id)
    assert not any(isinstance(event, ProviderError) for event in await stage.until_done())


async def test_rubbish_instead_of_audio_ends_the_utterance_after_2_s(stage: Stage, clock: MockClock) -> None:
    voice = await stage.begin()
    stage.post("u", TEXT)
    context_id, _ = await voice.whole()
    await voice.say(context_id, "A table")
    began = trio.current_time()
    for _ in range(20):
        await voice.spoil(context_id)
        await voice.peer.send("<html>")
    events = await stage.until_done()
    assert trio.current_time() - began == pytest.approx(2, abs=0.1)
    assert [event.code for event in events if isinstance(event, ProviderError)] == ["garbage", "timeout"]
    assert words_of(events) == spaced("A table")


async def test_an_outage_is_fatal_once_text_has_waited_3_s(stage: Stage, clock: MockClock) -> None:
    stage.provider.refusals = [503] * 100
    stage.run()
    assert (await next_event(stage.tts)).code == "503"
    await trio.sleep(5)
    began = trio.current_time()
    stage.post("u", TEXT)
    fatal, error, last = await stage.until_done()
    assert trio.current_time() - began == pytest.approx(3, abs=0.2)
    assert isinstance(fatal, ProviderError)
    assert fatal.fatal
    assert error == ProviderError(fatal.message, "503", "u")
    assert last == Message("u", b"", True)


async def test_a_provider_that_takes_each_connection_but_says_nothing_costs_4_s(stage: Stage, clock: MockClock) -> None:
    stage.run()
    began = trio.current_time()
    for uuid in ("u", "u~1"):
        stage.post(uuid, TEXT)
        error, _ = await stage.until_done()
        assert isinstance(error, ProviderError)
        assert (error.code, error.uuid) == ("timeout", uuid)
    assert trio.current_time() - began < 5


async def test_a_line_that_is_cut_in_every_upgrade_is_an_outage(
    stage: Stage, nursery: trio.Nursery, clock: MockClock
) -> None:
    async def cut(stream: trio.SocketStream) -> None:
        await stream.receive_some()
        await stream.aclose()

    listeners = await nursery.start(trio.serve_tcp, cut, 0)
    stage.provider.url = f"ws://127.0.0.1:{listeners[0].socket.getsockname()[1]}"
    stage.open()
    began = trio.current_time()
    stage.run()
    stage.post("u", TEXT)
    first, fatal, error, last = await stage.until_done()
    assert trio.current_time() - began == pytest.approx(3, abs=0.3)
    assert isinstance(first, ProviderError)
    assert isinstance(fatal, ProviderError)
    assert (first.fatal, fatal.fatal) == (False, True)
    assert error == ProviderError(fatal.message, fatal.code, "u")
    assert last == Message("u", b"", True)
