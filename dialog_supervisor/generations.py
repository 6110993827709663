"""The hot swap: which generation the next call gets, which others still have calls, and which one a rollback returns to."""

import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import structlog
import trio

from dialog_supervisor import metrics
from dialog_supervisor.config import Config
from dialog_supervisor.generation import Generation
from dialog_supervisor.probe import probe
from dialog_supervisor.snapshot import GenerationFailed, private_directory, take
from dialog_supervisor.sqlite import files_of

log = structlog.get_logger("generations")


class Generations:
    """All versions of the agent's code that this dialogd has; `current` is for the next call.

    A generation is named HASH.N: the hash of its content, and which load of this dialogd's it is. The same content loaded
    again is another generation, because what it imports from elsewhere may have changed. dialog.toml is not read again.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._loads = 0
        self._known: list[Generation] = []  # those with a snapshot, in the order of their loading
        self._current: Generation | None = None
        self._candidate: Generation | None = None
        self._previous: Generation | None = None  # its snapshot is kept, also when its template has ended
        self._swapping = trio.Lock()
        self._directory = Path()
        self._nursery: trio.Nursery | None = None

    @property
    def current(self) -> Generation:
        """The generation of the next call. There is one from when `run` has started."""
        assert self._current is not None
        return self._current

    @property
    def workers(self) -> int:
        """How many workers are alive, of all generations."""
        return sum(generation.workers for generation in self._known)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Have a generation serve until cancelled, and leave nothing behind. Raises `GenerationFailed` if the first cannot.

        The first is not probed: it has nothing to fall back to, and a start should not depend on the providers' mood.
        """
        runtime = self._config.environ.get("RUNTIME_DIRECTORY")
        parent = Path(runtime.split(":")[0]) / "generations" if runtime else Path(tempfile.gettempdir())
        with private_directory(parent) as self._directory:
            try:
                async with trio.open_nursery() as self._nursery:
                    self._current = await self._load()
                    self._candidate = None
                    task_status.started()
                    await trio.sleep_forever()
            finally:
                with trio.CancelScope(shield=True):
                    await self._swapping.acquire()  # a swap under way, cancelled too, has let go of the directory

    async def reload(self) -> dict[str, Any]:
        """Copy the agent's directory, import it, probe it, and promote it. Calls under way keep the code they have.

        Returns the new generation, its hash, the previous one and the seconds taken. Raises `GenerationFailed` with the
        author's traceback; the old generation then serves on. Reloads wait for one another.
        """
        return await self._swap("reload", self._load_and_probe)

    async def rollback(self) -> dict[str, Any]:
        """Promote the generation that served before the current one; a second rollback undoes the first.

        It has served already, so it is not probed. Returns and raises as `reload`.
        """
        return await self._swap("rollback", self._revive)

    def describe(self) -> list[dict[str, Any]]:
        """Return the generations, the oldest first; `state` is current, starting, retiring or previous."""
        return [
            {
                "generation": generation.name,
                "hash": generation.snapshot.hash,
                "state": self._state(generation),
                "rollback": generation is self._previous,
                "age_s": round(trio.current_time() - generation.began_at, 1),
                "calls": generation.calls,
                "workers": generation.workers,
            }
            for generation in self._known
        ]

    def _state(self, generation: Generation) -> str:
        if generation is self._current:
            return "current"
        if generation is self._candidate:
            return "starting"
        return "retiring" if generation.calls or generation is not self._previous else "previous"

    async def _swap(self, what: str, make: Callable[[], Awaitable[Generation]]) -> dict[str, Any]:
        async with self._swapping:
            began_at, old = trio.current_time(), self.current
            try:
                new = await make()
                self._promote(new)
            except GenerationFailed as error:
                metrics.SWAPS.labels(what, "failed").inc()
                log.error(f"the {what} failed; the old generation serves on", generation=old.name, reason=str(error))
                raise GenerationFailed(f"the {what} failed, and generation {old.name} serves on:\n\n{error}\n") from None
            finally:
                with trio.CancelScope(shield=True):
                    await self._dismiss_candidate()
            metrics.SWAPS.labels(what, "done").inc()
            seconds = round(trio.current_time() - began_at, 3)
            log.info(f"{what} done", generation=new.name, previous=old.name, retiring_calls=old.calls, seconds=seconds)
            return {"generation": new.name, "hash": new.snapshot.hash, "previous": old.name, "seconds": seconds}

    def _promote(self, new: Generation) -> None:
        old = self.current
        self._current, self._previous = new, old
        new.promote()
        old.retire()

    async def _dismiss_candidate(self) -> None:
        """End a candidate that was not promoted, and forget what is needed no more."""
        candidate, self._candidate = self._candidate, None
        if candidate is not None and candidate is not self._current:
            candidate.retire()
            await candidate.ended.wait()
        await self._tidy()

    async def _load_and_probe(self) -> Generation:
        generation = await self._load()
        await probe(generation, self._config.calls.shutdown_grace)
        return generation

    async def _load(self) -> Generation:
        """Copy the agent's directory and start a template from the copy."""
        self._loads += 1
        config = self._config
        files = (config.file, config.file.parent / ".env", *files_of(config.store.path))
        unwanted = (*files, config.recordings.directory, self._directory)
        snapshot = await trio.to_thread.run_sync(take, config.agent_path, self._directory, self._loads, unwanted)
        self._candidate = Generation(config, snapshot)
        self._known.append(self._candidate)
        return await self._start(self._candidate)

    async def _revive(self) -> Generation:
        if self._previous is None:
            raise GenerationFailed("no generation has served before it; correct the code, and reload")
        if self._previous.running:
            return self._previous
        await self._previous.ended.wait()
        return await self._start(self._previous)

    async def _start(self, generation: Generation) -> Generation:
        assert self._nursery is not None
        await self._nursery.start(self._keep, generation)
        return generation

    async def _keep(self, generation: Generation, *, task_status: trio.TaskStatus[None]) -> None:
        """Run a generation to its end."""
        try:
            await generation.run(task_status=task_status)
        finally:
            with trio.CancelScope(shield=True):
                await self._tidy()

    async def _tidy(self) -> None:
        """Forget the generations that have ended, but for the one that a rollback may want."""
        wanted = (self._current, self._candidate, self._previous)
        ended = [generation for generation in self._known if generation not in wanted and generation.ended.is_set()]
        self._known = [generation for generation in self._known if generation not in ended]
        for generation in ended:
            try:
                await trio.to_thread.run_sync(generation.snapshot.remove)
            except OSError as error:
                log.warning("a snapshot cannot be removed", directory=str(generation.snapshot.directory), reason=str(error))
