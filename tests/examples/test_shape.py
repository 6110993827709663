"""What all examples have in common: the same files, configurations that load, a conversation, and a demo to run it."""

import subprocess
from pathlib import Path

import pytest

from dialog_local.call.script import read_script
from dialog_supervisor.config import load
from tests.examples.desk import EXAMPLES

WITH_CONVERSATION = sorted(file.parent.name for file in EXAMPLES.glob("*/conversation.txt"))
DEMO = Path(__file__).parents[2] / "scripts" / "demo"


def demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(DEMO), *arguments], capture_output=True, text=True, timeout=30, check=False)


@pytest.mark.parametrize("example", WITH_CONVERSATION)
def test_an_example_is_configured_for_this_machine_and_for_the_real_services(example: str) -> None:
    directory = EXAMPLES / example
    local, real = (load(directory / name, {"TWILIO_AUTH_TOKEN": "t"}) for name in ("local.toml", "dialog.toml"))
    assert local.agent.env["DEEPGRAM_URL"]
    assert local.transfer == real.transfer
    template = (directory / ".env.template").read_text()
    assert all(f"{name}=" in template for name in local.agent.env if not name.endswith("URL"))


@pytest.mark.parametrize("example", WITH_CONVERSATION)
def test_an_example_says_how_to_run_it(example: str) -> None:
    text = (EXAMPLES / example / "README.md").read_text()
    command = "./scripts/demo" if example == "minimal" else f"./scripts/demo {example}"
    assert f"`{command}`" in text
    assert f"dialogd -c examples/{example}/dialog.toml" in text
    assert read_script(EXAMPLES / example / "conversation.txt").lines


def test_an_unknown_example_is_told_with_those_that_there_are() -> None:
    done = demo("nothing")
    assert done.returncode == 1
    assert f"there is no example nothing; there are: {' '.join(WITH_CONVERSATION)}" in done.stderr


def test_an_example_without_a_conversation_is_told_so() -> None:
    done = demo("echo")
    assert done.returncode == 1
    assert "examples/echo has no conversation.txt" in done.stderr
