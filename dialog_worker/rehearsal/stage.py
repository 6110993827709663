"""What a rehearsal has instead of services: servers on this machine for model, ear and voice; and an agent that uses it."""

import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import ModuleType
from typing import Any
from urllib.request import getproxies, proxy_bypass

import trio
from trio_websocket import ConnectionClosed, HandshakeError, wrap_server_stream

from dialog_worker.agent.base import Agent
from dialog_worker.rehearsal import CALL_ID, END
from dialog_worker.stt.base import STT
from dialog_worker.tts.base import TTS
from dialog_worker.voip import VoIP
from protocol.messages import Media, Message, StreamingStarted

PLAYS = 10  # as of the calls without services
_WITH_SPEECH = 2  # of them: each ear and each voice has its turn; parting from them takes a third of a second
_LASTS_S = 5.0  # at most, on a machine with no time for it
_HERE = "127.0.0.1"
_PROXIED = {"http", "all"}  # what the environment may send through a proxy, HTTP_PROXY and ALL_PROXY
_NOTHING = b'{"object":"list","data":[]}'
_CHUNK = (
    b'data: {"id":"1","object":"chat.completion.chunk","created":1,"model":"m","choices":'
    b'[{"index":0,"delta":{"role":"assistant","content":"Just a rehearsal. "},"finish_reason":%b}]}\n\n'
)
_ANSWER = _CHUNK % b"null" * 8 + _CHUNK % b'"stop"' + b"data: [DONE]\n\n"

Make = Callable[[ModuleType, str], Any]
_EARS: Mapping[str, Make] = {
    "dialog_worker.stt.deepgram": lambda home, url: home.DeepgramSTT("key", url=url),
    "dialog_worker.stt.openai": lambda home, url: home.OpenAISTT("key", url=url),
}
_VOICES: Mapping[str, Make] = {
    "dialog_worker.tts.cartesia": lambda home, url: home.CartesiaTTS("voice", "key", url=url),
    "dialog_worker.tts.elevenlabs": lambda home, url: home.ElevenLabsTTS("voice", "key", url=url),
}


class Mute(TTS):
    """Says nothing."""

    def post(self, message: Message[str]) -> None:
        """Ignore text."""

    def abort(self, uuid: str) -> None:
        """Have nothing to stop."""

    async def run(self) -> None:
        await trio.sleep_forever()


class Stage:
    """One call's. Of several ears and voices that are imported, each takes its turn by the call's `number`."""

    def __init__(self, number: int) -> None:
        self._number = number
        self._speaks = number < _WITH_SPEECH
        self.missing: set[str] = set()  # who has not been spoken to yet
        self._complete = trio.Event()

    @contextmanager
    def opened(self, tell: Callable[..., None]) -> Iterator[None]:
        """Inside, the servers can be reached. `tell` has something happen in the call."""
        self._tell = tell
        with _listening() as self._http, _listening() as self._ear, _listening() as self._voice:
            yield

    def talker(self, voip: VoIP) -> Agent:
        """Make the agent: one that thinks with a model, if that is imported and its server here can be reached."""
        ears: list[STT] = [self._turn_of(_EARS, self._ear)] if self._speaks and _loaded(_EARS) else []
        voices: list[TTS] = [self._turn_of(_VOICES, self._voice)] if self._speaks and _loaded(_VOICES) else []
        self.missing = {name for name, have in (("ear", ears), ("voice", voices)) if have}
        voices = voices or [Mute()]
        home = sys.modules.get("dialog_worker.agent.openai")
        if home is None or (_PROXIED & getproxies().keys() and not proxy_bypass(_HERE)):
            return self._led(Agent)(voip=voip, stt=ears, tts=voices)
        self.missing.add("model")
        url = f"http://{_address(self._http)}/v1"
        return self._led(home.OpenAIAgent)(voip=voip, stt=ears, tts=voices, model="m", api_key="key", base_url=url)

    def _turn_of(self, makes: Mapping[str, Make], server: socket.socket) -> Any:
        loaded = _loaded(makes)
        name = loaded[self._number % len(loaded)]
        return makes[name](sys.modules[name], f"ws://{_address(server)}")

    def _led(self, base: type[Agent]) -> Callable[..., Agent]:
        """Return an agent's class whose calls last until everybody was spoken to."""
        stage = self

        class Talker(base):  # type: ignore[valid-type, misc]  # a base that is known when it is imported
            async def run(self) -> None:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(stage.serve)
                    nursery.start_soon(stage.end)
                    await super().run()
                    nursery.cancel_scope.cancel()

            async def on_streaming_started(self, started: StreamingStarted) -> None:
                self.post(Message(CALL_ID, "Is this a rehearsal?", done=True))

            def on_media(self, media: Media) -> None:
                super().on_media(media)
                self.voip.post(Message(CALL_ID, media.payload))

        return Talker

    async def end(self) -> None:
        """End the call when everybody has been spoken to."""
        with trio.move_on_after(_LASTS_S if self.missing else 0):
            await self._complete.wait()
        self._tell(*END)

    async def serve(self) -> None:
        """Be all services at once."""
        async with trio.open_nursery() as nursery:
            for server, serve in ((self._http, self._model), (self._ear, self._listen), (self._voice, self._speak)):
                listener = trio.SocketListener(trio.socket.from_stdlib_socket(server))
                nursery.start_soon(trio.serve_listeners, serve, [listener])

    def _spoken_to(self, name: str) -> None:
        self.missing.discard(name)
        if not self.missing:
            self._complete.set()

    async def _model(self, stream: trio.SocketStream) -> None:
        received = b""
        async with stream:
            async for data in stream:
                received += data
                head, _, body = received.partition(b"\r\n\r\n")
                asked, whole = b"/chat/completions" in head, received.endswith((b"\r\n\r\n", b"}"))
                if asked and body and whole:
                    await stream.send_all(_response(b"text/event-stream", _ANSWER))
                    self._spoken_to("model")
                elif not asked and whole:
                    await stream.send_all(_response(b"application/json", _NOTHING))
                else:
                    continue
                received = b""

    async def _listen(self, stream: trio.SocketStream) -> None:
        await self._converse(stream, "ear")

    async def _speak(self, stream: trio.SocketStream) -> None:
        await self._converse(stream, "voice")

    async def _converse(self, stream: trio.SocketStream, name: str) -> None:
        """Accept a WebSocket and hear what is sent to it."""
        async with stream, trio.open_nursery() as nursery:
            with suppress(ConnectionClosed, HandshakeError):
                socket = await (await wrap_server_stream(nursery, stream)).accept()
                self._spoken_to(name)
                while True:
                    await socket.get_message()
            nursery.cancel_scope.cancel()


def _loaded(makes: Mapping[str, Make]) -> list[str]:
    return [name for name in makes if name in sys.modules]


def _response(kind: bytes, body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\ncontent-length: %d\r\n\r\n%b" % (kind, len(body), body)


def _address(server: socket.socket) -> str:
    host, port = server.getsockname()
    return f"{host}:{port}"


def _listening() -> socket.socket:
    return socket.create_server((_HERE, 0))
