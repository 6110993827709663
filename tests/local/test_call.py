"""`dialogctl call`: its options, the caller's turns, recordings, and the report of a recorded call."""

import io
import wave
from pathlib import Path

import msgspec
import numpy as np
import pytest
import trio
from rich.console import Console

from dialog_local.call import report
from dialog_local.call.command import app
from dialog_local.call.conversation import (
    INTERRUPT_AFTER_SECONDS,
    TURN_PAUSE_SECONDS,
    Conversation,
    Step,
    Taken,
    Trace,
    Turn,
)
from dialog_local.call.recording import stereo_wav, telephone_audio
from dialog_local.call.report import LiveReport, agent_utterances, match_words, summarise, words
from dialog_local.call.script import read_script
from dialog_local.call.session import Failed
from dialog_local.call.session import Line as CommandLineTurn
from dialog_local.call.speech_client import started
from dialog_local.carrier.company import PhoneCompany
from dialog_local.carrier.events import Answered, Cleared, Ended, Event, Said, VoiceBegan, VoiceEnded
from dialog_local.carrier.line import FRAME_SECONDS, Line
from dialog_local.carrier.media import Clear, Media
from dialog_local.carrier.phonecall import Call
from dialog_local.carrier.playout import SILENCE
from dialog_local.speech.audio import UnreadableAudio, decode

LOUD = bytes([0x80, 0x00]) * 4000  # a second


def run(*tokens: str) -> object:
    return app(tokens, exit_on_error=False, result_action="return_value")


# Options


def test_says_and_wavs_keep_the_order_of_the_command_line() -> None:
    _, bound, _ = app.parse_args(["--say", "one", "--wav", "two.wav", "--say", "three", "--json"])
    assert bound.arguments["turns"] == (
        CommandLineTurn("--say", "one"),
        CommandLineTurn("--wav", "two.wav"),
        CommandLineTurn("--say", "three"),
    )


@pytest.mark.parametrize(
    ("tokens", "reason"),
    [
        ([], "say something"),
        (["--say", "x", "--text"], "say something"),
        (["--say", "x", "--script", "y"], "say something"),
        (["--script", "y", "--interrupt", "1"], "write '!' before the turn"),
        (["--say", "x", "--interrupt", "2"], "--interrupt 2: there are 1 turns"),
        (["--say", "x", "--url", "http://127.0.0.1:1/voice"], "needs --token"),
    ],
)
def test_what_cannot_be_meant_is_a_usage_error(tokens: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*tokens) == 2
    assert reason in capsys.readouterr().err


def test_a_missing_configuration_is_told_with_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--say", "x", "-c", str(tmp_path / "none.toml")) == 1
    assert "none.toml: no such file" in capsys.readouterr().err


def test_a_missing_recording_is_told_with_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--wav", str(tmp_path / "none.wav"), "--url", "http://127.0.0.1:9/voice", "--token", "t") == 1
    assert "none.wav cannot be read: No such file" in capsys.readouterr().err


def test_a_dialogd_that_does_not_answer_is_told_with_the_remedy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "dialog.toml"
    config.write_text(
        '[gateway]\nlisten = "127.0.0.1:9"\npublic_url = "https://voice.example.com"\n'
        f'[twilio]\naccount_sid = "AC{"0" * 32}"\nauth_token = "t"\n[agent]\npath = "."\n'
    )
    (tmp_path / "a.wav").write_bytes(wav_file(np.zeros(80), 8000, 2))
    assert run("--wav", str(tmp_path / "a.wav"), "-c", str(config)) == 1
    assert f"no dialogd answers at http://127.0.0.1:9; start one with: dialogd -c {config}" in capsys.readouterr().err


# A script


def test_a_script_has_a_turn_on_each_line_and_marks_those_that_interrupt(tmp_path: Path) -> None:
    (file := tmp_path / "conversation.txt").write_text("# a comment\n\nHello.\n! Stop!\n  Bye.  \n")
    script = read_script(file)
    assert [line.value for line in script.lines] == ["Hello.", "Stop!", "Bye."]
    assert script.interrupt == (2,)


@pytest.mark.parametrize(
    ("text", "reason"),
    [("# nothing\n", "there is no turn in it"), ("Hello.\n!\n", "turn 2 says nothing"), (None, "No such file")],
)
def test_a_script_without_words_is_refused(text: str | None, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "conversation.txt"
    if text is not None:
        file.write_text(text)
    with pytest.raises(Failed, match=reason):
        read_script(file)


async def test_a_server_that_starts_is_waited_for(autojump_clock: trio.testing.MockClock) -> None:
    began = trio.current_time()
    await started("http://127.0.0.1:9/v1", within=3)
    assert trio.current_time() - began == pytest.approx(3)


# Recordings


def wav_file(samples: "np.ndarray[tuple[int], np.dtype[np.float64]]", rate: int, width: int, channels: int = 1) -> bytes:
    """Return samples in -1..1 as PCM; with two channels the second one is silent."""
    levels = np.rint(samples * (2 ** (8 * width - 1) - 1)).astype(np.int64)
    frames = np.stack([levels, *[np.zeros_like(levels)] * (channels - 1)], axis=1).reshape(-1)
    if width == 1:
        data = (frames + 128).astype(np.uint8).tobytes()
    else:
        data = frames.astype("<i8").view(np.uint8).reshape(-1, 8)[:, :width].tobytes()
    written = io.BytesIO()
    with wave.open(written, "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(data)
    return written.getvalue()


@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize(("rate", "channels"), [(8000, 1), (16000, 2), (44100, 1), (48000, 2)])
def test_any_pcm_wav_becomes_telephone_audio(width: int, rate: int, channels: int) -> None:
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(rate) / rate)
    heard = decode(telephone_audio(wav_file(tone, rate, width, channels)), "pcm_mulaw")
    assert len(heard) == pytest.approx(8000, abs=2)
    spectrum = np.abs(np.fft.rfft(heard[:8000], 8000))
    assert int(spectrum.argmax()) == 440
    assert float(np.abs(heard[1000:7000]).max()) == pytest.approx(0.5 / channels, rel=0.1)


def test_what_is_no_wav_is_refused() -> None:
    with pytest.raises(UnreadableAudio, match="not a WAV file"):
        telephone_audio(b"ID3 music")


def test_the_caller_is_left_and_the_agent_right() -> None:
    with wave.open(io.BytesIO(stereo_wav(LOUD[:8], bytes([SILENCE]) * 16))) as file:
        assert (file.getnchannels(), file.getframerate(), file.getnframes()) == (2, 8000, 16)
        levels = np.frombuffer(file.readframes(16), dtype="<i2").reshape(-1, 2)
    assert (np.abs(levels[:8, 0]) > 30000).all()
    assert not levels[8:, 0].any()
    assert not levels[:, 1].any()


# Turns, on a virtual clock: a line with an agent that answers by itself


class ScriptedAgent:
    """Says `greeting`, and after each of the caller's turns `answer`, both as seconds of sound; stops when interrupted."""

    def __init__(self, greeting: float, answer: float) -> None:
        self.greeting = greeting
        self.answer = answer

    async def run(self, call: Call) -> None:
        line = call.line
        assert line is not None
        self._say(line, self.greeting)
        async for event in call.log:
            match event:
                case VoiceBegan(who="caller"):
                    line.handle(Clear("MZ"))
                case VoiceEnded(who="caller"):
                    self._say(line, self.answer)
                case _:
                    pass

    def _say(self, line: Line, seconds: float) -> None:
        line.handle(msgspec.convert({"event": "media", "streamSid": "MZ", "media": {"payload": ""}}, Media))
        media = msgspec.convert(
            {"event": "media", "streamSid": "MZ", "media": {"payload": (LOUD * 10)[: round(seconds * 8000)]}}, Media
        )
        line.handle(media)


async def hold(greeting: float, answer: float, turns: list[Turn]) -> tuple[list[Taken], list[Event]]:
    """Let a conversation take place on a line without a socket; return the turns as spoken, and the events."""
    call = PhoneCompany("AC", "t").call("http://127.0.0.1/voice", "+1", "+2")
    remaining = iter(turns)

    async def next_turn() -> Turn | None:
        return next(remaining, None)

    conversation = Conversation(call, next_turn, lambda _taken: None)
    call.line = Line(trio.current_time(), call.log.append)
    call.line.answered = True
    async with trio.open_nursery() as nursery:
        nursery.start_soon(call.line.run)
        nursery.start_soon(ScriptedAgent(greeting, answer).run, call)
        await conversation.run()
        nursery.cancel_scope.cancel()
    return conversation.taken, call.log.history


async def test_the_caller_waits_for_the_greeting_and_for_each_answer(autojump_clock: trio.testing.MockClock) -> None:
    taken, _ = await hold(2.0, 3.0, [Turn("one", LOUD), Turn("two", LOUD)])
    first, second = taken
    assert first.began_at == pytest.approx(2.0 + TURN_PAUSE_SECONDS, abs=3 * FRAME_SECONDS)
    # The agent here answers when it is sure that the caller is silent, 0.7 s after the last sound.
    assert second.began_at == pytest.approx(first.last_sound_at + 0.7 + 3.0 + TURN_PAUSE_SECONDS, abs=5 * FRAME_SECONDS)


async def test_the_caller_speaks_first_to_an_agent_that_does_not(autojump_clock: trio.testing.MockClock) -> None:
    taken, _ = await hold(0.0, 1.0, [Turn("one", LOUD)])
    assert taken[0].began_at == pytest.approx(10.0, abs=2 * FRAME_SECONDS)


async def test_an_interrupting_turn_is_spoken_over_the_answer(autojump_clock: trio.testing.MockClock) -> None:
    taken, events = await hold(1.0, 5.0, [Turn("one", LOUD), Turn("wait", LOUD, interrupts=True)])
    answers = [event.at for event in events if isinstance(event, VoiceBegan) and event.who == "agent"]
    assert taken[1].began_at == pytest.approx(answers[1] + INTERRUPT_AFTER_SECONDS, abs=2 * FRAME_SECONDS)
    [barge_in] = report.barge_ins(taken, events, [])
    assert barge_in.dropped_ms == pytest.approx(5000 - INTERRUPT_AFTER_SECONDS * 1000, abs=100)
    assert barge_in.from_first_sound_ms == pytest.approx(20, abs=20)


async def test_the_last_sound_is_not_the_silence_after_it(autojump_clock: trio.testing.MockClock) -> None:
    taken, _ = await hold(0.5, 1.0, [Turn("one", LOUD + bytes([SILENCE]) * 4000)])
    assert taken[0].last_sound_at - taken[0].first_sound_at == pytest.approx(1.0, abs=0.001)


# Words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It's 7:30, isn't it?", ["its", "seven", "thirty", "isnt", "it"]),
        ("Room 21 \u2013 for 12", ["room", "twenty", "one", "for", "twelve"]),
        ("555", ["five", "five", "five"]),
        ("05", ["zero", "five"]),
        ("Good-bye, to-day", ["goodbye", "today"]),
    ],
)
def test_words_are_as_one_says_them(text: str, expected: list[str]) -> None:
    assert words(text) == expected


def test_words_count_in_order() -> None:
    match = match_words("A table for two at 7:30, certainly.", "a table for to at seven thirty")
    assert (match.said, match.heard) == (8, 6)
    assert match.share == 0.75


def test_nothing_said_is_no_match() -> None:
    assert match_words("", "anything").share == 0.0


# Reports


EVENTS: list[Event] = [
    Answered(0.01),
    VoiceBegan(0.5, "agent"),
    VoiceEnded(2.0, "agent"),
    VoiceBegan(3.0, "caller"),
    VoiceEnded(4.0, "caller"),
    VoiceBegan(4.8, "agent"),
    VoiceBegan(6.0, "caller"),
    Cleared(6.35, 1500.0),
    VoiceEnded(6.35, "agent"),
    VoiceEnded(6.9, "caller"),
    VoiceBegan(7.5, "agent"),
    Said(8.5, "Goodbye."),
    Ended(9.0, "the caller hung up"),
]
TAKEN = [Taken(1, "A table, please.", False, 2.9, 3.0, 4.0), Taken(2, "[wait.wav]", True, 5.95, 6.0, 6.9)]
STEPS = [
    Step(0.3, "saying", "Hello.", at=0.3),
    Step(2.1, "said", "Hello.", {"interrupted": "false"}, at=2.1),
    Step(4.2, "heard", "a table please", at=4.2),
    Step(4.5, "tool", "", {"name": "book", "arguments": "{}", "result": "done"}, at=4.5),
    Step(4.6, "saying", "Booked, and what else?", at=4.6),
    Step(6.15, "speech_started", at=6.15),
    Step(6.4, "said", "Booked, and", {"interrupted": "true"}, at=6.4),
    Step(9.1, "history", "[]", at=9.1),
]


def test_the_summary_has_delays_barge_in_and_history() -> None:
    summary = summarise("CA1", TAKEN, EVENTS, STEPS, files=["call.wav"])
    assert [turn.delay_ms for turn in summary.turns] == [800.0, 600.0]
    assert (summary.delay_median_ms, summary.delay_worst_ms) == (700.0, 800.0)
    assert (summary.turns[0].recognised, summary.turns[0].answer) == ("a table please", "Booked, and what else?")
    [barge_in] = summary.barge_ins
    assert (barge_in.from_noticed_ms, barge_in.from_first_sound_ms, barge_in.dropped_ms) == (200.0, 350.0, 1500.0)
    assert (summary.history, summary.ended, summary.seconds) == ("[]", "the caller hung up", 9.0)


def test_speech_noticed_in_an_earlier_turn_does_not_count_for_a_barge_in() -> None:
    earlier = Step(3.2, "speech_started", at=3.2)
    [barge_in] = report.barge_ins(TAKEN, EVENTS, [earlier])
    assert barge_in.from_noticed_ms is None


def test_a_step_dated_just_after_its_effect_took_no_time() -> None:
    late = Step(6.36, "speech_started", at=6.36)
    [barge_in] = report.barge_ins(TAKEN, EVENTS, [late])
    assert barge_in.from_noticed_ms == 0.0


def test_what_the_agent_said_is_what_was_heard_of_it_and_the_carriers_words() -> None:
    assert report.agent_words(EVENTS, STEPS) == "Hello. Booked, Goodbye."


def test_the_agents_utterances_last_to_the_end_of_the_call() -> None:
    assert agent_utterances(EVENTS, 9.0) == [(0.5, 2.0), (4.8, 6.35), (7.5, 9.0)]


def test_the_live_report_is_plain_lines_with_times() -> None:
    written = io.StringIO()
    live = LiveReport(Console(file=written, highlight=False, markup=False))
    live.turn(TAKEN[0])
    for step in STEPS[2:6]:
        live.step(step)
    live.event(EVENTS[5])
    live.event(EVENTS[7])
    assert written.getvalue().splitlines() == [
        "   2.90  caller   A table, please.",
        "   4.20  heard    a table please",
        "   4.50  tool     book({}) -> done",
        "   4.60  agent    Booked, and what else?",
        "   4.80           answers 800 ms after the caller's last sound",
        "   6.35  barge-in cut off, 1500 ms unheard",
    ]


def test_steps_are_put_on_the_callers_clock_by_the_fastest_arrival() -> None:
    call = PhoneCompany("AC", "t").call("http://127.0.0.1/voice", "+1", "+2")
    trace = Trace(call, None, lambda _step: None)
    trace.add(Step(1.0, "log"), arrived_at=1.5)
    trace.add(Step(2.0, "log"), arrived_at=2.1)
    trace.add(Step(3.0, "log"), arrived_at=9.0)
    assert [round(step.at, 3) for step in trace.steps] == [1.5, 2.1, 3.1]
