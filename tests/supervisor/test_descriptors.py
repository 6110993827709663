"""How many descriptors dialogd wants and takes, and what it does when there are many, or none left."""

import fcntl
import os
import resource
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio
from structlog.testing import capture_logs

from dialog_supervisor import descriptors
from dialog_supervisor.config import Config, load
from dialog_supervisor.confinement.limits import why_not_forked
from dialog_supervisor.connections import Listener
from dialog_supervisor.http import Request, Response
from dialog_supervisor.sections import GatewayConfig
from dialog_supervisor.telemetry import metrics
from dialog_supervisor.template import Forked, _encode
from dialog_supervisor.template_process import Inherited, NoWorker, TemplateProcess
from dialog_supervisor.worker import Worker
from tests.conftest import StartDialogd
from tests.e2e.control import PATIENCE_S
from tests.supervisor.configuration import ENVIRON, GATEWAY, writer

FEW, HIGH = 600, 1_500
ANSWER = b"HTTP/1.1 200 "


@contextmanager
def permitted(count: int) -> Iterator[None]:
    """Have no descriptors from this number on, inside."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def few() -> Iterator[None]:
    """A process that may have few descriptors until it asks for more."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard <= 2 * HIGH:
        pytest.skip("this process may have no more descriptors")
    with permitted(FEW):
        yield


@pytest.fixture
def sleeper() -> Iterator[int]:
    """A process that does nothing."""
    with subprocess.Popen(["sleep", "60"], start_new_session=True) as process:
        yield process.pid
        process.kill()


def configured(tmp_path: Path, max_calls: int) -> Config:
    file = writer(tmp_path)(f"[calls]\nmax_calls = {max_calls}", gateway=f"{GATEWAY}\nmax_connections = 100")
    return load(file, ENVIRON)


def limit() -> int:
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


# The limit


@pytest.mark.usefixtures("few")
def test_the_limit_is_raised_to_what_the_configuration_can_need(tmp_path: Path) -> None:
    with capture_logs() as logs:
        descriptors.permit(configured(tmp_path, max_calls=100))
    assert limit() == 64 + 100 + 8 * 100
    assert [(line["event"], line["before"]) for line in logs] == [("the limit of descriptors is raised", FEW)]


@pytest.mark.usefixtures("few")
def test_a_limit_that_suffices_is_left_alone(tmp_path: Path) -> None:
    with capture_logs() as logs:
        descriptors.permit(configured(tmp_path, max_calls=10))
    assert (limit(), logs) == (FEW, [])


@pytest.mark.usefixtures("few")
def test_where_the_system_permits_less_the_log_says_so(tmp_path: Path) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY:
        pytest.skip("this process may have as many as it likes")
    with capture_logs() as logs:
        descriptors.permit(configured(tmp_path, max_calls=hard))
    assert limit() == hard
    assert [(line["event"], line["limit"]) for line in logs if line["log_level"] == "warning"] == [
        ("there may be too few descriptors for all calls", hard)
    ]


@pytest.mark.usefixtures("few")
def test_a_dialogd_raises_its_own(start_dialogd: StartDialogd) -> None:
    dialogd = start_dialogd(calls={"max_calls": 100}, gateway={"max_connections": 200})
    assert resource.prlimit(dialogd.pid, resource.RLIMIT_NOFILE)[0] == 64 + 200 + 8 * 100
    assert dialogd.find(event="the limit of descriptors is raised", before=FEW)


# Many


async def test_a_worker_is_seen_whatever_its_descriptor_s_number(sleeper: int) -> None:
    worker = Worker("g", "CA1")
    pidfd = os.pidfd_open(sleeper)
    worker.forked(sleeper, fcntl.fcntl(pidfd, fcntl.F_DUPFD, HIGH))
    os.close(pidfd)
    assert worker.alive
    worker.close()


# None left


async def test_a_worker_whose_descriptor_did_not_arrive_is_none(sleeper: int) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    worker = Worker("g", "CA1")
    template = TemplateProcess(Inherited(sleeper), ours, "g", {})
    with theirs:
        async with template.ending(), trio.open_nursery() as nursery:
            nursery.start_soon(template.serve)
            theirs.send(_encode(Forked("CA1", sleeper)))
            with pytest.raises(NoWorker, match="no descriptor left for it; raise LimitNOFILE"):
                await template.fork(worker)
            nursery.cancel_scope.cancel()
    worker.close()


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (BlockingIOError(11, "Resource temporarily unavailable"), "raise TasksMax, or whatever else limits processes"),
        (OSError(12, "Cannot allocate memory"), "has no memory for it"),
        (OSError(24, "Too many open files"), "raise LimitNOFILE"),
        (ValueError("of another kind"), "of another kind"),
    ],
)
def test_an_operator_is_told_what_a_fork_lacked(error: Exception, why: str) -> None:
    assert why in why_not_forked(error)


async def answer(_: Request) -> Response:
    return Response(200, "ok\n")


def refused(reason: str) -> float:
    return metrics.REGISTRY.get_sample_value("dialog_connections_refused_total", {"reason": reason}) or 0.0


async def ask(stream: trio.SocketStream) -> bytes:
    await stream.send_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
    return bytes(await stream.receive_some())


async def test_who_finds_no_descriptor_waits_and_the_log_says_so_once(nursery: trio.Nursery) -> None:
    listener, before = Listener(GatewayConfig(public_url="http://voice.test"), answer), refused("descriptors")
    with socket.create_server(("127.0.0.1", 0)) as listening, capture_logs() as logs:
        listening.setblocking(False)
        await nursery.start(listener.serve, listening)
        client = trio.socket.socket()
        os.close(next_free := os.dup(client.fileno()))
        with permitted(next_free), trio.fail_after(PATIENCE_S):
            await client.connect(listening.getsockname())
            while refused("descriptors") < before + 2:  # noqa: ASYNC110 - it looks again and again
                await trio.sleep(0.02)
        async with trio.SocketStream(client) as stream:
            assert (await ask(stream)).startswith(ANSWER)
        nursery.cancel_scope.cancel()
    [line] = [line for line in logs if line["event"] == "cannot accept a connection"]
    assert (line["count"], line["reason"], line["remedy"]) == (1, "Too many open files", "raise LimitNOFILE")


async def test_the_last_descriptors_are_not_for_new_connections(nursery: trio.Nursery) -> None:
    listener, before = Listener(GatewayConfig(public_url="http://voice.test"), answer), refused("descriptors")
    with socket.create_server(("127.0.0.1", 0)) as listening, capture_logs() as logs:
        listening.setblocking(False)
        await nursery.start(listener.serve, listening)
        client = trio.socket.socket()
        os.close(next_free := os.dup(client.fileno()))
        async with trio.SocketStream(client) as stream:
            with permitted(next_free + descriptors.RESERVE):
                await client.connect(listening.getsockname())
                assert (await stream.receive_some()).startswith(b"HTTP/1.1 503 ")
        nursery.cancel_scope.cancel()
    assert refused("descriptors") == before + 1
    assert [line["count"] for line in logs if line["event"] == "cannot accept a connection"] == [1]


async def test_of_many_connections_too_many_the_log_has_one_line_and_the_metrics_all(nursery: trio.Nursery) -> None:
    config = GatewayConfig(public_url="http://voice.test", max_connections=1)
    listener, before = Listener(config, answer), refused("max_connections")
    with socket.create_server(("127.0.0.1", 0)) as listening, capture_logs() as logs:
        listening.setblocking(False)
        await nursery.start(listener.serve, listening)
        async with await trio.open_tcp_stream(*listening.getsockname()) as first:
            assert (await ask(first)).startswith(ANSWER)
            for _ in range(3):
                async with await trio.open_tcp_stream(*listening.getsockname()) as another:
                    assert (await another.receive_some()).startswith(b"HTTP/1.1 503 ")
        nursery.cancel_scope.cancel()
    assert refused("max_connections") == before + 3
    assert [line["count"] for line in logs if line["event"] == "too many connections"] == [1]
