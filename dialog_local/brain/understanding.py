"""What a caller's words say about a table: how many people, and when. Made for recognised speech, so it forgives.

Numbers come as words or digits, "for" may have been "four", and "p. m." may come in pieces.
"""

import re
from dataclasses import dataclass

_UNITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
_UNITS += ["thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"]
_TENS = {"twenty": 20, "thirty": 30, "forty": 40, "fourty": 40, "fifty": 50}
_NUMBERS = {**{word: value for value, word in enumerate(_UNITS)}, **_TENS}
_LARGEST_PARTY = 40  # more is a misunderstanding
_WEEKDAYS = re.compile(r"\b(monday|tuesday|wednesday|thursday|friday|saturday|sunday)s?\b")
# Agents put the time before what the caller said, for models that want to know it (ISO 8601, on a line of its own).
_STAMP = re.compile(r"\A\s*\d{4}-\d\d-\d\d[T ](?P<clock>\d\d:\d\d)(?::\d\d(?:\.\d+)?)?(?:Z|[+-]\d\d:?\d\d)?\s*\n")


@dataclass(frozen=True)
class Details:
    """What is known of a booking; `time` like "19:30"."""

    people: int | None = None
    time: str | None = None

    def over(self, earlier: "Details") -> "Details":
        """These details, completed by earlier ones."""
        return Details(earlier.people if self.people is None else self.people, self.time or earlier.time)


def clock(text: str) -> str | None:
    """The hour and minute of the time stamp that a text begins with, like "19:30"."""
    stamp = _STAMP.match(text)
    return stamp["clock"] if stamp else None


def weekday(text: str) -> str | None:
    """The day of the week that a text names first."""
    day = _WEEKDAYS.search(words(text))
    return day[1] if day else None


def words(text: str) -> str:
    """The text in lower case, without a time stamp or punctuation (but for a colon within a time), single-spaced."""
    text = _STAMP.sub("", text).lower().replace("’", "'")
    text = re.sub(r"\b([ap])\s*\.?\s*m\b\.?", r"\1m", text)
    text = re.sub(r"(?<=\d)\.(?=\d\d\b)", ":", text)
    text = re.sub(r"(?<=\d)(?=[ap]m\b)", " ", text)
    return " ".join(re.sub(r"[^a-z0-9:' ]|(?<!\d):|:(?!\d)", " ", text).split())


def _digits(text: str) -> str:
    """Number words as digits: "seven thirty five" is "7 35"."""
    tokens: list[str] = []
    tens = False  # the last token is a number word like "twenty", which a unit may complete
    for word in text.split():
        value = _NUMBERS.get(word)
        if value is not None and tens and 0 < value < 10:
            tokens[-1] = str(int(tokens[-1]) + value)
        else:
            tokens.append(word if value is None else str(value))
        tens = word in _TENS
    return " ".join(tokens)


_MISHEARD = [
    (r"\b(for|of) (?:for|fore)\b", r"\1 4"),
    (r"\b(for|of) (?:to|too)\b(?! book| have)", r"\1 2"),
    (r"\b(?:to|too) (people|persons|guests)\b", r"2 \1"),
    (r"\b(at|past|to) ate\b", r"\1 8"),
    (r"\b(for|of) ate\b", r"\1 8"),
    (r"\ba (?:couple|pair)(?: of)?\b", "2"),
    (r"\b(?:just|only) (?:me|myself)\b|\bby myself\b", "1 people"),
]

_HOUR = r"(?P<hour>[01]?\d|2[0-3])"
_MINUTE = r"(?P<minute>[0-5]\d)"
_HALF_DAY = r"(?: (?:o'?clock|oclock))?(?: in the)?(?: (?P<half>am|pm|morning|afternoon|evening))?\b"
# The first that matches counts; the words between two groups are what tells a time from a number of people.
_TIMES = [
    (re.compile(rf"\bhalf(?: past| after)? {_HOUR}\b{_HALF_DAY}"), 30),
    (re.compile(rf"\b(?:a )?quarter (?:past|after) {_HOUR}\b{_HALF_DAY}"), 15),
    (re.compile(rf"\b(?:a )?quarter (?:to|before|of) {_HOUR}\b{_HALF_DAY}"), -15),
    (re.compile(rf"\b(?P<past>\d\d?)(?: minutes)? (?:past|after) {_HOUR}\b{_HALF_DAY}"), 0),
    (re.compile(rf"\b(?P<before>\d\d?)(?: minutes)? (?:to|before) {_HOUR}\b{_HALF_DAY}"), 0),
    (re.compile(rf"\b{_HOUR}:{_MINUTE}\b{_HALF_DAY}"), 0),
    (re.compile(rf"\b{_HOUR} (?:oh? |0 ?)(?P<past>\d)\b{_HALF_DAY}"), 0),
    (re.compile(rf"\b{_HOUR} {_MINUTE}\b(?! people| persons| guests| of us){_HALF_DAY}"), 0),
    (re.compile(rf"\b{_HOUR}(?= o'?clock| oclock| am\b| pm\b| in the){_HALF_DAY}"), 0),
    (re.compile(rf"\b(?:at|around|about|by|from) {_HOUR}\b(?! people| persons| guests| of us){_HALF_DAY}"), 0),
]
_NAMED_TIMES = {"noon": "12:00", "midday": "12:00", "midnight": "00:00"}

_PARTY = re.compile(
    r"\b(?P<before>\d+) (?:\w+ )?(?:people|persons|person|guests|of us|adults|seats|places)\b"
    r"|\b(?:for|of|party|us) (?:the )?(?P<after>\d+)\b"
)
_LONE_NUMBER = re.compile(r"\d+")


def details(text: str, *, wanted: str | None = None) -> Details:
    """Return what an utterance says; a lone number is taken for what is `wanted`, "people" or "time"."""
    said = _digits(words(text))
    for pattern, meant in _MISHEARD:
        said = re.sub(pattern, meant, said)
    time, said = _take_time(said)
    party = _PARTY.search(said)
    people = int(party["before"] or party["after"]) if party else None
    lone = _LONE_NUMBER.findall(said)
    if people is None and len(lone) == 1 and wanted == "people":
        people = int(lone[0])
    if time is None and people is None and len(lone) == 1 and wanted == "time":
        time = _clock(int(lone[0]), 0, None)
    return Details(people if people is not None and 0 < people <= _LARGEST_PARTY else None, time)


def _take_time(said: str) -> tuple[str | None, str]:
    """Find a time, and return it with the text around it."""
    for pattern, offset in _TIMES:
        match = pattern.search(said)
        if match is None:
            continue
        parts = match.groupdict()
        minutes = offset + int(parts.get("minute") or parts.get("past") or 0) - int(parts.get("before") or 0)
        time = _clock(int(parts["hour"]), minutes, parts["half"])
        if time is not None:
            return time, f"{said[: match.start()]} {said[match.end() :]}"
    for word, time in _NAMED_TIMES.items():
        if re.search(rf"\b{word}\b", said):
            return time, said.replace(word, " ")
    return None, said


def _clock(hour: int, minutes: int, half: str | None) -> str | None:
    """A time of day; without "am", an hour below twelve means the evening, as it does in a restaurant."""
    if not 0 <= hour < 24:
        return None
    morning = half in {"am", "morning"}
    if morning and hour == 12:
        hour = 0
    elif not morning and 0 < hour < 12:
        hour += 12
    hour, minute = divmod(hour * 60 + minutes, 60)
    return f"{hour % 24:02d}:{minute:02d}"
