"""The load generator against real dialogds: one whose agent echoes, and some that do what it must notice."""

import base64
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from websockets.frames import Frame, Opcode
from websockets.server import ServerProtocol

from dialog_local.load import callers, command, server
from dialog_local.load.callers import Meter
from dialog_local.load.timer import Timer
from dialog_local.load.wire import STAMP, CallFailed, Stream, mark
from dialog_local.speech.audio import decode, encode

ECHO = Path(__file__).parents[2] / "examples" / "echo"
FORGETFUL = """
from dialog_worker import Agent, Message

class Forgetful(Agent):
    heard = 0

    def on_media(self, media):
        self.heard += 1
        if self.heard % 10:
            self.voip.post(Message("echo", media.payload))

def create(voip):
    return Forgetful(voip=voip)
"""
SILENT = """
from dialog_worker import Agent

class Silent(Agent):
    def on_media(self, media):
        pass

def create(voip):
    return Silent(voip=voip)
"""
Ran = tuple[int, dict[str, Any], str]


def write_config(directory: Path, agent: Path) -> Path:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = directory / "dialog.toml"
    config.write_text(f"""
[gateway]
listen = "127.0.0.1:{port}"
public_url = "https://voice.example.com"
[twilio]
account_sid = "AC{"1" * 32}"
auth_token = "secret"
[agent]
path = {json.dumps(str(agent))}
[control]
socket = "control.sock"
[log]
format = "json"
""")
    return config


@contextmanager
def dialogd(config: Path) -> Iterator[Path]:
    command = [sys.executable, "-c", "from dialog_supervisor.cli import dialogd; dialogd()", "-c", str(config)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            said = next((line for line in process.stderr if '"ready"' in line), None)
            assert said, "dialogd did not start"
            yield config
        finally:
            process.send_signal(signal.SIGTERM)
            process.stderr.read()
            process.wait(20)


@pytest.fixture(scope="module")
def echo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with dialogd(write_config(tmp_path_factory.mktemp("echo"), ECHO)) as config:
        yield config


@pytest.fixture
def capture(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> pytest.CaptureFixture[str]:
    """What a load says on stdout and stderr; loads are short here."""
    monkeypatch.setattr(command, "SETTLE_S", 0.1)
    monkeypatch.setattr(command, "STRAGGLERS_S", 0.3)
    return capsys


def run(config: Path, capture: pytest.CaptureFixture[str], *options: str) -> Ran:
    code = command.app(["-c", str(config), "--json", *options], exit_on_error=False, result_action="return_value")
    said = capture.readouterr()
    return code, json.loads(said.out or "{}"), said.err


def agent_of(directory: Path, code: str) -> Path:
    (directory / "agent").mkdir()
    (directory / "agent" / "agent.py").write_text(code)
    return directory / "agent"


def test_every_frame_of_a_short_load_comes_back(echo: Path, capture: pytest.CaptureFixture[str]) -> None:
    code, result, error = run(echo, capture, "--calls", "3", "--seconds", "1", "--ramp", "0.05")
    assert (code, error) == (0, "")
    assert result["answered"] == 3
    assert result["frames_sent"] == pytest.approx(150, abs=10)
    assert (result["frames_echoed"], result["frames_lost"]) == (result["frames_sent"], 0)
    assert 0 < result["echo_ms"]["p50"] <= result["echo_ms"]["p99"] <= result["echo_ms"]["max"]
    assert result["webhook_ms"]["p50"] > 0
    assert result["first_echo_ms"]["p50"] > 0


def test_the_cost_of_dialogd_and_all_its_processes_is_measured(echo: Path, capture: pytest.CaptureFixture[str]) -> None:
    _, result, _ = run(echo, capture, "--calls", "10", "--seconds", "2", "--ramp", "0")
    cost = result["cost"]
    assert cost["processes"] == 12  # dialogd, its template, and workers enough for more than a tick of dialogd's time
    assert 0 < cost["supervisor_cpu_ms"] <= cost["tree_cpu_ms"]
    assert cost["loaded_mb"] > cost["idle_mb"] > 10
    assert cost["per_call_mb"] > 0
    assert result["generator_cpu_ms"] > 0


def test_the_figures_are_also_shown_as_lines(echo: Path, capture: pytest.CaptureFixture[str]) -> None:
    code = command.app(
        ["-c", str(echo), "--calls", "1", "--seconds", "0.2"], exit_on_error=False, result_action="return_value"
    )
    said = capture.readouterr().out
    assert code == 0
    assert "1 of 1 answered, 0 failed" in said
    assert "0 lost" in said


def test_nothing_of_the_calls_is_left_in_dialogd(echo: Path, capture: pytest.CaptureFixture[str]) -> None:
    run(echo, capture, "--calls", "2", "--seconds", "0.2", "--ramp", "0")
    _, result, _ = run(echo, capture, "--calls", "1", "--seconds", "0.2")
    assert result["cost"]["processes"] == 3  # no worker of the calls before


def test_calls_one_after_another_tell_how_soon_a_worker_is_ready(echo: Path, capture: pytest.CaptureFixture[str]) -> None:
    code, result, _ = run(echo, capture, "--forks", "3")
    assert code == 0
    assert result["calls"] == 3
    assert 0 < result["hello_ms"]["p50"] < 1000


def test_a_wrong_token_fails_every_call_with_the_reason(echo: Path, capture: pytest.CaptureFixture[str]) -> None:
    code, result, error = run(echo, capture, "--calls", "2", "--ramp", "0", "--token", "wrong")
    assert code == 1
    assert result["failed"] == 2
    assert "2 of 2 calls failed" in error
    assert "HTTP 403" in error


def test_lost_frames_are_counted_and_fail_the_load(tmp_path: Path, capture: pytest.CaptureFixture[str]) -> None:
    with dialogd(write_config(tmp_path, agent_of(tmp_path, FORGETFUL))) as config:
        code, result, error = run(config, capture, "--calls", "1", "--seconds", "1")
    assert code == 1
    assert result["failed"] == 0
    assert result["frames_lost"] == pytest.approx(5, abs=1)
    assert "frames did not come back" in error


def test_an_agent_that_does_not_echo_fails_its_call(
    tmp_path: Path, capture: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(callers, "FIRST_ECHO_S", 0.5)
    with dialogd(write_config(tmp_path, agent_of(tmp_path, SILENT))) as config:
        code, result, error = run(config, capture, "--calls", "1", "--seconds", "1")
    assert (code, result["answered"]) == (1, 0)
    assert "does the agent echo?" in error


def test_without_a_dialogd_it_says_where_none_answers(tmp_path: Path, capture: pytest.CaptureFixture[str]) -> None:
    code, _, error = run(write_config(tmp_path, ECHO), capture)
    assert code == 1
    assert f"no dialogd answers at {tmp_path / 'control.sock'}" in error


def test_where_nobody_listens_the_address_is_named(capture: pytest.CaptureFixture[str]) -> None:
    code = command.app(
        ["--url", "http://127.0.0.1:1/twilio/voice", "--token", "secret", "--calls", "1"],
        exit_on_error=False,
        result_action="return_value",
    )
    assert code == 1
    assert "the connection to 127.0.0.1:1 failed" in capture.readouterr().err


def test_a_process_that_does_not_exist_is_named(echo: Path, capture: pytest.CaptureFixture[str]) -> None:
    code, _, error = run(echo, capture, "--pid", "99999999")
    assert code == 1
    assert "there is no process 99999999" in error


@pytest.mark.parametrize("options", [("--calls", "0"), ("--seconds", "-1"), ("--url", "https://voice.example.com/")])
def test_options_that_cannot_be_are_refused(
    tmp_path: Path, capture: pytest.CaptureFixture[str], options: tuple[str, ...]
) -> None:
    code, _, error = run(tmp_path / "dialog.toml", capture, *options)
    assert code == 2
    assert options[0] in error


# The wire, without a server


def opened() -> ServerProtocol:
    """A server's end of a WebSocket whose handshake is over."""
    server = ServerProtocol()
    server.receive_data(
        b"GET / HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    )
    [request] = server.events_received()
    server.send_response(server.accept(request))  # type: ignore[arg-type]  # the first event is always the request
    server.data_to_send()
    return server


def read(server: ServerProtocol, data: bytes) -> list[dict[str, Any]]:
    server.receive_data(data)
    frames = [event for event in server.events_received() if isinstance(event, Frame) and event.opcode is Opcode.TEXT]
    return [json.loads(bytes(frame.data)) for frame in frames]


def test_a_frame_carries_the_time_and_silence_in_twilios_form() -> None:
    stream = Stream("AC1", "CA1", {})
    stream.start()
    [message] = read(opened(), stream.media(123.456))
    payload = base64.b64decode(message["media"].pop("payload"))
    assert payload == STAMP.pack(123.456) + b"\xff" * 152
    assert message == {
        "event": "media",
        "sequenceNumber": "2",
        "media": {"track": "inbound", "chunk": "1", "timestamp": "20"},
        "streamSid": stream.stream_sid,
    }


@given(stamp=st.binary(min_size=8, max_size=8))
def test_a_frame_is_known_again_when_the_server_has_decoded_and_encoded_it(stamp: bytes) -> None:
    assert mark(encode(decode(stamp, "pcm_mulaw"), "pcm_mulaw")) == mark(stamp)


def test_start_names_the_call_and_its_parameters() -> None:
    stream = Stream("AC1", "CA1", {"k": "v"})
    _, start = read(opened(), stream.connected() + stream.start())
    assert start["start"]["callSid"] == "CA1"
    assert start["start"]["customParameters"] == {"k": "v"}
    assert start["sequenceNumber"] == "1"


@given(payloads=st.lists(st.binary(max_size=300), max_size=5), cuts=st.lists(st.integers(0, 1600), max_size=5))
def test_what_the_server_sends_is_read_however_it_is_cut(payloads: list[bytes], cuts: list[int]) -> None:
    sent = b"".join(Frame(Opcode.TEXT, payload).serialize(mask=False) for payload in payloads)
    edges = [0, *sorted(min(cut, len(sent)) for cut in cuts), len(sent)]
    stream = Stream("AC1", "CA1", {})
    got = [frame for a, b in pairwise(edges) for frame in stream.receive(sent[a:b])]
    assert got == [(Opcode.TEXT, payload) for payload in payloads]


def test_a_long_frame_is_read() -> None:
    frame = Frame(Opcode.TEXT, bytes(70_000)).serialize(mask=False)
    assert list(Stream("AC1", "CA1", {}).receive(frame)) == [(Opcode.TEXT, bytes(70_000))]


def test_a_fragmented_message_is_refused_by_name() -> None:
    frame = Frame(Opcode.TEXT, b"half", fin=False).serialize(mask=False)
    with pytest.raises(CallFailed, match="fragmented"):
        list(Stream("AC1", "CA1", {}).receive(frame))


# The meter


def test_a_frame_under_way_when_measuring_ends_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    meter, times = Meter(), iter([10.0, 11.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(times))
    meter.open()
    meter.count_sent(10.99)
    assert meter.close() == 1.0
    assert (meter.lost, meter.complete.is_set()) == (1, False)
    meter.count_echo(10.99, 11.02)
    assert (meter.lost, meter.complete.is_set()) == (0, True)


def test_frames_outside_the_window_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    meter, times = Meter(), iter([10.0, 11.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(times))
    meter.count_sent(9.0)
    meter.open()
    meter.count_echo(9.0, 10.5)
    meter.close()
    meter.count_sent(11.5)
    assert (meter.sent, len(meter.echoes)) == (0, 0)


# The timer


def rings(timer: Timer) -> bool:
    return bool(select.select([timer.fd], [], [], 0)[0])


def test_a_timer_can_be_read_once_its_time_has_come_and_until_it_is_taken() -> None:
    with Timer() as timer:
        timer.take()  # which waits for nothing
        assert not rings(timer)
        timer.set(time.perf_counter() + 3600)
        assert not rings(timer)
        timer.set(time.perf_counter())
        assert select.select([timer.fd], [], [], 5)[0]
        timer.take()
        assert not rings(timer)


# /proc


def test_a_process_tree_has_the_descendants() -> None:
    script = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'print(1, flush=True); input()'])"
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()  # the grandchild runs
        assert len(server.tree([process.pid])) == 2
        process.communicate(b"\n")


def test_the_cpu_time_that_a_process_uses_is_seen() -> None:
    before = server.usage([os.getpid()])
    started = sum(os.times()[:2])
    while sum(os.times()[:2]) - started < 0.1:
        pass
    assert server.usage([os.getpid()]).since(before) == pytest.approx(0.1, abs=0.03)


def test_memory_is_at_least_what_a_process_fills() -> None:
    before = server.memory([os.getpid()])
    filled = bytearray(os.urandom(20_000_000))
    assert server.memory([os.getpid()]) - before > len(filled) * 0.9
