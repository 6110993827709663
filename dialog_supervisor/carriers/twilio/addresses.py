"""Where Twilio finds this dialogd: the URLs it is given, all below `gateway.public_url`, and the forms that it may sign."""

import re
from collections.abc import Iterator
from urllib.parse import urlsplit

from dialog_supervisor.sections import GatewayConfig

PREFIX = "/twilio/"
VOICE_PATH = PREFIX + "voice"
AFTER_PATH = PREFIX + "after"
MEDIA_PREFIX = PREFIX + "media/"
_OF_A_NODE = re.compile(f"/n/[^/]+(?={PREFIX})")
CALLBACK_PATHS = {PREFIX + about: about for about in ("recording", "transcript", "stream", "status")}


class Addresses:
    """The public URLs. Those that Twilio is given have the node's name in front, if it has one, as `/n/NAME`.

    It is in the path, by which a proxy leads back to the node that has the call: Twilio strips a stream URL's query.
    """

    def __init__(self, gateway: GatewayConfig) -> None:
        self._origin = gateway.public_url.rstrip("/")
        self._node = f"/n/{gateway.node}" if gateway.node else ""
        self.after = self._origin + self._node + AFTER_PATH

    def here(self, path: str) -> str:
        """Return a path as it is without the name of a node; of any, for a proxy brings what a dead one was asked."""
        return _OF_A_NODE.sub("", path, count=1) if self._node and path.startswith("/n/") else path

    def url(self, path: str, query: str = "") -> str:
        """Return the URL that Twilio asked for when the request was for this path."""
        return self._origin + path + (f"?{query}" if query else "")

    def socket_url(self, path: str) -> str:
        """Return the URL of the WebSocket that Twilio opened when the request was for this path."""
        return self._origin.replace("http", "ws", 1) + path

    def media(self, token: str) -> str:
        """Return a media socket's URL. The token is in the path: Twilio strips a stream URL's query (docs, <Stream>)."""
        return self.socket_url(self._node + MEDIA_PREFIX + token)

    def callback(self, about: str) -> str:
        """Return where Twilio reports on a call's "recording", "transcript", "stream" or "status"."""
        return self._origin + self._node + PREFIX + about


def signed_urls(url: str) -> Iterator[str]:
    """Yield the forms of a WebSocket URL that Twilio may have signed: with and without port, each with and without a slash.

    Twilio's documentation leaves open which it is ("try appending a trailing /"), and its own validator takes port 80 for a
    wss URL's default. The https form is never one of them.
    """
    parts = urlsplit(url)
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    port = parts.port or (443 if parts.scheme == "wss" else 80)
    for place in dict.fromkeys((parts.netloc, host, f"{host}:{port}")):
        yield f"{parts.scheme}://{place}{parts.path}"
        yield f"{parts.scheme}://{place}{parts.path}/"
