"""Every line of code in docs/from-dialog.md runs: in a configuration, in an agent on a call, or on the command line."""

import ast
import inspect
import logging
import shlex
import tomllib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

import dialog_worker
from dialog_supervisor.config import load
from dialog_worker import STT, TTS, Agent, Message, VoIP
from dialog_worker.testing import scripted_call
from tests.conftest import StartDialogd
from tests.e2e.daemon import Dialogd
from tests.from_dialog.table import ROOT, Row, rows, rows_of

NOWHERE = "ws://127.0.0.1:9"  # the discard port: refuses connections, and never leaves this machine
AGENT_SECTIONS = ("The line", "Speech", "The agent")
REQUIRED: dict[str, dict[str, object]] = {
    "gateway": {"public_url": "https://voice.example.com"},
    "twilio": {"account_sid": "AC" + "0" * 32, "auth_token": "secret"},
    "agent": {"path": "."},
}


class Caller(Agent):
    """Answers without a model, so that what a line of code begins comes to an end."""

    async def inference(self, message: Message[str]) -> None:
        await self.dispatch_message(Message(message.uuid, "At noon.", done=True))


@pytest.fixture(autouse=True)
def _providers_are_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DEEPGRAM_URL", "CARTESIA_URL", "ELEVENLABS_URL", "OPENAI_REALTIME_URL"):
        monkeypatch.setenv(name, NOWHERE)


def vocabulary(agent: Agent) -> dict[str, Any]:
    """Return the names that a line of code may use."""

    async def pieces() -> AsyncIterator[str]:
        yield "At noon."

    names = {name: getattr(dialog_worker, name) for name in dialog_worker.__all__}
    return names | {"self": agent, "trio": trio, "logging": logging, "pieces": pieces}


async def execute(code: str, names: dict[str, Any]) -> None:
    """Run a line of code, which may await."""
    compiled = compile(code, "docs/from-dialog.md", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    result = eval(compiled, names)  # the project's own documentation
    if inspect.isawaitable(result):
        await result


def test_every_section_is_run() -> None:
    known = {"The gateway", "What happens on the line", "The rest", *AGENT_SECTIONS}
    assert {row.section for row in rows()} == known


@pytest.mark.parametrize("row", rows_of("The gateway"), ids=str)
def test_a_line_of_configuration(row: Row, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TWILIO_AUTH_TOKEN", "secret")
    (tmp_path / "agent.py").write_text("def create(voip): ...\n")
    table, _, assignment = row.code.partition(" ")
    name = table.strip("[]")
    said = REQUIRED[name] | tomllib.loads(assignment)
    if "certificate" in said:
        said |= {"key": "key.pem"}
        for file in ("cert.pem", "key.pem"):
            (tmp_path / file).touch()
    config = tmp_path / "dialog.toml"
    config.write_text("\n".join(_toml(REQUIRED | {name: said})))
    taken = getattr(load(config), name)
    for key, value in tomllib.loads(assignment).items():
        assert getattr(taken, key) == ("secret" if key == "auth_token" else value)


def _toml(tables: dict[str, dict[str, object]]) -> Iterator[str]:
    for name, values in tables.items():
        yield f"[{name}]"
        yield from (f"{key} = {value!r}" for key, value in values.items())


@pytest.mark.parametrize("row", [row for section in AGENT_SECTIONS for row in rows_of(section)], ids=str)
async def test_a_line_in_an_agent(row: Row, autojump_clock: MockClock) -> None:
    agents: list[Agent] = []

    def make(voip: VoIP, stt: STT, tts: TTS) -> Agent:
        agents.append(Caller(voip=voip, stt=stt, tts=tts))
        return agents[0]

    async with scripted_call(make) as call:
        await trio.sleep(0.1)
        with trio.fail_after(30):
            await execute(row.code, vocabulary(agents[0]))
        assert not [trace for trace in call.traces if trace.fields.get("level") == "error"]


@pytest.mark.parametrize("row", rows_of("What happens on the line"), ids=str)
def test_a_handler(row: Row) -> None:
    names: dict[str, Any] = {}
    exec(row.code, names)  # the project's own documentation
    [handler] = [value for value in names.values() if inspect.isfunction(value)]
    default = getattr(Agent, handler.__name__)
    assert inspect.iscoroutinefunction(handler) is inspect.iscoroutinefunction(default)
    assert len(inspect.signature(handler).parameters) == len(inspect.signature(default).parameters)


@pytest.fixture(scope="module")
def dialogd(start_shared_dialogd: StartDialogd) -> Dialogd:
    return start_shared_dialogd()


@pytest.mark.parametrize("row", rows_of("The rest"), ids=str)
async def test_a_command(row: Row, dialogd: Dialogd) -> None:
    command, *arguments = shlex.split(row.code)
    if command == "./scripts/demo":  # the examples' own tests place their calls
        assert (ROOT / command).stat().st_mode & 0o100
        assert (ROOT / "examples" / arguments[0] / "agent.py").is_file()
        return
    assert command == "dialogctl"
    done = await dialogd.ctl(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
