"""What crossed the pipe in one call, as lines of JSON: the supervisor writes them, `dialogctl logs` and `replay` read them.

The first line is a `Header`, every other an `Entry`. Audio is not in it: a line a second tells how much there was.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from protocol.messages import Event, Failure, Wire

RECORD_VERSION = 1
SUFFIX = ".jsonl"


class NotARecord(Exception):
    """A file that is no event log of a version that can be read here; the message says why."""


class Header(Struct, frozen=True):
    """The call: its id, its code's generation, when it began (UTC), and whether what was said is in the record."""

    dialog_events: int
    call: str
    generation: str
    began: str
    transcripts: bool


class Entry(Struct, frozen=True, omit_defaults=True):
    """One thing that happened, `t` seconds after the call began: an `event` or a `command` of the pipe, or a `step`.

    `pid` is the worker's, 0 before its fork. `fields` are the message's own, by name; bytes are told by their number.
    A step has a `text` besides.
    """

    t: float
    pid: int = 0
    event: str = ""
    command: str = ""
    step: str = ""
    text: str = ""
    fields: dict[str, Any] = {}


def plain(value: Any) -> Any:
    """Return a message, or what is in one, as JSON has it: structs by their fields' names, bytes by their number."""
    if isinstance(value, Struct):
        return {name: plain(held) for name, held in msgspec.structs.asdict(value).items()}
    return len(value) if isinstance(value, bytes) else value


def event_of(entry: Entry) -> Event:
    """Return the event that an entry tells of. Raises `NotARecord` for one that had bytes in it, or is not known here."""
    kind = next((kind for kind in Wire.__subclasses__() if kind.__name__ == entry.event), None)
    names = () if kind is None else kind.__struct_fields__
    defaults = () if kind is None else kind.__struct_defaults__
    values = dict(zip(reversed(names), reversed(defaults), strict=False)) | entry.fields
    if isinstance(failure := values.get("failure"), dict):
        values["failure"] = [failure.get(name) for name in Failure.__struct_fields__]
    try:
        event: Event = msgspec.convert([entry.event, *(values[name] for name in names)], Event)
    except (msgspec.ValidationError, KeyError) as error:
        raise NotARecord(f"an event {entry.event!r} that is not known here: {error}") from None
    return event


def read(file: Path) -> tuple[Header, list[Entry]]:
    """Return what an event log tells. Raises `NotARecord`, and OSError.

    A line that was cut off, because the disk was full or dialogd was killed, is left out.
    """
    lines = file.read_bytes().splitlines()
    try:
        header = msgspec.json.decode(lines[0] if lines else b"", type=Header)
    except msgspec.MsgspecError:
        raise NotARecord(f"{file} is no event log: its first line is no header") from None
    if header.dialog_events != RECORD_VERSION:
        raise NotARecord(f"{file} is of version {header.dialog_events}; this is written and read here: {RECORD_VERSION}")
    return header, list(_entries(lines[1:]))


def _entries(lines: list[bytes]) -> Iterator[Entry]:
    for line in lines:
        try:
            yield msgspec.json.decode(line, type=Entry)
        except msgspec.MsgspecError:
            continue
