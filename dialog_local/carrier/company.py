"""A phone company on this machine that behaves as Twilio does towards its customer.

It places calls to a voice webhook and serves the REST requests that steer them (Twilio docs, Call resource: update, fetch).
One `PhoneCompany` has many calls; `Call.run` carries one. Errors are told as Twilio tells them: code, message, status.
"""

import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio
from hypercorn.config import Config
from hypercorn.trio import serve

from dialog_local.carrier.faults import Faults
from dialog_local.carrier.phonecall import Account, Call, StatusEvent, Voice
from dialog_local.carrier.rest import Api
from dialog_local.carrier.transcriptions import Ear

GRACEFUL_SECONDS = 0.2  # for requests under way when the phone company closes


class PhoneCompany:
    """An account with a phone company: it places calls, and knows them by sid for the REST requests about them.

    `voice` speaks `<Say>`; without it the words pass in silence. `ear` transcribes. `ssl_context` decides which servers are
    trusted. `faults` is what goes wrong with the REST API.
    """

    def __init__(
        self,
        account_sid: str,
        auth_token: str,
        *,
        voice: Voice | None = None,
        ear: Ear | None = None,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        self.account = Account(account_sid, auth_token, voice, ssl_context or ssl.create_default_context(), ear)
        self.calls: dict[str, Call] = {}
        self.faults = Faults()

    def call(
        self,
        webhook_url: str,
        from_: str,
        to: str,
        *,
        via: str = "",
        fallback_url: str = "",
        status_url: str = "",
        status_events: tuple[StatusEvent, ...] = ("completed",),
    ) -> Call:
        """Make a call from `from_` to `to`, whose number is configured with `webhook_url`; `Call.run` places it.

        `via` is a base URL that is really connected to where `webhook_url` names a public host, as behind a proxy. What
        becomes of the call is told to `status_url`, as far as it is one of the `status_events`.
        """
        made = Call(
            self.account,
            webhook_url,
            from_,
            to,
            via=via,
            fallback_url=fallback_url,
            status_url=status_url,
            status_events=status_events,
        )
        self.calls[made.sid] = made
        return made

    @asynccontextmanager
    async def serve(self, host: str = "127.0.0.1", port: int = 0) -> AsyncIterator[str]:
        """Serve the REST API while the block lasts; gives its base URL. Port 0 takes any free one. Raises `OSError`."""
        listener = socket.create_server((host, port))  # made here, so that an error is an `OSError`, not a group
        host, port = listener.getsockname()[:2]
        config = Config()
        config.bind = [f"fd://{listener.detach()}"]
        config.accesslog = config.errorlog = None
        config.graceful_timeout = GRACEFUL_SECONDS
        async with trio.open_nursery() as nursery:
            await nursery.start(serve, Api(self.account, self.calls, self.faults).app(), config)
            yield f"http://{host}:{port}"
            nursery.cancel_scope.cancel()
