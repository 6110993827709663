"""The supervisor's side of the sandbox: what of this machine agent code is shown, and what is deleted after a call."""

import shutil
from functools import partial
from pathlib import Path

import trio

from dialog_supervisor.config import Config, ConfigError
from dialog_supervisor.confinement import sandbox
from dialog_supervisor.confinement.sandbox import Confinement, scratch_prefix
from dialog_supervisor.snapshot import Snapshot
from dialog_supervisor.store.sqlite import files_of
from dialog_supervisor.threads import in_thread

_SCRATCH = "scratch"  # beside the snapshots: the workers' directories for temporary files
_HIDDEN_DIRECTORIES = ("CREDENTIALS_DIRECTORY", "STATE_DIRECTORY")  # environment variables, systemd.exec(5)


def check_sandbox(config: Config) -> None:
    """Raise `ConfigError` when a sandbox is asked for that this machine does not have."""
    if config.workers.sandbox and (why := sandbox.lacking()):
        raise ConfigError(f"{config.file}: workers.sandbox = true: {why}; set it to false, or take a kernel that can")


def confinement(config: Config, snapshot: Snapshot) -> Confinement | None:
    """Return the sandbox for a version of the agent's code: without dialogd's configuration, secrets and recordings.

    None when there is to be no sandbox. Raises OSError.
    """
    if not config.workers.sandbox:
        return None
    scratch = _scratch(snapshot)
    scratch.mkdir(mode=0o700, exist_ok=True)
    directories = [Path(config.environ[name]) for name in _HIDDEN_DIRECTORIES if name in config.environ]
    store = files_of(config.store.path)
    hidden = [config.file, config.file.parent / ".env", config.recordings.directory, *store, *directories]
    if config.gateway.key:
        hidden.append(config.file.parent / config.gateway.key)
    return Confinement(
        scratch=str(scratch),
        readable=tuple(map(str, config.workers.readable)),
        writable=tuple(map(str, config.workers.writable)),
        hidden=tuple(map(str, hidden)),
    )


async def remove_scratch(config: Config, snapshot: Snapshot, pid: int) -> None:
    """Delete what a worker has left of temporary files, also when cancelled."""
    if config.workers.sandbox:
        with trio.CancelScope(shield=True):
            for directory in _scratch(snapshot).glob(f"{scratch_prefix(pid)}*"):
                remove = partial(shutil.rmtree, directory, ignore_errors=True)
                try:
                    await in_thread(remove)
                except OSError:  # no thread: a call's temporary files do not wait for one
                    remove()


def _scratch(snapshot: Snapshot) -> Path:
    return snapshot.directory.parent / _SCRATCH
