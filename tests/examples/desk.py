"""Runs an example: as a call from end to end on this machine, or in-process with the scripted brain for its model."""

import json
import os
import shutil
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import trio

from dialog_worker import STT, TTS, OpenAIAgent, VoIP
from dialog_worker.testing import ScriptedCall, scripted_call
from tests.e2e.daemon import Dialogd
from tests.local.test_brain import served

EXAMPLES = Path(__file__).parents[2] / "examples"
DIALOGCTL = Path(sys.executable).with_name("dialogctl")

Kind = TypeVar("Kind", bound=OpenAIAgent)
Summary = dict[str, Any]


def configured(example: str, directory: Path, server: str) -> Path:
    """Copy an example, and have its local.toml use free ports and the speech server at `server`. Return that file."""
    copied = directory / example
    shutil.copytree(EXAMPLES / example, copied, ignore=shutil.ignore_patterns(".env*", "__pycache__"))
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        listen, rest = (f"127.0.0.1:{free.getsockname()[1]}" for free in (one, other))
    config = copied / "local.toml"
    text = config.read_text()
    for ours, theirs in (("127.0.0.1:8080", listen), ("127.0.0.1:8090", rest), ("127.0.0.1:8070", server)):
        assert ours in text
        text = text.replace(ours, theirs)
    config.write_text(f'{text}\n[control]\nsocket = "{copied}/control.sock"\n')
    return config


@contextmanager
def serving(example: str, directory: Path, server: str, **environ: str) -> Iterator[Dialogd]:
    """Run dialogd with an example's local.toml until the block is left, and check that it stops well."""
    with Dialogd(configured(example, directory, server), environ) as dialogd:
        dialogd.wait_for_log(event="ready")
        yield dialogd
        dialogd.stop()


async def place_call(dialogd: Dialogd, server: str, *arguments: str, check: bool = True) -> Summary:
    """Run `dialogctl call` and return its summary."""
    options = ["--json", "--check"] if check else ["--json"]
    command = [str(DIALOGCTL), "-c", str(dialogd.config), "call", *options, *arguments]
    environ = os.environ | {"DIALOG_LOCAL_URL": f"http://{server}"}
    done = await trio.run_process(command, capture_stdout=True, capture_stderr=True, check=False, env=environ)
    assert done.returncode == 0, done.stderr.decode() + dialogd.text
    summary: Summary = json.loads(done.stdout)
    return summary


def tool_calls(summary: Summary) -> list[tuple[str, Any]]:
    """Return the tools that the agent remembers to have called, with their arguments."""
    calls = [call["function"] for entry in json.loads(summary["history"]) for call in entry.get("tool_calls", ())]
    return [(call["name"], json.loads(call["arguments"])) for call in calls]


def remembered(summary: Summary, role: str) -> list[str]:
    """Return what the agent remembers that was said by one side."""
    return [entry["content"] for entry in json.loads(summary["history"]) if entry["role"] == role and entry.get("content")]


@asynccontextmanager
async def rehearsal(kind: type[Kind], base_url: str = "") -> AsyncIterator[tuple[ScriptedCall, Kind]]:
    """Run an example's agent in-process, with the scripted brain for its model or another one at `base_url`."""
    made: list[Kind] = []
    async with served() as url:

        def make(voip: VoIP, stt: STT, tts: TTS) -> OpenAIAgent:
            address = base_url or f"{url}/v1"
            made.append(kind(voip=voip, stt=stt, tts=tts, model="m", api_key="k", base_url=address))
            return made[0]

        async with scripted_call(make) as call:
            yield call, made[0]
