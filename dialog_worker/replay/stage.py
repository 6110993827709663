"""Plays a script to an agent, in this process: its line, ears and voice are the script's, its model is real.

Time in which nobody waits for a provider is skipped, so a call takes as long as its model thinks.
"""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from dialog_worker.agent.base import Agent
from dialog_worker.agent.openai import OpenAIAgent
from dialog_worker.agent.tools import Tool
from dialog_worker.replay.exchanges import Happening, asked_for
from dialog_worker.replay.script import Cue, Done, Moment, Progress, Script, canonical, pressed
from dialog_worker.stt.base import Final, SpeechEnded, SpeechStarted
from dialog_worker.testing import ScriptedCall
from dialog_worker.voip import VoIP
from protocol.link import RequestFailed
from protocol.messages import Dispose, Dtmf, Failure, Metadata, Request, Shutdown, StreamingStopped, TransferTo, Turn
from protocol.record import plain

PATIENCE_S = 60.0  # with an agent that does not come to an end of what it says; then the caller goes on
_QUIET_S = 0.01  # of real time without anything happening, before time is skipped
_GRACE_S = 5.0  # for the agent's last handlers
_REQUESTS = {kind.__name__: kind for kind in Request.__subclasses__()}
_OWN_WAITERS = 1  # for a descriptor: trio's own, for what other threads want to be run
_UNDONE = "error: this is a replay, in which nothing is done that was not done in the call"


class ReplayedCall(ScriptedCall):
    """A line that answers as it did then, and notes what happens now."""

    def __init__(self, metadata: Metadata, failures: dict[str, list[Failure | None]]) -> None:
        super().__init__(metadata)
        self.happened: list[Happening] = []
        self.asides: set[str] = set()  # what the agent says where an answer takes long
        self._failures = {kind: list(answers) for kind, answers in failures.items()}
        self._progress = Progress()
        self._spoken = 0  # utterances begun
        self._news = trio.Event()

    def note(self, happening: Happening) -> None:
        """Something happened."""
        if happening.kind == "saying" and not self._progress.saying:
            self._spoken += 1
        self.happened.append(happening)
        self._progress.take(happening)
        self._news.set()
        self._news = trio.Event()

    def trace(self, kind: str, text: str, fields: dict[str, str] | None = None) -> None:
        super().trace(kind, text, fields)
        self.note(Happening(kind, text, fields or {}))

    def report(self, turn: Turn) -> None:
        super().report(turn)
        self.note(Happening("turn", turn.outcome))

    async def request(self, kind: type[Request], *, timeout_s: float, **fields: Any) -> str:
        asked = kind(0, timeout_s, **fields)
        self.note(Happening("request", asked_for(kind.__name__, plain(asked))))
        answers = self._failures.get(kind.__name__, [])
        failure = answers.pop(0) if answers else None
        if getattr(asked, "after_playout", False):
            await self._until(lambda: not self._progress.saying)
        if failure is not None:
            await trio.lowlevel.checkpoint()
            raise RequestFailed(kind.__name__, failure)
        answer = await super().request(kind, timeout_s=timeout_s, **fields)
        if kind in (TransferTo, Dispose):  # as Hangup, which the line deals with
            await self.caller_hangs_up()
        return answer

    async def until_calm(self) -> None:
        """Wait until nothing is being thought or said, within reason."""
        await self._until(lambda: self._progress.calm)

    async def until_speaking(self, spoken: int) -> None:
        """Wait until more utterances than so many have begun, or there are none to come."""
        await self._until(lambda: self._spoken > spoken or self._progress.calm)

    async def _until(self, reached: Callable[[], bool]) -> None:
        with trio.move_on_after(PATIENCE_S):
            while not reached():
                await self._news.wait()

    async def play_cues(self, cues: list[Cue]) -> None:
        """Do what the caller and the carrier did."""
        spoken = 0  # utterances that had begun at the last cue
        for cue in cues:
            await self._moment(cue.after, spoken)
            await trio.sleep(cue.gap_s)
            spoken = self._spoken
            await self._tell(cue)
            with trio.move_on_after(PATIENCE_S):
                await wait_all_tasks_blocked()  # the agent has taken notice of it, and is calm no more if it has to answer

    async def _moment(self, after: Moment, spoken: int) -> None:
        if after == "calm":
            await self.until_calm()
        elif after == "speaking":
            await self.until_speaking(spoken)

    async def _tell(self, cue: Cue) -> None:
        if isinstance(cue.what, SpeechStarted | Final | SpeechEnded):
            await self.stt.emit(cue.what)
            return
        if isinstance(cue.what, Metadata):
            self._metadata = cue.what
        if isinstance(cue.what, Dtmf):
            self.note(pressed(cue.what))
        await self.tell(cue.what)


class RecordedTool(Tool, frozen=True):
    """A tool that asks of the line what it asked in the call, returns what it returned then, and does nothing else."""

    line: ReplayedCall
    done: dict[str, list[Done]]

    async def call(self, arguments: str) -> str:
        """Do as in the call with the same arguments: the first, the second, and so on."""
        await trio.lowlevel.checkpoint()
        found = self.done.get(canonical(arguments))
        if not found:
            return _UNDONE
        done = found.pop(0) if len(found) > 1 else found[0]
        for kind, fields in done.requests:
            with suppress(RequestFailed):  # as it may have then; the result tells of it
                await self.line.request(_REQUESTS[kind], timeout_s=PATIENCE_S, **fields)
        return done.result


async def perform(script: Script, create: Callable[[VoIP], Agent], clock: MockClock, *, real_tools: bool) -> ReplayedCall:
    """Play a script to the agent that `create` makes, and return its call, when it is over. Raises what the agent raises."""
    call = ReplayedCall(script.metadata, script.failures)
    agent = create(call)
    if agent.stt is not None:
        agent.set_stt(call.stt)
    if agent.tts is not None:
        agent.set_tts(call.tts)
    if isinstance(agent, OpenAIAgent):
        call.asides.add(agent.holding)
    if isinstance(agent, OpenAIAgent) and not real_tools:
        agent.tools = {name: _recorded(one, script, call) for name, one in agent.tools.items()}
    async with trio.open_nursery() as nursery:
        nursery.start_soon(call.play)
        nursery.start_soon(_skip_idle_time, clock)
        async with trio.open_nursery() as players:
            players.start_soon(_run, agent, players.cancel_scope)
            await call.play_cues(script.cues)
            await call.until_calm()
            await call.tell(StreamingStopped("the replay is over"))
            await call.tell(Shutdown("the replay is over", _GRACE_S))
        nursery.cancel_scope.cancel()
    return call


async def _run(agent: Agent, scope: trio.CancelScope) -> None:
    """Run the agent; when it has left, nobody is there to be told anything more."""
    await agent.run()
    scope.cancel()


def _recorded(tool: Tool, script: Script, line: ReplayedCall) -> RecordedTool:
    done = {arguments: list(found) for (name, arguments), found in script.done.items() if name == tool.name}
    return RecordedTool(tool.name, tool.description, tool.parameters, tool.arguments, tool.method, line, done)


async def _skip_idle_time(clock: MockClock) -> None:
    """Whenever everybody waits for time alone, have it be later. Who waits for a socket or a thread needs real time."""
    await wait_all_tasks_blocked(_QUIET_S)
    while True:
        await wait_all_tasks_blocked(_QUIET_S)
        statistics = trio.lowlevel.current_statistics()
        if _waits_for_others(statistics):
            continue
        if 0 < statistics.seconds_to_next_deadline < float("inf"):
            clock.jump(statistics.seconds_to_next_deadline)


def _waits_for_others(statistics: Any) -> bool:
    waiting = statistics.io_statistics.tasks_waiting_read + statistics.io_statistics.tasks_waiting_write
    return waiting > _OWN_WAITERS or trio.to_thread.current_default_thread_limiter().borrowed_tokens > 0
