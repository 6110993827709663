"""What every room's tests share: a real `dialogd`, with whatever configuration a test needs, and the local providers."""

import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.daemon import Dialogd, running
from tests.local.sockets import MAX_CONTEXTS

StartDialogd = Callable[..., Dialogd]
TABLE = ("provider", "in mid-call", "silence", "words heard", "the agent is told", "the conversation")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the table of `tests/e2e/misbehaviour`, also where its calls were made by another process (pytest-xdist).

    Before it comes what tests could not show on this machine.
    """
    reports = [report for outcome in ("passed", "failed") for report in terminalreporter.getreports(outcome)]
    for name, value in [told for report in reports for told in report.user_properties if told[0].startswith("not shown")]:
        terminalreporter.write_line(f"{name}: {value}", yellow=True)
    rows = [value for report in reports for name, value in report.user_properties if name == "misbehaviour"]
    if not rows:
        return
    widths = [max(len(row[column]) for row in [TABLE, *rows]) for column in range(len(TABLE))]
    terminalreporter.section("misbehaviours of providers in mid-call")
    for row in [TABLE, *rows]:
        terminalreporter.write_line("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


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


@contextmanager
def local_providers(*options: str) -> Iterator[str]:
    """Run `python -m dialog_local` with its models loaded; gives host and port. It must end cleanly on SIGTERM."""
    command = [sys.executable, "-m", "dialog_local", "--listen", "127.0.0.1:0", *options]
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


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    """The local providers, one for all tests, with few contexts, so that some can find them taken."""
    with local_providers("--max-contexts", str(MAX_CONTEXTS)) as address:
        yield address
