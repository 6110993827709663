"""A machine on which one dialogd follows another. Its listener, as one from systemd, and its store outlive them."""

import base64
import json
import socket
import sqlite3
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, closing, contextmanager
from pathlib import Path
from typing import Any

import trio

from tests.e2e.control import PATIENCE_S, Controlled
from tests.e2e.daemon import PUBLIC_URL, Dialogd, write_agent, write_config
from tests.e2e.test_recovery import COUNTER
from tests.e2e.twilio_client import PhoneCall, Place, Twilio, verbs

TAKEN_UP = "a call is taken up that another dialogd left"


class Site:
    """The place of a dialogd; `place` is where its carrier calls."""

    def __init__(
        self, directory: Path, store: Path, listener: socket.socket, sections: Mapping[str, Mapping[str, object]]
    ) -> None:
        directory.mkdir(exist_ok=True)
        self.store = store
        self.place = Place(PUBLIC_URL, listener.getsockname()[1])
        self._listener = listener
        self._agent = write_agent(directory / "agent", COUNTER)
        self.config = directory / "dialog.toml"
        self.configure(**sections)

    def configure(self, **sections: Mapping[str, object]) -> None:
        """Write the configuration of the next dialogd."""
        kept = {"path": str(self.store), **sections.get("store", {})}
        write_config(self.config.parent, self._agent, **{**sections, "store": kept})

    @contextmanager
    def dialogd(self, **environ: str) -> Iterator[Dialogd]:
        """Run a dialogd; in the end it is stopped, unless it is dead by then."""
        with Dialogd(self.config, environ, listener=self._listener) as dialogd:
            dialogd.wait_for_log(event="ready")
            yield dialogd
            if dialogd.alive:
                dialogd.stop()


@contextmanager
def site(directory: Path, file: Path | None = None, **sections: Mapping[str, object]) -> Iterator[Site]:
    """Have a site, whose dialogd's store is in `directory` unless it is elsewhere."""
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        yield Site(directory, file or directory / "calls.sqlite", listener, sections)


def kept_calls(store: Path) -> dict[str, bytes]:
    """Return the calls that a store has, and the last checkpoint of each; "fallback" for one that waits for that."""
    with closing(sqlite3.connect(f"file:{store}?mode=ro", uri=True)) as connection:
        rows = connection.execute("SELECT call_id, record FROM calls").fetchall()
    return {call_id: checkpoint(json.loads(record)) for call_id, record in rows}


def checkpoint(record: dict[str, Any]) -> bytes:
    """Return the last checkpoint that a call's record has, or what stands for one."""
    return b"fallback" if record["fallback"] else base64.b64decode(record["state"]["checkpoint"] or "")


async def kept(site: Site, calls: Mapping[PhoneCall, bytes]) -> None:
    """Wait until the site's store has these calls with these checkpoints, and no others."""
    wanted = {call.sid: checkpoint for call, checkpoint in calls.items()}
    with trio.fail_after(PATIENCE_S):
        while kept_calls(site.store) != wanted:  # noqa: ASYNC110 - another process
            await trio.sleep(0.02)


@asynccontextmanager
async def counting(here: Site, twilio: Twilio, key: str = "3") -> AsyncIterator[PhoneCall]:
    """Have a call under way whose agent has counted, and the store know of it."""
    call = PhoneCall(twilio)
    await call.ring()
    async with call.stream():
        await call.press(key)
        with trio.fail_after(PATIENCE_S):
            while kept_calls(here.store).get(call.sid) != key.encode():  # noqa: ASYNC110 - another process
                await trio.sleep(0.02)
        yield call


async def goes_on(dialogd: Controlled, call: PhoneCall, expected: str = "3") -> None:
    """Ask what comes after, and check that the conversation goes on where it was, and ends as it should."""
    assert verbs(await call.after()) == ["Connect"]
    async with call.stream():
        assert (await dialogd.step(call.sid, kind="restored"))["text"] == expected
        await call.press("#")
        assert (await dialogd.step(call.sid, kind="count"))["text"] == (expected or "0")
        await call.stop()
        await dialogd.ended(call.sid)
