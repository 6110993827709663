"""Places the table's calls, several at a time, and measures what their callers noticed."""

import json
import math
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import trio
from msgspec import Struct

from dialog_local.call.conversation import Conversation, Source, Step, Trace, Turn
from dialog_local.call.report import match_words
from dialog_local.call.speech_client import SpeechClient
from dialog_local.carrier.company import PhoneCompany
from dialog_local.carrier.events import Ended, Said
from dialog_local.carrier.line import FRAME_BYTES, FRAME_SECONDS, audible_span
from dialog_local.carrier.phonecall import Call
from tests.e2e.daemon import ACCOUNT_SID, AUTH_TOKEN, Dialogd
from tests.e2e.misbehaviour.cases import BOOKING, CASES, MENU, SPEAKS_AT_S, Case
from tests.e2e.misbehaviour.detour import Detour

LONGEST_SILENCE_S = 5.0
AT_ONCE = 6  # calls; more make the recogniser of a small machine late
APART_S = 0.7  # between two beginnings, so that not all speak at once
LONGEST_S = 40.0  # of a call; none that is right lasts half as long
TELLING_S = 1.0  # after a call, for dialogd's last steps
DESK = Path(__file__).with_name("desk")
FALLBACK = "Please call again later."
LEAVES_AT_S = 17.0  # the caller, who was asked to say it again after the 10 s that a model may take
OUTCOMES = {"ended over REST: Status=completed": "goes on", "the caller hung up": "apologises"}
EARS = {"deepgram": "/v1/listen", "openai-realtime": "/v1/realtime?intent=transcription"}
VOICES = {"cartesia": "/tts/websocket", "elevenlabs": "/v1/text-to-speech/joe/multi-stream-input"}


class Row(Struct, frozen=True):
    """What came of a case. `silence_s`: the longest, from the caller's first word on. `lost`: words of the caller's."""

    case: Case
    silence_s: float
    said: int
    lost: int
    told: tuple[str, ...]
    outcome: str
    seconds: float
    detail: str  # for whoever has to find out why
    call: int = 1  # the second is placed where the machine was too busy for the first

    def cells(self) -> list[str]:
        """Return the row for people."""
        provider = self.case.provider + (" and another" if self.case.spare else "")
        words = f"{self.said - self.lost} of {self.said}" if self.outcome == "goes on" else "-"
        outcome = self.outcome + (" (2nd call)" if self.call > 1 else "")
        return [provider, self.case.what, f"{self.silence_s:.1f} s", words, ", ".join(self.told) or "-", outcome]

    @property
    def wrong(self) -> list[str]:
        """What is not as it has to be."""
        return [
            complaint
            for complaint, is_so in {
                f"it {self.outcome}, instead of: {self.case.outcome}": self.outcome != self.case.outcome,
                f"{self.case.told} was not told": self.case.told not in {code.rstrip("!") for code in self.told} | {""},
                f"{self.silence_s:.1f} s of silence": self.silence_s > LONGEST_SILENCE_S,
                f"{self.lost} words are lost": self.lost > 1 and self.case.outcome == "goes on",
            }.items()
            if is_so
        ]


def number_of(case: Case) -> str:
    """Return the number on which a case's agent is called."""
    return f"+1555{CASES.index(case):07d}"


def plan(server: str, detour: str) -> dict[str, Any]:
    """Return with whom the agent of each number hears, speaks and thinks."""
    return {number_of(case): _plan_of(case, server, f"{detour}/{number_of(case)}") for case in CASES}


def _plan_of(case: Case, server: str, detour: str) -> dict[str, dict[str, str]]:
    def first(paths: dict[str, str]) -> dict[str, str]:
        """The case's own provider first, by its detour; then another, if need be."""
        healthy = {name: f"ws://{server}{path}" for name, path in paths.items() if name != case.provider}
        if case.provider not in paths:
            return dict(list(healthy.items())[:1])
        return {case.provider: f"ws://{detour}{paths[case.provider]}", **(healthy if case.spare else {})}

    agents: dict[tuple[str, ...], str] = {(MENU,): "waiter", (BOOKING,): "clerk"}
    model = agents.get(case.says, "receptionist")
    fault = f"/misbehave/{case.faults[0]}" if case.provider == "openai" else ""
    return {"ears": first(EARS), "voices": first(VOICES), "model": {model: f"http://{server}{fault}/v1"}}


def place_all(server: str, start: Callable[..., Dialogd], cases: Sequence[Case], at_once: int) -> dict[Case, Row]:
    """Place a call for each case, on one dialogd, and return what came of them."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        rest_port = free.getsockname()[1]
    return trio.run(_Table(server, rest_port, start, at_once).run, cases)


class _Table:
    def __init__(self, server: str, rest_port: int, start: Callable[..., Dialogd], at_once: int) -> None:
        self._server = server
        self._rest_port = rest_port
        self._start = start
        self._rows: dict[Case, Row] = {}
        self._audio: dict[str, bytes] = {}
        self._room = trio.CapacityLimiter(at_once)

    async def run(self, cases: Sequence[Case]) -> dict[Case, Row]:
        company = PhoneCompany(ACCOUNT_SID, AUTH_TOKEN, voice=self._voice)
        async with SpeechClient(f"http://{self._server}") as speech:
            for line in {line for case in cases for line in case.says} | {FALLBACK}:
                self._audio[line] = await speech.say(line)
        async with company.serve(port=self._rest_port), trio.open_nursery() as nursery:
            detour = await nursery.start(Detour(self._server, {number_of(case): case.faults for case in CASES}).run)
            dialogd = await trio.to_thread.run_sync(self._started, detour)
            async with trio.open_nursery() as calls:
                for case in cases:
                    await self._room.acquire_on_behalf_of(case)
                    calls.start_soon(self._place, case, company, dialogd)
                    await trio.sleep(APART_S)
            nursery.cancel_scope.cancel()
        return self._rows

    async def _voice(self, text: str) -> bytes:
        return self._audio[text]

    def _started(self, detour: str) -> Dialogd:
        return self._start(
            agent=DESK,
            environ={"PLAN": json.dumps(plan(self._server, detour))},
            twilio={"api_url": f"http://127.0.0.1:{self._rest_port}"},
            fallback={"say": FALLBACK},
        )

    async def _place(self, case: Case, company: PhoneCompany, dialogd: Dialogd) -> None:
        via = f"http://127.0.0.1:{dialogd.port}"
        call = company.call(f"{dialogd.public_url}/twilio/voice", "+15550001111", number_of(case), via=via)
        trace = Trace(call, dialogd.directory / "control.sock", lambda _step: None)
        conversation = Conversation(call, self._lines(call, case), lambda _taken: None)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(conversation.run)
            nursery.start_soon(trace.run)
            with trio.move_on_after(LONGEST_S):
                await call.run()
            self._room.release_on_behalf_of(case)
            nursery.cancel_scope.deadline = trio.current_time() + TELLING_S
        said = [turn.label for turn in conversation.taken]
        self._rows[case] = _row(case, call, said, trace.steps, dialogd)

    def _lines(self, call: Call, case: Case) -> Source:
        remaining = iter(case.says)

        async def next_line() -> Turn | None:
            assert call.line is not None
            await trio.sleep_until(call.line.began_at + SPEAKS_AT_S)
            if line := next(remaining, ""):
                return Turn(line, self._audio[line])
            await trio.sleep_until(call.line.began_at + (LEAVES_AT_S if case.outcome == "apologises" else math.inf))
            return None  # and hang up

        return next_line


def _row(case: Case, call: Call, said: Sequence[str], steps: Sequence[Step], dialogd: Dialogd) -> Row:
    heard = " ".join(step.text for step in steps if step.kind == "heard")
    match = match_words(" ".join(said), heard)
    log = [line for line in dialogd.find(call=call.sid) if line.get("level") in ("warning", "error")]
    ended = next((event for event in call.log.history if isinstance(event, Ended)), None)
    fallback = any(isinstance(event, Said) for event in call.log.history)
    return Row(
        case=case,
        silence_s=longest_silence_s(call),
        said=match.said,
        lost=match.said - match.heard,
        told=tuple(_told(step) for step in steps if step.kind == "told") + tuple(_model_told(log)),
        outcome="handed over" if fallback else OUTCOMES.get(ended.reason if ended else "", "lost"),
        seconds=call.now() if ended is None else ended.at,
        detail="\n".join(
            [repr(step) for step in steps] + [repr(event) for event in call.log.history] + list(map(repr, log))
        ),
    )


def _told(step: Step) -> str:
    return f"{step.fields['code']}{'!' if step.fields['fatal'] == 'True' else ''}"


def _model_told(log: Sequence[dict[str, Any]]) -> Iterator[str]:
    for line in log:
        for words in ("asked again", "failed"):
            if line["event"].startswith((f"the model {words}", f"the model is {words}")):
                yield words


def longest_silence_s(call: Call) -> float:
    """Return for how long nobody was heard at most, from the caller's first sound to the call's end."""
    assert call.line is not None
    caller, agent = (call.line.tracks[who].read() for who in ("caller", "agent"))
    longest = quiet = 0
    begun = False
    for start in range(0, len(caller), FRAME_BYTES):
        mine, theirs = (audible_span(track[start : start + FRAME_BYTES]) is not None for track in (caller, agent))
        begun |= mine
        quiet = 0 if mine or theirs else quiet + begun
        longest = max(longest, quiet)
    return longest * FRAME_SECONDS
