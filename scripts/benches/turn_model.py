"""The language model of the bench: chat completions over HTTP/1.1, plain or with TLS, whose handshakes are counted."""

import ssl
import time
from collections.abc import Mapping

import h11
import msgspec
import trio
from msgspec import Struct

from dialog_local.brain.completions import Chat, chunks
from dialog_local.brain.receptionist import Say
from dialog_worker.agent.completion import Sentences
from scripts.benches.turn_sockets import DatedConnection, SecureConnection, accepted
from scripts.benches.turn_talk import Delays, Talk

WRITES_ON_S = 0.15  # between two tokens where the model is to be interrupted


class _User(Struct):
    user: str = ""


class Model:
    """`/v1/chat/completions` and `/v1/models`."""

    def __init__(self, talks: Mapping[str, Talk], delays: Delays, tls: ssl.SSLContext | None) -> None:
        self.connections = 0
        self.handshakes = 0
        self.turns = 0
        self._talks = talks
        self._delays = delays
        self._tls = tls

    async def serve(self, stream: trio.SocketStream) -> None:
        """Serve one connection."""
        self.connections += 1
        connection = accepted(stream, self._tls)
        with connection:
            try:
                if isinstance(connection, SecureConnection):
                    await connection.shake_hands()
                    self.handshakes += 1
                await self._converse(connection, time.time())
            except (OSError, ssl.SSLError, h11.RemoteProtocolError):
                return  # an interrupted agent closes the connection in mid-answer

    async def _converse(self, connection: DatedConnection, ready_at: float) -> None:
        http = h11.Connection(h11.SERVER)
        while http.our_state is h11.IDLE:
            request, body = None, b""
            while not isinstance(event := http.next_event(), h11.EndOfMessage):
                if event is h11.NEED_DATA:
                    http.receive_data(await connection.receive())
                elif isinstance(event, h11.Request):
                    request = event
                elif isinstance(event, h11.Data):
                    body += event.data
                else:
                    return  # the client has left
            if request is not None and request.target.endswith(b"/chat/completions"):
                await self._answer(http, connection, body, ready_at)
            else:
                _respond(http, connection, b'{"object":"list","data":[]}')
            http.start_next_cycle()

    async def _answer(self, http: h11.Connection, connection: DatedConnection, body: bytes, ready_at: float) -> None:
        at = connection.arrived_at
        chat, user = msgspec.json.decode(body, type=Chat), msgspec.json.decode(body, type=_User).user
        talk = self._talks[user]
        self.turns += 1
        talk.asked(chat.messages[-1].text, at, warm_since=ready_at)
        pause_s, sentences, told = self._delays.model_ms / 1000, Sentences(), False
        head = http.send(h11.Response(status_code=200, headers=[("content-type", "text/event-stream")])) or b""
        for piece in chunks(chat, Say(talk.answer)):
            await trio.sleep(pause_s)
            pause_s = WRITES_ON_S if told and talk.writes_on else self._delays.token_ms / 1000
            sent_at = connection.send(head + _event(http, msgspec.json.encode(piece)))
            head = b""
            delta = piece["choices"][0]["delta"] if piece["choices"] else {}
            if not told and sentences.feed(delta.get("content", "")):
                told = True
                talk.sentence_written(sent_at)
        connection.send(_event(http, b"[DONE]") + (http.send(h11.EndOfMessage()) or b""))


def _event(http: h11.Connection, data: bytes) -> bytes:
    return http.send(h11.Data(data=b"data: " + data + b"\n\n")) or b""


def _respond(http: h11.Connection, connection: DatedConnection, body: bytes) -> None:
    headers = [("content-type", "application/json"), ("content-length", str(len(body)))]
    events = (h11.Response(status_code=200, headers=headers), h11.Data(data=body), h11.EndOfMessage())
    connection.send(b"".join(http.send(event) or b"" for event in events))
