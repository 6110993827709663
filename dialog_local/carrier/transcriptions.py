"""Real-time transcriptions of one call as Twilio makes them: asked for over REST, every utterance told by a callback.

Twilio docs, "Real-Time Transcriptions" resource; the callbacks' fields from live captures. An utterance is what the line
takes for one: sound of one party, ended by a pause.
"""

import json
import math
from collections.abc import Awaitable, Callable
from secrets import token_hex
from typing import Literal, TypeAlias

import trio
from msgspec import Struct

from dialog_local.carrier.events import Ended, EventLog, Party, Transcribed, TranscriptionChanged, VoiceBegan, VoiceEnded
from dialog_local.carrier.faults import RestError
from dialog_local.carrier.line import Track
from dialog_local.carrier.reports import Reports, iso_now
from dialog_local.carrier.twiml import Reference

Ear: TypeAlias = Callable[[bytes], Awaitable[str]]  # one utterance, mu-law at 8 kHz, to its text; raises `Deaf`

ENGINES = ("google", "deepgram")
INVALID_ENGINE = 32650
MARGIN_SECONDS = 0.25  # of sound on both sides of an utterance, for the recogniser
CONFIDENCE = 0.9  # of 1; an ear does not say how sure it is
STABILITY = "0.9"  # of 1, of a draft that will not change
TRACKS: dict[Party, Literal["inbound_track", "outbound_track"]] = {"caller": "inbound_track", "agent": "outbound_track"}


class Deaf(Exception):
    """An ear cannot hear any more; the message says why."""


class Order(Struct, frozen=True):
    """What is to be transcribed, and who is told of it."""

    track: Literal["both_tracks", "inbound_track", "outbound_track"] = "both_tracks"
    engine: str = "google"
    language: str = "en-US"
    partial_results: bool = False
    callback: Reference | None = None


class _Utterance(Struct, frozen=True):
    """Who spoke, from when to when in seconds of the call."""

    who: Party
    begin: float
    end: float


class Transcription:
    """One transcription: `run` listens until `stop` or the call's end, and tells what is said."""

    def __init__(
        self,
        order: Order,
        tracks: dict[Party, Track],
        *,
        ear: Ear,
        reports: Reports,
        log: EventLog,
        now: Callable[[], float],
    ) -> None:
        self.sid = "GT" + token_hex(16)
        self.status: Literal["in-progress", "stopped"] = "in-progress"
        self._order = order
        self._ear = ear
        self._tracks = tracks
        self._reports = reports
        self._log = log
        self._now = now
        self._began_at = now()
        self._speaking: dict[Party, float] = {}  # who is, since when
        self._listening = trio.CancelScope()
        self._told = 0

    def stop(self) -> None:
        """Transcribe no more than what has been said. Raises `RestError` if that is so already."""
        if self.status == "stopped":
            raise RestError(400, 21220, f"Transcription {self.sid} is stopped already.")
        self.status = "stopped"
        self._log.append(TranscriptionChanged(self._now(), self.sid, "stopped"))
        self._listening.cancel()

    async def run(self) -> None:
        """Listen, and tell of it from the beginning to the end."""
        engine = {
            "TranscriptionEngine": self._order.engine,
            "ProviderConfiguration": json.dumps({"profanityFilter": "true"}),
        }
        wishes = {"PartialResults": str(self._order.partial_results).lower(), "Track": self._order.track}
        await self._tell("started", {**engine, **wishes, "LanguageCode": self._order.language})
        try:
            await self._transcribe_all()
        except Deaf as error:
            self.status = "stopped"
            # as live captures have it; other sources spell TranscriptionErrorCode and TranscriptionError
            await self._tell("error", {"ErrorCode": str(INVALID_ENGINE), "ErrorMessage": str(error)})
        await self._tell("stopped", {})

    async def _transcribe_all(self) -> None:
        said, to_hear = trio.open_memory_channel[_Utterance](math.inf)  # a call's utterances are few
        deaf: Deaf | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._find_utterances, said)
            try:
                async for utterance in to_hear:
                    await self._transcribe(utterance)
            except Deaf as error:  # raised below, outside of the nursery, which would make a group of it
                deaf = error
                nursery.cancel_scope.cancel()
        if deaf is not None:
            raise deaf

    async def _find_utterances(self, said: trio.MemorySendChannel[_Utterance]) -> None:
        with said:
            with self._listening:
                async for event in self._log:
                    match event:
                        case VoiceBegan(at=at, who=who):
                            self._speaking[who] = max(at, self._began_at)
                        case VoiceEnded(at=at, who=who) if (begin := self._speaking.pop(who, at)) < at:
                            said.send_nowait(_Utterance(who, begin, at))
                        case Ended():
                            break
                        case _:
                            pass
            for who, begin in self._speaking.items():
                said.send_nowait(_Utterance(who, begin, self._now()))

    async def _transcribe(self, utterance: _Utterance) -> None:
        track = TRACKS[utterance.who]
        if self._order.track not in {"both_tracks", track}:
            return
        begin, end = max(0.0, utterance.begin - MARGIN_SECONDS), utterance.end + MARGIN_SECONDS
        text = await self._ear(self._tracks[utterance.who].read(begin, end))
        if not text:
            return
        if not isinstance(self._log.history[-1], Ended):  # nothing follows it
            self._log.append(Transcribed(self._now(), utterance.who, text))
        common = {"Track": track, "LanguageCode": self._order.language}
        if self._order.partial_results:
            draft = {"TranscriptionData": json.dumps({"transcript": text}), "Final": "false", "Stability": STABILITY}
            await self._tell("content", common | draft)
        data = json.dumps({"transcript": text, "confidence": CONFIDENCE})
        await self._tell("content", common | {"TranscriptionData": data, "Final": "true"})

    async def _tell(self, event: str, fields: dict[str, str]) -> None:
        self._told += 1
        identity = {"TranscriptionSid": self.sid, "TranscriptionEvent": f"transcription-{event}"}
        await self._reports.tell(
            self._order.callback, identity | {"SequenceId": str(self._told), "Timestamp": iso_now()} | fields
        )


class Transcriptions:
    """The transcriptions of one call, by sid. Without an `ear` there is no engine to make them."""

    def __init__(self, ear: Ear | None, reports: Reports, log: EventLog, now: Callable[[], float]) -> None:
        self._ear = ear
        self._reports = reports
        self._log = log
        self._now = now
        self._known: dict[str, Transcription] = {}

    def start(self, order: Order, tracks: dict[Party, Track]) -> Transcription:
        """Begin to transcribe. Raises `RestError` for an engine that is not to be had."""
        if order.engine not in ENGINES:
            names = " and ".join(ENGINES)
            raise RestError(400, INVALID_ENGINE, f"TranscriptionEngine={order.engine!r} is not valid; there are {names}.")
        if self._ear is None:
            raise RestError(400, INVALID_ENGINE, f"TranscriptionEngine={order.engine!r} is not available: no ear was given.")
        transcription = Transcription(order, tracks, ear=self._ear, reports=self._reports, log=self._log, now=self._now)
        self._known[transcription.sid] = transcription
        self._log.append(TranscriptionChanged(self._now(), transcription.sid, "in-progress"))
        self._reports.start(transcription.run)
        return transcription

    def find(self, sid: str) -> Transcription | None:
        """Return a transcription."""
        return self._known.get(sid)

    def finish(self) -> None:
        """Stop what is under way: the call is about to end."""
        for transcription in self._known.values():
            if transcription.status == "in-progress":
                transcription.stop()
