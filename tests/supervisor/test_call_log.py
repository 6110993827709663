"""What a call's event log takes, what it leaves out, and how much."""

from collections import Counter
from pathlib import Path

import msgspec
import pytest
import trio
from trio.testing import MockClock

from dialog_supervisor.steps import Step
from dialog_supervisor.telemetry.call_log import WAITING_BYTES, CallLog
from dialog_supervisor.telemetry.discretion import discreet, discreet_step
from protocol.messages import Abort, Checkpoint, Dtmf, Heartbeat, Media, Message, Metadata, Post, Trace, TransferTo
from protocol.record import RECORD_VERSION, Entry, Header

WORDS = "my card is four nine one two"


class Kept:
    """A log, and what there is in it."""

    def __init__(self, *, transcripts: bool = True, size_limit: int = 1_000_000) -> None:
        header = Header(RECORD_VERSION, "CA1", "abc.1", "2026-11-25T18:00:00.000Z", transcripts)
        self.counts: Counter[str] = Counter()
        self.wakes = 0
        self.log = CallLog(Path("log"), header, self.counts, self.wake, size_limit=size_limit)

    def wake(self) -> None:
        self.wakes += 1

    def lines(self) -> list[bytes]:
        written, entries = self.log.take()
        assert written.count(b"\n") == entries
        return written.splitlines()

    def entries(self) -> list[Entry]:
        """Return what was entered since the last time."""
        return [msgspec.json.decode(line, type=Entry) for line in self.lines()]


async def test_events_and_commands_have_their_time_and_their_worker(autojump_clock: MockClock) -> None:
    kept = Kept()
    await trio.sleep(1.5)
    kept.log.told(Dtmf("5"), 7)
    kept.log.asked(Abort("u1"), 7)
    kept.log.asked(Checkpoint(b"state", 20), 7)
    assert kept.entries() == [
        Entry(1.5, 7, event="Dtmf", fields={"digit": "5"}),
        Entry(1.5, 7, command="Abort", fields={"uuid": "u1"}),
        Entry(1.5, 7, command="Checkpoint", fields={"state": 5, "audio_ms": 20}),
    ]


async def test_audio_and_heartbeats_are_left_out_and_what_is_a_step_is_told_once() -> None:
    kept = Kept()
    kept.log.told(Media(0, bytes(160)), 7)
    for command in (Post(Message("u", bytes(160))), Heartbeat(), Trace("heard", "hello")):
        kept.log.asked(command, 7)
    assert kept.entries() == []


async def test_how_many_frames_there_were_is_told_when_there_were_any(autojump_clock: MockClock) -> None:
    kept = Kept()
    for frames in (50, 0, 3):
        kept.counts.update({"frames_in": frames, "late": 1})
        await trio.sleep(1)
        kept.log.tick()
    assert kept.entries() == [
        Entry(1.0, step="media", fields={"in": 50, "out": 0}),
        Entry(3.0, step="media", fields={"in": 3, "out": 0}),
    ]


async def test_a_log_that_is_full_says_so_once() -> None:
    kept = Kept(size_limit=500)
    for _ in range(100):
        kept.log.told(Dtmf("5"), 7)
    *_, last = kept.entries()
    assert (last.step, last.text) == ("lost", "all that follows: events.size_limit is reached")
    kept.log.told(Dtmf("5"), 7)
    assert kept.entries() == []


async def test_what_comes_faster_than_it_is_written_is_lost_and_told() -> None:
    kept = Kept()
    for _ in range(40):
        kept.log.step(Step(0.0, "said", "a" * 8_000))
    lines = kept.lines()
    assert sum(map(len, lines)) < WAITING_BYTES + 200
    lost = 40 - (len(lines) - 1)
    assert msgspec.json.decode(lines[-1], type=Entry).text == f"{lost} entries, which came too fast"
    kept.log.told(Dtmf("5"), 7)
    assert len(kept.entries()) == 1


async def test_a_text_that_is_very_long_is_cut() -> None:
    kept = Kept()
    kept.log.step(Step(0.0, "said", "a" * 100_000, {"total": "b" * 100_000}))
    [entry] = kept.entries()
    assert (len(entry.text), len(entry.fields["total"])) == (16_385, 16_385)


async def test_the_end_of_a_call_wakes_who_writes() -> None:
    kept = Kept()
    kept.log.close()
    assert (kept.wakes, kept.log.closed) == (1, True)


# Where what is said may not be kept


async def test_without_transcripts_there_is_no_word_no_number_and_no_key() -> None:
    kept = Kept(transcripts=False)
    metadata = Metadata("CA1", "twilio", "+14155550123", "+14155550199", {"From": "+14155550123", "CallerName": "ANN"})
    kept.log.told(metadata, 0)
    kept.log.told(Dtmf("5"), 7)
    kept.log.asked(TransferTo(1, 15.0, "+14155550123"), 7)
    kept.log.step(Step(1.0, "heard", WORDS))
    kept.log.step(Step(1.0, "tool", "", {"name": "pay", "arguments": WORDS, "result": WORDS}))
    written = b"\n".join(kept.lines())
    for secret in (b"card", b"four", b"ANN", b"415555", b'"5"'):
        assert secret not in written
    assert b'"name":"pay"' in written


@pytest.mark.parametrize("kind", ["state", "worker", "request", "turn", "log"])
def test_what_dialogd_itself_tells_is_kept_with_numbers_masked(kind: str) -> None:
    assert discreet_step(kind, "from +14155550123", {"reason": "to +14155550199"}) == ("from …23", {"reason": "to …99"})


def test_figures_and_names_stay() -> None:
    assert discreet(
        {"played_ms": 200, "interrupted": True, "uuid": "u1", "failure": {"kind": "carrier", "code": 13224}}
    ) == {
        "played_ms": 200,
        "interrupted": True,
        "uuid": "u1",
        "failure": {"kind": "carrier", "code": 13224},
    }
