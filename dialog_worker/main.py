"""A worker's life, from the fork to its exit: the link, the heartbeat, the agent, and the log of all three."""

import importlib
import logging
import resource
import socket
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress

import trio

from dialog_worker.agent.base import Agent
from dialog_worker.provider import tls_context
from dialog_worker.voip import VoIP, VoIPProxy, sendable
from protocol.framing import ProtocolError
from protocol.link import Link, LinkClosed, OutboxFull
from protocol.messages import EXIT_WANT_OF_MEMORY, Event, Heartbeat, Trace
from protocol.readiness import Readiness

HEARTBEAT_S = 1.0
_LAST_WORDS_S = 0.5  # for the reason of a failure to reach the supervisor
_TRACEBACK_CHARACTERS = 8_000
_CHATTY = ("httpx2", "httpcore2", "openai", "trio-websocket")  # below warnings

_reserve = bytearray(8 << 20)  # given back when a worker fails, perhaps for want of memory, so that it can say so

Create = Callable[[VoIP], Agent]


def prepare() -> None:
    """Do once, before any fork, what every call would do again."""
    tls_context()
    importlib.import_module("encodings.idna")  # which name resolution loads on first use


def run(sock: socket.socket, create: Create, generation: str, call_id: str) -> int:
    """Serve one call over `sock` and return the exit code."""
    try:
        return trio.run(_serve, sock, create, generation, call_id)
    except BaseException as error:  # noqa: BLE001 - trio's own, as a rule for want of memory: nobody else is left to tell of it
        _reserve.clear()
        print(_explain(error), file=sys.stderr)
        return 1 if _want_of_memory(error) is None else EXIT_WANT_OF_MEMORY


async def _serve(sock: socket.socket, create: Create, generation: str, call_id: str) -> int:
    with Readiness() as readiness:
        readiness.add(sock.fileno())
        link: Link[Event] = Link(sock, Event, when_readable=lambda read: readiness.each(lambda _: read()))
        return await _talk(link, create, generation, call_id)


async def _talk(link: Link[Event], create: Create, generation: str, call_id: str) -> int:
    _log_over(link)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(link.run)
        try:
            link.introduce(generation, call_id)
            await link.introduced()
            nursery.start_soon(_beat, link)
            await create(VoIPProxy(link, call_id)).run()
            code = 0
        except (LinkClosed, ProtocolError):
            code = 1
        except (Exception, SystemExit, BaseExceptionGroup) as error:  # noqa: BLE001 - the call's boundary: what the agent raises is told to whoever keeps the log
            _reserve.clear()
            with suppress(LinkClosed, OutboxFull):
                link.post(Trace("log", sendable(_explain(error)), {"level": "error", "logger": "agent"}))
            code = 1 if _want_of_memory(error) is None else EXIT_WANT_OF_MEMORY
        with trio.move_on_after(_LAST_WORDS_S):
            await link.room()
        nursery.cancel_scope.cancel()
    link.close()
    return code


def _explain(error: BaseException) -> str:
    want = _want_of_memory(error)
    text = "".join(traceback.format_exception(want or error, chain=want is None)).rstrip()[-_TRACEBACK_CHARACTERS:]
    if want is not None:
        permitted, _ = resource.getrlimit(resource.RLIMIT_DATA)
        text += f"\nit may take {permitted // 1_000_000} MB of memory; raise workers.memory if it needs more"
    return f"the agent failed\n{text}"


def _want_of_memory(error: BaseException) -> MemoryError | None:
    """Return the `MemoryError` that tells most among what led to an error: others follow it wherever it is dealt with."""
    found: dict[int, BaseException] = {}
    waiting: list[BaseException | None] = [error]
    while waiting:
        one = waiting.pop()
        if one is not None and id(one) not in found:
            found[id(one)] = one
            waiting += [one.__cause__, one.__context__, *(one.exceptions if isinstance(one, BaseExceptionGroup) else ())]
    wants = [one for one in found.values() if isinstance(one, MemoryError)]
    return max(wants, key=lambda one: sum(1 for _ in traceback.walk_tb(one.__traceback__)), default=None)


async def _beat(link: Link[Event]) -> None:
    """Tell the supervisor once a second that the loop turns, and how late it is."""
    due = trio.current_time()
    while True:
        with suppress(LinkClosed, OutboxFull):
            link.post(Heartbeat(round((trio.current_time() - due) * 1000)))
        due = trio.current_time() + HEARTBEAT_S
        await trio.sleep_until(due)


class _LinkHandler(logging.Handler):
    """Sends log records over the link; the supervisor writes them, with the call's id and numbers masked."""

    link: Link[Event] | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """Send one record; on a full or closed link it is lost, rather than the call."""
        if self.link is None:
            return
        text = record.getMessage()
        if record.exc_info:
            text += "\n" + logging.Formatter().formatException(record.exc_info)
        level = "error" if record.levelno >= logging.ERROR else record.levelname.lower()
        with suppress(LinkClosed, OutboxFull):
            self.link.post(Trace("log", sendable(text[-_TRACEBACK_CHARACTERS:]), {"level": level, "logger": record.name}))


_handler = _LinkHandler()


def _log_over(link: Link[Event]) -> None:
    _handler.link = link
    if logging.root.handlers != [_handler]:  # a rehearsal has seen to it before the fork, where there was one
        logging.basicConfig(handlers=[_handler], level=logging.INFO, force=True)
        for name in _CHATTY:
            logging.getLogger(name).setLevel(logging.WARNING)
