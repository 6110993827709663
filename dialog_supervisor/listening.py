"""The sockets that dialogd listens on, opened as dialog.toml says, or refused with the key that is to be changed."""

import errno
import socket
import ssl

from dialog_supervisor.config import Config, ConfigError, split_address

_BACKLOG = 1024  # connections that the kernel may hold while the loop is busy


def listen(config: Config, key: str, address: str) -> socket.socket:
    """Return a listening, non-blocking TCP socket at the address that `key` has. Raises `ConfigError`."""
    host, port = split_address(address)
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[
            0
        ]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, True)
        listening.bind(place)
        listening.listen(_BACKLOG)
    except OSError as error:
        reason = "another program listens there" if error.errno == errno.EADDRINUSE else error.strerror
        raise ConfigError(f"{config.file}: {key} = {address!r}: {reason}") from None
    listening.setblocking(False)
    return listening


def tls(config: Config) -> ssl.SSLContext | None:
    """Return the public listener's certificate, ready for use; None where a proxy has it. Raises `ConfigError`."""
    if config.gateway.certificate is None or config.gateway.key is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    directory = config.file.parent
    try:
        context.load_cert_chain(directory / config.gateway.certificate, directory / config.gateway.key)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"{config.file}: gateway.certificate and gateway.key do not load: {error}") from None
    return context
