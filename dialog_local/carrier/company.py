"""A phone company on this machine that behaves as Twilio does towards its customer.

It places calls to a voice webhook and serves the REST requests that steer them (Twilio docs, Call resource: update, fetch).
One `PhoneCompany` has many calls; `Call.run` carries one. Errors are told as Twilio tells them: code, message, status.
"""

import base64
import hmac
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import parse_qsl

import trio
from hypercorn.config import Config
from hypercorn.trio import serve
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from dialog_local.carrier import twiml
from dialog_local.carrier.phonecall import Account, Call, Step, Voice

GRACEFUL_SECONDS = 0.2  # for requests under way when the phone company closes


class RestError(Exception):
    """A REST request that is refused."""

    def __init__(self, status: int, code: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code

    def response(self) -> JSONResponse:
        """Return Twilio's error document."""
        more_info = f"https://www.twilio.com/docs/errors/{self.code}"
        body = {"code": self.code, "message": str(self), "more_info": more_info, "status": self.status}
        return JSONResponse(body, self.status)


class PhoneCompany:
    """An account with a phone company: it places calls, and knows them by sid for the REST requests about them.

    `voice` speaks `<Say>`; without it the words pass in silence. `ssl_context` decides which servers are trusted.
    """

    def __init__(
        self,
        account_sid: str,
        auth_token: str,
        *,
        voice: Voice | None = None,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        self.account = Account(account_sid, auth_token, voice, ssl_context or ssl.create_default_context())
        self.calls: dict[str, Call] = {}

    def call(
        self,
        webhook_url: str,
        from_: str,
        to: str,
        *,
        via: str = "",
        fallback_url: str = "",
        status_url: str = "",
    ) -> Call:
        """Make a call from `from_` to `to`, whose number is configured with `webhook_url`; `Call.run` places it.

        `via` is a base URL that is really connected to where `webhook_url` names a public host, as behind a proxy.
        """
        made = Call(self.account, webhook_url, from_, to, via=via, fallback_url=fallback_url, status_url=status_url)
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
            await nursery.start(serve, self._app(), config)
            yield f"http://{host}:{port}"
            nursery.cancel_scope.cancel()

    def _app(self) -> Starlette:
        path = "/2010-04-01/Accounts/{account}/Calls/{call}.json"
        routes = [Route(path, self._fetch, methods=["GET"]), Route(path, self._update, methods=["POST"])]
        return Starlette(routes=routes, exception_handlers={RestError: _refuse, 404: _not_found})

    async def _fetch(self, request: Request) -> JSONResponse:
        return JSONResponse(self._named_call(request).resource())

    async def _update(self, request: Request) -> JSONResponse:
        call = self._named_call(request)
        fields = dict(parse_qsl((await request.body()).decode()))
        if call.ended:
            raise RestError(400, 21220, "Call is not in-progress. Cannot redirect.")
        if "Status" in fields:
            _change_status(call, fields["Status"])
        elif bool(fields.get("Twiml")) != bool(fields.get("Url")):
            call.replace(_step(fields))
        else:
            raise RestError(400, 21218, "Give one of Status, Twiml and Url.")
        return JSONResponse(call.resource())

    def _named_call(self, request: Request) -> Call:
        """Authenticate a request and return the call that it is about. Raises `RestError`."""
        self._authenticate(request.headers.get("authorization", ""))
        call = self.calls.get(request.path_params["call"])
        if call is None or request.path_params["account"] != self.account.sid:
            raise RestError(404, 20404, f"The requested resource {request.url.path} was not found")
        return call

    def _authenticate(self, authorization: str) -> None:
        expected = base64.b64encode(f"{self.account.sid}:{self.account.auth_token}".encode()).decode()
        if not hmac.compare_digest(authorization.encode(), f"Basic {expected}".encode()):
            raise RestError(401, 20003, "Authenticate: the account sid or the auth token is not the one configured")


def _change_status(call: Call, status: str) -> None:
    if status == "completed" or (status == "canceled" and call.status in {"queued", "ringing"}):
        call.end(f"ended over REST: Status={status}")
        return
    raise RestError(400, 21218, f"Status={status!r} is not possible for a call that is {call.status}.")


def _step(fields: dict[str, str]) -> Step:
    if url := fields.get("Url"):
        return Step(twiml.Reference(url, fields.get("Method", "POST").upper()))
    return Step(text=fields["Twiml"])


async def _refuse(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RestError)
    return error.response()


async def _not_found(request: Request, _error: Exception) -> JSONResponse:
    return RestError(404, 20404, f"The requested resource {request.url.path} was not found").response()
