"""The control API: dialogd's state and calls as JSON over a unix socket that only its user can open."""

import os
import stat
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import anyio
import msgspec
import structlog
import trio
from hypercorn.config import Config as HypercornConfig
from hypercorn.trio import serve
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from dialog_supervisor.call import Call
from dialog_supervisor.config import ConfigError
from dialog_supervisor.confinement import memory
from dialog_supervisor.logs import mask
from dialog_supervisor.snapshot import GenerationFailed
from dialog_supervisor.telemetry.figures import CONTENT_TYPE
from dialog_supervisor.upgrade.execution import UpgradeFailed

_RESTART_PAUSE_S = 1.0
_NOT_FOUND = 404
_CONFLICT = 409  # nothing is wrong with the request, but with what is to serve
_KEEP_ALIVE_S = 2.0  # between requests; Hypercorn notices that a client left only when this is over

log = structlog.get_logger("control")


class Refused(Exception):
    """What was asked for cannot be done now; the message says why, and what to do."""


class Controlled(Protocol):
    """What the control API asks of the supervisor."""

    def status(self) -> dict[str, Any]:
        """Return dialogd's state in figures."""

    def calls(self) -> Sequence[Call]:
        """Return the calls that have not ended."""

    def find(self, call_id: str) -> Call | None:
        """Return the call of this id, if it has not ended."""

    def render_figures(self) -> str:
        """Return all figures as Prometheus reads them."""

    def generations(self) -> Sequence[dict[str, Any]]:
        """Return the versions of the agent's code, the oldest first."""

    def drain(self) -> dict[str, Any]:
        """Take no other call; those under way go on."""

    def undrain(self) -> dict[str, Any]:
        """Take calls again. Raises `Refused` when dialogd is stopping."""

    async def reload(self) -> dict[str, Any]:
        """Have the next call use the agent's code as it is now. Raises `GenerationFailed`."""

    async def upgrade(self) -> dict[str, Any]:
        """Go on as the version that is installed now. Raises `Refused` or `UpgradeFailed`."""

    async def rollback(self) -> dict[str, Any]:
        """End the canary, or have the next call use the code that was current before. Raises `GenerationFailed`."""

    async def promote(self) -> dict[str, Any]:
        """Have all next calls use the canary's code. Raises `GenerationFailed`."""


class NoSuchCall(Exception):
    """There is no call of this id."""


class ControlApi:
    """What is answered on the control socket."""

    def __init__(self, controlled: Controlled) -> None:
        self._controlled = controlled

    def _call(self, request: Request) -> Call:
        call_id = request.path_params["call_id"]
        call = self._controlled.find(call_id)
        if call is None:
            raise NoSuchCall(f"there is no call {call_id}; see dialogctl calls")
        return call

    async def status(self, _: Request) -> Response:
        """Answer with dialogd's state, and the memory of its workers."""
        found = await memory.measure_all([call.worker for call in self._controlled.calls()])
        return JSONResponse(self._controlled.status() | memory.describe(found))

    async def metrics(self, _: Request) -> Response:
        """Answer with all figures."""
        return Response(self._controlled.render_figures(), media_type=CONTENT_TYPE)

    async def calls(self, _: Request) -> Response:
        """Answer with the calls under way."""
        return JSONResponse(await _described(self._controlled.calls()))

    async def call(self, request: Request) -> Response:
        """Answer with one call."""
        return JSONResponse((await _described([self._call(request)]))[0])

    async def events(self, request: Request) -> Response:
        """Answer with a call's steps as they come, or with `follow=no` those that there were."""
        follow = request.query_params.get("follow") != "no"
        return StreamingResponse(_steps(self._call(request), follow=follow), media_type="application/x-ndjson")

    async def hangup(self, request: Request) -> Response:
        """End a call."""
        call = self._call(request)
        call.end("hung up by the operator", by="operator")
        return JSONResponse(describe(call))

    async def generations(self, _: Request) -> Response:
        """Answer with the versions of the agent's code."""
        return JSONResponse(self._controlled.generations())

    async def drain(self, _: Request) -> Response:
        """Take no other call."""
        return JSONResponse(self._controlled.drain())

    async def undrain(self, _: Request) -> Response:
        """Take calls again."""
        return JSONResponse(self._controlled.undrain())


def control_app(controlled: Controlled) -> Starlette:
    """Return the API as an ASGI application."""
    api = ControlApi(controlled)
    refusals = (Refused, GenerationFailed, UpgradeFailed)
    return Starlette(
        routes=[
            Route("/status", api.status),
            Route("/metrics", api.metrics),
            Route("/calls", api.calls),
            Route("/calls/{call_id}", api.call),
            Route("/calls/{call_id}/events", api.events),
            Route("/calls/{call_id}/hangup", api.hangup, methods=["POST"]),
            Route("/generations", api.generations),
            Route("/drain", api.drain, methods=["POST"]),
            Route("/undrain", api.undrain, methods=["POST"]),
            Route("/reload", _swap(controlled.reload), methods=["POST"]),
            Route("/upgrade", _swap(controlled.upgrade), methods=["POST"]),
            Route("/rollback", _swap(controlled.rollback), methods=["POST"]),
            Route("/promote", _swap(controlled.promote), methods=["POST"]),
        ],
        exception_handlers={
            NoSuchCall: _said(_NOT_FOUND),
            **dict.fromkeys(refusals, _said(_CONFLICT)),
            Exception: _failed,  # told here, because Hypercorn has no log
        },
    )


def _swap(how: Callable[[], Awaitable[dict[str, Any]]]) -> Callable[[Request], Awaitable[Response]]:
    async def answer(_: Request) -> Response:
        return JSONResponse(await how())

    return answer


def _said(status: int) -> Callable[[Request, Exception], Response]:
    """Return what answers an expected failure: with its own words."""
    return lambda _, error: JSONResponse({"error": str(error)}, status)


async def _failed(request: Request, error: Exception) -> Response:
    log.error("a request to the control API failed", path=request.url.path, exc_info=error)
    return JSONResponse({"error": f"dialogd failed to answer ({type(error).__name__}); its log says more"}, 500)


def describe(call: Call) -> dict[str, Any]:
    """Return what an operator may know of a call; numbers masked."""
    return {
        "id": call.id,
        "state": call.state.value,
        "caller": mask(call.metadata.caller),
        "callee": mask(call.metadata.callee),
        "seconds": round(trio.current_time() - call.started_at, 1),
        "generation": call.generation,
        "worker_pid": call.worker.pid or None,
        "counts": dict(call.leg.counts),
    }


async def _described(calls: Sequence[Call]) -> list[dict[str, Any]]:
    """Return what an operator may know of calls, with the memory of their workers."""
    found = await memory.measure_all([call.worker for call in calls])
    return [describe(call) | memory.describe([one]) for call, one in zip(calls, found, strict=True)]


async def _steps(call: Call, *, follow: bool) -> AsyncIterator[bytes]:
    """Yield a call's steps: those that are remembered, and then each as it comes, unless only the first are wanted."""
    with call.watch(follow=follow) as steps:
        async for step in steps:
            yield msgspec.json.encode(step) + b"\n"


def private_directory(directory: Path) -> None:
    """Make the control socket's directory, for this user alone. Raises `ConfigError` if it is somebody else's."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = directory.stat(follow_symlinks=False)
    except OSError as error:
        raise ConfigError(f"control.socket: {directory} cannot be made: {error.strerror}") from None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid not in (os.getuid(), 0):
        raise ConfigError(f"control.socket: {directory} belongs to another user; choose a path of your own")


async def serve_control(
    controlled: Controlled, path: Path, *, task_status: trio.TaskStatus[Any] = trio.TASK_STATUS_IGNORED
) -> None:
    """Serve the API on a unix socket until cancelled, and leave no socket behind."""
    private_directory(path.parent)
    config = HypercornConfig()
    config.bind = [f"unix:{path}"]
    config.umask = 0o077
    config.accesslog = config.errorlog = None
    config.keep_alive_timeout = _KEEP_ALIVE_S
    config.graceful_timeout = 0
    app, start = control_app(controlled), _Start(task_status)
    anyio.current_time()  # loads what Starlette's streams need of it, now that there are no callers
    try:
        while True:
            try:
                await serve(app, config, mode="asgi", task_status=start)  # type: ignore[arg-type]  # Starlette is one
            except Exception as error:  # the control API's boundary: calls go on without it
                if not start.done:
                    raise ConfigError(f"control.socket: {path} cannot be opened: {_cause(error)}") from error
                log.exception("the control API failed and is started again")
                await trio.sleep(_RESTART_PAUSE_S)
    finally:
        with suppress(OSError):
            os.unlink(path)


def _cause(error: BaseException) -> str:
    """Return why, from within Hypercorn's groups."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return getattr(error, "strerror", None) or str(error)


class _Start(trio.TaskStatus[Any]):
    """Passes the first start on, and remembers it."""

    def __init__(self, inner: trio.TaskStatus[Any]) -> None:
        self._inner = inner
        self.done = False

    def started(self, value: Any = None) -> None:
        if not self.done:
            self.done = True
            self._inner.started(value)
