"""The text of one utterance: how much of it a provider has, and, from the words that it reports, how much of it was said."""

import re
from bisect import bisect_right

REACH = (
    24  # characters between a word and the next: more than the longest word or number that is said otherwise than written
)
_CLINGING = re.compile(r"[^\w\s]*")
_SENTENCE_END = re.compile(r"[^\d\s][.!?…。！？]+[\"')\]]*\s*$")  # "7." may yet become "7.50"


class Script:
    """Positions are in characters. `sent`: the provider has it. `timed`: the words up to it were reported. `said`: their
    audio is here, too.
    """

    def __init__(self) -> None:
        self.text = ""
        self.sent = 0
        self.timed = 0
        self.said = 0
        self._ends: list[int] = []  # of the pieces, without the space behind them
        self._answered = 0  # sent before the last audio
        self._missed = 0  # words in a row that are said otherwise than written

    def add(self, piece: str) -> None:
        """Append a piece."""
        self.text += piece
        self._ends.append(len(self.text.rstrip()))

    @property
    def unsent(self) -> str:
        """The text that the provider does not have."""
        return self.text[self.sent :]

    @property
    def ends_a_sentence(self) -> bool:
        """Whether a voice can be expected to say it as it stands."""
        return bool(_SENTENCE_END.search(self.text))

    @property
    def waiting(self) -> int:
        """How many pieces are not spoken; where no words are reported, those sent before the last audio count as spoken."""
        return len(self._ends) - bisect_right(self._ends, self.said if self.timed else self._answered)

    @property
    def lags(self) -> bool:
        """Whether the reported words show that the provider is still far from the end of what it was sent."""
        return bool(self.timed) and len(self.text[self.timed : self.sent].strip()) > REACH

    def answer(self) -> None:
        """Audio came for what was sent."""
        self._answered = self.sent

    def follow(self, word: str) -> int:
        """Find the next word, and return the position behind it and its punctuation.

        A word that is not where it should be is said otherwise than it is written: it moves nothing, and the next ones are
        looked for further on. So a word may be taken for unsaid, but never one for said that was not.
        """
        reach = len(word) + REACH * (1 + self._missed)
        found = self.text.find(word, self.timed, min(self.timed + reach, self.sent)) if word else -1
        if found < 0:
            self._missed += 1
            return self.timed
        self._missed = 0
        end = found + len(word)
        clinging = _CLINGING.match(self.text, end)
        self.timed = clinging.end() if clinging else end
        return self.timed

    def rewind(self, position: int) -> None:
        """What follows `position` has to be sent again."""
        self.sent = self.timed = self.said = self._answered = position
        self._missed = 0

    def finish(self) -> None:
        """All that was sent is said."""
        self.timed = self.said = self._answered = self.sent
        self._missed = 0
