"""A receptionist that thinks with the tests' own model server."""

from typing import Any

import trio

from dialog_worker import STT, TTS, OpenAIAgent, VoIP, tool

from .model_server import ModelServer


class Receptionist(OpenAIAgent):
    system = "You answer the phone."
    apology = "Sorry?"

    def __init__(self, *, voip: VoIP, stt: STT, tts: TTS, url: str) -> None:
        super().__init__(voip=voip, stt=stt, tts=tts, model="m", api_key="k", base_url=url)
        self.booked: list[tuple[int, str]] = []

    @tool
    async def book_table(self, people: int, time: str) -> str:
        """Book a table."""
        self.booked.append((people, time))
        return f"booked for {people} at {time}"

    @tool
    async def slow(self) -> str:
        """Take a while."""
        await trio.sleep(0.3)
        return "done"


class Desk:
    """Makes the agent of a call, and keeps it for the test."""

    kind = Receptionist

    def __init__(self, server: ModelServer) -> None:
        self._server = server
        self.agent: Receptionist

    def __call__(self, voip: VoIP, stt: STT, tts: TTS) -> Receptionist:
        self.agent = self.kind(voip=voip, stt=stt, tts=tts, url=self._server.url)
        return self.agent


def spoken(history: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(entry["role"], entry["content"]) for entry in history if entry.get("content")]
