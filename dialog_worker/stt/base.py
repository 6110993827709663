"""What an agent expects of speech to text, whoever provides it.

For each stretch of the caller's speech: `SpeechStarted` once, as soon as speech is noticed; any number of `Interim`; then
`Final` with the whole utterance, if any word was understood; then `SpeechEnded`. An agent never asks which provider it has.
"""

import math
from abc import abstractmethod
from typing import TypeAlias

from msgspec import Struct

from dialog_worker.participant import Participant, ProviderError, Word


class SpeechStarted(Struct, frozen=True):
    """The caller began to speak: stop talking."""


class Interim(Struct, frozen=True):
    """What the utterance seems to be so far; may still change."""

    text: str


class Final(Struct, frozen=True):
    """One whole utterance, never empty."""

    text: str
    confidence: float | None = None
    words: tuple[Word, ...] = ()


class SpeechEnded(Struct, frozen=True):
    """The caller stopped speaking."""


Hearing: TypeAlias = SpeechStarted | Interim | Final | SpeechEnded | ProviderError


class Owed(Struct, frozen=True):
    """What a recogniser that is replaced has still to give: what it had understood, and the audio that it had not."""

    hearings: tuple[Hearing, ...] = ()
    audio: bytes = b""


class STT(Participant[Hearing]):
    """Speech to text for one call."""

    @abstractmethod
    def post(self, audio: bytes) -> None:
        """Take the caller's next audio, in the stream's encoding (mu-law at 8 kHz by default). Never blocks.

        While the provider is away the audio is kept, up to a limit; what is lost beyond it is told in a `ProviderError`.
        """

    @property
    def unanswered_since(self) -> float:
        """When the caller was last heard, in trio's time, if that is without an answer; `math.inf` if not, or if unknown."""
        return math.inf

    def retire(self) -> Owed:
        """Another takes over: return what this one owes, in the stream's encoding, and emit nothing more.

        Whoever calls this cancels `run`, tells the hearings and posts the audio to the successor.
        By default nothing is owed.
        """
        return Owed()
