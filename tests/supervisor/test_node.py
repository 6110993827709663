"""Several dialogds behind one public URL: each has a name, which its addresses and what it tells the carrier are made of."""

from pathlib import Path

import pytest

from dialog_supervisor.carriers.twilio.addresses import Addresses
from dialog_supervisor.config import Config, load
from dialog_supervisor.sections import GatewayConfig
from tests.supervisor.configuration import ENVIRON, GATEWAY, Write, refusal, writer

NODE = ENVIRON | {"DIALOG_NODE": "2"}


@pytest.fixture
def write(tmp_path: Path) -> Write:
    return writer(tmp_path)


def of_node(file: Path, node: str) -> Config:
    return load(file, ENVIRON | {"DIALOG_NODE": node})


def test_the_environment_names_a_node(write: Write) -> None:
    assert load(write(), NODE).gateway.node == "2"
    assert load(write(), ENVIRON).gateway.node == ""


def test_the_file_wins_over_the_environment(write: Write) -> None:
    assert load(write(gateway=f'{GATEWAY}\nnode = "east"'), NODE).gateway.node == "east"


def test_one_file_gives_each_node_addresses_of_its_own(write: Write) -> None:
    listen = 'listen = "127.0.0.1:808{node}"'
    control = '[control]\nlisten = "127.0.0.1:909{node}"\nsocket = "/run/dialog/{node}.sock"'
    config = load(write(control, gateway=f"{GATEWAY}\n{listen}"), NODE)
    assert (config.gateway.listen, config.control.listen) == ("127.0.0.1:8082", "127.0.0.1:9092")
    assert config.control.socket == Path("/run/dialog/2.sock")


def test_each_node_has_a_control_socket_of_its_own_and_all_have_one_store(write: Write) -> None:
    one, two = of_node(write(), "1"), of_node(write(), "2")
    assert one.control.socket != two.control.socket
    assert one.store.path == two.store.path


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"gateway": f'{GATEWAY}\nlisten = "127.0.0.1:808{{node}}"'}, "gateway.listen = '127.0.0.1:808{node}'"),
        ({"more": '[control]\nlisten = "127.0.0.1:909{node}"'}, "control.listen = '127.0.0.1:909{node}'"),
        ({"more": '[control]\nsocket = "/run/{node}.sock"'}, "control.socket = '/run/{node}.sock'"),
    ],
)
def test_an_address_that_needs_a_name_is_refused_without_one(write: Write, more: dict[str, str], said: str) -> None:
    remedy = "set gateway.node, or DIALOG_NODE in its environment"
    assert refusal(write(**more)) == f"{said}: has {{node}}, but this dialogd has no name; {remedy}"


@pytest.mark.parametrize("name", ["a b", "a/b", "ü", "%31", ".", "x" * 33])
def test_what_a_path_would_write_differently_is_no_name(write: Write, name: str) -> None:
    remedy = "is not a name for a node; use up to 32 letters, digits, - and _"
    assert refusal(write(), NODE | {"DIALOG_NODE": name}) == f"DIALOG_NODE = {name!r}: {remedy}"
    assert refusal(write(gateway=f'{GATEWAY}\nnode = "{name}"'), NODE) == f"gateway.node = {name!r}: {remedy}"


def addresses(node: str) -> Addresses:
    return Addresses(GatewayConfig(public_url="https://voice.example.com", node=node))


def test_all_that_the_carrier_is_given_leads_back_to_the_node() -> None:
    named = addresses("2")
    assert named.after == "https://voice.example.com/n/2/twilio/after"
    assert named.media("token") == "wss://voice.example.com/n/2/twilio/media/token"
    assert named.callback("recording") == "https://voice.example.com/n/2/twilio/recording"


def test_a_dialogd_without_a_name_gives_none() -> None:
    nameless = addresses("")
    assert nameless.after == "https://voice.example.com/twilio/after"
    assert nameless.media("token") == "wss://voice.example.com/twilio/media/token"
    assert nameless.here("/n/2/twilio/after") == "/n/2/twilio/after"


@pytest.mark.parametrize("path", ["/twilio/after", "/n/2/twilio/after", "/n/1/twilio/after"])
def test_a_node_answers_with_its_name_without_one_and_for_another_node(path: str) -> None:
    assert addresses("2").here(path) == "/twilio/after"


@pytest.mark.parametrize("path", ["/n/2/healthz", "/n//twilio/after", "/n/twilio/after", "/x/n/2/twilio/after"])
def test_any_other_path_is_left_as_it_is(path: str) -> None:
    assert addresses("2").here(path) == path
