"""One local call from preparation to files: speech for the caller, the phone company, the conversation, the report."""

import sys
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Literal, TypeAlias

import trio
from msgspec import Struct
from rich.console import Console

from dialog_local.call import report
from dialog_local.call.conversation import Conversation, Source, Trace, Turn
from dialog_local.call.recording import stereo_wav, telephone_audio
from dialog_local.call.report import LiveReport, Match, Summary
from dialog_local.call.speech_client import SpeechClient, SpeechUnavailable, started
from dialog_local.carrier.company import PhoneCompany
from dialog_local.carrier.events import Said, StreamStarted, VoiceBegan, VoiceEnded
from dialog_local.carrier.phonecall import Call
from dialog_local.carrier.transcriptions import Deaf
from dialog_local.speech.audio import UnreadableAudio

_PATIENCE_SECONDS = 1.0  # for what takes longer, a line says what is being done
_MARGIN_SECONDS = 0.25  # of sound on both sides of an utterance, for the recogniser
_TELLING_SECONDS = 3.0  # after the call, for dialogd's last steps and the last words

Kind: TypeAlias = Literal["--say", "--wav"]


class Line(Struct, frozen=True):
    """One turn as the command line has it."""

    kind: Kind
    value: str


class Target(Struct, frozen=True):
    """What is called, and what is known of it."""

    webhook_url: str
    account_sid: str
    token: str
    via: str = ""
    rest_address: tuple[str, int] | None = None
    control_socket: Path | None = None
    start_command: str = "dialogd -c dialog.toml"


class Failed(Exception):
    """The call cannot be placed, or was not what it should have been; the message says why, and what to do."""


class Session:
    """One call from its preparation to its files."""

    def __init__(
        self,
        target: Target,
        console: Console,
        from_: str,
        to: str,
        out: Path | None,
        *,
        check: bool,
        max_seconds: float,
        wait: float = 0.0,
    ) -> None:
        self._target = target
        self._console = console
        self._live = LiveReport(console)
        self._from, self._to = from_, to
        self._out = out
        self._check = check
        self._max_seconds = max_seconds
        self._wait = wait
        self._speech = SpeechClient()
        self._recognised: dict[tuple[float, float], str] = {}  # what the agent said, by when it was heard

    async def run(self, lines: Sequence[Line], text: bool, interrupt: Collection[int]) -> Summary:
        """Prepare the turns, place the call, live through it, and sum it up. Raises `Failed` and what its parts raise."""
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self._speech)
            await self._speech.started(within=self._wait)
            turns = await self._prepared(lines, interrupt)
            await started(self._target.via or self._target.webhook_url, within=self._wait)
            company = PhoneCompany(
                self._target.account_sid, self._target.token, voice=self._carrier_voice, ear=self._carrier_ear
            )
            if self._target.rest_address is not None:
                await stack.enter_async_context(_served(company, self._target.rest_address))
            target = self._target
            placed = company.call(target.webhook_url, self._from, self._to, via=target.via)
            if text and sys.stdin.isatty():
                self._console.print("type what the caller says; an empty line hangs up", style="dim")
            conversation = Conversation(placed, self._typed if text else _scripted(turns), self._live.turn)
            trace = Trace(placed, target.control_socket, self._live.step)
            await self._live_through(placed, conversation, trace)
            if reason := _failure(placed, target):
                raise Failed(reason)
            if self._check and (missing := len(turns) - len(conversation.taken)):
                raise Failed(f"--check: the call ended {missing} turns early: {placed.log.history[-1]}")
            files = await self._written(placed)
            match = await self._match(placed, trace)
            events = placed.log.history
            return report.summarise(placed.sid, conversation.taken, events, trace.steps, match=match, files=files)

    async def _prepared(self, lines: Sequence[Line], interrupt: Collection[int]) -> list[Turn]:
        """Turn the command line's turns into audio, before anybody waits on a line for it."""
        turns: list[Turn] = []
        async with _patience(self._console, "preparing what the caller says ..."):
            for number, line in enumerate(lines, start=1):
                audio = await (self._speech.say(line.value) if line.kind == "--say" else _file_audio(line.value))
                label = line.value if line.kind == "--say" else f"[{Path(line.value).name}]"
                turns.append(Turn(label, audio, interrupts=number in interrupt))
        return turns

    async def _live_through(self, placed: Call, conversation: Conversation, trace: Trace) -> None:
        async with trio.open_nursery() as telling, trio.open_nursery() as talking:
            talking.start_soon(conversation.run)
            talking.start_soon(self._limit, placed)
            telling.start_soon(self._show, placed)
            telling.start_soon(trace.run)
            telling.start_soon(self._listen, placed, trace)
            await placed.run()
            talking.cancel_scope.cancel()
            # What is still to be told of the end may come after the receiver has been put down.
            telling.cancel_scope.deadline = trio.current_time() + _TELLING_SECONDS

    async def _show(self, placed: Call) -> None:
        async for event in placed.log:
            self._live.event(event)

    async def _limit(self, placed: Call) -> None:
        await trio.sleep(self._max_seconds)
        placed.end(f"--max-seconds {self._max_seconds:g} have passed")

    async def _listen(self, placed: Call, trace: Trace) -> None:
        """Recognise what the agent says as it ends. Without the agent's own account that is shown."""
        began = 0.0
        async for event in placed.log:
            match event:
                case VoiceBegan(who="agent"):
                    began = event.at
                case VoiceEnded(who="agent"):
                    told = any(step.kind == "saying" for step in trace.steps)
                    try:
                        text = await self._recognise(placed, began, event.at)
                    except SpeechUnavailable as error:
                        if not told:
                            self._live.line(event.at, "problem", f"what the agent says cannot be shown: {error}")
                        return
                    if not told:
                        self._live.line(began, "agent", f"{text or '(no words)'}   (as recognised)")
                case _:
                    pass

    async def _recognise(self, placed: Call, began: float, ended: float) -> str:
        """Return what the agent said between two times; the speech server is asked once. Raises `SpeechUnavailable`."""
        if (began, ended) not in self._recognised:
            self._recognised[began, ended] = await self._speech.recognise(_sound(placed, began, ended))
        return self._recognised[began, ended]

    async def _typed(self) -> Turn | None:
        """Read the caller's next line from the terminal."""
        line = await trio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True)
        return Turn(line.strip(), await self._speech.say(line.strip())) if line.strip() else None

    async def _carrier_voice(self, text: str) -> bytes:
        """Speak <Say>, or be silent for a while where there is no speech server: the call must not end for it."""
        try:
            return await self._speech.say(text)
        except SpeechUnavailable:
            return b"\xff" * 8000

    async def _carrier_ear(self, audio: bytes) -> str:
        """Transcribe for the carrier; raises `Deaf` where there is no speech server."""
        try:
            return await self._speech.recognise(audio)
        except SpeechUnavailable as error:
            raise Deaf(str(error)) from error

    async def _written(self, placed: Call) -> list[str]:
        if self._out is None or placed.line is None:
            return []
        tracks = placed.line.tracks
        try:
            await trio.Path(self._out).write_bytes(stereo_wav(tracks["caller"].read(), tracks["agent"].read()))
        except OSError as error:
            raise Failed(f"--out {self._out} cannot be written: {error.strerror}") from error
        return [f"{self._out} (the caller left, the agent right)"]

    async def _match(self, placed: Call, trace: Trace) -> Match | None:
        """Compare the agent's words with its voice; None where either is not to be had, unless they are to be checked."""
        said = report.agent_words(placed.log.history, trace.steps)
        if not said:
            return None
        texts: list[str] = []
        deaf = False
        try:
            async with _patience(self._console, "listening to the agent again ..."):
                for begin, end in report.agent_utterances(placed.log.history, placed.now()):
                    texts.append(await self._recognise(placed, begin, end))
        except* SpeechUnavailable:
            if self._check:
                raise
            deaf = True
        return None if deaf else report.match_words(said, " ".join(texts))


def _scripted(turns: Sequence[Turn]) -> Source:
    remaining = iter(turns)

    async def next_turn() -> Turn | None:
        await trio.lowlevel.checkpoint()
        return next(remaining, None)

    return next_turn


async def _file_audio(name: str) -> bytes:
    try:
        return telephone_audio(await trio.Path(name).read_bytes())
    except OSError as error:
        raise Failed(f"--wav {name} cannot be read: {error.strerror}") from error
    except UnreadableAudio as error:
        raise Failed(f"--wav {name}: {error}; convert it to a PCM WAV file") from error


@asynccontextmanager
async def _served(company: PhoneCompany, address: tuple[str, int]) -> AsyncIterator[None]:
    """Serve the phone company's REST API where dialogd expects it. Raises `Failed`."""
    async with AsyncExitStack() as stack:
        try:
            await stack.enter_async_context(company.serve(*address))
        except OSError as error:
            raise Failed(
                f"the phone company cannot listen at {address[0]}:{address[1]} (twilio.api_url): {error.strerror}; "
                "is another call being placed?"
            ) from error
        yield


@asynccontextmanager
async def _patience(console: Console, doing: str) -> AsyncIterator[None]:
    """Say what is being done, if it takes a while."""

    async def tell() -> None:
        await trio.sleep(_PATIENCE_SECONDS)
        console.print(doing, style="dim")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(tell)
        yield
        nursery.cancel_scope.cancel()


def _sound(placed: Call, begin: float, end: float) -> bytes:
    """Return what the caller heard, with a margin that recognisers like."""
    assert placed.line is not None
    return placed.line.tracks["agent"].read(max(0.0, begin - _MARGIN_SECONDS), end + _MARGIN_SECONDS)


def _failure(placed: Call, target: Target) -> str:
    """Return why no conversation came about, "" if one did."""
    if any(isinstance(event, StreamStarted | Said) for event in placed.log.history) or not placed.problems:
        return ""
    problem = placed.problems[0]
    where = target.via or target.webhook_url
    if problem.code == 11205:
        return f"no dialogd answers at {where}; start one with: {target.start_command} ({problem.message})"
    if problem.http_status == 403:
        return (
            f"{target.webhook_url} answered 403: it does not accept the signature; its twilio.auth_token or its "
            "gateway.public_url differs from what this call was signed with"
        )
    return f"the call failed with error {problem.code}: {problem.message}"
