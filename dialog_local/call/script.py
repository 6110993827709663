"""A caller's lines in a file: one a turn. `#` begins a comment, `!` a turn that is said over the agent's answer."""

from pathlib import Path

from msgspec import Struct

from dialog_local.call.session import Failed, Line


class Script(Struct, frozen=True):
    """What is said, and the numbers (from 1) of the turns that interrupt."""

    lines: tuple[Line, ...]
    interrupt: tuple[int, ...]


def read_script(file: Path) -> Script:
    """Read a file of turns. Raises `Failed`."""
    try:
        written = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise Failed(f"--script {file} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    turns = [line for line in written if line and not line.startswith("#")]
    if empty := [number for number, turn in enumerate(turns, start=1) if not turn.removeprefix("!").strip()]:
        raise Failed(f"--script {file}: turn {empty[0]} says nothing; write the words behind the '!'")
    if not turns:
        raise Failed(f"--script {file}: there is no turn in it; write what the caller says, a line a turn")
    lines = tuple(Line("--say", turn.removeprefix("!").strip()) for turn in turns)
    return Script(lines, tuple(number for number, turn in enumerate(turns, start=1) if turn.startswith("!")))
