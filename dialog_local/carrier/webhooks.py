"""Signed requests from the phone company to its customer: signature, routing, retry.

Twilio docs, security: X-Twilio-Signature = base64(HMAC-SHA1(auth token, URL + every parameter's name and value, sorted by
name)). Twilio docs, webhooks connection overrides: 5 s to connect, 15 s in all, one retry if the connection failed, carrying
the same I-Twilio-Idempotency-Token.
"""

import base64
import hashlib
import hmac
import ssl
from collections.abc import Mapping
from urllib.parse import urlencode, urlsplit, urlunsplit
from uuid import uuid4

import httpx
import trio

CONNECT_SECONDS = 5.0
TOTAL_SECONDS = 15.0
ATTEMPTS = 2


class WebhookFailed(Exception):
    """A webhook got no usable answer: 11205 without a connection or in time, 11200 for an HTTP error."""

    def __init__(self, code: int, url: str, message: str, http_status: int = 0) -> None:
        super().__init__(message)
        self.code = code
        self.url = url
        self.http_status = http_status


def signature(auth_token: str, url: str, params: Mapping[str, str]) -> str:
    """Sign a request to `url` as Twilio does.

    Userinfo is never signed; the port is dropped for https and kept otherwise. Whether Twilio keeps the port of a wss URL is
    not documented; it is kept here.
    """
    signed = _signed_url(url) + "".join(name + params[name] for name in sorted(params))
    return base64.b64encode(hmac.new(auth_token.encode(), signed.encode(), hashlib.sha1).digest()).decode()


def _signed_url(url: str) -> str:
    parts = urlsplit(url)
    netloc = parts.netloc.rpartition("@")[2]
    if parts.scheme == "https" and parts.port is not None:
        netloc = netloc[: -len(f":{parts.port}")]
    return urlunsplit((parts.scheme, netloc, parts.path, parts.query, ""))


class Route:
    """How public addresses are reached: as they are written, or through a given address, as behind a proxy.

    `via` is a base URL such as "http://127.0.0.1:8080"; it stands in for the scheme, host and port of every URL below
    `public_url`. The Host header stays the public one.
    """

    def __init__(self, public_url: str = "", via: str = "", ssl_context: ssl.SSLContext | None = None) -> None:
        self.ssl_context = ssl_context or ssl.create_default_context()
        self._public_host = urlsplit(public_url).netloc if via else ""
        self._via = urlsplit(via)

    def host_header(self, url: str) -> str:
        """The host (and port) that the customer believes to be asked at."""
        return urlsplit(url).netloc.rpartition("@")[2]

    def path(self, url: str) -> str:
        """What stands in the request line for an address."""
        parts = urlsplit(url)
        return (parts.path or "/") + (f"?{parts.query}" if parts.query else "")

    def target(self, url: str) -> str:
        """The http(s) address to really ask for `url`."""
        parts = urlsplit(url)
        scheme, netloc = parts.scheme.replace("ws", "http"), parts.netloc
        if self._public_host and parts.netloc.rpartition("@")[2] == self._public_host:
            scheme, netloc = self._via.scheme, self._via.netloc
        return urlunsplit((scheme, netloc, parts.path or "/", parts.query, ""))

    async def connect(self, url: str) -> trio.abc.Stream:
        """Open the connection for `url`, with TLS where it is due. Raises `OSError`."""
        target = urlsplit(self.target(url))
        host, tls = target.hostname or "", target.scheme == "https"
        tcp = await trio.open_tcp_stream(host, target.port or (443 if tls else 80))
        if not tls:
            return tcp
        secure = trio.SSLStream(tcp, self.ssl_context, server_hostname=urlsplit(url).hostname, https_compatible=True)
        try:
            await secure.do_handshake()
        except BaseException as error:
            await trio.aclose_forcefully(secure)
            if isinstance(error, trio.BrokenResourceError):
                raise ConnectionError(f"TLS with {host} failed: {error.__cause__}") from error
            raise
        return secure


class Webhooks:
    """Sends signed requests for one call. Use as an async context manager."""

    def __init__(self, auth_token: str, route: Route) -> None:
        self._auth_token = auth_token
        self._route = route
        timeout = httpx.Timeout(TOTAL_SECONDS, connect=CONNECT_SECONDS)
        # Proxies named in the environment have nothing to do with a phone call on this machine.
        self._client = httpx.AsyncClient(verify=route.ssl_context, timeout=timeout, trust_env=False)

    async def __aenter__(self) -> "Webhooks":
        await self._client.__aenter__()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._client.aclose()

    async def ask(self, url: str, params: Mapping[str, str], method: str = "POST") -> str:
        """Return the body that `url` answers with, tried once more if it cannot be connected to. Raises `WebhookFailed`."""
        token = str(uuid4())
        try:
            with trio.fail_after(TOTAL_SECONDS):
                for attempt in range(1, ATTEMPTS + 1):
                    try:
                        return self._body(url, await self._send(url, params, method, token))
                    except (httpx.ConnectError, httpx.ConnectTimeout):
                        if attempt == ATTEMPTS:
                            raise
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            message = f"no answer from {self._route.target(url)}: {error or type(error).__name__}"
            raise WebhookFailed(11205, url, message) from error
        except trio.TooSlowError as error:
            raise WebhookFailed(11205, url, f"{url} did not answer within {TOTAL_SECONDS:g} s") from error
        raise AssertionError("unreachable: the last attempt returns or raises")

    async def _send(self, url: str, params: Mapping[str, str], method: str, token: str) -> httpx.Response:
        if method == "GET":  # the parameters are part of the address then, and signed as such
            url += ("&" if urlsplit(url).query else "?") + urlencode(params)
        signed = signature(self._auth_token, url, {} if method == "GET" else params)
        headers = {
            "Host": self._route.host_header(url),
            "X-Twilio-Signature": signed,
            "I-Twilio-Idempotency-Token": token,
            "User-Agent": "TwilioProxy/1.1",
            "Accept": "*/*",
        }
        content = None
        if method != "GET":
            content = urlencode(params)
            headers["Content-Type"] = "application/x-www-form-urlencoded; charset=UTF-8"
        target = self._route.target(url)
        names = {"sni_hostname": urlsplit(url).hostname} if target.startswith("https") else {}
        return await self._client.request(method, target, content=content, headers=headers, extensions=names)

    def _body(self, url: str, response: httpx.Response) -> str:
        if response.status_code >= 300:
            message = f"{url} answered HTTP {response.status_code}: {response.text[:200].strip()}"
            raise WebhookFailed(11200, url, message, response.status_code)
        return response.text
