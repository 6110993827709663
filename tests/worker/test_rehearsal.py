"""The rehearsal before the first fork: it meets every service, loads what calls need, and leaves nothing behind."""

import os
import subprocess
import sys

import pytest

ADAPTERS = "from dialog_worker import CartesiaTTS, DeepgramSTT, ElevenLabsTTS, OpenAIAgent, OpenAISTT"
EARS_ALONE = "from dialog_worker import DeepgramSTT"
ECHO = "from dialog_worker import Agent"

_SCRIPT = """
import logging, os, sys, threading
import dialog_worker.main
dialog_worker.main.prepare()
{imports}
import dialog_worker.rehearsal as rehearsal
before = os.listdir("/proc/self/fd")
assert rehearsal.rehearse()
assert os.listdir("/proc/self/fd") == before
assert len(os.listdir("/proc/self/task")) == 1
{then}
"""


def run(imports: str, then: str = "", **environ: str) -> None:
    """Run a process that imports this, rehearses, and does `then`."""
    script = _SCRIPT.format(imports=imports, then=then)
    found = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False, env=os.environ | environ
    )
    assert found.returncode == 0, found.stderr


@pytest.mark.parametrize("imports", [ECHO, EARS_ALONE, ADAPTERS])
def test_it_speaks_to_every_service_and_leaves_neither_threads_nor_descriptors(imports: str) -> None:
    run(imports)


def test_an_agent_without_a_model_does_not_have_the_models_library_loaded() -> None:
    run(ECHO, "assert not {'openai', 'pydantic', 'httpx2'} & sys.modules.keys()")


def test_a_call_loads_no_more_modules() -> None:
    run(
        ADAPTERS,
        "from dialog_worker.rehearsal.stage import Stage\n"
        "loaded = set(sys.modules)\n"
        "assert rehearsal._talk(Stage(0)) and rehearsal._talk(Stage(1))\n"
        "assert set(sys.modules) == loaded, set(sys.modules) - loaded",
    )


def test_it_keeps_away_from_a_proxy_which_would_be_asked_for_this_machine() -> None:
    run(
        ADAPTERS,
        "assert 'openai' in sys.modules",
        HTTP_PROXY="http://127.0.0.1:1",
        NO_PROXY="",
    )


def test_it_says_so_where_no_network_can_be_had() -> None:
    run(
        ADAPTERS,
        "import socket\n"
        "def refuse(*_): raise PermissionError(1, 'refused')\n"
        "socket.create_server = refuse\n"
        "assert not rehearsal.rehearse()",
    )
