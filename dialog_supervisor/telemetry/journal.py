"""systemd's journal, where stderr leads to it: lines of the log go there with fields that journalctl can be asked for.

The protocol is https://systemd.io/JOURNAL_NATIVE_PROTOCOL: a datagram an entry, or a sealed memfd for one that is too large.
"""

import errno
import fcntl
import os
import socket
from array import array
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

SOCKET = Path("/run/systemd/journal/socket")
IDENTIFIER = "dialogd"  # SyslogIdentifier= of deploy/systemd/dialogd.service, which holds for stderr alone
_STDERR_FD = 2
_FIELDS = ("call", "generation", "event")  # of a line, as DIALOG_CALL and so on
PRIORITIES = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}  # by level; syslog(3)
_TOO_LARGE = (errno.EMSGSIZE, errno.ENOBUFS)
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE  # journald takes no other


def is_behind(fd: int, environ: Mapping[str, str]) -> bool:
    """Whether what is written to a descriptor ends in the journal, as JOURNAL_STREAM tells (systemd.exec(5))."""
    found = os.fstat(fd)
    return environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"


def entry(line: str, about: Mapping[str, Any]) -> dict[str, str]:
    """Return the fields of a line of the log: the line itself is the message, and `about` says what it tells of."""
    priority = PRIORITIES[about.get("level", "info")]
    fields = {"MESSAGE": line, "PRIORITY": str(priority), "SYSLOG_IDENTIFIER": IDENTIFIER}
    return fields | {f"DIALOG_{key.upper()}": str(about[key]) for key in _FIELDS if about.get(key) is not None}


def encode(fields: Mapping[str, str]) -> bytes:
    """Return an entry as journald reads it; a value of several lines has its length before it."""
    return b"".join(_field(name.encode(), value.encode(errors="backslashreplace")) for name, value in fields.items())


def _field(name: bytes, value: bytes) -> bytes:
    if b"\n" in value:
        return b"%b\n%b%b\n" % (name, len(value).to_bytes(8, "little"), value)
    return b"%b=%b\n" % (name, value)


class Journal:
    """Sends lines to journald without ever waiting for it.

    What it does not take goes to `otherwise`, with the priority before it as a stream to the journal has it (sd-daemon(3)).
    """

    def __init__(self, otherwise: Callable[[str], None], path: Path = SOCKET) -> None:
        self._otherwise = otherwise
        self._path = str(path)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)

    def write(self, line: str, about: Mapping[str, Any]) -> None:
        """Send one line of the log."""
        fields = entry(line, about)
        try:
            self._send(encode(fields))
        except OSError:
            self._otherwise(f"<{fields['PRIORITY']}>{line}")

    def close(self) -> None:
        """Send no more."""
        self._socket.close()

    def _send(self, data: bytes) -> None:
        try:
            self._socket.sendto(data, self._path)
        except OSError as error:
            if error.errno not in _TOO_LARGE:
                raise
            self._send_in_memory(data)

    def _send_in_memory(self, data: bytes) -> None:
        with open(os.memfd_create("dialogd-log", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING), "wb") as file:
            file.write(data)
            file.flush()
            fcntl.fcntl(file, fcntl.F_ADD_SEALS, _SEALS)
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", [file.fileno()]))]
            self._socket.sendmsg([], rights, 0, self._path)


def write_through(line: str) -> None:
    """Write a line to a stderr that is the journal's stream, unless that is full too: then the line is lost."""
    with suppress(OSError), socket.fromfd(_STDERR_FD, socket.AF_UNIX, socket.SOCK_STREAM) as stream:
        stream.send(f"{line}\n".encode(errors="backslashreplace"), socket.MSG_DONTWAIT)
