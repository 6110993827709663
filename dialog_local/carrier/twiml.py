"""TwiML as Twilio reads it: an XML document becomes a list of verbs to be carried out in order.

Twilio docs, TwiML for Programmable Voice. Known here are the verbs that a voice agent's call can meet: Say, Play, Pause,
Redirect, Dial, Hangup, and Connect with a bidirectional Stream. Anything else in a document is an error that names it.
"""

from collections.abc import Callable
from typing import TypeAlias
from urllib.parse import urljoin, urlsplit, urlunsplit
from xml.etree import ElementTree

from msgspec import Struct


class DocumentError(Exception):
    """A document that Twilio would refuse, with the number of its error."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class Reference(Struct, frozen=True):
    """Where to ask for the next document, and how."""

    url: str
    method: str = "POST"


class Say(Struct, frozen=True):
    """Speak a text, `loop` times."""

    text: str
    loop: int = 1


class Play(Struct, frozen=True):
    """Play a recording, or touch tones."""

    url: str = ""
    digits: str = ""


class Pause(Struct, frozen=True):
    """Be silent."""

    seconds: float = 1.0


class Hangup(Struct, frozen=True):
    """End the call."""


class Redirect(Struct, frozen=True):
    """Go on with another document."""

    to: Reference


class Dial(Struct, frozen=True):
    """Connect the caller with somebody else."""

    targets: tuple[str, ...]


class Connect(Struct, frozen=True):
    """Connect the caller with a media stream until that ends; then `action`, or the next verb.

    `status_callback` is told what becomes of the stream, which it knows by its `name`.
    """

    url: str
    parameters: dict[str, str]
    action: Reference | None = None
    status_callback: Reference | None = None
    name: str = ""


Verb: TypeAlias = Say | Play | Pause | Hangup | Redirect | Dial | Connect


def parse(document: str, base_url: str) -> list[Verb]:
    """Return the verbs of a document that was found at `base_url`, which its relative addresses refer to.

    Raises `DocumentError`: 12100 for what is no XML or has no <Response>, 12200 for verbs and attributes that do not fit,
    31941 for a track that a bidirectional stream cannot have, 31922 and 31923 for a stream's address.
    """
    try:
        root = ElementTree.fromstring(document)
    except ElementTree.ParseError as error:
        raise DocumentError(12100, f"the answer of {base_url} is not XML: {error}: {document[:200]!r}") from error
    if root.tag != "Response":
        raise DocumentError(12100, f"the answer of {base_url} begins with <{root.tag}> instead of <Response>")
    return [_verb(element, base_url) for element in root]


def _verb(element: ElementTree.Element, base_url: str) -> Verb:
    read = _READERS.get(element.tag)
    if read is None:
        raise DocumentError(12200, f"<{element.tag}> is not a verb that this phone company knows: {', '.join(_READERS)}")
    return read(element, base_url)


def _say(say: ElementTree.Element, _base_url: str) -> Say:
    return Say("".join(say.itertext()).strip(), loop=int(_number(say, "loop", 1)))


def _play(play: ElementTree.Element, base_url: str) -> Play:
    url = (play.text or "").strip()
    return Play(urljoin(base_url, url) if url else "", play.get("digits", ""))


def _pause(pause: ElementTree.Element, _base_url: str) -> Pause:
    return Pause(_number(pause, "length", 1))


def _hangup(_hangup: ElementTree.Element, _base_url: str) -> Hangup:
    return Hangup()


def _redirect(redirect: ElementTree.Element, base_url: str) -> Redirect:
    return Redirect(_reference(redirect, base_url, (redirect.text or "").strip()))


def _dial(dial: ElementTree.Element, _base_url: str) -> Dial:
    texts = [dial.text, *(child.text for child in dial)]
    targets = tuple(text.strip() for text in texts if text and text.strip())
    if not targets:
        raise DocumentError(13223, "<Dial> names nobody: give a number, or <Number>, <Sip>, <Client> or <Conference> in it")
    return Dial(targets)


def _reference(element: ElementTree.Element, base_url: str, url: str) -> Reference:
    return Reference(urljoin(base_url, url), element.get("method", "POST").upper())


def _number(element: ElementTree.Element, name: str, default: float) -> float:
    try:
        return float(element.get(name, default))
    except ValueError as error:
        raise DocumentError(12200, f"<{element.tag} {name}={element.get(name)!r}> is not a number") from error


def _connect(connect: ElementTree.Element, base_url: str) -> Connect:
    if [child.tag for child in connect] != ["Stream"]:
        raise DocumentError(12200, f"<Connect> must hold one <Stream>, not {[child.tag for child in connect]}")
    stream = connect[0]
    track = stream.get("track", "inbound_track")
    if track != "inbound_track":
        raise DocumentError(31941, f"<Stream track={track!r}>: under <Connect> only inbound_track is possible")
    action, told = connect.get("action"), stream.get("statusCallback")
    return Connect(
        _stream_url(stream.get("url", "")),
        dict(_parameter(child) for child in stream),
        _reference(connect, base_url, action) if action else None,
        Reference(urljoin(base_url, told), stream.get("statusCallbackMethod", "POST").upper()) if told else None,
        stream.get("name", ""),
    )


def _parameter(element: ElementTree.Element) -> tuple[str, str]:
    name, value = element.get("name", ""), element.get("value", "")
    if element.tag != "Parameter" or not name:
        raise DocumentError(12200, f"<Stream> holds <{element.tag}>; only <Parameter name value> is possible")
    if len(name) + len(value) >= 500:  # Twilio docs, TwiML <Stream>: name and value together under 500 characters
        raise DocumentError(12200, f"<Parameter name={name!r}> is {len(name) + len(value)} characters; it must be under 500")
    return name, value


def _stream_url(url: str) -> str:
    """Return the address without query and fragment, which Twilio does not pass on (error 31920 is what one then sees).

    Twilio insists on wss; ws is taken too, because on loopback there is nobody to hide from.
    """
    parts = urlsplit(url)
    if parts.scheme not in {"ws", "wss"}:
        raise DocumentError(31922, f"<Stream url={url!r}> must begin with wss://")
    if not parts.hostname:
        raise DocumentError(31923, f"<Stream url={url!r}> has no host")
    return urlunsplit((parts.scheme, parts.netloc, parts.path, "", ""))


_READERS: dict[str, Callable[[ElementTree.Element, str], Verb]] = {
    "Say": _say,
    "Play": _play,
    "Pause": _pause,
    "Hangup": _hangup,
    "Redirect": _redirect,
    "Dial": _dial,
    "Connect": _connect,
}
