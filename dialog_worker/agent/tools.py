"""Tools: an agent's methods that a language model may call, described to it by their signature and docstring."""

import inspect
import logging
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar, get_type_hints

import msgspec
import trio
from msgspec import Struct

TOOL_TIMEOUT_S = 30.0  # a caller waits for the result; longer work belongs in the agent's nursery

Method = TypeVar("Method", bound=Callable[..., Any])

log = logging.getLogger("agent")


def tool(method: Method) -> Method:
    """Let the model call this method.

    Its parameters become the tool's JSON schema, its docstring the description; what it returns goes back to the model, a
    string as it is and everything else as JSON. `Annotated[str, msgspec.Meta(description=…)]` describes a single parameter.
    """
    if not inspect.iscoroutinefunction(method):
        raise TypeError(f"@tool {method.__qualname__} is not async; write `async def {method.__name__}(self, …)`")
    method.__dialog_tool__ = True  # type: ignore[attr-defined]  # a mark on a function, read by `tools_of`
    return method


class Tool(Struct, frozen=True):
    """One method of one agent, as the model sees it and as it is called."""

    name: str
    description: str
    parameters: dict[str, Any]
    arguments: type[Struct]
    method: Callable[..., Awaitable[Any]]

    def definition(self) -> dict[str, Any]:
        """Return what OpenAI's chat completions take in `tools`."""
        function = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": function}

    async def call(self, arguments: str) -> str:
        """Call the method with the model's JSON and return what to tell the model, also when that is what went wrong."""
        try:
            given = msgspec.json.decode(arguments or "{}", type=self.arguments, strict=False)
        except msgspec.MsgspecError as error:
            return f"error: {self.name} was called with unusable arguments: {error}"
        values = {field: getattr(given, field) for field in self.arguments.__struct_fields__}
        with trio.move_on_after(TOOL_TIMEOUT_S):
            try:
                result = await self.method(**values)
                return result if isinstance(result, str) else msgspec.json.encode(result).decode()
            except Exception:  # the author's code, at the edge of the conversation: the model apologises, the log explains
                log.exception("tool %s failed", self.name)
                return f"error: {self.name} failed"
        return f"error: {self.name} took over {TOOL_TIMEOUT_S:g} s and was stopped"


def tools_of(agent: object) -> dict[str, Tool]:
    """Return the tools among an agent's methods, by name. Its properties are not evaluated for that."""
    found = inspect.getmembers_static(type(agent), lambda member: getattr(member, "__dialog_tool__", False))
    return {name: _tool(name, getattr(agent, name)) for name, _ in found}


def _tool(name: str, method: Callable[..., Awaitable[Any]]) -> Tool:
    hints = get_type_hints(method, include_extras=True)
    fields: list[Any] = []
    for parameter in inspect.signature(method).parameters.values():
        by_name = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if not by_name or parameter.name not in hints:
            raise TypeError(f"@tool {name}: parameter {parameter.name!r} needs a name and a type that JSON can express")
        described = (parameter.name, hints[parameter.name])
        fields.append(described if parameter.default is parameter.empty else (*described, parameter.default))
    arguments = msgspec.defstruct(name, fields, kw_only=True)
    return Tool(name, inspect.getdoc(method) or "", _schema(name, arguments), arguments, method)


def _schema(name: str, arguments: type[Struct]) -> dict[str, Any]:
    try:
        [_], components = msgspec.json.schema_components([arguments], ref_template="#/$defs/{name}")
    except TypeError as error:
        raise TypeError(f"@tool {name}: {error}") from None
    schema: dict[str, Any] = components.pop(name)
    schema.pop("title")
    return schema | ({"$defs": components} if components else {})
