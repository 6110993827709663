"""Structured logs on stderr: readable on a terminal, JSON lines elsewhere, with the call's id on every line of a call.

Telephone numbers and pressed keys are masked here, at the last moment, so that no caller of a logger has to think of it.
"""

import logging
import re
import sys
from collections.abc import MutableMapping
from typing import Any

import structlog

from dialog_supervisor.config import LogConfig

_TELEPHONE_NUMBER = re.compile(r"(?<![\w.:-])\+?\d{7,15}(?![\w.:-])")
_KEYS_PRESSED = ("digit", "digits")
_LEVELS = {"debug": 10, "info": 20, "notice": 20, "warning": 30, "error": 40}


def mask(text: str) -> str:
    """Hide all but the last two digits of every telephone number in `text`."""
    return _TELEPHONE_NUMBER.sub(lambda found: f"…{found[0][-2:]}", text)


def _mask_event(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    for key, value in event.items():
        if key in _KEYS_PRESSED:
            event[key] = "…"
        elif isinstance(value, str) and key not in ("timestamp", "level"):
            event[key] = mask(value)
    return event


def configure(config: LogConfig) -> None:
    """Set up logging for this process. Standard-library loggers of our libraries end in the same lines, from warnings on."""
    readable = sys.stderr.isatty() if config.format == "auto" else config.format == "console"
    renderer = structlog.dev.ConsoleRenderer() if readable else structlog.processors.JSONRenderer()
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
        *([] if readable else [structlog.processors.format_exc_info]),
        _mask_event,
    ]
    structlog.configure(
        processors=[*shared, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[config.level]),
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(processor=renderer, foreign_pre_chain=shared))
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
