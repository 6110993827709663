"""What every room's tests share: a real `dialogd`, started with whatever configuration a test needs."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.daemon import Dialogd, running

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
