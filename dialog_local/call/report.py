"""What a local call looks like on the terminal, line by line as it happens, and what is left of it at the end.

Everything here is computed from recorded events, without I/O, so that a report can be made of any list of them.
"""

import difflib
import re
from collections.abc import Sequence
from statistics import median

import msgspec
from msgspec import Struct
from rich.console import Console
from rich.text import Text

from dialog_local.call.conversation import Step, Taken
from dialog_local.carrier.events import Cleared, Dialed, Ended, Event, Played, Problem, Said, VoiceBegan, VoiceEnded

_STYLES = {"caller": "cyan", "agent": "green", "tool": "magenta", "heard": "dim", "barge-in": "yellow", "problem": "red"}
_CLOCK_ERROR_MS = 5.0  # between dialogd's clock and the caller's, on one machine
_CLOCKS_AGREE_SECONDS = 0.1  # the same, plus the way of a step from a busy worker
_ANSWER_WITHIN_SECONDS = 30.0  # a sound later than this is no answer to the turn before

_OLD_SPELLING = re.compile(r"\b(good|to)-(bye|day|night|morrow)\b")  # as the recogniser writes these words now and then
_ONES = {0: "zero", 1: "one", 2: "two", 3: "three", 4: "four", 5: "five", 6: "six", 7: "seven", 8: "eight", 9: "nine"}
_TEENS = {10: "ten", 11: "eleven", 12: "twelve", 13: "thirteen", 14: "fourteen", 15: "fifteen", 16: "sixteen"}
_TEENS |= {17: "seventeen", 18: "eighteen", 19: "nineteen"}
_TENS = {2: "twenty", 3: "thirty", 4: "forty", 5: "fifty", 6: "sixty", 7: "seventy", 8: "eighty", 9: "ninety"}


class BargeIn(Struct, frozen=True):
    """Where the caller cut the agent off.

    Milliseconds to the carrier's `clear`: from the agent noticing speech (None without its trace), and from the caller's
    first audible sample (None if no turn was being spoken).
    """

    at: float
    dropped_ms: float
    from_noticed_ms: float | None
    from_first_sound_ms: float | None


class Match(Struct, frozen=True):
    """How many of the words that the agent said were recognised in what it sounded like, in order."""

    said: int
    heard: int
    recognised: str

    @property
    def share(self) -> float:
        """1.0 for every word."""
        return self.heard / self.said if self.said else 0.0


class TurnSummary(Struct, frozen=True):
    """One of the caller's turns; `delay_ms` is from its last sound to the agent's first, None if that did not follow."""

    number: int
    said: str
    recognised: str
    answer: str
    interrupts: bool
    delay_ms: float | None


class Summary(Struct, frozen=True):
    """What a call came to."""

    call: str
    ended: str
    seconds: float
    turns: tuple[TurnSummary, ...]
    delay_median_ms: float | None
    delay_worst_ms: float | None
    barge_ins: tuple[BargeIn, ...]
    words: Match | None
    history: str
    problems: tuple[str, ...]
    files: tuple[str, ...]


class LiveReport:
    """Prints a call as it happens."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._last_turn: Taken | None = None

    def line(self, at: float, who: str, text: str) -> None:
        """Print one line: the time in the call, who, and the words."""
        shown = Text(f"{at:7.2f}  ", style="dim")
        shown.append(f"{who:<9}", style=_STYLES.get(who, "dim"))
        shown.append(text, style="dim" if who == "heard" else "")
        self._console.print(shown, soft_wrap=True)

    def turn(self, taken: Taken) -> None:
        """The caller begins to speak."""
        self._last_turn = taken
        self.line(taken.began_at, "caller", f"{taken.label}{'   (over the agent)' if taken.interrupts else ''}")

    def event(self, event: Event) -> None:
        """Something happened on the line."""
        match event:
            case VoiceBegan(who="agent"):
                self._answered(event.at)
            case Cleared() if event.dropped_ms > 0:
                self.line(event.at, "barge-in", f"cut off, {event.dropped_ms:.0f} ms unheard")
            case Said():
                self.line(event.at, "carrier", f"says: {event.text}")
            case Played():
                self.line(event.at, "carrier", f"plays {event.digits or event.url}")
            case Dialed():
                self.line(event.at, "carrier", f"dials {', '.join(event.targets)}")
            case Problem():
                self.line(event.at, "problem", f"{event.code}: {event.message}")
            case Ended():
                self.line(event.at, "end", event.reason)
            case _:
                pass

    def step(self, step: Step) -> None:
        """The agent tells something."""
        match step.kind:
            case "heard":
                self.line(step.at, "heard", step.text)
            case "saying":
                self.line(step.at, "agent", step.text)
            case "said" if step.fields.get("interrupted") == "true":
                self.line(step.at, "barge-in", f"the caller heard: {step.text or '(nothing)'}")
            case "tool":
                self.line(step.at, "tool", tool_call(step))
            case "log" if step.fields.get("logger") or step.fields.get("level") in ("warning", "error"):
                self.line(step.at, "log", step.text)
            case _:
                pass

    def _answered(self, at: float) -> None:
        taken = self._last_turn
        if taken is not None and 0 < taken.last_sound_at < at:
            self.line(at, "", f"answers {(at - taken.last_sound_at) * 1000:.0f} ms after the caller's last sound")
            self._last_turn = None


def tool_call(step: Step) -> str:
    """Return a tool's name, arguments and result on one line."""
    fields = step.fields
    return f"{fields.get('name', step.text)}({fields.get('arguments', '')}) -> {fields.get('result', '')}"


def turn_summaries(taken: Sequence[Taken], events: Sequence[Event], steps: Sequence[Step]) -> tuple[TurnSummary, ...]:
    """Return what became of each turn: a turn's answer is what lies between its last sound and the next turn's beginning."""
    voices = [event.at for event in events if isinstance(event, VoiceBegan) and event.who == "agent"]
    summaries = []
    for index, turn in enumerate(taken):
        until = taken[index + 1].began_at if index + 1 < len(taken) else float("inf")
        limit = min(until, turn.last_sound_at + _ANSWER_WITHIN_SECONDS)
        answered_at = next((at for at in voices if turn.last_sound_at < at < limit), None)
        within = [step for step in steps if turn.began_at <= step.at < until]
        heard = " ".join(step.text for step in within if step.kind == "heard")
        answer = " ".join(step.text.strip() for step in within if step.kind == "saying")
        delay = None if answered_at is None else round((answered_at - turn.last_sound_at) * 1000, 1)
        summaries.append(TurnSummary(turn.number, turn.label, heard, answer, turn.interrupts, delay))
    return tuple(summaries)


def barge_ins(taken: Sequence[Taken], events: Sequence[Event], steps: Sequence[Step]) -> tuple[BargeIn, ...]:
    """Return every time that buffered audio was thrown away, with how long that took within the turn that caused it."""
    found = []
    for event in events:
        if isinstance(event, Cleared) and event.dropped_ms > 0:
            sound = max((turn.first_sound_at for turn in taken if 0 < turn.first_sound_at <= event.at), default=None)
            noticed = None if sound is None else _noticed_at(steps, sound, event.at)
            at, dropped_ms = round(event.at, 3), round(event.dropped_ms, 1)
            found.append(BargeIn(at, dropped_ms, _elapsed_ms(noticed, event.at), _elapsed_ms(sound, event.at)))
    return tuple(found)


def _noticed_at(steps: Sequence[Step], sound_at: float, cleared_at: float) -> float | None:
    """Return when the agent noticed the speech that began at `sound_at`; its step may be dated just after its effect."""
    noticed = [step.at for step in steps if step.kind == "speech_started"]
    return next((at for at in noticed if sound_at <= at <= cleared_at + _CLOCKS_AGREE_SECONDS), None)


def _elapsed_ms(since: float | None, at: float) -> float | None:
    return None if since is None else max(0.0, round((at - since) * 1000, 1))


def agent_words(events: Sequence[Event], steps: Sequence[Step]) -> str:
    """Return all that the caller was told, in order: by the agent as far as it was heard, and by the carrier's <Say>.

    The last word of what was cut off is left out: the caller heard a part of it, which nobody can be asked to recognise.
    """
    said = [(step.at, _whole_words(step)) for step in steps if step.kind == "said"]
    said += [(event.at, event.text) for event in events if isinstance(event, Said)]
    return " ".join(text for _, text in sorted(said, key=lambda each: each[0]))


def _whole_words(step: Step) -> str:
    return step.text.rpartition(" ")[0] if step.fields.get("interrupted") == "true" else step.text


def agent_utterances(events: Sequence[Event], call_seconds: float) -> list[tuple[float, float]]:
    """Return when the agent could be heard, as (begin, end) in seconds; what was not over lasts to the call's end."""
    spans: list[tuple[float, float]] = []
    began: float | None = None
    for event in events:
        match event:
            case VoiceBegan(who="agent"):
                began = event.at
            case VoiceEnded(who="agent") if began is not None:
                spans.append((began, event.at))
                began = None
            case _:
                pass
    return spans if began is None else [*spans, (began, call_seconds)]


def words(text: str) -> list[str]:
    """Return a text's words as one would say them: lower case, no punctuation, numbers below a hundred in words."""
    spoken: list[str] = []
    text = _OLD_SPELLING.sub(r"\1\2", text.lower().replace("\u2019", "'"))
    for token in re.findall(r"[^\W\d_]+(?:'[^\W\d_]+)*|\d+", text):
        spoken.extend(_number_words(token) if token.isdecimal() else [token.replace("'", "")])
    return spoken


def _number_words(digits: str) -> list[str]:
    number = int(digits)
    if number in _TEENS:
        return [_TEENS[number]]
    if 20 <= number < 100:
        tens, ones = divmod(number, 10)
        return [_TENS[tens], *([_ONES[ones]] if ones else [])]
    return [_ONES[int(digit)] for digit in digits]


def match_words(said: str, recognised: str) -> Match:
    """Compare what was said with what was recognised: words in the same order count."""
    expected, found = words(said), words(recognised)
    blocks = difflib.SequenceMatcher(None, expected, found, autojunk=False).get_matching_blocks()
    return Match(len(expected), sum(block.size for block in blocks), recognised)


def summarise(
    call: str,
    taken: Sequence[Taken],
    events: Sequence[Event],
    steps: Sequence[Step],
    *,
    match: Match | None = None,
    files: Sequence[str] = (),
) -> Summary:
    """Put a call's end result together."""
    turns = turn_summaries(taken, events, steps)
    delays = [turn.delay_ms for turn in turns if turn.delay_ms is not None]
    ended = next((event for event in events if isinstance(event, Ended)), Ended(0.0, "the call did not end"))
    return Summary(
        call=call,
        ended=ended.reason,
        seconds=round(ended.at, 2),
        turns=turns,
        delay_median_ms=round(median(delays), 1) if delays else None,
        delay_worst_ms=max(delays) if delays else None,
        barge_ins=barge_ins(taken, events, steps),
        words=match,
        history=next((step.text for step in reversed(steps) if step.kind == "history"), ""),
        problems=tuple(f"{event.code}: {event.message}" for event in events if isinstance(event, Problem)),
        files=tuple(files),
    )


def print_summary(console: Console, summary: Summary) -> None:
    """Print a summary for people."""
    rows = [("duration", f"{summary.seconds:.1f} s, {len(summary.turns)} turns; {summary.ended}")]
    if summary.delay_median_ms is not None:
        rows.append(("delay", f"{summary.delay_median_ms:.0f} ms median, {summary.delay_worst_ms:.0f} ms worst"))
    rows += [("barge-in", _barge_in(barge_in)) for barge_in in summary.barge_ins]
    if summary.words is not None:
        match = summary.words
        rows.append(("words", f"{match.heard} of {match.said} said by the agent were recognised ({match.share:.0%})"))
    rows += _history(summary.history)
    rows += [("problem", problem) for problem in summary.problems]
    rows += [("written", file) for file in summary.files]
    console.print()
    for name, value in rows:
        console.print(Text(f"{name:<10}", style="dim").append(value, style="none"), soft_wrap=True)


def _history(told: str) -> list[tuple[str, str]]:
    """Return the agent's chat messages, a row each: what it holds to have been said."""
    rows = []
    for message in msgspec.json.decode(told) if told else ():
        if message.get("content"):
            rows.append((message["role"], message["content"]))
        rows += [("calls", "{name}({arguments})".format(**call["function"])) for call in message.get("tool_calls", ())]
    titles = ["remembers"] + [""] * len(rows)
    return [(title, f"{role:<10}{text}") for title, (role, text) in zip(titles, rows, strict=False)]


def _barge_in(barge_in: BargeIn) -> str:
    parts = [f"at {barge_in.at:.2f} s, {barge_in.dropped_ms:.0f} ms unheard"]
    if barge_in.from_noticed_ms is not None:
        noticed = max(barge_in.from_noticed_ms, _CLOCK_ERROR_MS)  # the two clocks cannot tell less apart
        parts.append(f"cleared within {noticed:.0f} ms of the agent noticing speech")
    if barge_in.from_first_sound_ms is not None:
        parts.append(f"{barge_in.from_first_sound_ms:.0f} ms after the caller's first sound")
    return ", ".join(parts)
