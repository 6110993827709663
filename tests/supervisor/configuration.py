"""A usable dialog.toml for tests to spoil, and what is said against it then."""

from collections.abc import Callable
from pathlib import Path

import pytest

from dialog_supervisor.config import ConfigError, load

SID = "AC" + "0123456789abcdef" * 2
TOKEN = "fedcba9876543210fedcba9876543210"
GATEWAY = 'public_url = "https://voice.example.com"'
TWILIO = f'account_sid = "{SID}"\nauth_token = "env:TWILIO_AUTH_TOKEN"'
ENVIRON = {"TWILIO_AUTH_TOKEN": TOKEN, "PATH": "/usr/bin", "XDG_RUNTIME_DIR": "/run/user/1"}

Write = Callable[..., Path]


def writer(tmp_path: Path) -> Write:
    """Return a function that writes a usable dialog.toml with what a test adds to it, or puts in a section's place."""
    (tmp_path / "agent").mkdir()

    def write_file(
        more: str = "",
        *,
        gateway: str = GATEWAY,
        twilio: str = TWILIO,
        agent: str = 'path = "agent"',
        text: str | None = None,
    ) -> Path:
        file = tmp_path / "dialog.toml"
        sections = f"[gateway]\n{gateway}\n[twilio]\n{twilio}\n[agent]\n{agent}\n{more}\n"
        file.write_text(sections if text is None else text)
        return file

    return write_file


def refusal(file: Path, environ: dict[str, str] | None = None) -> str:
    """Return what `load` has to say against a file, less the file's name, which it begins with."""
    with pytest.raises(ConfigError) as caught:
        load(file, ENVIRON if environ is None else environ)
    message = str(caught.value)
    assert message.startswith(f"{file}: ")
    assert TOKEN not in message
    return message.removeprefix(f"{file}: ")
