"""The hot swap: which generation the next call gets, which one is on trial, and which one a rollback returns to."""

import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import structlog
import trio
from msgspec import Struct
from msgspec.structs import asdict

from dialog_supervisor.canary import Rules, Trial
from dialog_supervisor.config import Config
from dialog_supervisor.generation import Generation, GenerationState
from dialog_supervisor.probe import probe
from dialog_supervisor.snapshot import GenerationFailed, PrivateDirectory, private_directory, take
from dialog_supervisor.store.sqlite import files_of
from dialog_supervisor.telemetry import metrics
from dialog_supervisor.threads import in_thread

log = structlog.get_logger("generations")


def no_code(config: Config) -> tuple[Path, ...]:
    """Return dialogd's own files, which may be in the agent's directory and are not of it."""
    files = (config.file, config.file.parent / ".env", *files_of(config.store.path))
    directories = (config.recordings.directory, config.events.directory)
    return *files, *(directory for directory in directories if directory != Path())


class GenerationsState(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All versions of the agent's code that another process goes on with; `current` and the like are names."""

    directory: PrivateDirectory
    loads: int
    known: tuple[GenerationState, ...]
    current: str
    previous: str | None
    canary: str | None
    trial: Trial

    def descriptors(self) -> list[int]:
        """Return those that go along."""
        templates = [one.template for one in self.known if one.template is not None]
        return [self.directory.lock_fd, *(template.control_fd for template in templates)]


class Generations:
    """All versions of the agent's code that this dialogd has; `current` is for the next call, but for a canary's share.

    A generation is named HASH.N: the hash of its content, and which load of this dialogd's it is. The same content loaded
    again is another generation, because what it imports from elsewhere may have changed. dialog.toml is not read again.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        agent = config.agent
        self._rules = Rules(agent.canary, agent.canary_calls, agent.canary_margin)
        self._loads = 0
        self._known: list[Generation] = []  # those with a snapshot, in the order of their loading
        self._current: Generation | None = None
        self._candidate: Generation | None = None
        self._canary: Generation | None = None
        self._trial = Trial("", self._rules)  # the canary's; without one, nobody's
        self._counted = trio.Event()  # a call or a turn more, of any generation
        self._previous: Generation | None = None  # its snapshot is kept, also when its template has ended
        self._swapping = trio.Lock()
        self._directory = PrivateDirectory(Path(), -1)
        self._inherited: PrivateDirectory | None = None  # from the process that had these generations before
        self._nursery: trio.Nursery | None = None

    @property
    def current(self) -> Generation:
        """The generation that was promoted last. There is one from when `run` has started."""
        assert self._current is not None
        return self._current

    @property
    def canary(self) -> str | None:
        """The name of the generation on trial, if there is one."""
        return self._canary.name if self._canary else None

    @property
    def workers(self) -> int:
        """How many workers are alive, of all generations."""
        return sum(generation.workers for generation in self._known)

    def for_next_call(self) -> Generation:
        """Return the generation of the next call: the canary when it is its turn, and its template runs."""
        if self._canary is None or not self._trial.takes_next():
            return self.current
        if self._canary.ready:
            return self._canary
        self._canary.tally.miss()
        return self.current

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Have a generation serve until cancelled, and leave nothing behind. Raises `GenerationFailed` if the first cannot.

        The first is not probed: it has nothing to fall back to, and a start should not depend on the providers' mood.
        """
        runtime = self._config.environ.get("RUNTIME_DIRECTORY")
        parent = Path(runtime.split(":")[0]) / "generations" if runtime else Path(tempfile.gettempdir())
        with private_directory(parent, self._inherited) as self._directory:
            try:
                async with trio.open_nursery() as self._nursery:
                    if self._inherited is None:
                        self._current = await self._load()
                        self._candidate = None
                    else:
                        await self._go_on()
                    task_status.started()
                    await self._judge()
            finally:
                with trio.CancelScope(shield=True):
                    await self._swapping.acquire()  # a swap under way, cancelled too, has let go of the directory

    def hand_over(self, now: float) -> GenerationsState | None:
        """Return what another process needs to go on with them: nothing while one of them starts or ends.

        For use within `unchanged`.
        """
        known = [generation.hand_over(now) for generation in self._known]
        told = tuple(generation for generation in known if generation is not None)
        if len(told) < len(known):
            return None
        return GenerationsState(
            directory=self._directory,
            loads=self._loads,
            known=told,
            current=self.current.name,
            previous=self._previous.name if self._previous else None,
            canary=self.canary,
            trial=self._trial,
        )

    def take_over(self, state: GenerationsState, handed_over_at: float) -> None:
        """Before `run`: go on with those that another process had."""
        self._inherited, self._loads, self._trial = state.directory, state.loads, state.trial
        for one in state.known:
            generation = Generation(self._config, one.snapshot, self._on_count)
            generation.take_over(one, handed_over_at)
            self._known.append(generation)
        self._current = self.named(state.current)
        self._previous = None if state.previous is None else self.named(state.previous)
        self._canary = None if state.canary is None else self.named(state.canary)

    def named(self, name: str) -> Generation:
        """Return the generation of this name. Raises KeyError."""
        return {generation.name: generation for generation in self._known}[name]

    async def _go_on(self) -> None:
        for generation in [generation for generation in self._known if generation.inherited]:
            await self._start(generation)

    @asynccontextmanager
    async def unchanged(self) -> AsyncIterator[None]:
        """Inside, no reload, rollback or promotion by hand is under way."""
        async with self._swapping:
            yield

    async def reload(self) -> dict[str, Any]:
        """Copy the agent's directory, import it, probe it, and promote it, or try it. Calls under way keep their code.

        Returns the new generation, its hash, the previous one, the seconds taken, the share of a hundred new calls that it
        takes as a `canary` (None when it was promoted), and the canary that has `ended` by it, if one has. Raises
        `GenerationFailed` with the author's traceback; the old generation then serves on. Reloads wait for one another.
        """
        return await self._swap("reload", self._load_and_probe, self._try_out if self._rules.share else self._promote)

    async def rollback(self) -> dict[str, Any]:
        """End the canary; without one, promote the generation before the current one, and a second time undo that.

        It has served already, so it is not probed. Returns and raises as `reload`.
        """
        return await self._swap("rollback", self._revive, self._return_to)

    async def promote(self) -> dict[str, Any]:
        """Promote the canary now. Returns and raises as `reload`."""
        return await self._swap("promotion", self._canary_to_promote, self._promote)

    def describe(self) -> list[dict[str, Any]]:
        """Return the generations, the oldest first; `state` is current, canary, starting, retiring or previous."""
        return [
            {
                "generation": generation.name,
                "hash": generation.snapshot.hash,
                "state": self._state(generation),
                "rollback": generation is self._previous,
                "age_s": round(trio.current_time() - generation.began_at, 1),
                "calls": generation.calls,
                "workers": generation.workers,
                "tally": asdict(generation.tally.figures),
                "trial": self._figures(generation) if generation is self._canary else None,
            }
            for generation in self._known
        ]

    def _state(self, generation: Generation) -> str:
        if generation is self._current:
            return "current"
        if generation is self._candidate:
            return "starting"
        if generation is self._canary:
            return "canary"
        return "retiring" if generation.calls or generation is not self._previous else "previous"

    async def _swap(
        self, what: str, make: Callable[[], Awaitable[Generation]], install: Callable[[Generation], None]
    ) -> dict[str, Any]:
        async with self._swapping:
            began_at = trio.current_time()
            try:
                new = await make()
                old, canary = self.current, self._canary
                install(new)
                done = {
                    "generation": new.name,
                    "previous": canary.name if canary and new is old else old.name,
                    "seconds": round(trio.current_time() - began_at, 3),
                    "canary": self._rules.share if new is self._canary else None,
                    "ended": canary.name if canary not in (None, new) else None,
                }
            except GenerationFailed as error:
                metrics.SWAPS.labels(what, "failed").inc()
                serving = self.current.name
                log.error(f"the {what} failed; the old generation serves on", generation=serving, reason=str(error))
                raise GenerationFailed(f"the {what} failed, and generation {serving} serves on:\n\n{error}\n") from None
            finally:
                with trio.CancelScope(shield=True):
                    await self._dismiss_candidate()
            metrics.SWAPS.labels(what, "done").inc()
            retiring = sum(generation.calls for generation in self._known if self._state(generation) == "retiring")
            known = {name: value for name, value in done.items() if value is not None}
            log.info(f"{what} done", **known, retiring_calls=retiring)
            return {"hash": new.snapshot.hash, **done}

    # The canary

    def _try_out(self, new: Generation) -> None:
        """Have a share of the calls take the new generation, instead of another that was on trial."""
        self._dismiss_canary()
        self._canary = new
        self._trial = Trial(new.name, self._rules, self.current.tally.figures.as_beginning())

    def _promote(self, new: Generation) -> None:
        self._dismiss_canary(unless=new)
        old = self.current
        self._current, self._previous = new, old
        new.promote()
        old.retire()

    def _return_to(self, generation: Generation) -> None:
        if generation is self._current:
            self._dismiss_canary()
        else:
            self._promote(generation)

    def _dismiss_canary(self, *, unless: Generation | None = None) -> None:
        """There is no trial any more; the calls that have the canary's code finish on it."""
        canary, self._canary = self._canary, None
        if canary not in (None, unless):
            canary.retire()

    async def _canary_to_promote(self) -> Generation:
        if self._canary is None:
            raise GenerationFailed("no canary is on trial; dialogctl generations shows what there is")
        return self._canary

    async def _judge(self) -> None:
        """End a trial as soon as the figures say how."""
        while True:
            await self._counted.wait()
            self._counted = trio.Event()
            if self._canary is not None:
                self._judge_canary(self._canary, self.current)

    def _judge_canary(self, canary: Generation, old: Generation) -> None:
        verdict = self._trial.verdict(canary.tally.figures, old.tally.figures)
        if verdict is None:
            return
        said = {"generation": canary.name, "reason": verdict.reason, "trial": self._figures(canary)}
        if verdict.promoted:
            self._promote(canary)
            metrics.TRIALS.labels("promoted").inc()
            log.info("canary promoted", previous=old.name, **said)
        else:
            self._dismiss_canary()
            metrics.TRIALS.labels("rolled_back").inc()
            log.error("canary rolled back", current=old.name, **said)

    def _figures(self, canary: Generation) -> dict[str, Any]:
        return self._trial.describe(canary.tally.figures, self.current.tally.figures)

    def _on_count(self) -> None:
        self._counted.set()

    # Loading and ending

    async def _dismiss_candidate(self) -> None:
        """End a candidate that was not promoted, and forget what is needed no more."""
        candidate, self._candidate = self._candidate, None
        if candidate is not None and candidate not in (self._current, self._canary):
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
        directory = self._directory.path
        unwanted = (*no_code(config), directory)
        try:
            snapshot = await in_thread(partial(take, config.agent_path, directory, self._loads, unwanted))
        except OSError as error:
            raise GenerationFailed(f"the agent's code cannot be copied: {error.strerror or error}") from error
        self._candidate = Generation(config, snapshot, self._on_count)
        self._known.append(self._candidate)
        return await self._start(self._candidate)

    async def _revive(self) -> Generation:
        if self._canary is not None:
            return self.current
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
                await in_thread(generation.snapshot.remove)
            except OSError as error:
                log.warning("a snapshot cannot be removed", directory=str(generation.snapshot.directory), reason=str(error))
