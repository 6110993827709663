"""What dialogd and the service manager tell each other: readiness, reloads, the watchdog's beat, and a listener passed in.

The protocols are sd_notify(3), sd_watchdog_enabled(3) and sd_listen_fds(3): datagrams on a unix socket and environment
variables, so nothing of systemd has to be installed, and whatever else speaks them (podman, s6) will do.
"""

import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import structlog
import trio

from dialog_supervisor.config import ConfigError

LISTENER_NAME = "gateway"  # FileDescriptorName= of deploy/systemd/dialogd.socket
_UNNAMED = ("", "unknown")  # sd_listen_fds_with_names(3)
_FIRST_FD = 3  # SD_LISTEN_FDS_START
_STATUS_INTERVAL_S = 10.0  # for `systemctl status`, where no watchdog asks for more
_BEATS_PER_TIMEOUT = 2  # sd_watchdog_enabled(3) recommends half of the time

log = structlog.get_logger("systemd")


class ServiceNotifier:
    """Tells the service manager what dialogd is doing; says nothing where there is none (no NOTIFY_SOCKET).

    `summary` returns one line for `systemctl status`. A notification that cannot be sent is logged, and that is all.
    Making one raises `ConfigError` when the environment makes no sense.
    """

    def __init__(self, environ: Mapping[str, str], summary: Callable[[], str]) -> None:
        self._address = _address(environ.get("NOTIFY_SOCKET", ""))
        self._watchdog_s = watchdog_timeout(environ, os.getpid())
        self._summary = summary
        self._shown = ""
        self._reloads = 0
        self._stopping = False
        self._reached = True

    def ready(self) -> None:
        """Say that calls are taken."""
        self._send("READY=1", self._status())

    def stopping(self) -> None:
        """Say that dialogd is on its way out."""
        self._stopping = True
        self._send("STOPPING=1", self._status())

    @contextmanager
    def reloading(self) -> Iterator[None]:
        """Say that a reload is under way inside the block; of several at a time, the last to end says that it is over.

        Each begins with a time stamp, as Type=notify-reload wants it: systemd tells by it which SIGHUP is being followed.
        """
        self._reloads += 1
        now_usec = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        self._send("RELOADING=1", f"MONOTONIC_USEC={now_usec}", "STATUS=reloading the agent's code")
        self._shown = ""
        try:
            yield
        finally:
            self._reloads -= 1
            if not self._reloads and not self._stopping:
                self.ready()

    async def run(self) -> None:
        """Until cancelled, tell the watchdog that the loop which runs this is alive, and `systemctl status` what is new."""
        if self._address is None:
            return
        interval_s = self._watchdog_s / _BEATS_PER_TIMEOUT if self._watchdog_s else _STATUS_INTERVAL_S
        beat = ("WATCHDOG=1",) if self._watchdog_s else ()
        while True:
            lines = beat if self._reloads or self._summary() == self._shown else (*beat, self._status())
            if lines:
                self._send(*lines)
            await trio.sleep(interval_s)

    def _status(self) -> str:
        self._shown = self._summary()
        return f"STATUS={self._shown}"

    def _send(self, *lines: str) -> None:
        """Send one datagram, without ever waiting for its reader."""
        if self._address is None:
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as notify:
            try:
                notify.sendto("\n".join(lines).encode(), self._address)
            except OSError as error:
                if self._reached:
                    log.warning("the service manager cannot be told", state=lines[0], reason=error.strerror)
                self._reached = False
            else:
                self._reached = True


def _address(given: str) -> str | None:
    """Return the address to send to: a path, or a name in the abstract namespace, which begins with @ (unix(7))."""
    if not given:
        return None
    if given[0] not in "/@":
        raise ConfigError(f"NOTIFY_SOCKET = {given!r}: only unix sockets are spoken to, /PATH or @NAME; unset it")
    return "\0" + given[1:] if given[0] == "@" else given


def watchdog_timeout(environ: Mapping[str, str], pid: int) -> float | None:
    """Return the seconds without a beat after which the process `pid` would be killed, or None. Raises `ConfigError`."""
    given = environ.get("WATCHDOG_USEC", "")
    if not given or environ.get("WATCHDOG_PID", str(pid)) != str(pid):
        return None
    if not given.isdecimal() or int(given) == 0:
        raise ConfigError(f"WATCHDOG_USEC = {given!r}: is not a number of microseconds; unset it, or use WatchdogSec=")
    return int(given) / 1e6


def inherited_listener(environ: Mapping[str, str], pid: int, fd: int = _FIRST_FD) -> socket.socket | None:
    """Return the listening socket that was passed to the process `pid`, or None if none was. Raises `ConfigError`.

    Connections that came in while no dialogd ran wait in it: with a socket unit, a restart refuses nobody.
    """
    if environ.get("LISTEN_PID") != str(pid):
        return None
    given = environ.get("LISTEN_FDS", "")
    if given != "1":
        raise ConfigError(f"LISTEN_FDS = {given!r}: dialogd takes one listener; have one ListenStream= in dialogd.socket")
    name = environ.get("LISTEN_FDNAMES", "")
    if name != LISTENER_NAME and name not in _UNNAMED and not name.endswith(".socket"):
        raise ConfigError(f"LISTEN_FDNAMES = {name!r}: is not known; the listener is FileDescriptorName={LISTENER_NAME}")
    return _listener(fd)


def _listener(fd: int) -> socket.socket:
    """Return a descriptor as a socket of ours, which no child inherits."""
    try:
        found = socket.socket(fileno=fd)
    except OSError as error:
        raise ConfigError(f"LISTEN_FDS: descriptor {fd} is no socket ({error.strerror}); see dialogd.socket") from None
    listens = found.type == socket.SOCK_STREAM and found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    if not listens or found.family not in (socket.AF_INET, socket.AF_INET6):
        found.close()
        raise ConfigError(
            f"LISTEN_FDS: descriptor {fd} does not listen for TCP; dialogd.socket needs ListenStream=HOST:PORT"
        )
    found.set_inheritable(False)
    found.setblocking(False)
    return found
