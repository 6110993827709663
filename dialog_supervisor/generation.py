"""One version of the agent's code: the template process that has imported it, and the workers forked from it."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import structlog
import trio
from msgspec import Struct

from dialog_supervisor.config import Config
from dialog_supervisor.confinement.agents import remove_scratch
from dialog_supervisor.snapshot import GenerationFailed, Snapshot
from dialog_supervisor.tally import Tally, TallyState
from dialog_supervisor.telemetry import metrics
from dialog_supervisor.template_process import NoWorker, TemplateProcess, TemplateState
from dialog_supervisor.worker import Worker

WORKER_TIMEOUT_S = 15.0  # for a fork, also where the template has to be started again first: callers wait so long
_RESTART_PAUSE_S = 1.0  # between two starts

log = structlog.get_logger("generation")


class GenerationState(Struct, frozen=True, forbid_unknown_fields=True):
    """A generation that another process goes on with, and its template, if that runs."""

    snapshot: Snapshot
    age_s: float
    tally: TallyState
    retired: bool
    template: TemplateState | None


class Generation:
    """The agent's code as it was when this generation began, able to fork a worker for a call.

    Its template runs while the generation is current, is a canary or has calls; once it is retired, it ends with the last of
    them. `counted` is called when something was added to its tally.
    """

    def __init__(self, config: Config, snapshot: Snapshot, counted: Callable[[], None] = lambda: None) -> None:
        self.snapshot = snapshot
        self.began_at = trio.current_time()
        self.tally = Tally(counted)
        self._config = config
        self._inherited: TemplateState | None = None  # from the process that had this generation before
        self._template: TemplateProcess | None = None  # that can fork
        self._can_fork = trio.Event()
        self._workers: dict[int, Worker] = {}
        self._retired = False
        self._life: trio.CancelScope | None = None
        self.ended = trio.Event()  # its template does not run
        self.ended.set()

    def hand_over(self, now: float) -> GenerationState | None:
        """Return what another process needs to go on with it: nothing while its template starts, ends or forks."""
        template = self._template.hand_over() if self._template is not None else None
        if self._life is not None and (template is None or not self.running):
            return None
        return GenerationState(self.snapshot, now - self.began_at, self.tally.hand_over(), self._retired, template)

    def take_over(self, state: GenerationState, handed_over_at: float) -> None:
        """Go on where another process left it: before `run`, if its template is alive."""
        self.began_at, self._inherited = handed_over_at - state.age_s, state.template
        self._retired = state.retired
        self.tally.take_over(state.tally)

    @property
    def inherited(self) -> bool:
        """Whether its template is another process's, and to be gone on with by `run`."""
        return self._inherited is not None

    def know(self, worker: Worker) -> None:
        """A worker was forked for another process; what the template tells of it is for this one."""
        self._workers[worker.pid] = worker

    @property
    def name(self) -> str:
        """What operators call it: its snapshot's name."""
        return self.snapshot.name

    @property
    def workers(self) -> int:
        """How many workers of this generation are alive."""
        return len(self._workers)

    @property
    def calls(self) -> int:
        """How many calls it has, which keep it alive."""
        return self.tally.under_way

    @property
    def running(self) -> bool:
        """Whether its template runs, and is not about to end."""
        return self._life is not None and not self._life.cancel_called

    @property
    def ready(self) -> bool:
        """Whether its template can fork a worker now."""
        return self._template is not None

    def hold(self, call_id: str) -> None:
        """A call begins on this code, and stays on it."""
        self.tally.begin(call_id)

    def let_go(self, call_id: str) -> None:
        """A call has ended."""
        self.tally.end(call_id)
        self._end_when_idle()

    def promote(self) -> None:
        """It gets calls: it lives until `retire`."""
        self._retired = False

    def retire(self) -> None:
        """No more calls will begin on this code."""
        self._retired = True
        self._end_when_idle()

    def _end_when_idle(self) -> None:
        if self._retired and not self.calls and self._life is not None:
            self._life.cancel()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep a template alive until `retire` has been called and the last call has ended; may then be run again.

        Raises `GenerationFailed` if its first start fails; later deaths are mended.
        """
        self._retired, self.ended = self._retired and self._inherited is not None, trio.Event()
        try:
            with trio.CancelScope() as self._life:
                self._end_when_idle()
                await self._live(task_status)
        finally:
            self._life = None
            self.ended.set()

    async def _live(self, task_status: trio.TaskStatus[None]) -> None:
        started_at = trio.current_time()
        async with self._serving() as template:
            task_status.started()
            await template.serve()
        while True:
            log.error("the template process died and is started again; calls under way go on", generation=self.name)
            await trio.sleep_until(started_at + _RESTART_PAUSE_S)
            started_at = trio.current_time()
            try:
                async with self._serving() as template:
                    log.info("the template process runs again", generation=self.name)
                    await template.serve()
            except GenerationFailed as error:
                log.error("the template process has not started again", reason=str(error))

    @asynccontextmanager
    async def _serving(self) -> AsyncIterator[TemplateProcess]:
        """Start a template, yield it when the agent is imported, and end it. Raises `GenerationFailed`."""
        inherited, self._inherited = self._inherited, None
        if inherited is None:
            template = await TemplateProcess.started(self._config, self.snapshot, self._workers)
        else:
            template = TemplateProcess.taken_over(inherited, self.name, self._workers)
        async with template.ending():
            try:
                if inherited is None:
                    await template.ready(self._config, self.snapshot)
                self._template = template
                self._can_fork.set()
                yield template
            finally:
                self._template = None
                if self._can_fork.is_set():  # who waits for a start that has failed waits for the next
                    self._can_fork = trio.Event()

    @asynccontextmanager
    async def worker(self, worker: Worker) -> AsyncIterator[None]:
        """Fork the process of `worker`, and be its supervisor inside the block. Raises `NoWorker`."""
        try:
            with metrics.forking():
                await self._fork(worker)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(worker.run)
                yield
                nursery.cancel_scope.cancel()
        finally:
            self._workers.pop(worker.pid, None)
            await remove_scratch(self._config, self.snapshot, worker.pid)

    async def _fork(self, worker: Worker) -> None:
        """Have the template fork, or, where that dies or does not answer, the one that is started after it."""
        with trio.move_on_after(WORKER_TIMEOUT_S):
            while worker.pid == 0:
                if self._template is None:  # also where a template died while somebody was being woken for it
                    await self._can_fork.wait()
                else:
                    await self._template.fork(worker)
            return
        raise NoWorker(f"no template process could fork one within {WORKER_TIMEOUT_S:g} s")
