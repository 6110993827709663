"""One loud call, for as long as the program runs: `python -m scripts.benches.loud KIND WEBHOOK`.

When it is told to end it prints how much it said and heard, as JSON. A call that ends is followed by another.
"""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from enum import Enum

import msgspec
import trio
from msgspec import Struct

from dialog_local.load.callers import FRAME_S, dial
from dialog_local.load.wire import CallFailed, Connection, Stream, Target, upgrade
from scripts.benches.stage import ACCOUNT, TOKEN

AT_ONCE = 20  # frames in one write, where nobody keeps the time
MANY_PER_S = 2_000  # frames; forty telephones
RECEIVE_BYTES = 64 << 10
LITTLE_BYTES = 16 << 10  # of room in the kernel for what nobody reads
AGAIN_S = 0.2  # from a call's end to the next


class Kind(Enum):
    """What is loud about the call: the caller's number, by which the agent knows it."""

    MANY = "+15550000001"  # the carrier sends 2,000 frames a second
    TORRENT = "+15550000002"  # the carrier sends all that the socket takes
    VOICE = "+15550000003"  # the agent speaks as much as it may
    FLOOD = "+15550000004"  # the agent speaks more than it may
    DEAF = "+15550000005"  # the carrier sends 2,000 frames a second, which the agent echoes, and reads nothing


class Said(Struct, frozen=True):
    """What came of it: how many calls, and frames to and from the server for each second."""

    calls: int
    sent_per_s: float
    heard_per_s: float


class Loud:
    """The caller."""

    def __init__(self, kind: Kind, target: Target) -> None:
        self._kind = kind
        self._target = target
        self._calls = self._sent = self._heard = 0
        self._began_at = time.perf_counter()

    def said(self) -> Said:
        """Return how loud it was so far."""
        elapsed = time.perf_counter() - self._began_at
        return Said(self._calls, round(self._sent / elapsed), round(self._heard / elapsed))

    def run(self) -> None:
        """Place call after call, until the program ends."""
        while True:
            with suppress(OSError, CallFailed):  # as when the server had enough of it
                sock, stream = trio.run(self._place)
                self._calls += 1
                with sock:
                    self._talk(sock, stream)
            time.sleep(AGAIN_S)

    async def _place(self) -> tuple[socket.socket, Stream]:
        call_sid = "CA" + os.urandom(16).hex()
        verb = await dial(self._target, call_sid, self._kind.value)
        with Connection(self._socket()) as connection:
            await upgrade(connection, verb.url, self._target.token)
            stream = Stream(self._target.account_sid, call_sid, verb.parameters)
            connection.write(stream.connected() + stream.start())
            sock = connection.detach()
        sock.setblocking(True)
        return sock, stream

    def _socket(self) -> socket.socket:
        sock = socket.socket()
        if self._kind is Kind.DEAF:  # before connecting: later, the kernel would drop even acknowledgements when it is full
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, LITTLE_BYTES)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.connect(self._target.address)
        sock.setblocking(False)
        return sock

    def _talk(self, sock: socket.socket, stream: Stream) -> None:
        if self._kind is not Kind.DEAF:
            threading.Thread(target=self._listen, args=(sock,), daemon=True).start()
        for count in self._turns():
            now = time.perf_counter()
            sock.sendall(b"".join([stream.media(now) for _ in range(count)]))
            self._sent += count

    def _turns(self) -> Iterator[int]:
        """Yield how many frames to send, whenever it is time to."""
        if self._kind is Kind.TORRENT:
            while True:
                yield AT_ONCE
        every_s = 1 / MANY_PER_S if self._kind in {Kind.MANY, Kind.DEAF} else FRAME_S
        due = time.perf_counter()
        while True:
            count = int((time.perf_counter() - due) / every_s) + 1
            yield count
            due += count * every_s
            time.sleep(max(0.0, due - time.perf_counter()))

    def _listen(self, sock: socket.socket) -> None:
        with suppress(OSError):
            while data := sock.recv(RECEIVE_BYTES):
                self._heard += data.count(b'"event":"media"')


def main(kind: str, webhook: str) -> None:
    """Be loud until told to end."""
    host, _, port = webhook.split("/")[2].partition(":")
    loud = Loud(Kind[kind], Target(webhook, (host, int(port)), ACCOUNT, TOKEN))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        loud.run()
    finally:
        print(msgspec.json.encode(loud.said()).decode(), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
