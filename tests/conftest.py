"""What every room's tests share: a real `dialogd`, with whatever configuration a test needs, and the local providers."""

import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.daemon import Dialogd, running
from tests.local.sockets import MAX_CONTEXTS

StartDialogd = Callable[..., Dialogd]


def _starter(directory: Path, stack: ExitStack) -> StartDialogd:
    def start(**settings: Any) -> Dialogd:
        return stack.enter_context(running(directory / f"dialogd-{len(list(directory.iterdir()))}", **settings))

    return start


@pytest.fixture
def start_dialogd(tmp_path: Path) -> Iterator[StartDialogd]:
    """Return a function that starts a `dialogd` for one test; see `tests.e2e.daemon.running` for what it takes."""
    with ExitStack() as stack:
        yield _starter(tmp_path, stack)


@pytest.fixture(scope="module")
def start_shared_dialogd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartDialogd]:
    """Return a function that starts a `dialogd` for the tests of one module."""
    with ExitStack() as stack:
        yield _starter(tmp_path_factory.mktemp("shared"), stack)


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    """`python -m dialog_local` with its models loaded; gives host and port. It must end cleanly on SIGTERM."""
    command = [sys.executable, "-m", "dialog_local", "--listen", "127.0.0.1:0", "--max-contexts", str(MAX_CONTEXTS)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        address = process.stderr.readline().removeprefix("listening on http://").strip()
        assert re.fullmatch(r"loading the recogniser … \d+\.\d s\n", process.stderr.readline())
        assert re.fullmatch(r"loading the voice … \d+\.\d s\n", process.stderr.readline())
        try:
            yield address
        finally:
            process.send_signal(signal.SIGTERM)
            rest = process.stderr.read()
    assert (process.returncode, rest) == (0, "")
