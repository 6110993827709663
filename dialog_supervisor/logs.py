"""Structured logs: readable on a terminal, JSON lines elsewhere, with the call's id on every line of a call.

They go to stderr, and where that is systemd's journal, there with fields.

Telephone numbers and pressed keys are masked here, at the last moment, so that no caller of a logger has to think of it.
"""

import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager, suppress
from typing import Any

import structlog

from dialog_supervisor.sections import LogConfig, Secret
from dialog_supervisor.telemetry import journal

_TELEPHONE_NUMBER = re.compile(
    r"""
      (?:\+|%2B)\d{7,15}(?!\d)                          # E.164, whatever surrounds it; %2B in a form or a URL
    | \+\d{1,3}(?:[ ()/-]{1,2}\d{2,5}){2,5}(?!\d)       # written in groups
    | (?:(?<![\w.:-])|(?<=sip:)|(?<=tel:))\d{7,15}       # without its plus: not within an address, a time, an identifier
      (?!\w|[.:-]\w)
    """,
    re.VERBOSE | re.IGNORECASE,
)
_KEYS_PRESSED = ("digit", "digits")
_STDERR_FD = 2
_listeners: dict[str, Callable[[Mapping[str, Any]], None]] = {}  # by call id
_LEVELS = {"debug": 10, "info": 20, "notice": 20, "warning": 30, "error": 40}


def mask(text: str) -> str:
    """Hide all but the last two digits of every telephone number in `text`."""
    return _TELEPHONE_NUMBER.sub(lambda found: f"…{found[0][-2:]}", text)


def _mask_event(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    for key, value in event.items():
        if key not in ("timestamp", "level"):
            event[key] = _masked(key, value)
    return event


def _masked(key: str, value: Any) -> Any:
    """Return a field's value as the log may show it, also where it holds others."""
    if isinstance(value, Secret) or key.lower() in _KEYS_PRESSED:
        return "…"
    if isinstance(value, str):
        return mask(value)
    if isinstance(value, Mapping):
        return {name: _masked(str(name), held) for name, held in value.items()}
    if isinstance(value, list | tuple):
        return [_masked("", held) for held in value]
    return value


def _tell_the_call(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Have a call know what the log says of it, masked as it is; what is said in it, it knows already."""
    listener = _listeners.get(str(event.get("call", "")))
    if listener is not None and not event.get("speech"):
        listener(event)
    return event


@contextmanager
def heard_by(call_id: str, listener: Callable[[Mapping[str, Any]], None]) -> Iterator[None]:
    """Inside, `listener` is told of each line of the log that has this call's id."""
    _listeners[call_id] = listener
    try:
        yield
    finally:
        del _listeners[call_id]


def _in_order(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Put first what every line has, so that lines can be read one below the other."""
    first = {key: event[key] for key in ("timestamp", "level", "event", "call") if key in event}
    return {**first, **event}


def _drop_speech(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    if event.get("speech"):
        raise structlog.DropEvent
    return event


def _write(line: str, _about: Mapping[str, Any]) -> None:
    """Write a line to standard error; what cannot be written, on a full disk say, is lost: dialogd must outlive its log.

    It goes past `sys.stderr`, which would keep what failed, and fail again with it at exit.
    """
    data = f"{line}\n".encode(errors="backslashreplace")
    with suppress(OSError):
        while data:
            data = data[os.write(_STDERR_FD, data) :]


class _Lines:
    """What structlog calls a logger: has a method for each level, which takes the line and what it was made of."""

    def __init__(self, write: Callable[[str, Mapping[str, Any]], None]) -> None:
        for level in journal.PRIORITIES:
            setattr(self, level, write)


class _Libraries(logging.Handler):
    """Has the standard library's loggers log as ours do."""

    def emit(self, record: logging.LogRecord) -> None:
        structlog.get_logger().log(
            min(record.levelno // 10 * 10, logging.CRITICAL), record.getMessage(), exc_info=record.exc_info
        )


def configure(config: LogConfig) -> None:
    """Set up logging for this process. Standard-library loggers of our libraries end in the same lines, from warnings on."""
    readable = sys.stderr.isatty() if config.format == "auto" else config.format == "console"
    render = structlog.dev.ConsoleRenderer() if readable else structlog.processors.JSONRenderer(ensure_ascii=False)
    journalled = journal.is_behind(_STDERR_FD, os.environ)
    lines = _Lines(journal.Journal(journal.write_through).write if journalled else _write)

    def as_line(logger: Any, method: str, event: MutableMapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (render(logger, method, {**event}), event), {}

    structlog.configure(
        processors=[
            *([] if config.transcripts else [_drop_speech]),
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.StackInfoRenderer(),
            *([] if readable else [structlog.processors.format_exc_info]),
            _mask_event,
            _in_order,
            _tell_the_call,
            as_line,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[config.level]),
        logger_factory=lambda *_name: lines,
        cache_logger_on_first_use=True,
    )
    logging.basicConfig(handlers=[_Libraries()], level=logging.WARNING, force=True)
