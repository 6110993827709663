"""Addresses in dialog.toml: where to listen, what the public calls it, and where the control socket is."""

import os
import stat
from pathlib import Path

import pytest

from dialog_supervisor.config import Config, load, split_address
from tests.supervisor.configuration import ENVIRON, GATEWAY, TOKEN, TWILIO, Write, refusal, writer


@pytest.fixture
def write(tmp_path: Path) -> Write:
    return writer(tmp_path)


@pytest.mark.parametrize(
    ("address", "host", "port"),
    [
        ("127.0.0.1:8080", "127.0.0.1", 8080),
        ("localhost:0", "localhost", 0),
        ("voice-1.example.com:65535", "voice-1.example.com", 65535),
        ("[::1]:8080", "::1", 8080),
        ("[::ffff:127.0.0.1]:80", "::ffff:127.0.0.1", 80),
        ("[fe80::1%eth0]:80", "fe80::1%eth0", 80),
        (":8080", "", 8080),
    ],
)
def test_an_address_is_a_host_and_a_port(address: str, host: str, port: int) -> None:
    assert split_address(address) == (host, port)


@pytest.mark.parametrize(
    "address",
    [
        "",
        "8080",
        "localhost",
        "localhost:",
        "h:65536",
        "h:-1",
        "h:http",
        "h:８０",
        " h:80",
        "h: 80",
        "::1:80",
        "[::1:80",
        "::1]:80",
        "[::1]",
        "[]:80",
        "http://h:80",
    ],
)
def test_anything_else_is_no_address(write: Write, address: str) -> None:
    with pytest.raises(ValueError, match=r".*"):
        split_address(address)
    said = refusal(write(gateway=f'{GATEWAY}\nlisten = "{address}"'))
    assert said == f"gateway.listen = '{address}': is not an address and a port, such as \"127.0.0.1:8080\""


@pytest.mark.parametrize("address", ["", "9090", "localhost:"])
def test_where_figures_are_served_is_an_address_too(write: Write, address: str) -> None:
    said = refusal(write(f'[control]\nlisten = "{address}"'))
    assert said == f"control.listen = '{address}': is not an address and a port, such as \"127.0.0.1:8080\""


@pytest.mark.parametrize(
    "url",
    [
        "https://voice.example.com",
        "https://voice.example.com/",
        "http://127.0.0.1:8080",
        "https://[2001:db8::1]",
        "https://[2001:db8::1]:8443",
        "https://bücher.example",
    ],
)
def test_a_public_url_is_an_origin(write: Write, url: str) -> None:
    assert load(write(gateway=f'public_url = "{url}"'), ENVIRON).gateway.public_url == url


@pytest.mark.parametrize(
    "url",
    [
        "",
        "voice.example.com",
        "//voice.example.com",
        "wss://voice.example.com",
        "HTTPS://voice.example.com",
        "https://",
        "https:///twilio",
        "https://voice.example.com/twilio",
        "https://voice.example.com?",
        "https://voice.example.com?a=b",
        "https://voice.example.com#",
        "https://voice.example.com:",
        "https://voice.example.com:0",
        "https://voice.example.com:65536",
        "https://voice.example.com:https",
        "https://voice example.com",
        " https://voice.example.com",
        "https://voice.example.com ",
        "https://[2001:db8::1",
        "https://2001:db8::1",
        "https://voice.example.com\\t",
    ],
)
def test_any_other_public_url_is_refused(write: Write, url: str) -> None:
    said = refusal(write(gateway=f'public_url = "{url}"'))
    assert said.startswith("gateway.public_url = ")
    assert said.endswith(': must be a bare origin, such as "https://voice.example.com"')


def test_an_api_url_may_have_a_path_and_must_be_http(write: Write) -> None:
    assert load(write(twilio=f'{TWILIO}\napi_url = "http://127.0.0.1:1/api"'), ENVIRON).twilio.api_url.endswith("/api")
    said = refusal(write(twilio=f'{TWILIO}\napi_url = "api.twilio.com"'))
    assert said == "twilio.api_url = 'api.twilio.com': must be an http or https URL"


# The control socket


def socket_of(file: Path, **environ: str) -> Path:
    return load(file, {"TWILIO_AUTH_TOKEN": TOKEN} | environ).control.socket


def test_the_control_socket_as_configured_is_relative_to_the_file(write: Write, tmp_path: Path) -> None:
    assert socket_of(write('[control]\nsocket = "c.sock"'), RUNTIME_DIRECTORY="/run/dialogd") == tmp_path / "c.sock"


def test_an_absolute_control_socket_is_kept(write: Write) -> None:
    assert socket_of(write('[control]\nsocket = "/run/c.sock"')) == Path("/run/c.sock")


def test_systemds_runtime_directory_is_next(write: Write) -> None:
    assert socket_of(write(), RUNTIME_DIRECTORY="/run/dialogd:/run/more") == Path("/run/dialogd/control.sock")


def test_otherwise_it_is_in_a_directory_of_this_user(write: Write) -> None:
    socket = socket_of(write(), XDG_RUNTIME_DIR="/run/user/1")
    assert socket.parent == Path(f"/run/user/1/dialog-{os.getuid()}")
    assert socket.suffix == ".sock"


def test_every_configuration_file_has_a_control_socket_of_its_own(write: Write, tmp_path: Path) -> None:
    other = tmp_path / "other.toml"
    other.write_text(write().read_text())
    assert socket_of(write()) != socket_of(other)
    assert socket_of(write()) == socket_of(write())


def test_a_link_to_a_configuration_has_the_same_control_socket(write: Write, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "elsewhere" / "dialog.toml"
    link.symlink_to(write())
    (tmp_path / "elsewhere" / "agent").mkdir()
    assert socket_of(link) == socket_of(write())


def test_a_control_socket_with_too_long_a_path_is_refused(write: Write) -> None:
    said = refusal(write(f'[control]\nsocket = "/{"x" * 107}"'))
    assert said.endswith("a unix socket's path has at most 107 bytes; choose a shorter one")
    assert socket_of(write(f'[control]\nsocket = "/{"x" * 106}"')).name == "x" * 106


def test_loading_writes_nothing(write: Write, tmp_path: Path) -> None:
    file = write()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    config: Config = load(file, ENVIRON)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert stat.S_ISREG(config.file.stat().st_mode)
