"""Lines of the log as entries of systemd's journal: how they are written, and that nobody waits for a journald."""

import array
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from dialog_supervisor.telemetry.journal import IDENTIFIER, Journal, encode, entry, is_behind, write_through

LARGE = "x" * 1_000_000  # more than a datagram takes


class Journald:
    """Its end of the socket."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(path))

    def receive(self) -> bytes:
        """Return an entry, wherever it is."""
        data, rights, *_ = self.socket.recvmsg(100_000, socket.CMSG_SPACE(4))
        if not rights:
            return data
        assert data == b""
        (fd,) = array.array("i", rights[0][2])
        with open(fd, "rb") as file:
            assert fcntl.fcntl(file, fcntl.F_GET_SEALS) & fcntl.F_SEAL_WRITE
            file.seek(0)
            return file.read()


@pytest.fixture
def journald(tmp_path: Path) -> Iterator[Journald]:
    journald = Journald(tmp_path / "socket")
    yield journald
    journald.socket.close()


@pytest.fixture
def journal(journald: Journald) -> Iterator[tuple[Journal, list[str]]]:
    """A journal, and the lines that it could not send."""
    lines: list[str] = []
    yield (sends := Journal(lines.append, journald.path)), lines
    sends.close()


# Entries


def test_the_line_is_the_message_as_it_is() -> None:
    assert entry('{"event": "ready"}', {"level": "info"})["MESSAGE"] == '{"event": "ready"}'


@pytest.mark.parametrize(("level", "priority"), [("debug", "7"), ("info", "6"), ("warning", "4"), ("error", "3")])
def test_the_level_is_the_priority_that_syslog_has_for_it(level: str, priority: str) -> None:
    assert entry("line", {"level": level})["PRIORITY"] == priority


def test_a_line_can_be_found_by_its_call_its_generation_and_its_event() -> None:
    fields = entry("line", {"level": "info", "event": "call begins", "call": "CA1", "generation": "4c54.1", "caller": "…67"})
    assert fields == {
        "MESSAGE": "line",
        "PRIORITY": "6",
        "SYSLOG_IDENTIFIER": IDENTIFIER,
        "DIALOG_CALL": "CA1",
        "DIALOG_GENERATION": "4c54.1",
        "DIALOG_EVENT": "call begins",
    }


def test_a_line_of_no_call_has_no_such_field() -> None:
    assert "DIALOG_CALL" not in entry("line", {"level": "info", "event": "ready", "call": None})


def test_a_value_of_one_line_is_written_as_it_is() -> None:
    assert encode({"MESSAGE": "a=b", "PRIORITY": "6"}) == b"MESSAGE=a=b\nPRIORITY=6\n"


def test_a_value_of_several_lines_has_its_length_before_it() -> None:
    assert encode({"MESSAGE": "é\nb"}) == b"MESSAGE\n\x04\0\0\0\0\0\0\0\xc3\xa9\nb\n"


def test_what_is_no_unicode_is_escaped() -> None:
    assert encode({"MESSAGE": "\udcff"}) == b"MESSAGE=\\udcff\n"


# The journal's socket


def test_an_entry_is_a_datagram(journal: tuple[Journal, list[str]], journald: Journald) -> None:
    journal[0].write("line", {"level": "warning"})
    assert journald.receive() == encode(entry("line", {"level": "warning"}))


def test_an_entry_that_is_too_large_for_that_is_sent_as_memory(
    journal: tuple[Journal, list[str]], journald: Journald
) -> None:
    journal[0].write(LARGE, {"level": "info"})
    assert journald.receive() == encode(entry(LARGE, {"level": "info"}))
    assert journal[1] == []


def test_a_journald_that_reads_nothing_is_not_waited_for(journal: tuple[Journal, list[str]]) -> None:
    lines = [str(number) for number in range(5000)]
    for line in lines:
        journal[0].write(line, {"level": "info"})
    taken = len(lines) - len(journal[1])
    assert 0 < taken < len(lines)
    assert journal[1] == [f"<6>{line}" for line in lines[taken:]]


def test_without_a_journald_lines_go_elsewhere_with_their_priority(tmp_path: Path) -> None:
    lines: list[str] = []
    journal = Journal(lines.append, tmp_path / "socket")
    journal.write("line", {"level": "warning"})
    journal.write(LARGE, {"level": "info"})
    assert lines == ["<4>line", f"<6>{LARGE}"]
    journal.close()


def test_no_descriptor_is_left_of_what_was_sent(journal: tuple[Journal, list[str]], journald: Journald) -> None:
    before = os.listdir("/proc/self/fd")
    journal[0].write(LARGE, {"level": "info"})
    journald.receive()
    assert len(os.listdir("/proc/self/fd")) == len(before)


# Where stderr leads to


def test_a_descriptor_is_the_journals_when_systemd_names_its_device_and_inode(tmp_path: Path) -> None:
    with (tmp_path / "stream").open("w") as stream:
        found = os.fstat(stream.fileno())
        assert is_behind(stream.fileno(), {"JOURNAL_STREAM": f"{found.st_dev}:{found.st_ino}"})


@pytest.mark.parametrize("environ", [{}, {"JOURNAL_STREAM": ""}, {"JOURNAL_STREAM": "8:1"}, {"JOURNAL_STREAM": "nonsense"}])
def test_any_other_is_not(tmp_path: Path, environ: dict[str, str]) -> None:
    with (tmp_path / "stream").open("w") as stream:
        assert not is_behind(stream.fileno(), environ)


def test_the_journals_stream_is_not_waited_for_either(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        monkeypatch.setattr("dialog_supervisor.telemetry.journal._STDERR_FD", ours.fileno())
        for _ in range(1000):
            write_through("x" * 1000)
        assert theirs.recv(1001) == b"x" * 1000 + b"\n"
