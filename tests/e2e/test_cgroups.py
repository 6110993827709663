"""Control groups of a real kernel: each worker is in one while it lives, and nothing of either is left.

A machine may have no control groups that tests can make: then dialogd goes on without, and says so. What a group limits
depends on the controllers that this machine's cgroup v2 has, which may be none.
"""

import os
import secrets
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from dialog_supervisor.confinement import cgroups
from dialog_supervisor.confinement.cgroups import NoGroups
from tests.conftest import StartDialogd
from tests.e2e import daemon
from tests.e2e.control import PATIENCE_S
from tests.e2e.daemon import DIALOGD, Dialogd
from tests.e2e.site import site
from tests.e2e.twilio_client import PhoneCall, Twilio

TAKES_OVER = "worker died in mid-call, and another takes over"
ENTERING = """#!/bin/sh
group={home}
if [ -d "$group/dialogd" ]; then group="$group/dialogd"; fi  # once there are limits below it, it can have no process itself
echo $$ > "$group/cgroup.procs"
exec {dialogd} "$@"
"""
MEMORY = 150_000_000
PROCESSES = 40

CROWDED = '''
"""An echo that starts processes: some hide, some take memory, and some are too many."""

import os
import subprocess
import sys
import time
from contextlib import suppress

from dialog_worker import Agent, Media, Message, VoIP

GREEDY = "kept = bytearray(60 << 20); import time; time.sleep(60)"


class Crowded(Agent):
    def on_media(self, media: Media) -> None:
        self.voip.post(Message("echo", media.payload))

    async def on_dtmf(self, dtmf) -> None:
        {"1": self.hide, "2": self.fill, "3": self.multiply, "4": self.explode}[dtmf.digit]()

    def hide(self) -> None:
        subprocess.Popen(["setsid", "sleep", "60"])
        time.sleep(0.2)
        os._exit(5)

    def fill(self) -> None:
        for _ in range(4):
            subprocess.Popen([sys.executable, "-c", GREEDY])

    def explode(self) -> None:
        if os.fork() == 0:
            while True:
                with suppress(OSError):
                    if os.fork() == 0:
                        os.setsid()

    def multiply(self) -> None:
        try:
            while True:
                subprocess.Popen(["sleep", "60"])
        except OSError as error:
            self.voip.trace("refused", error.strerror)


def create(voip: VoIP) -> Agent:
    return Crowded(voip=voip)
'''


def made() -> Path | None:
    """Return a new control group beside this process's own, or None where there can be none."""
    try:
        own = cgroups._own()
        home = own / f"dialog-tests-{secrets.token_hex(4)}"
        home.mkdir()
    except (NoGroups, OSError):
        return None
    return home


@contextmanager
def within_a_group(scripts: Path) -> Iterator[Path | None]:
    """Have every `dialogd` start in a control group of its own, as under systemd; give that, if there is one."""
    home = made()
    with pytest.MonkeyPatch.context() as patch:
        if home is not None:
            scripts.mkdir()
            entering = scripts / "dialogd"
            entering.write_text(ENTERING.format(home=home, dialogd=DIALOGD))
            entering.chmod(0o755)
            patch.setattr(daemon, "DIALOGD", entering)
        yield home
    if home is not None:
        (home / "dialogd").rmdir()
        home.rmdir()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path | None]:
    """The group that these tests' `dialogd` is in."""
    with within_a_group(tmp_path_factory.mktemp("home") / "bin") as home:
        yield home


@pytest.fixture(scope="module")
def dialogd(home: Path | None, start_shared_dialogd: StartDialogd) -> Dialogd:
    return start_shared_dialogd(agent=CROWDED, workers={"memory": MEMORY, "processes": PROCESSES})


def groups(home: Path) -> set[Path]:
    """Return the workers' groups."""
    return set(home.glob("worker-*"))


def members(group: Path) -> list[int]:
    """Return the pids of what is in a group."""
    return [int(pid) for pid in (group / "cgroup.procs").read_text().split()]


async def none_left(home: Path) -> None:
    """Wait until the workers' groups are removed."""
    with trio.fail_after(PATIENCE_S):
        while groups(home):  # noqa: ASYNC110 - another process's
            await trio.sleep(0.02)


NotShown = Callable[[str], None]


@pytest.fixture
def not_shown(request: pytest.FixtureRequest) -> NotShown:
    """Return what tells, at the end of the run, that this machine lacks a controller for something."""
    return lambda what: request.node.user_properties.append(("not shown here, for want of cgroup v2 controllers", what))


async def test_whether_there_are_groups_is_told(home: Path | None, dialogd: Dialogd) -> None:
    found = (await dialogd.ask("/status"))["cgroup"]
    if home is None:
        assert dialogd.find(event="workers have no control groups of their own", reason=found["reason"])
        return
    assert dialogd.find(event="each worker has a control group", within=str(home), limiting=found["controllers"])
    assert members(home / "dialogd")[0] == dialogd.pid


async def test_a_worker_has_a_group_as_long_as_it_lives(home: Path | None, dialogd: Dialogd) -> None:
    async with Twilio(dialogd) as twilio, twilio.streaming() as call:
        await call.echo()
        if home is not None:
            pid = (await dialogd.ask(f"/calls/{call.sid}"))["worker_pid"]
            assert pid in [one for group in groups(home) for one in members(group)]
            assert pid not in members(home / "dialogd")
    await dialogd.ended(call.sid)
    if home is not None:
        await none_left(home)


async def test_what_hides_in_a_session_of_its_own_ends_with_the_group(home: Path | None, dialogd: Dialogd) -> None:
    before = set(dialogd.processes())
    async with Twilio(dialogd) as twilio, twilio.streaming() as call:
        await call.echo()
        await call.press("1")
        await dialogd.logged(event=TAKES_OVER, call=call.sid)
        await call.echo()
    await dialogd.ended(call.sid)
    if home is not None:
        await none_left(home)
    with trio.fail_after(PATIENCE_S):
        while set(dialogd.processes()) != before:  # noqa: ASYNC110 - other processes
            await trio.sleep(0.02)


async def test_a_worker_whose_processes_take_too_much_memory_together_is_replaced(
    home: Path | None, dialogd: Dialogd, not_shown: NotShown
) -> None:
    if "memory" not in (await dialogd.ask("/status"))["cgroup"].get("controllers", []):
        not_shown("memory.max")
        return
    async with Twilio(dialogd) as twilio, twilio.streaming() as call:
        await call.echo()
        await call.press("2")
        said = await dialogd.logged(event="worker ran out of memory (cgroup)", call=call.sid)
        assert said["remedy"] == "raise workers.memory if it needs more"
        await dialogd.logged(event=TAKES_OVER, call=call.sid)
        await call.echo()


async def test_a_worker_starts_no_more_processes_than_it_may(
    home: Path | None, dialogd: Dialogd, not_shown: NotShown
) -> None:
    if "pids" not in (await dialogd.ask("/status"))["cgroup"].get("controllers", []):
        not_shown("pids.max")
        return
    async with Twilio(dialogd) as twilio, twilio.streaming() as call:
        await call.echo()
        await call.press("3")
        assert (await dialogd.step(call.sid, kind="refused"))["text"] == os.strerror(11)
        await call.echo()
    await dialogd.logged(event="worker was refused processes (cgroup)", call=call.sid)


async def test_a_fork_bomb_neither_disturbs_another_call_nor_leaves_anything(
    home: Path | None, dialogd: Dialogd, not_shown: NotShown
) -> None:
    if home is None or not {"pids", "cpu"} <= set((await dialogd.ask("/status"))["cgroup"]["controllers"]):
        not_shown("a fork bomb held by pids.max and cpu.weight")
        return
    await none_left(home)
    before = set(dialogd.processes())
    async with Twilio(dialogd) as twilio, twilio.streaming() as other:
        async with twilio.streaming() as call:
            await other.echo()
            await call.press("4")
            while len(dialogd.processes()) < PROCESSES:  # noqa: ASYNC110 - other processes
                await trio.sleep(0.02)
            for _ in range(50):
                await other.echo()
        await dialogd.ended(call.sid)
        await dialogd.logged(event="worker was refused processes (cgroup)", call=call.sid)
        await other.echo()
    assert (await dialogd.ended(other.sid))["media_dropped"] == 0
    await none_left(home)
    assert set(dialogd.processes()) == before


async def test_what_a_killed_dialogd_left_is_removed_by_the_next(tmp_path: Path) -> None:
    with within_a_group(tmp_path / "bin") as home, site(tmp_path) as line:
        with line.dialogd() as killed:
            async with Twilio(line.place) as twilio:
                call = PhoneCall(twilio)
                await call.ring()
                await killed.step(call.sid, kind="worker")
                killed.signal(signal.SIGKILL)
                await killed.exited()
        left = groups(home) if home else set()
        assert (len(left) == 1) is (home is not None)
        with line.dialogd() as following:
            found = (await following.ask("/status"))["cgroup"]
            assert found["path"] == (str(home) if home else None), found
            if home:
                with trio.fail_after(PATIENCE_S):
                    while left & groups(home):  # noqa: ASYNC110 - another process's
                        await trio.sleep(0.02)
