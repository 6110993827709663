"""Tools: what the model is told of a method, and what a call of it returns, whatever goes wrong."""

import enum
import json
import logging
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
import pytest
import trio
from trio.testing import MockClock

from dialog_worker.agent.tools import TOOL_TIMEOUT_S, Tool, tool, tools_of


class Size(enum.Enum):
    SMALL = "small"
    LARGE = "large"


class Guest(msgspec.Struct):
    name: str
    age: int = 30


@dataclass
class Booking:
    number: int
    time: str


class Restaurant:
    """An agent as far as tools are concerned."""

    @property
    def nursery(self) -> Any:
        raise RuntimeError("the call has not begun")

    @tool
    async def book(self, people: int, time: str, size: Size = Size.SMALL) -> str:
        """Book a table.

        `time` is like "19:30".
        """
        return f"{people} at {time}, {size.value}"

    @tool
    async def greet(self, guest: Guest, tone: Literal["warm", "formal"] = "warm") -> Booking:
        return Booking(guest.age, tone)

    @tool
    async def describe(
        self, what: Annotated[str, msgspec.Meta(description="a dish")], times: int | None = None
    ) -> list[str]:
        return [what] * (times or 1)

    @tool
    async def close(self) -> None:
        """Close the restaurant."""

    @tool
    async def explode(self) -> str:
        raise ValueError("the oven")

    @tool
    async def hang(self) -> str:
        await trio.sleep_forever()
        raise AssertionError

    @tool
    async def strange(self) -> object:
        return object()

    async def not_a_tool(self, anything: object) -> None:
        pass


@pytest.fixture
def tools() -> dict[str, Tool]:
    return tools_of(Restaurant())


# What the model is told


def test_only_marked_methods_are_tools_and_properties_are_left_alone(tools: dict[str, Tool]) -> None:
    assert set(tools) == {"book", "greet", "describe", "close", "explode", "hang", "strange"}


def test_a_definition_has_name_description_and_parameters(tools: dict[str, Tool]) -> None:
    assert tools["book"].definition() == {
        "type": "function",
        "function": {
            "name": "book",
            "description": 'Book a table.\n\n`time` is like "19:30".',
            "parameters": {
                "type": "object",
                "properties": {
                    "people": {"type": "integer"},
                    "time": {"type": "string"},
                    "size": {"$ref": "#/$defs/Size", "default": "small"},
                },
                "required": ["people", "time"],
                "$defs": {"Size": {"enum": ["large", "small"], "title": "Size"}},
            },
        },
    }


def test_a_tool_without_parameters_or_docstring_has_an_empty_schema(tools: dict[str, Tool]) -> None:
    assert tools["explode"].parameters == {"type": "object", "properties": {}, "required": []}
    assert tools["explode"].description == ""


def test_a_single_parameter_can_be_described(tools: dict[str, Tool]) -> None:
    assert tools["describe"].parameters["properties"]["what"] == {"type": "string", "description": "a dish"}


def test_every_definition_is_json(tools: dict[str, Tool]) -> None:
    for one in tools.values():
        assert json.loads(json.dumps(one.definition())) == one.definition()


def test_an_override_without_the_mark_is_no_tool() -> None:
    class Quiet(Restaurant):
        async def explode(self) -> str:
            return ""

    assert "explode" not in tools_of(Quiet())


async def test_an_override_with_the_mark_is_the_one_that_is_called() -> None:
    class Calm(Restaurant):
        @tool
        async def explode(self) -> str:
            return "no"

    assert await tools_of(Calm())["explode"].call("") == "no"


# Mistakes of the author


def test_a_method_that_is_not_async_is_refused_with_the_remedy() -> None:
    with pytest.raises(TypeError, match=r"@tool .*oven is not async; write `async def oven\(self, …\)`"):

        @tool
        def oven(self: Any) -> str:
            return ""


def test_a_parameter_without_type_is_refused() -> None:
    class Agent:
        @tool
        async def book(self, people) -> str:  # type: ignore[no-untyped-def]  # the mistake under test
            return ""

    with pytest.raises(TypeError, match=r"@tool book: parameter 'people' needs a name and a type"):
        tools_of(Agent())


@pytest.mark.parametrize("variadic", ["args", "kwargs", "positional"])
def test_a_parameter_that_cannot_be_given_by_name_is_refused(variadic: str) -> None:
    class Args:
        @tool
        async def book(self, *args: int) -> str:
            return ""

    class Kwargs:
        @tool
        async def book(self, **kwargs: int) -> str:
            return ""

    class Positional:
        @tool
        async def book(self, positional: int, /) -> str:
            return ""

    agent = {"args": Args, "kwargs": Kwargs, "positional": Positional}[variadic]()
    with pytest.raises(TypeError, match=f"@tool book: parameter '{variadic}' needs a name"):
        tools_of(agent)


def test_a_type_that_json_cannot_express_is_refused_by_the_tools_name() -> None:
    class Agent:
        @tool
        async def book(self, thing: complex) -> str:
            return ""

    with pytest.raises(TypeError, match="@tool book: "):
        tools_of(Agent())


# Calls


async def test_a_string_goes_back_as_it_is(tools: dict[str, Tool]) -> None:
    assert await tools["book"].call('{"people": 4, "time": "19:30", "size": "large"}') == "4 at 19:30, large"


async def test_defaults_are_filled_in_and_numbers_in_quotes_understood(tools: dict[str, Tool]) -> None:
    assert await tools["book"].call('{"people": "4", "time": "19:30"}') == "4 at 19:30, small"


async def test_everything_else_goes_back_as_json(tools: dict[str, Tool]) -> None:
    assert json.loads(await tools["greet"].call('{"guest": {"name": "Jo"}}')) == {"number": 30, "time": "warm"}
    assert await tools["describe"].call('{"what": "soup", "times": 2}') == '["soup","soup"]'
    assert await tools["close"].call("{}") == "null"


async def test_no_arguments_may_be_an_empty_string(tools: dict[str, Tool]) -> None:
    assert await tools["close"].call("") == "null"


@pytest.mark.parametrize(
    "arguments",
    [
        "{",
        "null",
        "[]",
        "{}",
        '{"people": 4}',
        '{"people": "four", "time": "19:30"}',
        '{"people":1,"time":"","size":"huge"}',
    ],
)
async def test_unusable_arguments_are_the_models_to_correct(tools: dict[str, Tool], arguments: str) -> None:
    assert (await tools["book"].call(arguments)).startswith("error: book was called with unusable arguments: ")


async def test_a_failure_is_told_without_its_details_and_logged_with_them(
    tools: dict[str, Tool], caplog: pytest.LogCaptureFixture
) -> None:
    assert await tools["explode"].call("") == "error: explode failed"
    assert "the oven" in caplog.text


async def test_a_result_that_is_no_json_is_a_failure_too(tools: dict[str, Tool], caplog: pytest.LogCaptureFixture) -> None:
    assert await tools["strange"].call("") == "error: strange failed"
    assert "object is unsupported" in caplog.text
    assert caplog.records[0].levelno == logging.ERROR


async def test_a_tool_that_takes_too_long_is_stopped(tools: dict[str, Tool], autojump_clock: MockClock) -> None:
    assert await tools["hang"].call("") == f"error: hang took over {TOOL_TIMEOUT_S:g} s and was stopped"
    assert trio.current_time() == pytest.approx(TOOL_TIMEOUT_S)


async def test_the_end_of_the_call_ends_a_tool(tools: dict[str, Tool], autojump_clock: MockClock) -> None:
    with trio.move_on_after(1) as scope:
        await tools["hang"].call("")
    assert scope.cancelled_caught
