"""What dialogd tells a service manager and takes over from it: over real datagram sockets, and with a real dialogd."""

import os
import re
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
import trio

from dialog_supervisor.config import ConfigError
from dialog_supervisor.systemd import ServiceNotifier, inherited_listener, watchdog_timeout
from tests.conftest import StartDialogd
from tests.e2e import daemon
from tests.e2e.control import PATIENCE_S
from tests.e2e.daemon import Dialogd, write_agent, write_config

State = dict[str, str]
BEAT_S = 0.05
PASSED = {"LISTEN_FDS": "1", "LISTEN_PID": "8"}

PASSES_A_LISTENER = """#!{python}
import os, socket, sys
listening = socket.create_server(("127.0.0.1", 0))
os.dup2(listening.fileno(), 9)
os.dup2(9, 3)
os.environ.update(LISTEN_FDS="1", LISTEN_PID=str(os.getpid()), LISTEN_FDNAMES="gateway")
os.execv({dialogd!r}, sys.argv)
"""

SLOW_AGENT = """
from dialog_worker import Agent
from pathlib import Path

Path({gate!r}).read_text()


def create(voip):
    return Agent(voip=voip)
"""


class ServiceSocket:
    """The service manager's end of sd_notify(3)."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(address.replace("@", "\0", 1) if address.startswith("@") else address)
        self._socket.settimeout(PATIENCE_S)

    def receive(self) -> State:
        """Return the next datagram's assignments."""
        return dict(line.split("=", 1) for line in self._socket.recv(4096).decode().split("\n"))

    def receive_with(self, name: str) -> State:
        """Return the next datagram that assigns this."""
        while name not in (state := self.receive()):
            pass
        return state

    def drain(self) -> list[State]:
        """Return what has arrived by now."""
        self._socket.setblocking(False)
        found = []
        with suppress(BlockingIOError):
            while True:
                found.append(self.receive())
        self._socket.settimeout(PATIENCE_S)
        return found

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def service(tmp_path: Path) -> Iterator[ServiceSocket]:
    found = ServiceSocket(str(tmp_path / "notify"))
    yield found
    found.close()


def notifier(service: ServiceSocket, **environ: str) -> ServiceNotifier:
    return ServiceNotifier({"NOTIFY_SOCKET": service.address, **environ}, lambda: "taking calls")


# What is sent


def test_readiness_comes_with_a_status(service: ServiceSocket) -> None:
    notifier(service).ready()
    assert service.receive() == {"READY": "1", "STATUS": "taking calls"}


def test_an_abstract_socket_is_reached() -> None:
    service = ServiceSocket(f"@dialog-test-{os.getpid()}")
    notifier(service).stopping()
    assert service.receive()["STOPPING"] == "1"
    service.close()


def test_a_reload_is_announced_with_the_time_and_followed_by_readiness(service: ServiceSocket) -> None:
    before = time.monotonic_ns() // 1000
    with notifier(service).reloading():
        announced = service.receive()
        assert announced["RELOADING"] == "1"
        assert before <= int(announced["MONOTONIC_USEC"]) <= time.monotonic_ns() // 1000
        assert service.drain() == []
    assert service.receive() == {"READY": "1", "STATUS": "taking calls"}


def test_a_failed_reload_leaves_dialogd_ready(service: ServiceSocket) -> None:
    with pytest.raises(ZeroDivisionError), notifier(service).reloading():
        raise ZeroDivisionError
    assert [set(state) for state in service.drain()] == [{"RELOADING", "MONOTONIC_USEC", "STATUS"}, {"READY", "STATUS"}]


def test_of_two_reloads_at_a_time_the_last_to_end_says_ready(service: ServiceSocket) -> None:
    notify = notifier(service)
    with notify.reloading():
        with notify.reloading():
            pass
        assert all("READY" not in state for state in service.drain())
    assert "READY" in service.receive()


def test_a_reload_that_ends_while_stopping_does_not_say_ready(service: ServiceSocket) -> None:
    notify = notifier(service)
    with notify.reloading():
        notify.stopping()
    assert "STOPPING" in service.drain()[-1]


def test_without_a_service_manager_nothing_is_said() -> None:
    notify = ServiceNotifier({}, str)
    with notify.reloading():
        notify.stopping()


def test_a_service_manager_that_is_gone_is_no_reason_to_fail(service: ServiceSocket) -> None:
    notify = notifier(service)
    service.close()
    notify.ready()
    notify.stopping()


def test_a_full_socket_holds_nothing_up(service: ServiceSocket) -> None:
    notify = notifier(service)
    for _ in range(1000):  # more than net.unix.max_dgram_qlen
        notify.ready()
    assert 0 < len(service.drain()) < 1000


def test_an_address_that_is_no_unix_socket_is_refused() -> None:
    with pytest.raises(ConfigError, match="NOTIFY_SOCKET = 'vsock:2:1234'"):
        ServiceNotifier({"NOTIFY_SOCKET": "vsock:2:1234"}, str)


# The watchdog


async def test_the_watchdog_hears_twice_in_its_timeout(
    service: ServiceSocket, autojump_clock: trio.testing.MockClock
) -> None:
    with trio.move_on_after(9.9):
        await notifier(service, WATCHDOG_USEC="2000000").run()
    assert [state.get("WATCHDOG") for state in service.drain()] == ["1"] * 10


async def test_without_a_watchdog_only_a_new_status_is_told(
    service: ServiceSocket, autojump_clock: trio.testing.MockClock
) -> None:
    calls = 0
    notify = ServiceNotifier({"NOTIFY_SOCKET": service.address}, lambda: f"{calls} under way")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(notify.run)
        await trio.sleep(100)
        calls = 1
        await trio.sleep(100)
        nursery.cancel_scope.cancel()
    assert service.drain() == [{"STATUS": "0 under way"}, {"STATUS": "1 under way"}]


def test_a_watchdog_for_another_process_is_not_ours() -> None:
    assert watchdog_timeout({"WATCHDOG_USEC": "2000000", "WATCHDOG_PID": "7"}, pid=8) is None


def test_a_watchdog_is_ours_by_pid_or_when_no_pid_is_given() -> None:
    assert watchdog_timeout({"WATCHDOG_USEC": "2500000", "WATCHDOG_PID": "8"}, pid=8) == 2.5
    assert watchdog_timeout({"WATCHDOG_USEC": "2500000"}, pid=8) == 2.5


@pytest.mark.parametrize("value", ["0", "soon", "-1"])
def test_a_watchdog_without_a_time_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match=f"WATCHDOG_USEC = '{value}'"):
        watchdog_timeout({"WATCHDOG_USEC": value}, pid=8)


# A listener passed in


def test_a_listener_for_another_process_is_not_ours() -> None:
    assert inherited_listener({"LISTEN_FDS": "1", "LISTEN_PID": "7"}, pid=8) is None


@pytest.mark.parametrize("count", ["2", "0", "", "one"])
def test_any_other_number_of_listeners_than_one_is_refused(count: str) -> None:
    with pytest.raises(ConfigError, match=f"LISTEN_FDS = '{count}'"):
        inherited_listener({"LISTEN_FDS": count, "LISTEN_PID": "8"}, pid=8)


def test_a_listener_of_an_unknown_name_is_refused() -> None:
    with pytest.raises(ConfigError, match="LISTEN_FDNAMES = 'console'"):
        inherited_listener({"LISTEN_FDS": "1", "LISTEN_PID": "8", "LISTEN_FDNAMES": "console"}, pid=8)


@pytest.mark.parametrize("name", ["gateway", "unknown", "", "dialogd.socket"])
def test_a_listener_is_taken_over_without_blocking_and_not_passed_on(name: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as passed:
        passed.set_inheritable(True)
        found = inherited_listener({**PASSED, "LISTEN_FDNAMES": name}, 8, os.dup(passed.fileno()))
        assert found is not None
        with found:
            assert found.getsockname() == passed.getsockname()
            assert (found.getblocking(), found.get_inheritable()) == (False, False)


def test_a_socket_that_does_not_listen_for_tcp_is_refused_and_closed(tmp_path: Path) -> None:
    with socket.socket() as deaf, socket.socket(type=socket.SOCK_DGRAM) as udp, socket.socket(socket.AF_UNIX) as local:
        local.bind(str(tmp_path / "local"))
        local.listen()
        for passed in (deaf, udp, local):
            with pytest.raises(ConfigError, match="does not listen for TCP"):
                inherited_listener(PASSED, 8, fd := os.dup(passed.fileno()))
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fstat(fd)


def test_a_file_in_the_listeners_place_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w") as file, pytest.raises(ConfigError, match="is no socket"):
        inherited_listener(PASSED, 8, file.fileno())


# A real dialogd


def healthz(port: int) -> int:
    return httpx.get(f"http://127.0.0.1:{port}/healthz").status_code


def test_readiness_waits_for_the_agent_and_then_calls_are_taken(tmp_path: Path, service: ServiceSocket) -> None:
    os.mkfifo(gate := tmp_path / "gate")
    agent = write_agent(tmp_path / "agent", SLOW_AGENT.format(gate=str(gate)))
    with Dialogd(write_config(tmp_path, agent), {"NOTIFY_SOCKET": service.address}) as dialogd:
        with gate.open("w"):  # opens when the agent's code waits at it
            assert service.drain() == []
        status = service.receive_with("READY")["STATUS"]
        assert re.fullmatch(r"taking calls; .*generation [0-9a-f]{12}\.1", status)
        assert healthz(dialogd.port) == 200
        dialogd.stop()


async def test_a_reload_by_command_and_by_signal_is_told_and_a_stop_too(
    start_dialogd: StartDialogd, service: ServiceSocket
) -> None:
    dialogd = start_dialogd(environ={"NOTIFY_SOCKET": service.address})
    service.receive_with("READY")

    assert (await dialogd.ctl("reload")).returncode == 0
    assert "RELOADING" in service.receive_with("RELOADING")
    assert service.receive_with("READY")["STATUS"].endswith(".2")

    dialogd.signal(signal.SIGHUP)
    assert "RELOADING" in service.receive_with("RELOADING")
    assert service.receive_with("READY")["STATUS"].endswith(".3")

    dialogd.signal(signal.SIGTERM)
    assert service.receive_with("STOPPING")["STATUS"].startswith("not taking calls")
    assert await dialogd.exited() == 0


def test_the_watchdog_hears_nothing_while_the_loop_stands_still(start_dialogd: StartDialogd, service: ServiceSocket) -> None:
    watchdog = str(round(2 * BEAT_S * 1e6))
    dialogd = start_dialogd(environ={"NOTIFY_SOCKET": service.address, "WATCHDOG_USEC": watchdog})
    service.receive_with("WATCHDOG")
    service.receive_with("WATCHDOG")
    dialogd.signal(signal.SIGSTOP)
    os.waitid(os.P_PID, dialogd.pid, os.WSTOPPED | os.WNOWAIT)
    service.drain()
    time.sleep(6 * BEAT_S)  # in which six beats would come
    assert service.drain() == []
    dialogd.signal(signal.SIGCONT)
    service.receive_with("WATCHDOG")


def test_an_inherited_listener_is_used_and_the_configured_address_left_alone(
    tmp_path: Path, start_dialogd: StartDialogd, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrapper = tmp_path / "socket-activated"
    wrapper.write_text(PASSES_A_LISTENER.format(python=sys.executable, dialogd=str(daemon.DIALOGD)))
    wrapper.chmod(0o755)
    monkeypatch.setattr(daemon, "DIALOGD", wrapper)
    with socket.create_server(("127.0.0.1", 0)) as somebody:
        taken = somebody.getsockname()[1]
        dialogd = start_dialogd(gateway={"listen": f"127.0.0.1:{taken}"})
        assert dialogd.port != taken
        assert healthz(dialogd.port) == 200
