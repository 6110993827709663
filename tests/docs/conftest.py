"""The modules of docs/participants.md, as files that Python can import and mypy can check."""

from pathlib import Path

import pytest

from tests.docs.page import modules


@pytest.fixture(scope="session")
def participants(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with the page's modules."""
    directory = tmp_path_factory.mktemp("participants")
    for name, source in modules("participants.md").items():
        (directory / name).write_text(source)
    return directory
