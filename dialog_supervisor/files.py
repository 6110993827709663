"""Files that come over the network: written beside the event loop, to a name of their own only when they are whole."""

import os
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, suppress
from pathlib import Path

import trio

from dialog_supervisor.threads import in_thread

_PRIVATE = 0o600  # they hold what callers said
_PRIVATE_DIRECTORY = 0o700


class NotKept(Exception):
    """A file could not be written, or is larger than the operator permits."""


async def keep(content: AbstractAsyncContextManager[AsyncIterator[bytes]], path: Path, size_limit: int) -> Path:
    """Write what comes to `path` and return it; a reader never finds half a file there. Raises `NotKept`.

    What opening or reading `content` raises goes through, and leaves nothing behind.
    """
    partial = path.with_name(path.name + ".part")
    try:
        await in_thread(lambda: _prepare(path.parent))
        async with content as chunks, await trio.open_file(partial, "wb", opener=_private) as file:
            size = 0
            async for chunk in chunks:
                size += len(chunk)
                if size > size_limit:
                    raise NotKept(f"it is larger than {size_limit} bytes (recordings.size_limit)")
                await file.write(chunk)
        await trio.Path(partial).rename(path)
    except OSError as error:
        raise NotKept(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        with trio.CancelScope(shield=True), suppress(OSError):  # which was told of already, or the file is whole
            await trio.Path(partial).unlink(missing_ok=True)
    return path


def _prepare(directory: Path) -> None:
    directory.mkdir(mode=_PRIVATE_DIRECTORY, parents=True, exist_ok=True)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, _PRIVATE)
