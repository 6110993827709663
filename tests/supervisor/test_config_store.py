"""Where calls are kept, unless dialog.toml says otherwise."""

from pathlib import Path

import pytest

from dialog_supervisor.config import load
from tests.supervisor.configuration import ENVIRON, Write, refusal, writer


@pytest.fixture
def write(tmp_path: Path) -> Write:
    return writer(tmp_path)


def place(file: Path, **environ: str) -> Path:
    return load(file, ENVIRON | environ).store.path


def test_where_systemd_keeps_a_services_state(write: Write) -> None:
    environ = {"STATE_DIRECTORY": "/var/lib/dialog:/var/lib/other", "HOME": "/home/me"}
    assert place(write(), **environ) == Path("/var/lib/dialog/calls.sqlite")


def test_in_the_users_state_else(write: Write) -> None:
    assert place(write(), XDG_STATE_HOME="/state", HOME="/home/me").parent == Path("/state/dialog")
    assert place(write(), HOME="/home/me").parent == Path("/home/me/.local/state/dialog")


def test_under_a_name_for_each_configuration(write: Write, tmp_path: Path) -> None:
    here, other = write(), tmp_path / "other.toml"
    other.write_text(here.read_text())
    assert place(here, HOME="/home/me") == place(here, HOME="/home/me")
    assert place(here, HOME="/home/me") != place(other, HOME="/home/me")


@pytest.mark.parametrize("home", ["", "relative"])
def test_nowhere_where_there_is_no_home(write: Write, home: str) -> None:
    assert place(write(), HOME=home, XDG_STATE_HOME=home) == Path()


def test_where_the_file_says(write: Write, tmp_path: Path) -> None:
    assert place(write('[store]\npath = "kept/calls.sqlite"'), HOME="/home/me") == tmp_path / "kept" / "calls.sqlite"


def test_a_path_that_is_none_is_refused(write: Write) -> None:
    assert refusal(write('[store]\npath = ""')).startswith("store.path = '': a path is missing")


def test_what_is_neither_true_nor_false_is_refused(write: Write) -> None:
    assert refusal(write('[store]\nenabled = "yes"')).startswith("store.enabled = 'yes': ")
