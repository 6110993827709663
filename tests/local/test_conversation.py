"""Whole conversations: `dialogctl call`, a real dialogd, the minimal example's agent, and the local providers."""

import json
import os
import shutil
import socket
import sys
import wave
from pathlib import Path
from typing import Any

import pytest
import trio
from moonshine_voice.utils import get_assets_path

from tests.conftest import StartDialogd
from tests.e2e.daemon import AUTH_TOKEN, Dialogd
from tests.local.sockets import share_of_words

MINIMAL = Path(__file__).parents[2] / "examples" / "minimal"
DIALOGCTL = Path(sys.executable).with_name("dialogctl")


@pytest.fixture
def dialogd(server: str, start_dialogd: StartDialogd, tmp_path: Path) -> Dialogd:
    """A dialogd with the minimal agent and the local providers."""
    agent = tmp_path / "agent"
    shutil.copytree(MINIMAL, agent, ignore=shutil.ignore_patterns("*.toml", ".env*"))
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        listen, rest = (f"127.0.0.1:{free.getsockname()[1]}" for free in (one, other))
    environ = {
        "DEEPGRAM_API_KEY": "local",
        "DEEPGRAM_URL": f"ws://{server}/v1/listen",
        "CARTESIA_API_KEY": "local",
        "CARTESIA_URL": f"ws://{server}/tts/websocket",
        "CARTESIA_VOICE": "joe",
        "OPENAI_API_KEY": "local",
        "OPENAI_BASE_URL": f"http://{server}/v1",
        "OPENAI_MODEL": "scripted-receptionist",
    }
    gateway = {"listen": listen, "public_url": f"http://{listen}"}
    return start_dialogd(agent=agent, environ=environ, gateway=gateway, twilio={"api_url": f"http://{rest}"})


async def place_call(dialogd: Dialogd, server: str, *arguments: str) -> dict[str, Any]:
    """Run `dialogctl call` and return its summary."""
    command = [str(DIALOGCTL), "-c", str(dialogd.config), "call", "--json", "--check", *arguments]
    environ = os.environ | {"DIALOG_LOCAL_URL": f"http://{server}", "TWILIO_AUTH_TOKEN": AUTH_TOKEN}
    done = await trio.run_process(command, capture_stdout=True, capture_stderr=True, check=False, env=environ)
    assert done.returncode == 0, done.stderr.decode() + dialogd.text
    summary: dict[str, Any] = json.loads(done.stdout)
    return summary


def remembered(summary: dict[str, Any], role: str) -> list[str]:
    return [entry["content"] for entry in json.loads(summary["history"]) if entry["role"] == role and entry.get("content")]


async def test_a_caller_books_a_table_interrupts_and_hangs_up(dialogd: Dialogd, server: str, tmp_path: Path) -> None:
    out = tmp_path / "call.wav"
    lines = ["A table for four people at seven thirty, please.", "What is on the menu?", "Thank you, bye."]
    spoken = [argument for line in lines for argument in ("--say", line)]
    summary = await place_call(dialogd, server, "--interrupt", "3", "--out", str(out), *spoken)

    assert remembered(summary, "tool")[0] == "booked: a table for 4 at 19:30"
    assert summary["words"]["heard"] >= 0.8 * summary["words"]["said"]
    [barge_in] = summary["barge_ins"]
    assert barge_in["from_noticed_ms"] < 300
    menu = next(entry for entry in remembered(summary, "assistant") if entry.startswith("With pleasure"))
    assert "risotto tonight" not in menu  # the end of the menu was never heard
    assert "rest" in summary["ended"].lower()  # the agent hung up
    with wave.open(str(out)) as recording:
        assert (recording.getnchannels(), recording.getframerate()) == (2, 8000)
        assert recording.getnframes() / 8000 > summary["seconds"] - 1
    assert (await dialogd.ask("/status"))["workers"] == 0


async def test_a_human_voice_is_understood(dialogd: Dialogd, server: str, tmp_path: Path) -> None:
    excerpt = tmp_path / "reader.wav"
    with wave.open(str(get_assets_path() / "two_cities.wav")) as whole, wave.open(str(excerpt), "wb") as part:
        part.setparams(whole.getparams())
        part.writeframes(whole.readframes(int(whole.getframerate() * 6.5)))
    summary = await place_call(dialogd, server, "--wav", str(excerpt))
    text = "It was the best of times, it was the worst of times, it was the age of wisdom"
    assert share_of_words(" ".join(remembered(summary, "user")), text) >= 0.8
