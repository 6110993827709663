"""What is read back of an event log: every event as it was, and what is whole of a file that is not."""

from math import inf
from pathlib import Path

import pytest
from hypothesis import given
from msgspec import json
from msgspec.structs import astuple

from protocol.messages import Event, Failure, Media, Reply, Restored
from protocol.record import RECORD_VERSION, Entry, Header, NotARecord, event_of, plain, read
from tests.protocol.strategies import events

HEADER = Header(RECORD_VERSION, "CA1", "abc.1", "2026-11-25T18:00:00.000Z", transcripts=True)


def entered(event: Event) -> Entry:
    """Return an event as it comes out of a file."""
    line = json.encode(Entry(1.0, 7, event=type(event).__name__, fields=plain(event)))
    return json.decode(line, type=Entry)


def in_full(event: Event) -> bool:
    """Whether a log has all of an event: JSON has no infinity."""
    return not isinstance(event, Media | Restored) and not any(value in (inf, -inf) for value in astuple(event))


@given(events.filter(in_full))
def test_an_event_can_be_had_back(event: Event) -> None:
    assert event_of(entered(event)) == event


def test_a_failure_within_a_reply_too() -> None:
    reply = Reply(1, Failure("carrier", "no such call", 20404, 404))
    assert event_of(entered(reply)) == reply


def test_of_audio_there_is_only_how_much_it_was() -> None:
    assert plain(Media(20, bytes(160))) == {"timestamp_ms": 20, "payload": 160}


def test_a_field_that_a_later_version_has_added_takes_its_default() -> None:
    assert event_of(Entry(1.0, event="StreamingStarted", fields={"stream_id": "MZ1"})).encoding == "audio/x-mulaw"  # type: ignore[union-attr]  # it is one


@pytest.mark.parametrize(
    "entry",
    [Entry(1.0, event="Nonsense"), Entry(1.0, event="Dtmf"), Entry(1.0, event="Dtmf", fields={"digit": 5}), Entry(1.0)],
)
def test_what_is_no_event_is_refused(entry: Entry) -> None:
    with pytest.raises(NotARecord):
        event_of(entry)


def test_a_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "log"
    whole = json.encode(Entry(1.0, step="state", text="ringing"))
    file.write_bytes(b"\n".join([json.encode(HEADER), whole, whole[:-7], whole, whole[:9]]))
    assert read(file) == (HEADER, [Entry(1.0, step="state", text="ringing")] * 2)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "is no event log"),
        (b"\xff\xfe\n", "is no event log"),
        (b'{"t":1.0}\n', "is no event log"),
        (json.encode(Header(99, "CA1", "g", "", transcripts=False)), "is of version 99"),
    ],
)
def test_another_file_is_no_event_log(tmp_path: Path, content: bytes, why: str) -> None:
    (tmp_path / "log").write_bytes(content)
    with pytest.raises(NotARecord, match=why):
        read(tmp_path / "log")
