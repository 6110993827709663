"""The playout ledger against a carrier that plays in real time, on a virtual clock."""

from collections import deque
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dialog_supervisor.carriers.playout import BYTES_PER_MS, Cut, Playout
from protocol.messages import MessageDispatched


def speech(ms: int, fill: int = 1) -> bytes:
    return bytes([fill]) * (ms * BYTES_PER_MS)


def played(uuid: str, total_ms: int) -> MessageDispatched:
    return MessageDispatched(uuid, total_ms, total_ms, interrupted=False)


def cut_short(uuid: str, played_ms: int, total_ms: int) -> MessageDispatched:
    return MessageDispatched(uuid, played_ms, total_ms, interrupted=True)


@pytest.fixture
def playout() -> Playout:
    return Playout()


# Marks


def test_only_the_last_piece_is_followed_by_a_mark(playout: Playout) -> None:
    assert playout.post("a", speech(20), done=False, now=0) == ""
    assert playout.post("a", speech(20), done=True, now=0) == "a"


def test_a_mark_that_returns_says_that_all_was_heard(playout: Playout) -> None:
    playout.post("a", speech(200), done=True, now=0)
    assert playout.marked("a", now=0.2) == played("a", 200)
    assert not playout


def test_pieces_are_counted_together(playout: Playout) -> None:
    for _ in range(3):
        playout.post("a", speech(20), done=False, now=0)
    playout.post("a", b"", done=True, now=0)
    assert playout.marked("a", now=0.06) == played("a", 60)


def test_an_utterance_without_audio_is_answered_too(playout: Playout) -> None:
    assert playout.post("a", b"", done=True, now=0) == "a"
    assert playout.marked("a", now=0) == played("a", 0)


def test_a_mark_returns_once(playout: Playout) -> None:
    playout.post("a", speech(20), done=True, now=0)
    playout.marked("a", now=0.02)
    assert playout.marked("a", now=0.02) is None


def test_an_unknown_mark_means_nothing(playout: Playout) -> None:
    assert playout.marked("never sent", now=0) is None


def test_an_utterance_whose_mark_is_still_to_come_is_still_to_be_heard(playout: Playout) -> None:
    playout.post("a", speech(20), done=True, now=0)
    assert playout
    assert playout.buffered_s(now=5) == 0


# The clock


def test_audio_is_played_one_piece_after_the_other(playout: Playout) -> None:
    playout.post("a", speech(1000), done=True, now=0)
    playout.post("b", speech(500), done=True, now=0.2)
    assert playout.buffered_s(now=0.2) == pytest.approx(1.3)


def test_a_pause_between_pieces_is_not_counted_as_audio(playout: Playout) -> None:
    playout.post("a", speech(100), done=False, now=0)
    playout.post("a", speech(100), done=False, now=5)
    assert playout.buffered_s(now=5.04) == pytest.approx(0.06)
    assert playout.abort("a", now=5.04) == Cut(cut_short("a", 140, 200), [])


def test_after_the_last_mark_nothing_is_buffered_whatever_our_clock_says(playout: Playout) -> None:
    playout.post("a", speech(1000), done=True, now=0)
    playout.marked("a", now=0.9)
    assert playout.buffered_s(now=0.9) == 0


# Cuts


@pytest.mark.parametrize(("now", "heard"), [(0, 0), (0.123, 123), (0.999, 999), (1.0, 1000), (7, 1000)])
def test_an_abort_tells_how_much_was_heard(playout: Playout, now: float, heard: int) -> None:
    playout.post("a", speech(1000), done=False, now=0)
    assert playout.abort("a", now) == Cut(cut_short("a", heard, 1000), [])


def test_what_was_finished_and_heard_whole_was_not_interrupted(playout: Playout) -> None:
    playout.post("a", speech(100), done=True, now=0)
    assert playout.abort("a", now=0.1) == Cut(played("a", 100), [])


def test_what_was_heard_whole_so_far_but_not_finished_was_interrupted(playout: Playout) -> None:
    playout.post("a", speech(100), done=False, now=0)
    cut = playout.abort("a", now=0.5)
    assert cut is not None
    assert cut.dispatched.interrupted


def test_an_utterance_that_waits_for_its_turn_was_not_heard(playout: Playout) -> None:
    playout.post("a", speech(500), done=True, now=0)
    playout.post("b", speech(500), done=True, now=0)
    cut = playout.abort("b", now=0.25)
    assert cut is not None
    assert cut.dispatched == cut_short("b", 0, 500)


def test_the_mark_of_what_was_cut_means_nothing(playout: Playout) -> None:
    playout.post("a", speech(100), done=True, now=0)
    playout.abort("a", now=0.05)
    assert playout.marked("a", now=0.06) is None


def test_late_audio_of_what_was_cut_is_dropped(playout: Playout) -> None:
    playout.post("a", speech(100), done=False, now=0)
    playout.abort("a", now=0.05)
    assert playout.refuses("a")
    assert playout.post("a", speech(100), done=True, now=0.06) is None
    assert playout.buffered_s(now=0.06) == 0
    assert not playout


def test_audio_of_what_was_cut_before_it_came_is_dropped(playout: Playout) -> None:
    assert playout.abort("a", now=0) is None
    assert playout.post("a", speech(100), done=False, now=0) is None


def test_a_second_abort_has_nothing_to_cut(playout: Playout) -> None:
    playout.post("a", speech(100), done=False, now=0)
    playout.abort("a", now=0.01)
    assert playout.abort("a", now=0.02) is None


def test_an_abort_of_what_was_played_has_nothing_to_cut(playout: Playout) -> None:
    playout.post("a", speech(100), done=True, now=0)
    playout.marked("a", now=0.1)
    assert playout.abort("a", now=0.1) is None


def test_many_aborts_do_not_fill_the_memory(playout: Playout) -> None:
    for number in range(10_000):
        playout.abort(str(number), now=0)
    assert len(playout._aborted) <= 256
    assert playout.refuses("9999")


# What a cut takes from others


def test_others_are_sent_again_from_where_the_caller_was(playout: Playout) -> None:
    playout.post("a", speech(100, fill=1) + speech(100, fill=2), done=True, now=0)
    playout.post("b", speech(100, fill=3), done=True, now=0)
    playout.post("c", speech(100, fill=4), done=False, now=0)
    cut = playout.abort("b", now=0.15)
    assert cut == Cut(cut_short("b", 0, 100), [("a#1", speech(50, fill=2)), ("", speech(100, fill=4))])
    assert playout.buffered_s(now=0.15) == pytest.approx(0.15)


def test_what_is_sent_again_has_a_mark_of_its_own_and_the_old_one_means_nothing(playout: Playout) -> None:
    playout.post("a", speech(100), done=True, now=0)
    playout.post("b", speech(100), done=True, now=0)
    cut = playout.abort("a", now=0.05)
    assert cut is not None
    [(mark, _)] = cut.resend
    assert mark != "b"
    assert playout.marked("b", now=0.05) is None
    assert playout.marked(mark, now=0.15) == played("b", 100)


def test_each_time_something_is_sent_again_its_mark_is_another(playout: Playout) -> None:
    for uuid in "abc":
        playout.post(uuid, speech(100), done=True, now=0)
    playout.abort("b", now=0.01)
    playout.abort("c", now=0.02)
    assert playout.marked("a", now=0.03) is None
    assert playout.marked("a#1", now=0.03) is None
    assert playout.marked("a#3", now=0.1) == played("a", 100)


def test_a_finished_utterance_that_waits_only_for_its_mark_gets_a_new_one(playout: Playout) -> None:
    playout.post("a", speech(100), done=True, now=0)
    playout.post("b", speech(100), done=False, now=0)
    cut = playout.abort("b", now=0.15)
    assert cut is not None
    assert cut.resend == [("a#1", b"")]
    assert playout.marked("a#1", now=0.15) == played("a", 100)


def test_what_was_sent_again_can_be_cut_and_still_tells_all_that_was_heard(playout: Playout) -> None:
    playout.post("a", speech(100), done=True, now=0)
    playout.post("b", speech(100), done=True, now=0)
    playout.abort("b", now=0.05)
    assert playout.abort("a", now=0.08) == Cut(cut_short("a", 80, 100), [])


def test_an_unfinished_utterance_goes_on_after_it_was_sent_again(playout: Playout) -> None:
    playout.post("a", speech(100), done=False, now=0)
    playout.post("b", speech(100), done=False, now=0)
    playout.abort("b", now=0.05)
    mark = playout.post("a", speech(100), done=True, now=0.06)
    assert mark
    assert playout.buffered_s(now=0.06) == pytest.approx(0.14)
    assert playout.marked(mark, now=0.2) == played("a", 200)


def test_a_cut_within_a_sample_pair_never_repeats_more_than_a_millisecond(playout: Playout) -> None:
    playout.post("a", speech(1)[:-3] + speech(10), done=True, now=0)
    playout.post("b", speech(10), done=True, now=0)
    cut = playout.abort("b", now=0.0056)
    assert cut is not None
    [(_, rest)] = cut.resend
    assert abs(len(rest) - (85 - 0.0056 * 8000)) <= BYTES_PER_MS


# The line is gone


def test_when_the_line_is_gone_all_are_told(playout: Playout) -> None:
    playout.post("a", speech(100), done=True, now=0)
    playout.post("b", speech(100), done=True, now=0)
    playout.post("c", speech(100), done=False, now=0)
    assert playout.stop(now=0.15) == [played("a", 100), cut_short("b", 50, 100), cut_short("c", 0, 100)]
    assert not playout
    assert playout.buffered_s(now=0.15) == 0
    assert playout.stop(now=0.2) == []


def test_a_new_line_begins_empty(playout: Playout) -> None:
    playout.post("a", speech(5000), done=True, now=0)
    playout.stop(now=1)
    playout.post("b", speech(100), done=True, now=1)
    assert playout.buffered_s(now=1) == pytest.approx(0.1)


# A carrier that plays


class Carrier:
    """Plays in order and in real time, millisecond by millisecond; after `clear` it returns all marks at once."""

    def __init__(self) -> None:
        self.queue: deque[bytes | str] = deque()
        self.heard: list[bytes] = []  # a millisecond each
        self.returned: deque[str] = deque()

    def send(self, audio: bytes, mark: str | None) -> None:
        self.queue.extend(audio[start : start + BYTES_PER_MS] for start in range(0, len(audio), BYTES_PER_MS))
        if mark:
            self.queue.append(mark)
        self._return_marks()

    def play(self, ms: int) -> None:
        for _ in range(ms):
            if self.queue:
                item = self.queue.popleft()
                assert isinstance(item, bytes)
                self.heard.append(item)
                self._return_marks()

    def clear(self) -> None:
        self.returned.extend(item for item in self.queue if isinstance(item, str))
        self.queue.clear()

    def _return_marks(self) -> None:
        while self.queue and isinstance(mark := self.queue[0], str):
            self.returned.append(mark)
            self.queue.popleft()


class Line(RuleBasedStateMachine):
    """Posts, aborts and time passing in any order: what is told is what the carrier has played.

    Every millisecond of an utterance has a content of its own, so that one lost, repeated or out of order is seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.playout, self.carrier, self.ms = Playout(), Carrier(), 0
        self.said: dict[int, int] = {}  # milliseconds of each utterance
        self.finished: set[int] = set()
        self.told: dict[int, MessageDispatched] = {}

    @property
    def now(self) -> float:
        return self.ms / 1000

    def content(self, number: int, begin: int, end: int) -> bytes:
        return b"".join(number.to_bytes(4, "big") + ms.to_bytes(4, "big") for ms in range(begin, end))

    def heard_of(self, number: int) -> list[bytes]:
        return [ms for ms in self.carrier.heard if ms[:4] == number.to_bytes(4, "big")]

    def tell(self, dispatched: MessageDispatched | None) -> None:
        if dispatched is not None:
            number = int(dispatched.uuid)
            assert number not in self.told
            self.told[number] = dispatched
            assert dispatched.played_ms == len(self.heard_of(number))
            assert dispatched.total_ms == self.said[number]
            whole = number in self.finished and dispatched.played_ms == dispatched.total_ms
            assert dispatched.interrupted is not whole

    def marks_return(self) -> None:
        while self.carrier.returned:
            self.tell(self.playout.marked(self.carrier.returned.popleft(), self.now))

    @rule(ms=st.integers(0, 40), done=st.booleans())
    def begin(self, ms: int, done: bool) -> None:
        self.post(len(self.said), ms, done)

    @precondition(lambda self: self.open_ones())
    @rule(data=st.data(), ms=st.integers(0, 40), done=st.booleans())
    def go_on(self, data: Any, ms: int, done: bool) -> None:
        self.post(data.draw(st.sampled_from(self.open_ones())), ms, done)

    def open_ones(self) -> list[int]:
        return [number for number in self.said if number not in self.finished and number not in self.told]

    def post(self, number: int, ms: int, done: bool) -> None:
        begin = self.said.get(number, 0)
        audio = self.content(number, begin, begin + ms)
        self.said[number] = begin + ms
        mark = self.playout.post(str(number), audio, done=done, now=self.now)
        assert mark is not None
        if done:
            self.finished.add(number)
        self.carrier.send(audio, mark)

    @rule(ms=st.integers(1, 25), at_once=st.booleans())
    def time_passes(self, ms: int, at_once: bool) -> None:
        """Marks come back at once, or only after whatever happens next."""
        self.carrier.play(ms)
        self.ms += ms
        if at_once:
            self.marks_return()

    @precondition(lambda self: self.said)
    @rule(data=st.data())
    def abort(self, data: Any) -> None:
        number = data.draw(st.sampled_from(list(self.said)))
        cut = self.playout.abort(str(number), self.now)
        assert (cut is None) == (number in self.told)
        if cut is not None:
            self.carrier.clear()
            for mark, audio in cut.resend:
                self.carrier.send(audio, mark)
            self.tell(cut.dispatched)

    @precondition(lambda self: self.told)
    @rule(data=st.data())
    def late_audio(self, data: Any) -> None:
        number = data.draw(st.sampled_from(list(self.told)))
        if self.told[number].interrupted:
            assert self.playout.post(str(number), bytes(80), done=False, now=self.now) is None

    @invariant()
    def the_ledger_knows_how_much_the_carrier_has(self) -> None:
        waiting = sum(1 for item in self.carrier.queue if isinstance(item, bytes))
        assert self.playout.buffered_s(self.now) == pytest.approx(waiting / 1000, abs=1e-6)

    @invariant()
    def nothing_is_lost_repeated_or_out_of_order(self) -> None:
        for number in self.said:
            heard = self.heard_of(number)
            assert b"".join(heard) == self.content(number, 0, len(heard))

    def teardown(self) -> None:
        """At last all that was finished is heard or told, and the line's end tells the rest."""
        self.time_passes(5000, at_once=True)
        assert self.finished <= set(self.told)
        for dispatched in self.playout.stop(self.now):
            self.tell(dispatched)
        assert set(self.told) == set(self.said)
        assert not self.playout


TestLine = Line.TestCase
TestLine.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
