"""How `dialogd` starts, stops, and stays the same size."""

import os
import signal
import socket
import subprocess
from functools import partial
from pathlib import Path

import pytest
import trio

from tests.conftest import StartDialogd
from tests.e2e.control import PATIENCE_S
from tests.e2e.daemon import AUTH_TOKEN, DIALOGD, PROBE, PUBLIC_URL, Dialogd, write_agent, write_config
from tests.e2e.twilio_client import PhoneCall, Place, Twilio, verbs

MANY = int(os.environ.get("DIALOG_MANY_CALLS", "150"))
AT_ONCE = 10


async def test_sigterm_brings_whoever_still_talks_the_fallback_and_then_exits_0(start_dialogd: StartDialogd) -> None:
    dialogd = start_dialogd(calls={"ending_timeout": 5, "drain_timeout": 0.1}, fallback={"dial": "+14155550111"})
    async with Twilio(dialogd) as twilio:
        call = PhoneCall(twilio)
        await call.ring()
        async with call.stream():
            await call.echo()
            dialogd.signal(signal.SIGTERM)
            assert await call.closed() == 1000
        assert verbs(await PhoneCall(twilio).ring()) == ["Dial"]
        assert verbs(await call.after()) == ["Dial"]
        assert await dialogd.exited() == 0


async def test_a_second_sigterm_stops_at_once(start_dialogd: StartDialogd) -> None:
    dialogd = start_dialogd(calls={"ending_timeout": 60, "shutdown_grace": 60})
    async with Twilio(dialogd) as twilio:
        call = PhoneCall(twilio)
        await call.ring()
        async with call.stream():
            await call.press("4")
            await dialogd.step(call.sid, kind="stubborn")
            dialogd.signal(signal.SIGTERM)
            await dialogd.logged(event="stopping")
            dialogd.signal(signal.SIGTERM)
            with trio.fail_after(5):
                assert await dialogd.exited() == 0


async def test_sigint_brings_every_caller_the_fallback_without_waiting(start_dialogd: StartDialogd) -> None:
    dialogd = start_dialogd(calls={"ending_timeout": 5, "drain_timeout": 60}, fallback={"dial": "+14155550111"})
    async with Twilio(dialogd) as twilio:
        call = PhoneCall(twilio)
        await call.ring()
        async with call.stream():
            await call.echo()
            dialogd.signal(signal.SIGINT)
            assert await call.closed() == 1000
        assert verbs(await call.after()) == ["Dial"]
        assert await dialogd.exited() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_during_the_start_ends_it(tmp_path: Path, number: signal.Signals) -> None:
    agent = write_agent(tmp_path / "agent", "import sys, time\nprint('importing', file=sys.stderr)\ntime.sleep(60)\n")
    with Dialogd(write_config(tmp_path, agent), {}) as dialogd:
        with trio.fail_after(PATIENCE_S):
            while "importing" not in dialogd.text:  # noqa: ASYNC110 - no event: it is no line of the log
                await trio.sleep(0.02)
        dialogd.signal(number)
        assert dialogd.wait_for_log(event="stopping before it was ready")["signal"] == number.name
        dialogd.stop()


def test_an_agents_process_has_no_signals_blocked(start_dialogd: StartDialogd) -> None:
    blocked = {pid: _blocked(pid) for pid in start_dialogd().children()}
    assert set(blocked.values()) == {0}


def _blocked(pid: int) -> int:
    """Return the mask of the signals that a process' main thread has blocked."""
    [line] = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigBlk:")]
    return int(line.split()[1], 16)


BAD_AGENTS = {
    "cannot be imported": ("import no_such_module\n", "No module named 'no_such_module'"),
    "raises": ("def boom():\n    raise ValueError('my mistake')\n\nboom()\n", "ValueError: my mistake"),
    "is a syntax error": ("def create(voip)\n    pass\n", "SyntaxError"),
    "has no such function": ("def other(voip): ...\n", "create"),
    "is no function": ("create = 5\n", "not a function"),
    "exits": ("import sys\nsys.exit('no')\n", "SystemExit: no"),
    "starts a thread": (
        "import threading, time\nthreading.Thread(target=time.sleep, args=(60,), daemon=True, name='mine').start()\n"
        "def create(voip): ...\n",
        "started threads (mine)",
    ),
    "opens a connection": ("import socket\nmine = socket.socket()\ndef create(voip): ...\n", "network connection"),
    "kills its process": ("import os\nos._exit(3)\n", "ended before it was ready"),
}


def run(config: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """Run a dialogd that will not start and return what it said."""
    environ = os.environ | {"TWILIO_AUTH_TOKEN": AUTH_TOKEN}
    return subprocess.run(  # the code is what is asked for
        [DIALOGD, "-c", config, *more], env=environ, check=False, capture_output=True, text=True, timeout=10
    )


@pytest.mark.parametrize(("source", "reason"), BAD_AGENTS.values(), ids=BAD_AGENTS)
def test_an_entry_that_cannot_serve_ends_dialogd_with_its_authors_traceback(
    tmp_path: Path, source: str, reason: str
) -> None:
    said = run(write_config(tmp_path, write_agent(tmp_path / "agent", source)))
    assert (said.returncode, said.stdout) == (1, "")
    assert said.stderr.startswith("dialogd: the agent cannot serve calls:\n\n")
    assert reason in said.stderr
    assert "dialog_supervisor" not in said.stderr
    assert "importlib" not in said.stderr


def test_the_authors_traceback_names_file_and_line(tmp_path: Path) -> None:
    source, _ = BAD_AGENTS["raises"]
    said = run(write_config(tmp_path, write_agent(tmp_path / "agent", source)))
    assert f'File "{tmp_path}/agent/agent.py", line 2, in boom' in said.stderr


@pytest.mark.parametrize("section", ["gateway", "control"])
def test_a_busy_port_ends_dialogd_with_one_sentence(tmp_path: Path, section: str) -> None:
    agent = write_agent(tmp_path / "agent", "def create(voip): ...\n")
    with socket.create_server(("127.0.0.1", 0)) as busy:
        address = f"127.0.0.1:{busy.getsockname()[1]}"
        said = run(write_config(tmp_path, agent, **{section: {"listen": address}}))
    assert said.returncode == 1
    assert "Traceback" not in said.stderr
    assert said.stderr.splitlines()[-1] == (
        f"dialogd: {tmp_path}/dialog.toml: {section}.listen = '{address}': another program listens there"
    )


@pytest.mark.parametrize(
    "sections",
    [
        {"gateway": {"public_url": "voice.test"}},
        {"gateway": {"listen": "8080"}},
        {"gateway": {"unheard_of": 1}},
        {"twilio": {"auth_token": "env:NO_SUCH_VARIABLE"}},
        {"calls": {"connect_timeout": -1}},
        {"gateway": {"certificate": "none.pem", "key": "none.pem"}},
    ],
)
def test_a_bad_configuration_ends_dialogd_with_one_sentence(tmp_path: Path, sections: dict[str, dict[str, object]]) -> None:
    said = run(write_config(tmp_path, write_agent(tmp_path / "agent", "def create(voip): ...\n"), **sections))
    assert said.returncode == 1
    assert said.stderr.startswith(f"dialogd: {tmp_path}/dialog.toml: ")
    assert said.stderr.count("\n") == 1


def test_a_missing_configuration_ends_dialogd_with_one_sentence(tmp_path: Path) -> None:
    said = run(tmp_path / "none.toml")
    assert said.returncode == 1
    assert said.stderr.startswith(f"dialogd: {tmp_path}/none.toml: no such file")


def test_an_unknown_option_is_a_usage_error(tmp_path: Path) -> None:
    said = run(tmp_path / "none.toml", "--unheard-of")
    assert said.returncode == 2
    assert "--unheard-of" in said.stdout + said.stderr
    assert "Traceback" not in said.stderr


async def test_many_short_calls_leave_nothing_behind(start_dialogd: StartDialogd) -> None:
    dialogd = start_dialogd()
    before = _size(dialogd)
    tasks = (await dialogd.ask("/status"))["tasks"]
    await _short_calls(dialogd, MANY)
    await _settled(dialogd, before)
    assert _size(dialogd) == before
    assert len(dialogd.find(event="call ended", reason="the carrier stopped the stream")) == MANY
    status = await dialogd.ask("/status")
    assert (status["calls"], status["workers"], status["connections"]) == (0, 0, 0)
    with trio.move_on_after(10):  # a control connection's own tasks end by and by
        while (status := await dialogd.ask("/status"))["tasks"] > tasks:  # noqa: ASYNC110 - another process
            await trio.sleep(3)
    assert status["tasks"] <= tasks


async def test_asking_for_the_status_leaves_nothing_behind(start_dialogd: StartDialogd) -> None:
    dialogd = start_dialogd()
    before = _size(dialogd)
    for _ in range(20):
        await dialogd.ask("/status")
    await _settled(dialogd, before)
    assert _size(dialogd) == before


async def _short_calls(dialogd: Dialogd, count: int) -> None:
    """Place calls, `AT_ONCE` of them at a time, and end each after one frame."""
    limit = trio.CapacityLimiter(AT_ONCE)

    async def short_call() -> None:
        async with limit, twilio.streaming() as call:
            await call.echo()
            await call.stop()
            assert await call.closed() == 1000

    async with Twilio(dialogd) as twilio, trio.open_nursery() as nursery:
        for _ in range(count):
            nursery.start_soon(short_call)


def _size(dialogd: Dialogd) -> dict[str, int]:
    return {
        "descriptors": dialogd.descriptors(),
        "children": len(dialogd.children()),
        "processes": len(dialogd.processes()),
    }


async def _settled(dialogd: Dialogd, expected: dict[str, int]) -> None:
    """Wait until it is as large as expected: media sockets and control connections go by and by."""
    with trio.move_on_after(10):
        while _size(dialogd) != expected:  # noqa: ASYNC110 - no event tells of another process closing its descriptors
            await trio.sleep(0.05)


async def test_a_log_that_cannot_be_written_costs_no_call(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    gateway = {"listen": f"127.0.0.1:{port}", "public_url": PUBLIC_URL}
    config = write_config(tmp_path, write_agent(tmp_path / "agent", PROBE), gateway=gateway)
    environ = os.environ | {"TWILIO_AUTH_TOKEN": AUTH_TOKEN}
    command = ["sh", "-c", f"exec {DIALOGD} -c {config} 2>/dev/full"]
    async with trio.open_nursery() as nursery:
        process = await nursery.start(partial(trio.run_process, command, env=environ))
        await _listening(port)
        async with Twilio(Place(PUBLIC_URL, port)) as twilio, twilio.streaming() as call:
            await call.echo()
        process.terminate()
    assert process.returncode == 0


async def _listening(port: int) -> None:
    with trio.fail_after(PATIENCE_S):
        while True:
            try:
                await (await trio.open_tcp_stream("127.0.0.1", port)).aclose()
            except OSError:
                await trio.sleep(0.05)
            else:
                return


def test_a_control_socket_that_cannot_be_opened_ends_dialogd_with_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "taken.sock").mkdir()
    config = write_config(tmp_path, write_agent(tmp_path / "agent", PROBE), control={"socket": str(tmp_path / "taken.sock")})
    done = run(config)
    assert done.returncode == 1
    assert done.stderr.startswith("dialogd: control.socket: ")
    assert "Traceback" not in done.stderr
