"""What `dialogctl logs` shows of a call, under way or over, line by line; and how commands show a state again and again."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from dialog_supervisor.config import Config
from dialog_supervisor.control.asking import Failed, ask_lines, configuration
from dialog_supervisor.steps import Step
from dialog_supervisor.telemetry import event_logs
from dialog_supervisor.telemetry.discretion import HIDDEN, discreet_step
from protocol.record import Entry, NotARecord, read

_REFRESH_S = 1.0
_CLEAR = "\x1b[H\x1b[2J"  # cursor home, erase the display (ECMA-48)
_UNTOLD = {"saying", "speech_started", "speech_ended", "media", "history"}  # told better by other steps, or in --json
_QUIET_LEVELS = ("debug", "info")


def follow(show: Callable[[], None]) -> None:
    """Show something anew every second, until Ctrl-C: in place on a terminal, one below the other elsewhere.

    Raises `Failed` when it cannot be shown at first; later, when dialogd is replaced by another say, that is shown.
    """
    show()
    while True:
        sys.stdout.flush()
        time.sleep(_REFRESH_S)
        if sys.stdout.isatty():
            sys.stdout.write(_CLEAR)
        try:
            show()
        except Failed as error:
            print(error)


def show_log(call_id: str, *, follow: bool, json: bool) -> None:
    """Print what happened in a call. Raises `Failed` where nothing is known of it."""
    config = configuration()
    if json:
        _print(_raw(config, call_id, follow=follow))
    else:
        may_speak = config.log.transcripts or config.events.transcripts
        _print(filter(None, (line(step, may_speak=may_speak) for step in _steps(config, call_id, follow=follow))))


def _print(lines: Iterable[str]) -> None:
    for one in lines:
        print(one, flush=True)


def _raw(config: Config, call_id: str, *, follow: bool) -> Iterator[str]:
    files = _files(config, call_id)
    if files and not follow:
        for file in files:
            yield from file.read_text(errors="replace").splitlines()
        return
    yield from _live(config, call_id, follow=follow)


def _steps(config: Config, call_id: str, *, follow: bool) -> Iterator[Step]:
    """Yield a call's steps: of its event logs, which have all of them, or of the call itself as far as it remembers."""
    files = _files(config, call_id)
    if files and not follow:
        for file in files:
            yield from _recorded(file)
        return
    for text in _live(config, call_id, follow=follow):
        yield msgspec.json.decode(text, type=Step)


def _files(config: Config, call_id: str) -> list[Path]:
    try:
        return event_logs.find(config.events.directory, call_id) if config.events.directory != Path() else []
    except OSError as error:
        raise Failed(f"{config.events.directory} cannot be read: {error.strerror}; be dialogd's user, or root") from None


def _recorded(file: Path) -> Iterator[Step]:
    try:
        header, entries = read(file)
    except NotARecord as error:
        raise Failed(str(error)) from None
    except OSError as error:
        raise Failed(f"{file} cannot be read: {error.strerror}; be dialogd's user, or root") from None
    yield Step(0.0, "log", f"{header.call}, begun {header.began}, generation {header.generation}", {"level": "info"})
    yield from (_as_step(entry) for entry in entries if entry.step)


def _as_step(entry: Entry) -> Step:
    return Step(entry.t, entry.step, entry.text, {name: str(value) for name, value in entry.fields.items()})


def _live(config: Config, call_id: str, *, follow: bool) -> Iterator[str]:
    lines = ask_lines(f"/calls/{call_id}/events" + ("" if follow else "?follow=no"))
    if lines is not None:
        yield from lines
        return
    files = _files(config, call_id)
    if not files:
        kept = config.events.directory
        where = f"there is no event log of it in {kept}" if kept != Path() else "no event logs are kept (events.directory)"
        raise Failed(f"no call {call_id} is under way, and {where}; see dialogctl calls")
    for file in files:  # it was to be followed, and is over
        yield from (msgspec.json.encode(step).decode() for step in _recorded(file))


def line(step: Step, *, may_speak: bool) -> str:
    """Return a step as a line for people, or as several; "" for one that tells them nothing."""
    if step.kind in _UNTOLD:
        return ""
    text, fields = (step.text, step.fields) if may_speak else discreet_step(step.kind, step.text, step.fields)
    who, what = _told(step.kind, text, fields)
    return f"{step.t:9.3f}  {who:<12}{what}".rstrip()


def _told(kind: str, text: str, fields: Mapping[str, Any]) -> tuple[str, str]:
    """Return who or what a line is about, and the line."""
    match kind:
        case "heard":
            told = "caller", text
        case "said":
            cut = fields.get("interrupted") == "true"
            told = "agent", text + f"   (cut short; it was: {fields.get('total', HIDDEN)})" * cut
        case "tool":
            told = kind, f"{fields.get('name', '')}({fields.get('arguments', '')}) -> {fields.get('result', '')}"
        case "request":
            told = "agent asks", text
        case "log":
            level = str(fields.get("level", "info"))
            told = ("log" if level in _QUIET_LEVELS else level), _log_line(text, fields)
        case _:
            told = kind, text + _listed(fields)
    return told


def _log_line(text: str, fields: Mapping[str, Any]) -> str:
    first, *more = [*text.splitlines(), *str(fields.get("exception", "")).splitlines()]
    rest = {name: value for name, value in fields.items() if name not in ("level", "exception")}
    return "\n             ".join([first + _listed(rest), *more])


def _listed(fields: Mapping[str, Any]) -> str:
    return "".join(f"  {name}={value}" for name, value in fields.items() if value not in (HIDDEN, "None"))
