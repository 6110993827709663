"""A scripted caller in a call: when to speak, when to interrupt, when to hang up; and what the agent reports meanwhile.

The caller knows only what a caller hears. What the agent recognised, said and did comes from dialogd's control socket, if it
can be reached, and is put on the call's clock.
"""

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeAlias

import httpx
import msgspec
import trio
from msgspec import Struct

from dialog_local.carrier.events import AgentAudioBegan, AgentAudioEnded, Answered, Ended, Event, VoiceBegan, VoiceEnded
from dialog_local.carrier.line import Line, audible_span
from dialog_local.carrier.phonecall import Call, CallEnded
from dialog_local.carrier.playout import BYTES_PER_SECOND

GREETING_SECONDS = 10.0  # an agent that has not spoken by then waits for the caller
ANSWER_SECONDS = 20.0  # an agent that has not answered by then is not going to
INTERRUPT_AFTER_SECONDS = 2.0  # into the agent's answer, when a person would cut in
TURN_PAUSE_SECONDS = 0.2  # between turns, as people leave it; the audio of a voice ends in some silence of its own
_TRACE_ATTEMPT_SECONDS = 0.1
_TRACE_ATTEMPTS = 20


class Turn(Struct, frozen=True):
    """What the caller is to say: `label` for people, the audio itself, and whether to say it over the agent's answer."""

    label: str
    audio: bytes
    interrupts: bool = False


class Taken(Struct):
    """A turn as it was spoken: when its first and last audible samples were, in the call's seconds."""

    number: int
    label: str
    interrupts: bool
    began_at: float
    first_sound_at: float = 0.0
    last_sound_at: float = 0.0


class Step(Struct, frozen=True):
    """Something that dialogd tells of a call; `t` is in seconds since dialogd's call began, `at` on the caller's clock."""

    t: float
    kind: str
    text: str = ""
    fields: dict[str, str] = {}
    at: float = 0.0


Source: TypeAlias = Callable[[], Awaitable[Turn | None]]  # gives the next turn, or None to hang up


class Trace:
    """The agent's side of the call, from dialogd's control API over its unix socket.

    Both clocks count from the webhook; a step can only arrive after it happened, so the smallest difference seen between
    arrival and `t` is the best estimate of how far the clocks are apart.
    """

    def __init__(self, call: Call, socket: Path | None, notice: Callable[[Step], None]) -> None:
        self.steps: list[Step] = []
        self.reached = False
        self._call = call
        self._socket = socket
        self._notice = notice
        self._offset: float | None = None

    async def run(self) -> None:
        """Follow the call until dialogd says no more. Without a socket, or without an answer on it, there is no trace."""
        if self._socket is None or not self._socket.exists():
            return
        async for event in self._call.log:
            if isinstance(event, Answered):
                break
        transport = httpx.AsyncHTTPTransport(uds=str(self._socket))
        async with httpx.AsyncClient(transport=transport, base_url="http://dialogd", timeout=None) as client:
            for _ in range(_TRACE_ATTEMPTS):
                if await self._follow(client):
                    return
                await trio.sleep(_TRACE_ATTEMPT_SECONDS)

    async def _follow(self, client: httpx.AsyncClient) -> bool:
        """Read the steps. Returns whether dialogd knew the call."""
        try:
            async with client.stream("GET", f"/calls/{self._call.sid}/events") as response:
                if response.is_error:
                    return False
                self.reached = True
                async for line in response.aiter_lines():
                    self.add(msgspec.json.decode(line, type=Step), self._call.now())
        except httpx.HTTPError:
            pass  # dialogd has gone, or is not there; what was seen so far stands
        return self.reached

    def add(self, step: Step, arrived_at: float) -> None:
        """Take a step that arrived at this time of the call."""
        offset = arrived_at - step.t
        self._offset = offset if self._offset is None else min(self._offset, offset)
        placed = msgspec.structs.replace(step, at=step.t + self._offset)
        self.steps.append(placed)
        self._notice(placed)


class Conversation:
    """Leads the caller through a call. `taken` grows with each turn that was spoken; `notice` is told as one begins."""

    def __init__(self, call: Call, next_turn: Source, notice: Callable[[Taken], None]) -> None:
        self.taken: list[Taken] = []
        self._call = call
        self._next_turn = next_turn
        self._notice = notice
        self._agent = _Ear(call)

    async def run(self) -> None:
        """Speak every turn, wait for the last answer, hang up. Returns early when the call ends before."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._agent.run)
            try:
                while (turn := await self._next_turn()) is not None:
                    await self._take(turn)
                await self._await_answer(leaving=True)
                self._call.caller.hang_up()
            except CallEnded:
                pass  # the report says why
            nursery.cancel_scope.cancel()

    async def _take(self, turn: Turn) -> None:
        if turn.interrupts:
            await self._agent.speaking_for(INTERRUPT_AFTER_SECONDS, after=self._last_sound_at, within=ANSWER_SECONDS)
        else:
            await self._await_answer()
        taken = Taken(len(self.taken) + 1, turn.label, turn.interrupts, self._call.now())
        self.taken.append(taken)
        self._notice(taken)
        await self._call.caller.speak(turn.audio)
        assert self._call.line is not None
        _place_sounds(taken, self._call.line, self._call.now())

    @property
    def _last_sound_at(self) -> float:
        return self.taken[-1].last_sound_at if self.taken else 0.0

    async def _await_answer(self, *, leaving: bool = False) -> None:
        """Wait for the end of the agent's answer. Who leaves gives the agent the time to hang up first."""
        within = ANSWER_SECONDS if self.taken else GREETING_SECONDS
        pause = float("inf") if leaving else TURN_PAUSE_SECONDS
        await self._agent.finished(after=self._last_sound_at, within=within, pause=pause)


class _Ear:
    """What the caller's ear knows of the agent: whether it speaks, since when, and when it ended."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._began: float | None = None  # while the agent speaks
        self._ended = -1.0  # the last sound of its last utterance
        self._drained: float | None = None  # while none of its audio is left, since when
        self._over = False
        self._changed = trio.Event()

    async def run(self) -> None:
        """Listen until the call is over."""
        async for event in self._call.log:
            self._hear(event)
            self._changed.set()
            self._changed = trio.Event()

    async def finished(self, after: float, within: float, pause: float) -> None:
        """Wait until the agent has spoken, beyond `after`, and is silent again. Raises `CallEnded`.

        It is silent when nothing was heard for longer than between two sentences, or when no more audio of its own has
        come for `pause` seconds. If it has not begun to speak `within` seconds, that was its answer.
        """
        with trio.move_on_after(within) as patience:
            while (left := self._left(after, pause)) > 0:
                if self._began is not None:
                    patience.deadline = float("inf")
                with trio.move_on_after(left):
                    await self._change()

    def _left(self, after: float, pause: float) -> float:
        """Return in how many seconds the agent will have finished, if nothing happens until then; 0 when it has."""
        if self._began is None:
            return 0.0 if self._ended > after else float("inf")
        if self._drained is None or self._drained <= after:
            return float("inf")
        return max(0.0, self._drained + pause - self._call.now())

    async def speaking_for(self, seconds: float, after: float, within: float) -> None:
        """Wait until the agent has been speaking that long in an answer begun after `after`. Raises `CallEnded`."""
        with trio.move_on_after(within):
            while self._began is None or self._began < after:
                await self._change()
            await trio.sleep(max(0.0, self._began + seconds - self._call.now()))

    async def _change(self) -> None:
        if self._over:
            raise CallEnded(f"call {self._call.sid} has ended")
        await self._changed.wait()

    def _hear(self, event: Event) -> None:
        match event:
            case VoiceBegan(who="agent"):
                self._began = event.at
            case VoiceEnded(who="agent"):
                self._began, self._ended = None, event.at
            case AgentAudioBegan():
                self._drained = None
            case AgentAudioEnded():
                self._drained = event.at
            case Ended():
                self._over = True
            case _:
                pass


def _place_sounds(taken: Taken, line: Line, ended_at: float) -> None:
    """Find the first and the last audible sample of a turn in the caller's track."""
    spoken = line.tracks["caller"].read(taken.began_at, ended_at)
    first, last = audible_span(spoken) or (0, len(spoken))
    taken.first_sound_at = taken.began_at + first / BYTES_PER_SECOND
    taken.last_sound_at = taken.began_at + last / BYTES_PER_SECOND
