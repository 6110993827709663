"""What a server under load costs, seen from outside: its processes in /proc, and its calls' steps on the control socket."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import trio
from msgspec import Struct

from dialog_local.load.wire import CallFailed, Target, ask

READY_S = 10.0  # for a worker to be ready
ENDED_S = 10.0  # for a call to be over after it was hung up
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_PROC = Path("/proc")


class NotFound(Exception):
    """A process or a server is not there; the message names it."""


class Usage(Struct, frozen=True):
    """Seconds of CPU time that each process of a tree has used, by pid."""

    cpu_s: dict[int, float]

    def since(self, before: "Usage", pids: Iterable[int] | None = None) -> float:
        """Return the seconds used since `before` by these processes, or by all."""
        chosen = self.cpu_s if pids is None else [pid for pid in pids if pid in self.cpu_s]
        return sum(self.cpu_s[pid] - before.cpu_s.get(pid, 0.0) for pid in chosen)


def tree(roots: Iterable[int]) -> set[int]:
    """Return these processes and all that descend from them. Raises `NotFound`."""
    found = set(roots)
    parents = {pid: int(fields[1]) for pid, fields in _processes()}
    if missing := found - parents.keys():
        raise NotFound(f"there is no process {min(missing)}; give --pid the process of a running dialogd")
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def usage(pids: Iterable[int]) -> Usage:
    """Return the CPU time of these processes, as far as they live (proc_pid_stat(5): utime and stime, in ticks)."""
    stats = ((pid, _stat(pid)) for pid in pids)
    return Usage({pid: (int(fields[11]) + int(fields[12])) / _TICKS_PER_S for pid, fields in stats if fields})


def memory(pids: Iterable[int]) -> int:
    """Return the bytes that these processes take; what several share counts in parts, 1 in all (PSS).

    Raises `NotFound` for a process of another user (proc_pid_smaps(5): smaps_rollup needs the right to trace it).
    """
    return sum(_pss(pid) for pid in pids)


def _pss(pid: int) -> int:
    try:
        rollup = (_PROC / str(pid) / "smaps_rollup").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0  # it ended meanwhile
    except PermissionError:
        raise NotFound(f"process {pid} belongs to another user; run dialogctl load as the user of dialogd") from None
    return next((int(line.split()[1]) * 1024 for line in rollup.splitlines() if line.startswith("Pss:")), 0)


def _processes() -> Iterator[tuple[int, list[str]]]:
    for name in os.listdir(_PROC):
        if name.isdecimal() and (fields := _stat(int(name))):
            yield int(name), fields


def _stat(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat that follow the command in parentheses: [0] is the state, [1] the parent."""
    try:
        return (_PROC / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


class ControlSocket:
    """dialogd's control API. Raises `NotFound` when none answers."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def pid(self) -> int:
        """Return dialogd's process."""
        if not self._path.is_socket():  # httpcore leaves a socket behind when it cannot connect
            raise self._silent("no such socket")
        try:
            with httpx.Client(transport=httpx.HTTPTransport(uds=str(self._path)), base_url="http://dialogd") as client:
                return int(client.get("/status").json()["pid"])
        except httpx.HTTPError as error:
            raise self._silent(error) from None

    async def time_workers(self, target: Target, count: int) -> list[float]:
        """Place calls one after another; return for each the seconds from its beginning to its worker's Hello.

        The time begins when dialogd has checked the webhook and takes the call, so it includes the fork and a little more.
        Raises `CallFailed`.
        """
        transport = httpx.AsyncHTTPTransport(uds=str(self._path))
        async with httpx.AsyncClient(transport=transport, base_url="http://dialogd", timeout=ENDED_S) as client:
            try:
                return [await self._time_worker(client, target) for _ in range(count)]
            except httpx.HTTPError as error:
                raise self._silent(error) from None

    async def _time_worker(self, client: httpx.AsyncClient, target: Target) -> float:
        call_sid, seconds = "CA" + os.urandom(16).hex(), 0.0
        await ask(target, {"CallSid": call_sid, "AccountSid": target.account_sid, "CallStatus": "ringing"})
        try:
            with trio.fail_after(READY_S + ENDED_S):
                async with client.stream("GET", f"/calls/{call_sid}/events") as steps:
                    async for line in steps.aiter_lines():  # until the call has ended, so that calls do not overlap
                        step: dict[str, Any] = msgspec.json.decode(line)
                        if (step.get("kind"), step.get("text")) == ("worker", "ready"):
                            seconds = float(step["t"])
                            await client.post(f"/calls/{call_sid}/hangup")
        except trio.TooSlowError:
            raise CallFailed(f"call {call_sid} had no worker and no end within {READY_S + ENDED_S:g} s") from None
        if not seconds:
            raise CallFailed(f"call {call_sid} got no worker; dialogd's log says why")
        return seconds

    def _silent(self, error: object) -> NotFound:
        return NotFound(f"no dialogd answers at {self._path} ({error}); start one, or name its process with --pid")
