"""`python -m dialog_worker.replay DIRECTORY ENTRY LOG`: play an event log to the agent, and compare its answers.

`dialogctl replay` runs it with the agent's interpreter and environment. Exit codes: 0 the same answers, 1 others, or a
reason on stderr why it cannot be played.
"""

import argparse
import importlib
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import msgspec
import trio
from trio.testing import MockClock

from dialog_worker.agent.base import Agent
from dialog_worker.replay.exchanges import Compared, compare, exchanges_of
from dialog_worker.replay.script import script_of
from dialog_worker.replay.stage import perform
from dialog_worker.voip import VoIP
from protocol.record import NotARecord, read


class Unplayable(Exception):
    """Why a log cannot be replayed."""


def main() -> int:
    """Replay one log and return the exit code."""
    arguments = _parser().parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    try:
        compared = replay(arguments.directory, arguments.entry, arguments.log.absolute(), real_tools=arguments.tools)
    except (Unplayable, NotARecord) as error:
        print(f"dialogctl: {error}", file=sys.stderr)
        return 1
    except Exception as error:  # noqa: BLE001 - the author's code, whose traceback is what they need
        traceback.print_exception(error)
        print("dialogctl: the agent failed in the replay", file=sys.stderr)
        return 1
    if arguments.json:
        print(msgspec.json.format(msgspec.json.encode(compared)).decode())
    else:
        print("\n".join(told(compared)))
    return 0 if all(one.same for one in compared) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dialogctl replay")
    parser.add_argument("directory", type=Path)
    parser.add_argument("entry")
    parser.add_argument("log", type=Path)
    parser.add_argument("--tools", action="store_true")
    parser.add_argument("--json", action="store_true")
    return parser


def replay(directory: Path, entry: str, log: Path, *, real_tools: bool) -> list[Compared]:
    """Return the call's exchanges then and now. Raises `Unplayable`, `NotARecord`, and what the agent raises."""
    try:
        header, entries = read(log)
    except OSError as error:
        raise Unplayable(f"{log} cannot be read: {error.strerror}") from None
    if not header.transcripts:
        raise Unplayable(f"{log} has no words in it; set events.transcripts = true for the calls that are to be replayed")
    script, clock = script_of(entries), MockClock(rate=1.0)
    call = trio.run(partial(perform, real_tools=real_tools), script, _load(directory, entry), clock, clock=clock)
    return list(compare(exchanges_of(script.happened, call.asides), exchanges_of(call.happened, call.asides)))


def _load(directory: Path, entry: str) -> Callable[[VoIP], Agent]:
    """Return the function that makes the agent, as a worker has it: run in its directory, found there first."""
    os.chdir(directory)
    sys.path.insert(0, str(directory))
    module, _, name = entry.partition(":")
    create: Callable[[VoIP], Agent] = getattr(importlib.import_module(module), name)
    return create


def told(compared: Sequence[Compared]) -> Iterator[str]:
    """Yield the comparison as lines for people."""
    for number, one in enumerate(compared):
        yield f"{number:3}  caller  {one.caller}"
        if one.same:
            yield from _column("=", one.now)
        else:
            yield from _column("then", one.then)
            yield from _column("now", one.now)
    different = sum(not one.same for one in compared)
    yield f"{different} of {len(compared)} are answered differently" if different else "the same answers"


def _column(title: str, answers: Sequence[str]) -> Iterator[str]:
    for number, answer in enumerate(answers or ["(nothing)"]):
        yield f"     {title if number == 0 else '':<8}{answer}"


if __name__ == "__main__":
    sys.exit(main())
