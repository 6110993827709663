"""What a worker may take of the machine and of the log, and what happens to one that would take more."""

import os
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import trio

from dialog_supervisor.output import LINE_BYTES, LINES_PER_S, Lines
from tests.conftest import StartDialogd
from tests.e2e.daemon import AUTH_TOKEN, DIALOGD, Dialogd, write_agent, write_config
from tests.e2e.twilio_client import PhoneCall, Twilio

TAKES_OVER = "worker died in mid-call, and another takes over"
MEMORY = 200_000_000

GREEDY = '''
"""An echo that takes more of the machine than it should, and prints in every way there is."""

import ctypes
import os
import resource
import subprocess
import sys

import trio

from dialog_worker import Agent, Media, Message, VoIP

print("imported", end="")


class Greedy(Agent):
    def on_media(self, media: Media) -> None:
        self.voip.post(Message("echo", media.payload))

    async def on_dtmf(self, dtmf) -> None:
        does = {"1": self.take_memory, "2": self.tell, "3": self.say, "4": self.flood, "5": self.die, "6": self.leak,
                "7": self.crash, "8": self.leave_a_child}
        await does[dtmf.digit]()

    async def take_memory(self) -> None:
        kept = []
        while True:
            kept.append(bytearray(1 << 20))

    async def leak(self) -> None:
        kept = []
        while True:
            kept.append([None] * 10)

    async def tell(self) -> None:
        names = ("RLIMIT_DATA", "RLIMIT_NOFILE", "RLIMIT_CORE")
        limits = {name: str(resource.getrlimit(getattr(resource, name))) for name in names}
        dumpable = ctypes.CDLL(None).prctl(3, 0, 0, 0, 0)  # PR_GET_DUMPABLE
        self.voip.trace("limits", str(dumpable), limits)

    async def say(self) -> None:
        print("from Python")
        print("from Python's other end", file=sys.stderr)
        ctypes.CDLL(None).write(2, b"from C\\n", 7)
        subprocess.run(["sh", "-c", "echo from a child; echo and its complaints >&2"], check=True)
        print("call +15551234567", flush=True)

    async def flood(self) -> None:
        await trio.to_thread.run_sync(lambda: [print("line", number) for number in range(20_000)])
        self.voip.trace("flooded", "")

    async def die(self) -> None:
        sys.stdout.write("no end of line")
        sys.stdout.flush()
        os._exit(3)

    async def crash(self) -> None:
        ctypes.string_at(0)

    async def leave_a_child(self) -> None:
        subprocess.Popen(["yes", "still here"], start_new_session=True)
        os._exit(4)


def create(voip: VoIP) -> Agent:
    return Greedy(voip=voip)
'''


@pytest.fixture(scope="module")
def dialogd(start_shared_dialogd: StartDialogd) -> Dialogd:
    dialogd = start_shared_dialogd(agent=GREEDY, workers={"memory": MEMORY, "open_files": 99})
    dialogd.expects_traceback = True  # the agents' own
    return dialogd


async def worker_of(dialogd: Dialogd, call: PhoneCall) -> int:
    pid: int = (await dialogd.ask(f"/calls/{call.sid}"))["worker_pid"]
    return pid


def oom_score_added(pid: int) -> int:
    """Return what is added to a process's badness when memory is out, of 1000: proc_pid_oom_score_adj(5)."""
    return int(Path(f"/proc/{pid}/oom_score_adj").read_text())


def pipes(dialogd: Dialogd) -> int:
    """Return how many ends of pipes `dialogd` has open."""
    found = Path(f"/proc/{dialogd.pid}/fd").iterdir()
    return sum(os.readlink(file).startswith("pipe:") for file in found if file.is_symlink())


def is_named(name: str, pid: int) -> bool:
    """Return whether a process runs a program of that name."""
    with suppress(OSError):  # it ended meanwhile
        return Path(f"/proc/{pid}/comm").read_text().strip() == name
    return False


def printed(dialogd: Dialogd, call: PhoneCall, logger: str) -> list[str]:
    """Return what the log has of one stream of a call."""
    return [line["event"] for line in dialogd.find(call=call.sid, logger=logger)]


# The machine


@pytest.mark.parametrize(("key", "shown"), [("1", "in take_memory"), ("6", "")], ids=["large pieces", "small pieces"])
async def test_a_worker_out_of_memory_is_replaced_and_the_log_says_why(dialogd: Dialogd, key: str, shown: str) -> None:
    async with Twilio(dialogd) as twilio, twilio.streaming() as call:
        await call.echo()
        await call.press(key)
        await dialogd.logged(event=TAKES_OVER, call=call.sid)
        await call.echo()
    said = "\n".join(line["event"] for line in dialogd.find(call=call.sid) if line.get("logger") in ("agent", "stderr"))
    assert said.startswith("the agent failed\n")
    assert shown in said  # with nothing left at all, Python cannot note where it was
    assert said.endswith("\nMemoryError\nit may take 200 MB of memory; raise workers.memory if it needs more")


async def test_a_worker_is_limited_as_configured_and_leaves_no_core(dialogd: Dialogd) -> None:
    async with Twilio(dialogd) as twilio, twilio.streaming() as call:
        await call.press("2")
        told: dict[str, Any] = await dialogd.step(call.sid, kind="limits")
    assert told["fields"]["RLIMIT_DATA"].startswith(f"({MEMORY}, ")
    assert told["fields"]["RLIMIT_NOFILE"] == "(99, 99)"
    assert told["fields"]["RLIMIT_CORE"] == "(0, 0)"
    assert told["text"] == "0"


async def test_core_dumps_may_be_permitted(start_dialogd: StartDialogd) -> None:
    dialogd = start_dialogd(agent=GREEDY, workers={"core_dumps": True})
    async with Twilio(dialogd) as twilio, twilio.streaming() as call:
        await call.press("2")
        assert (await dialogd.step(call.sid, kind="limits"))["text"] == "1"


async def test_the_kernel_takes_workers_before_their_supervisor(dialogd: Dialogd) -> None:
    async with Twilio(dialogd) as twilio, twilio.streaming() as call:
        await call.echo()
        its = oom_score_added(await worker_of(dialogd, call))
    assert its == min(1000, oom_score_added(dialogd.pid) + 500)


def test_an_import_that_leaves_workers_no_memory_is_refused_with_the_remedy(tmp_path: Path) -> None:
    agent = write_agent(tmp_path / "agent", "kept = bytearray(100 << 20)\ndef create(voip): ...\n")
    config = write_config(tmp_path, agent, workers={"memory": 100_000_000})
    said = subprocess.run(
        [DIALOGD, "-c", config],
        env=os.environ | {"TWILIO_AUTH_TOKEN": AUTH_TOKEN},
        check=False,
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert said.returncode == 1
    assert "importing the agent takes 1" in said.stderr
    assert "MB of memory, and workers.memory permits 100; raise it" in said.stderr


# What it prints


async def test_whatever_is_printed_in_a_worker_goes_to_the_calls_log_line_by_line(dialogd: Dialogd) -> None:
    async with Twilio(dialogd) as twilio, twilio.streaming() as call:
        await call.press("3")
        last = await dialogd.logged(call=call.sid, event="call …67")  # masked, as everything in the log
        assert (last["logger"], last["level"]) == ("stdout", "info")
        complaint = await dialogd.logged(call=call.sid, event="and its complaints")
        assert (complaint["logger"], complaint["level"]) == ("stderr", "warning")
    assert printed(dialogd, call, "stdout") == ["from Python", "from a child", "call …67"]
    assert printed(dialogd, call, "stderr") == ["from Python's other end", "from C", "and its complaints"]


async def test_a_flood_of_lines_is_cut_counted_and_disturbs_nobody(dialogd: Dialogd) -> None:
    async with Twilio(dialogd) as twilio, twilio.streaming() as call:
        await call.press("4")
        await call.echo()
        await dialogd.step(call.sid, kind="flooded")
    await dialogd.ended(call.sid)
    *lines, last = printed(dialogd, call, "stdout")
    dropped = [int(line.split()[0]) for line in [*lines, last] if line.endswith(" lines dropped")]
    kept = [line for line in [*lines, last] if line.startswith("line ")]
    assert len(kept) + sum(dropped) == 20_000
    assert kept[:LINES_PER_S] == [f"line {number}" for number in range(LINES_PER_S)]
    assert len(kept) <= 3 * LINES_PER_S


async def test_last_words_are_logged_before_the_death(dialogd: Dialogd) -> None:
    async with Twilio(dialogd) as twilio, twilio.streaming() as call:
        await call.press("5")
        await dialogd.logged(event=TAKES_OVER, call=call.sid)
    events = [line["event"] for line in dialogd.find(call=call.sid)]
    assert events.index("no end of line") < events.index(TAKES_OVER)


async def test_a_process_that_outlives_its_worker_cannot_hold_the_log_open(start_dialogd: StartDialogd) -> None:
    dialogd = start_dialogd(agent=GREEDY)
    before = pipes(dialogd)
    async with Twilio(dialogd) as twilio, twilio.streaming() as call:
        await call.press("8")
        await dialogd.logged(event=TAKES_OVER, call=call.sid)
        await call.echo()
    await dialogd.ended(call.sid)
    assert pipes(dialogd) == before
    with trio.fail_after(5):
        while any(is_named("yes", pid) for pid in dialogd.processes()):  # noqa: ASYNC110 - it dies of SIGPIPE by and by
            await trio.sleep(0.02)


async def test_a_crash_in_c_shows_its_stack_in_the_calls_log(dialogd: Dialogd) -> None:
    async with Twilio(dialogd) as twilio, twilio.streaming() as call:
        await call.press("7")
        await dialogd.logged(event=TAKES_OVER, call=call.sid)
    lines = printed(dialogd, call, "stderr")
    assert "Fatal Python error: Segmentation fault" in lines
    assert any(line.endswith(" in crash") for line in lines)


async def test_what_is_printed_at_import_is_no_workers(dialogd: Dialogd) -> None:
    async with Twilio(dialogd) as twilio, twilio.streaming() as call:
        await call.echo()
    await dialogd.ended(call.sid)
    assert printed(dialogd, call, "stdout") == []


# Lines, without a process


def test_lines_come_when_they_are_complete() -> None:
    lines = Lines()
    assert lines.feed(b"one\ntw", 0) == ["one"]
    assert lines.feed(b"o\n\nthree", 0) == ["two"]
    assert lines.end() == ["three"]
    assert lines.end() == []


def test_a_long_line_comes_in_pieces_also_before_it_ends() -> None:
    lines = Lines()
    assert lines.feed(b"x" * LINE_BYTES + b"yy", 0) == ["x" * LINE_BYTES, "yy"]
    assert lines.feed(b"x" * LINE_BYTES + b"y\n", 0) == ["x" * LINE_BYTES, "y"]


def test_bytes_that_are_no_text_are_shown_all_the_same() -> None:
    assert Lines().feed(b"\xff\xfe\n", 0) == ["��"]


def test_more_lines_than_the_log_takes_are_counted_once_the_second_is_over() -> None:
    lines = Lines()
    assert len(lines.feed(b"x\n" * (LINES_PER_S + 7), 10)) == LINES_PER_S
    assert (lines.dropped(10.9), lines.due) == (0, 11)
    assert (lines.dropped(11), lines.dropped(11)) == (7, 0)
    assert lines.feed(b"again\n", 11) == ["again"]
