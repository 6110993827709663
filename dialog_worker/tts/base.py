"""What an agent expects of text to speech, whoever provides it.

The text of one utterance comes in pieces that share a uuid; the last has `done`. Its audio leaves as `Message[bytes]` with
the same uuid, and each utterance whose text was `done` ends in exactly one audio message with `done` (which may be empty),
also when the provider failed or fell silent: a `ProviderError` then precedes it. After `abort` nothing more of it is
emitted.
"""

from abc import abstractmethod
from typing import TypeAlias

from msgspec import Struct

from dialog_worker.participant import Participant, ProviderError, Word
from protocol.messages import Message


class WordTimings(Struct, frozen=True):
    """When the next words of an utterance are said, counted from its first sample."""

    uuid: str
    words: tuple[Word, ...]


Speaking: TypeAlias = Message[bytes] | WordTimings | ProviderError


class TTS(Participant[Speaking]):
    """Text to speech for one call."""

    @abstractmethod
    def post(self, message: Message[str]) -> None:
        """Say `message.data`, joined verbatim to the pieces before it. Never blocks."""

    @abstractmethod
    def abort(self, uuid: str) -> None:
        """Stop this utterance; emit nothing more of it. Unknown and finished utterances are no error."""
