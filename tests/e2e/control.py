"""A dialogd seen through its control socket, wherever it runs."""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import trio

PATIENCE_S = 15.0  # for anything that should take milliseconds, on a busy machine

LogLine = dict[str, Any]


class Controlled(ABC):
    """One that can be asked, as `dialogctl` asks it."""

    @property
    @abstractmethod
    def control(self) -> Path:
        """Where its control socket is."""

    @property
    @abstractmethod
    def text(self) -> str:
        """All that it has logged."""

    @abstractmethod
    async def logged(self, **wanted: object) -> LogLine:
        """Wait for a line of the log with these values and return it."""

    async def ask(self, path: str, method: str = "GET") -> Any:
        """Ask over the control socket, as `dialogctl` does."""
        transport = httpx.AsyncHTTPTransport(uds=str(self.control))
        async with httpx.AsyncClient(transport=transport, base_url="http://dialogd", timeout=PATIENCE_S) as client:
            response = await client.request(method, path)
            return response.raise_for_status().json()

    async def post(self, path: str) -> httpx.Response:
        """Post to the control socket, and return the answer whatever it says."""
        transport = httpx.AsyncHTTPTransport(uds=str(self.control))
        async with httpx.AsyncClient(transport=transport, base_url="http://dialogd", timeout=PATIENCE_S) as client:
            return await client.post(path)

    async def steps(self, call_id: str, count: int = 1, **wanted: str) -> list[dict[str, Any]]:
        """Return the first `count` steps of a call that have these values, as soon as there are so many."""
        return await trio.to_thread.run_sync(self._watch, call_id, count, wanted)

    def _watch(self, call_id: str, count: int, wanted: Mapping[str, str]) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        transport = httpx.HTTPTransport(uds=str(self.control))
        with (
            httpx.Client(transport=transport, base_url="http://dialogd", timeout=PATIENCE_S) as client,
            client.stream("GET", f"/calls/{call_id}/events") as response,
        ):
            for line in response.iter_lines():
                if wanted.items() <= (step := json.loads(line)).items():
                    found.append(step)
                if len(found) == count:
                    return found
        raise AssertionError(f"the call ended with {len(found)} steps {wanted}, not {count}\n{self.text}")

    async def step(self, call_id: str, **wanted: str) -> dict[str, Any]:
        """Return the first step of a call that has these values, as soon as there is one."""
        return (await self.steps(call_id, 1, **wanted))[0]

    async def watch(self, call_id: str, task_status: trio.TaskStatus[list[dict[str, Any]]]) -> None:
        """Have a list of all steps of a call; it grows until the call is over, and this returns then."""
        steps: list[dict[str, Any]] = []
        transport = httpx.AsyncHTTPTransport(uds=str(self.control))
        async with (
            httpx.AsyncClient(transport=transport, base_url="http://dialogd", timeout=PATIENCE_S) as client,
            client.stream("GET", f"/calls/{call_id}/events") as response,
        ):
            task_status.started(steps)
            async for line in response.aiter_lines():
                steps.append(json.loads(line))

    async def ended(self, call_id: str) -> LogLine:
        """Wait until a call is over and return the line of the log that says so."""
        return await self.logged(event="call ended", call=call_id)
