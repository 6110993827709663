"""Where Twilio finds this dialogd: the URLs it is given, all below `gateway.public_url`, and the forms that it may sign."""

from collections.abc import Iterator
from urllib.parse import urlsplit

PREFIX = "/twilio/"
VOICE_PATH = PREFIX + "voice"
AFTER_PATH = PREFIX + "after"
MEDIA_PREFIX = PREFIX + "media/"
CALLBACK_PATHS = {PREFIX + about: about for about in ("recording", "transcript", "stream", "status")}


class Addresses:
    """The public URLs. `public_url` has scheme, host and port, as Twilio's console has them."""

    def __init__(self, public_url: str) -> None:
        self._origin = public_url.rstrip("/")
        self.after = self._origin + AFTER_PATH

    def url(self, path: str, query: str = "") -> str:
        """Return the URL that Twilio asked for when the request was for this path."""
        return self._origin + path + (f"?{query}" if query else "")

    def media(self, token: str) -> str:
        """Return a media socket's URL. The token is in the path: Twilio strips a stream URL's query (docs, <Stream>)."""
        return self._origin.replace("http", "ws", 1) + MEDIA_PREFIX + token

    def callback(self, about: str) -> str:
        """Return where Twilio reports on a call's "recording", "transcript", "stream" or "status"."""
        return self._origin + PREFIX + about


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
