"""The figures over TCP, for a Prometheus on another machine: `/metrics`, two probes, and nothing that could do harm."""

from collections.abc import Callable, Mapping
from functools import partial

import msgspec
import structlog
import trio

from dialog_supervisor.config import Config
from dialog_supervisor.connections import Listener
from dialog_supervisor.http import Request, Response
from dialog_supervisor.listening import listen
from dialog_supervisor.telemetry.figures import CONTENT_TYPE

_MAX_CONNECTIONS = 32  # a few Prometheus servers, each with one

log = structlog.get_logger("control")


async def serve_figures(
    config: Config,
    render: Callable[[], str],
    probes: Mapping[str, Callable[[], Response]],
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve until cancelled where `control.listen` says, if it does; `probes` by their paths. Raises `ConfigError`.

    It is the public listener's own HTTP, with its limits and deadlines, for this address may be public by mistake.
    """
    address = config.control.listen
    if address is None:
        task_status.started()
        return
    limits = msgspec.structs.replace(config.gateway, max_connections=_MAX_CONNECTIONS)
    with listen(config, "control.listen", address) as listening:
        host, port = listening.getsockname()[:2]
        log.info("metrics are served", listen=f"{host}:{port}")
        task_status.started()
        await Listener(limits, partial(_answer, render, probes)).serve(listening)


async def _answer(render: Callable[[], str], probes: Mapping[str, Callable[[], Response]], request: Request) -> Response:
    if request.method not in ("GET", "HEAD"):
        return Response(405, "GET only\n", headers={"allow": "GET, HEAD"})
    if request.path == "/metrics":
        return Response(200, render(), CONTENT_TYPE)
    if request.path in probes:
        return probes[request.path]()
    return Response(404, f"there is {', '.join(probes)} and /metrics\n")
