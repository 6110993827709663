"""The carrier's side of a call: the webhook, the media socket, 50 frames a second, and a buffer that plays what it gets."""

import msgspec
import trio
from websockets.frames import Opcode

from dialog_local.carrier import media, twiml
from dialog_local.carrier.playout import Happening, MarkReached, Playout
from dialog_local.load.wire import CallFailed, Connection, Stream, Target, ask, upgrade
from dialog_local.outcome import first_of
from scripts.benches.turn_sockets import DatedConnection, dial
from scripts.benches.turn_speech import KEY_BYTES
from scripts.benches.turn_talk import PATIENCE_S, Talk

FRAME_S = 0.02
_decoder: msgspec.json.Decoder[media.Request] = msgspec.json.Decoder(media.Request)


class Line:
    """One call's line. It listens with the talk's ears: what arrives is told there, with its date."""

    def __init__(self, target: Target, talk: Talk) -> None:
        self._target = target
        self._talk = talk
        self._playout = Playout()

    async def run(self, turns: int) -> None:
        """Place the call, have it talk for so many turns, and hang up."""
        try:
            with trio.fail_after(PATIENCE_S):
                url, parameters = await self._ring()
                connection = await dial(self._target.address)
            with connection:
                with trio.fail_after(PATIENCE_S):
                    rest = await upgrade(connection, url, self._target.token)
                await self._stream(connection, Stream(self._target.account_sid, self._talk.sid, parameters), rest, turns)
        except* (CallFailed, OSError, trio.TooSlowError) as group:
            self._talk.failures.append(f"call {self._talk.number}: {first_of(group) or 'it was not connected in time'}")

    async def _ring(self) -> tuple[str, dict[str, str]]:
        numbers = {"From": "+15550001111", "To": "+15550002222", "Caller": "+15550001111", "Called": "+15550002222"}
        params = {"CallSid": self._talk.sid, "AccountSid": self._target.account_sid, **numbers}
        params |= {"CallStatus": "ringing", "Direction": "inbound", "ApiVersion": "2010-04-01"}
        verbs = twiml.parse(await ask(self._target, params), self._target.url)
        if not verbs or not isinstance(verbs[0], twiml.Connect):
            raise CallFailed("the webhook's answer does not begin with <Connect><Stream>")
        return verbs[0].url, verbs[0].parameters

    async def _stream(self, connection: DatedConnection, stream: Stream, rest: bytes, turns: int) -> None:
        connection.write(stream.connected() + stream.start())
        self._talk.ready["line"].set()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._listen, connection, stream, rest)
            nursery.start_soon(self._speak, connection, stream)
            await self._talk.run(turns)
            connection.write(stream.stop())
            nursery.cancel_scope.cancel()

    async def _speak(self, connection: Connection, stream: Stream) -> None:
        """Send a frame every 20 ms, and return the marks of what has been played by then."""
        due = trio.current_time()
        while True:
            connection.write(stream.media(due))
            self._return(connection, stream, self._playout.advance(trio.current_time()))
            due += FRAME_S
            await trio.sleep_until(due)

    async def _listen(self, connection: DatedConnection, stream: Stream, data: bytes) -> None:
        while True:
            for opcode, payload in stream.receive(data):
                if opcode == Opcode.TEXT:
                    self._take(connection, stream, _decoder.decode(payload))
                elif opcode == Opcode.PING:
                    connection.write(stream.pong(payload))
                elif opcode == Opcode.CLOSE:
                    raise CallFailed("the server closed the media socket")
            if not (data := await connection.receive()):
                raise CallFailed("the server ended the connection")

    def _take(self, connection: DatedConnection, stream: Stream, message: media.Request) -> None:
        now = trio.current_time()
        if isinstance(message, media.Media):
            audio = message.media.payload
            self._talk.audio_heard(audio[:KEY_BYTES], connection.arrived_at)
            self._return(connection, stream, self._playout.append(audio, now))
        elif isinstance(message, media.Mark):
            self._return(connection, stream, self._playout.mark(message.mark.name, now))
        else:
            self._talk.cleared(connection.arrived_at)
            self._return(connection, stream, self._playout.clear(now))

    def _return(self, connection: Connection, stream: Stream, happened: list[Happening]) -> None:
        for one in happened:
            if isinstance(one, MarkReached):
                connection.write(stream.mark(one.name))
                if not one.cleared:
                    self._talk.played.set()
