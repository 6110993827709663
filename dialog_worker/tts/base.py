"""What an agent expects of text to speech, whoever provides it.

The text of one utterance comes in pieces that share a uuid; the last has `done`. Its audio leaves as `Message[bytes]` with
the same uuid, and its words as `WordTimings`, each as soon as its audio has left. An utterance ends in exactly one audio
message with `done` (which may be empty): when all of its text is said, or at once when the provider failed or fell silent.
A `ProviderError` with its uuid then precedes that message, what was emitted before is what was said, and the rest of its
text is ignored. After a fatal `ProviderError`, which comes first, all utterances end so. After `abort` nothing more of one
is emitted.
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
