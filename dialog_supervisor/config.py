"""dialog.toml as typed sections: read once, checked completely, and refused with one sentence that says what to change.

A secret is written as a reference: `env:NAME`, `file:PATH` or `credential:NAME` (a systemd credential); a plain value works
for trying things out. A `.env` file beside the configuration is read too; the real environment wins over it.
"""

import difflib
import hashlib
import os
import re
import tempfile
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args
from urllib.parse import urlsplit

import msgspec
from dotenv import dotenv_values
from msgspec import Struct

from dialog_supervisor.sections import Secret, Section, Tables
from dialog_supervisor.transfer import PATTERN_FORMS, is_pattern

_SECRET_KEYS = re.compile(r"token|key|secret|password|^agent\.env", re.IGNORECASE)
_TOKEN_FORM = re.compile(r"[0-9a-fA-F]{32}")  # Twilio's auth tokens: never shown, wherever one was put by mistake
_E164 = re.compile(r"\+[1-9]\d{6,14}")
_USER_INFO = re.compile(r"//[^/]*@")  # of a URL: a name and a password
_HOST = re.compile(r"[\w.-]+|\[[0-9a-fA-F:.]+(%[\w.-]+)?\]")
_NODE = re.compile(r"[A-Za-z0-9_-]{1,32}")  # what no proxy writes differently in a path (RFC 3986, unreserved)
_NODE_PLACE = "{node}"
_UNIX_SOCKET_PATH_BYTES = 107  # sun_path less its closing zero, unix(7)


class ConfigError(Exception):
    """The configuration cannot be used; the message names file, key, value and remedy."""


class Environ(dict[str, str]):
    """Environment variables. They never show themselves in a repr: some are secrets."""

    def __repr__(self) -> str:
        return f"<{len(self)} variables>"


class Config(Tables, frozen=True, kw_only=True):
    """dialog.toml with where it was found: `file`, and the environment that its references were resolved in."""

    file: Path
    environ: Mapping[str, str]

    @property
    def agent_path(self) -> Path:
        """The agent's directory, absolute."""
        return self.file.parent / self.agent.path

    def agent_environ(self) -> dict[str, str]:
        """The environment of the processes that run agent code: without anything that holds a secret of the carrier.

        Also what systemd gave this process alone (notify socket, listeners, credentials, journal) stays here.
        """
        secret = self.twilio.auth_token
        kept = {
            name: value
            for name, value in self.environ.items()
            if secret not in value
            and not name.startswith(("TWILIO_", "TELNYX_", "LISTEN_"))
            and name not in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "CREDENTIALS_DIRECTORY", "JOURNAL_STREAM")
        }
        return {name: str(value) for name, value in self.agent.env.items()} | kept


def load(file: Path | str, environ: Mapping[str, str] | None = None) -> Config:
    """Read and check a configuration. Raises `ConfigError`."""
    path = Path(file).absolute()
    tables = _parse(path)
    surroundings = _surroundings(path, os.environ if environ is None else environ)
    try:
        said = msgspec.convert(tables, Tables, dec_hook=_Resolver(path, surroundings))
    except msgspec.ValidationError as error:
        raise _explain(path, tables, str(error)) from None
    found = {
        **_of_node(path, said, surroundings),
        "events": msgspec.structs.replace(said.events, directory=_events_directory(said.events.directory, surroundings)),
        "recordings": msgspec.structs.replace(
            said.recordings, directory=_recordings_directory(path, said.recordings.directory, surroundings)
        ),
        "store": msgspec.structs.replace(said.store, path=_store_file(path, said.store.path, surroundings)),
    }
    sections = {name: getattr(said, name) for name in Tables.__struct_fields__} | found
    config = Config(**sections, file=path, environ=surroundings)
    _check(path, config)
    return config


def split_address(address: str) -> tuple[str, int]:
    """Return host and port of `host:port` or `[v6]:port`; `:port` alone is every address. Raises ValueError."""
    host, separator, port = address.rpartition(":")
    usable = separator and re.fullmatch("[0-9]{1,5}", port) and int(port) <= 0xFFFF and (not host or _HOST.fullmatch(host))
    if not usable:
        raise ValueError(address)
    return host.removeprefix("[").removesuffix("]"), int(port)


def _parse(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; name your configuration with -c FILE") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: is not valid TOML: {error}") from None


def _surroundings(path: Path, environ: Mapping[str, str]) -> Environ:
    """Return the environment, completed by what `.env` beside the configuration says."""
    file = path.parent / ".env"
    try:
        written = {name: value for name, value in dotenv_values(file).items() if value is not None}
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    return Environ(written | dict(environ))


class _Resolver:
    """Turns what TOML cannot say, secrets and paths, into values while msgspec converts the tables."""

    def __init__(self, path: Path, environ: Mapping[str, str]) -> None:
        self._path = path
        self._environ = environ

    def __call__(self, kind: type, value: Any) -> Any:
        if not isinstance(value, str):
            raise ValueError(f"Expected `str`, got `{type(value).__name__}`")
        if kind is Secret:
            return Secret(self._secret(value))
        if kind is Path:
            return self._file(value)
        raise NotImplementedError(kind)

    def _secret(self, reference: str) -> str:
        scheme, _, name = reference.partition(":")
        match scheme:
            case "env":
                value = self._environ.get(name, "")
                if not value:
                    raise ValueError(
                        f"the environment variable {name} is not set; set it, or put it in {self._path.parent / '.env'}"
                    )
                return value
            case "file":
                return self._read(self._file(name))
            case "credential":
                directory = self._environ.get("CREDENTIALS_DIRECTORY")
                if not directory:
                    raise ValueError(
                        "there is no CREDENTIALS_DIRECTORY; run under systemd with LoadCredential=, or use env: or file:"
                    )
                return self._read(Path(directory) / name)
            case _:
                if not reference:
                    raise ValueError("it is empty; write env:NAME, file:PATH, credential:NAME, or the value")
                return reference

    def _file(self, name: str) -> Path:
        if not name:
            raise ValueError("a path is missing; write one, relative to this file")
        try:
            return self._path.parent / Path(name).expanduser()
        except RuntimeError:
            raise ValueError(f"there is no home directory for {name}; write the whole path") from None

    def _read(self, file: Path) -> str:
        try:
            value = file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{file} cannot be read: {getattr(error, 'strerror', None) or error}") from None
        if not value:
            raise ValueError(f"{file} is empty")
        return value


def _explain(path: Path, tables: dict[str, Any], reason: str) -> ConfigError:
    """Say msgspec's complaint in the file's own terms: its keys, the value found, and what was probably meant."""
    message, _, where = reason.partition(" - at `$")
    key = where.rstrip("`").strip(".").replace("[...]", "")
    if missing := re.search("missing required field `(.+)`", message):
        name = f"{key}.{missing[1]}".strip(".")
        return ConfigError(f"{path}: {name} is missing; add it{_example(name)}")
    if unknown := re.search("unknown field `(.+)`", message):
        name = f"{key}.{unknown[1]}".strip(".")
        near = difflib.get_close_matches(unknown[1], _known(key), n=1)
        remedy = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(_known(key))}"
        return ConfigError(f"{path}: {name} is not a known key; {remedy}")
    value: Any = tables
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    if key == "agent.env" and isinstance(value, dict) and (odd := [n for n, v in value.items() if not isinstance(v, str)]):
        key = f"{key}.{odd[0]}"
    if message.startswith("Invalid enum value"):
        message = f"is none of {', '.join(get_args(_type_of(key)))}"
    complaint = f"{message[:1].lower()}{message[1:]}{_example(key)}"
    return ConfigError(f"{path}: {key}{_shown(key, value)}: {complaint}")


def _shown(key: str, value: Any) -> str:
    """Return a value as an error may show it: not when it is, or holds, what might be a secret."""
    plain = isinstance(value, str | int | float) and "." in key
    if not plain or _SECRET_KEYS.search(key) or _TOKEN_FORM.fullmatch(str(value)):
        return ""
    return f" = {_USER_INFO.sub('//********@', value) if isinstance(value, str) else value!r}"


def _type_of(key: str) -> Any:
    """Return the type of a section or of a value in one."""
    found: Any = Tables
    for part in filter(None, key.split(".")):
        fields = msgspec.structs.fields(found) if isinstance(found, type) and issubclass(found, Struct) else ()
        found = next((info.type for info in fields if info.encode_name == part), Section)
    return found


def _known(key: str) -> list[str]:
    return list(_type_of(key).__struct_fields__)


def _example(name: str) -> str:
    examples = {
        "gateway": ', for example:\n[gateway]\npublic_url = "https://voice.example.com"',
        "gateway.public_url": ', for example: public_url = "https://voice.example.com"',
        "twilio": ', for example:\n[twilio]\naccount_sid = "AC…"\nauth_token = "env:TWILIO_AUTH_TOKEN"',
        "twilio.account_sid": ', for example: account_sid = "AC…", as the console shows it',
        "twilio.auth_token": ', for example: auth_token = "env:TWILIO_AUTH_TOKEN"',
        "agent.entry": ', for example: entry = "agent:create"',
        "agent": ', for example:\n[agent]\npath = "."\nentry = "agent:create"',
    }
    return examples.get(name, "")


def _check(path: Path, config: Config) -> None:
    """Refuse what has the right type and still cannot work."""

    def refuse(key: str, value: str | None, why: str) -> ConfigError:
        return ConfigError(f"{path}: {key}{_shown(key, value)}: {why}")

    public_url = config.gateway.public_url
    for key, address in (("gateway.listen", config.gateway.listen), ("control.listen", config.control.listen)):
        if not _is_address(address):
            raise refuse(key, address, 'is not an address and a port, such as "127.0.0.1:8080"')
    public = _split(public_url)
    if public is None or public_url.rstrip("/") != f"{public.scheme}://{public.netloc}":
        raise refuse("gateway.public_url", public_url, 'must be a bare origin, such as "https://voice.example.com"')
    if _split(config.twilio.api_url) is None:
        raise refuse("twilio.api_url", config.twilio.api_url, "must be an http or https URL")
    _check_certificate(path, config, refuse)
    if not config.agent_path.is_dir():
        missing = f"there is no directory {config.agent_path}; the path is relative to {path.name}"
        raise refuse("agent.path", config.agent.path, missing)
    for name, value in config.agent.env.items():
        if config.twilio.auth_token in value:
            raise refuse(f"agent.env.{name}", None, "holds twilio.auth_token, which agent code must not have; remove it")
    for key, paths in (("readable", config.workers.readable), ("writable", config.workers.writable)):
        for number, found in enumerate(paths):
            if not found.exists():
                raise refuse(f"workers.{key}[{number}]", str(found), "there is no such file or directory")
    _check_numbers(config, refuse)


def _check_numbers(config: Config, refuse: Callable[[str, str | None, str], ConfigError]) -> None:
    for number, pattern in enumerate(config.transfer.allow):
        if not is_pattern(pattern):
            raise refuse(f"transfer.allow[{number}]", pattern, f"is not of a form such as {PATTERN_FORMS}")
    for key, given in (("dial", config.fallback.dial), ("busy_dial", config.fallback.busy_dial or None)):
        if given is not None and not _E164.fullmatch(given):
            raise refuse(f"fallback.{key}", given, 'is not an E.164 number, such as "+15551234567"')


def _check_certificate(path: Path, config: Config, refuse: Callable[[str, str | None, str], ConfigError]) -> None:
    if (config.gateway.certificate is None) != (config.gateway.key is None):
        raise refuse("gateway.certificate", config.gateway.certificate, "certificate and key go together")
    for key, name in (("gateway.certificate", config.gateway.certificate), ("gateway.key", config.gateway.key)):
        if name is not None and not (path.parent / name).is_file():
            raise refuse(key, name, f"there is no file {path.parent / name}")


def _is_address(address: str | None) -> bool:
    """Whether one can listen there; where there is no address, nobody will."""
    try:
        return address is None or bool(split_address(address))
    except ValueError:
        return False


def _split(url: str) -> Any:
    """Return the parts of an http(s) URL with a host and a usable port, or None."""
    try:
        parts = urlsplit(url)
        host = parts.netloc if parts.port is None else parts.netloc.removesuffix(f":{parts.port}")
    except ValueError:
        return None
    return parts if parts.scheme in ("http", "https") and _HOST.fullmatch(host) and parts.port != 0 else None


def _of_node(path: Path, said: Tables, environ: Mapping[str, str]) -> dict[str, Any]:
    """Return the sections in which the name of the node matters, with that in its place."""
    node = said.gateway.node or environ.get("DIALOG_NODE", "")
    if node and not _NODE.fullmatch(node):
        key = "gateway.node" if said.gateway.node else "DIALOG_NODE"
        raise ConfigError(f"{path}: {key} = {node!r}: is not a name for a node; use up to 32 letters, digits, - and _")

    def named(key: str, text: str) -> str:
        if _NODE_PLACE in text and not node:
            how = f"has {_NODE_PLACE}, but this dialogd has no name; set gateway.node, or DIALOG_NODE in its environment"
            raise ConfigError(f"{path}: {key} = {text!r}: {how}")
        return text.replace(_NODE_PLACE, node)

    listen, figures = said.gateway.listen, said.control.listen
    socket = _control_socket(path, Path(named("control.socket", str(said.control.socket))), node, environ)
    return {
        "gateway": msgspec.structs.replace(said.gateway, node=node, listen=named("gateway.listen", listen)),
        "control": msgspec.structs.replace(
            said.control, socket=socket, listen=None if figures is None else named("control.listen", figures)
        ),
    }


def _control_socket(path: Path, given: Path, node: str, environ: Mapping[str, str]) -> Path:
    """Return where the control socket is: as configured, as systemd says, or in a directory for this user alone."""
    if given != Path():
        socket = given
    elif runtime := environ.get("RUNTIME_DIRECTORY"):
        socket = Path(runtime.split(":")[0]) / "control.sock"
    else:
        directory = Path(environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()) / f"dialog-{os.getuid()}"
        socket = directory / f"{_name_of(path)}{node and '-'}{node}.sock"
    if len(os.fsencode(socket)) > _UNIX_SOCKET_PATH_BYTES:
        limit = f"a unix socket's path has at most {_UNIX_SOCKET_PATH_BYTES} bytes; choose a shorter one"
        raise ConfigError(f"{path}: control.socket = '{socket}': {limit}")
    return socket


def _recordings_directory(path: Path, given: Path, environ: Mapping[str, str]) -> Path:
    """Return where downloaded recordings go: as configured, as systemd says, or beside the configuration."""
    if given != Path():
        return given
    state = environ.get("STATE_DIRECTORY")
    return (Path(state.split(":")[0]) if state else path.parent) / "recordings"


def _store_file(path: Path, given: Path, environ: Mapping[str, str]) -> Path:
    """Return where calls are kept: as configured, as systemd says, or in the user's home; `Path()` where there is none."""
    if given != Path():
        return given
    if state := environ.get("STATE_DIRECTORY"):
        return Path(state.split(":")[0]) / "calls.sqlite"
    home = environ.get("XDG_STATE_HOME", "")
    if not home.startswith("/"):  # XDG Base Directory Specification: anything else is to be ignored
        if not environ.get("HOME", "").startswith("/"):
            return Path()
        home = environ["HOME"] + "/.local/state"
    return Path(home) / "dialog" / f"{_name_of(path)}.sqlite"


def _name_of(path: Path) -> str:
    """Return a name that stands for a configuration file."""
    return hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]


def _events_directory(given: Path, environ: Mapping[str, str]) -> Path:
    """Return where event logs go: as configured, or as systemd says; nowhere else, for nobody asked for them there."""
    state = environ.get("STATE_DIRECTORY")
    return given if given != Path() or not state else Path(state.split(":")[0]) / "events"
