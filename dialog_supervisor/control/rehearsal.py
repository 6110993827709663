"""`dialogctl replay`: finds the event log, and has the agent's interpreter play it, with a worker's environment."""

import subprocess
import sys
from pathlib import Path

from dialog_supervisor.config import Config
from dialog_supervisor.control.asking import Failed, configuration
from dialog_supervisor.telemetry import event_logs

_REPLAY = ("-P", "-m", "dialog_worker.replay")  # by name: the supervisor's rooms do not import the worker's


def replay(log: str, *, tools: bool, json: bool) -> int:
    """Replay a call, by its id or its log's file, and return the exit code. Raises `Failed`."""
    config = configuration()
    file, agent = _file(config, log), config.agent
    python = str(config.file.parent / agent.python) if agent.python else sys.executable
    options = [*(["--tools"] if tools else []), *(["--json"] if json else [])]
    command = [python, *_REPLAY, str(config.agent_path.resolve()), agent.entry, str(file.absolute()), *options]
    try:
        return subprocess.run(command, env=config.agent_environ(), check=False).returncode
    except OSError as error:
        raise Failed(f"agent.python: {python} cannot be run: {error.strerror}") from None


def _file(config: Config, log: str) -> Path:
    if (file := Path(log)).is_file():
        return file
    directory = config.events.directory
    found = event_logs.find(directory, log) if directory != Path() else []
    if len(found) > 1:
        files = ", ".join(map(str, found))
        raise Failed(f"call {log} has more than one event log, for dialogd was started anew during it; name one of {files}")
    if not found:
        raise Failed(f"{log} is no file, and no call with an event log here; see events.directory, and events.transcripts")
    return found[0]
