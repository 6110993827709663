"""The log: whatever is written, numbers and keys are masked, and what only looks like a number is not."""

import json
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import structlog

from dialog_supervisor.logs import configure, mask
from dialog_supervisor.sections import LogConfig, Secret

NUMBER = "+15551234567"


Stderr = Callable[[], str]


@pytest.fixture
def stderr(capfd: pytest.CaptureFixture[str]) -> Iterator[Stderr]:
    """Return a function that returns what has been written; logging is as before afterwards."""
    handlers, level = logging.root.handlers[:], logging.root.level
    written: list[str] = []

    def read() -> str:
        written.append(capfd.readouterr().err)
        return "".join(written)

    yield read
    structlog.reset_defaults()
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)


def logged(stderr: Stderr, event: str, **fields: Any) -> dict[str, Any]:
    configure(LogConfig(format="json"))
    structlog.get_logger("room").info(event, **fields)
    line: dict[str, Any] = json.loads(stderr())
    return line


# Numbers


@pytest.mark.parametrize(
    "text",
    [
        "+15551234567",
        "15551234567",
        "5551234567",
        "from +15551234567 to x",
        "call from +15551234567.",
        "call from 15551234567.",
        "+15551234567: busy",
        "caller=15551234567,",
        "(15551234567)",
        "sip:+15551234567@example.com",
        "sip:15551234567@example.com",
        "tel:15551234567",
        "From=%2B15551234567&To=x",
        "+1 555 123 4567",
        "+1 (555) 123-4567",
        "+1-555-123-4567",
    ],
)
def test_a_telephone_number_keeps_its_last_two_digits(text: str) -> None:
    masked = mask(text)
    assert "…67" in masked
    assert "555" not in masked
    assert "1234" not in masked


def test_every_number_in_a_text_is_masked() -> None:
    assert mask("+15551234567 calls +491234567890") == "…67 calls …90"


def test_what_surrounds_a_number_stays() -> None:
    assert mask("sip:+15551234567@example.com;x=1") == "sip:…67@example.com;x=1"


@pytest.mark.parametrize(
    "text",
    [
        "2026-11-23T00:55:51.123456Z",
        "10.0.0.1:12345678",
        "f47ac10b-58cc-4372-a567-0e02b2c3d479",
        "12345678-1234-1234-1234-123456789012",
        "CA" + "1234567890" * 3 + "12",
        "1732323232.1234567",
        "code 31951, status 404",
        "lag +1.5 2.5 3",
        "port 8080 pid 123456",
    ],
)
def test_what_is_no_telephone_number_stays(text: str) -> None:
    assert mask(text) == text


# Lines


def test_a_line_is_json_with_level_and_time(stderr: Stderr) -> None:
    line = logged(stderr, "call begins", call="CA1")
    assert (line["event"], line["call"], line["level"]) == ("call begins", "CA1", "info")
    assert line["timestamp"].endswith("Z")


def test_numbers_are_masked_in_the_event_and_in_every_field(stderr: Stderr) -> None:
    line = logged(stderr, f"call from {NUMBER}", caller=NUMBER, form={"From": NUMBER}, parties=[NUMBER, (NUMBER,)])
    assert line["event"] == "call from …67"
    assert line["caller"] == "…67"
    assert NUMBER[1:] not in stderr()


@pytest.mark.parametrize("key", ["digit", "digits", "Digits"])
def test_pressed_keys_are_not_shown_at_all(stderr: Stderr, key: str) -> None:
    assert logged(stderr, "dtmf", **{key: "4711"})[key] == "…"


def test_pressed_keys_are_not_shown_within_other_fields(stderr: Stderr) -> None:
    assert logged(stderr, "webhook", form={"Digits": "4711"})["form"] == {"Digits": "…"}


def test_a_secret_is_not_shown(stderr: Stderr) -> None:
    logged(stderr, "config", token=Secret("hunter2"))
    assert "hunter2" not in stderr()


def test_numbers_stay_numbers(stderr: Stderr) -> None:
    line = logged(stderr, "call ended", seconds=12.5, frames=15551234, ok=True, nothing=None)
    assert (line["seconds"], line["frames"], line["ok"], line["nothing"]) == (12.5, 15551234, True, None)


def test_the_calls_id_is_on_every_line_of_a_call(stderr: Stderr) -> None:
    with structlog.contextvars.bound_contextvars(call="CA7"):
        assert logged(stderr, "anything")["call"] == "CA7"


def test_numbers_are_masked_in_a_traceback(stderr: Stderr) -> None:
    configure(LogConfig(format="json"))
    try:
        raise ValueError(f"no route to {NUMBER}")
    except ValueError:
        structlog.get_logger().exception("failed")
    assert "no route to …67" in json.loads(stderr())["exception"]


def test_lines_below_the_level_are_not_written(stderr: Stderr) -> None:
    configure(LogConfig(format="json", level="warning"))
    structlog.get_logger().info("quiet")
    assert stderr() == ""


def test_a_librarys_warning_ends_in_the_same_lines(stderr: Stderr) -> None:
    configure(LogConfig(format="json"))
    logging.getLogger("library").warning("cannot reach %s", NUMBER)
    logging.getLogger("library").info("chatter")
    line = json.loads(stderr())
    assert (line["event"], line["level"]) == ("cannot reach …67", "warning")


def test_the_console_format_is_for_people(stderr: Stderr) -> None:
    configure(LogConfig(format="console"))
    structlog.get_logger().info("call begins", caller=NUMBER)
    assert "call begins" in stderr()
    assert "…67" in stderr()
    assert not stderr().startswith("{")


def test_automatic_is_json_where_nobody_watches(stderr: Stderr) -> None:
    configure(LogConfig(format="auto"))
    structlog.get_logger().info("call begins")
    assert json.loads(stderr())["event"] == "call begins"
