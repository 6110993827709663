"""The scripted receptionist: which answer a conversation gets, by keywords. A pure function, and no language model.

It answers as a model with tools would: with words or with a tool call. It reads only the history that it is sent, so what it
quotes from there is what the agent holds to have been heard.
"""

import json
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import msgspec

from dialog_local.brain.understanding import Details, details, words

MODEL = "scripted-receptionist"

HELLO = "Hello! I can book a table for you, tell you our opening hours, or read you the menu."
WHO = "I am a script and no language model. I answer by keywords: I book tables, and tell the opening hours and the menu."
HOURS = "We are open from Tuesday to Sunday, from noon until ten in the evening. On Mondays we are closed."
MENU = (
    "With pleasure, here is what the kitchen has today. To begin with there is a minestrone with white beans, or grilled "
    "bread with tomatoes and basil. As a main course we have fresh pasta with mushrooms, a risotto with saffron, and sea "
    "bass from the oven with lemon and potatoes. For dessert you can choose between a tiramisu, a lemon tart, and three "
    "kinds of ice cream. And the cook recommends the risotto tonight."
)
GOODBYE = "Goodbye, and thank you for calling."
NOT_UNDERSTOOD = "I am sorry, I did not understand. I can book a table, tell you the opening hours, or read you the menu."
ASK_BOTH = "With pleasure. For how many people, and at what time?"
ASK_PEOPLE = "For how many people shall I book?"
ASK_TIME = "At what time would you like to come?"
NOTHING_SAID = "I have not said anything yet."
_QUOTE = "I said: "


class Function(msgspec.Struct):
    """A function's name and its arguments as JSON text."""

    name: str
    arguments: str = ""


class ToolCall(msgspec.Struct):
    """A call that an assistant message made."""

    id: str
    function: Function


class ChatMessage(msgspec.Struct):
    """A message of the history, in OpenAI's shape."""

    role: str
    content: Any = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None

    @property
    def text(self) -> str:
        """The content as text, whether it came as a string or in parts."""
        if isinstance(self.content, str):
            return self.content
        parts = self.content if isinstance(self.content, list) else []
        return "".join(str(part.get("text", "")) for part in parts if isinstance(part, dict))


@dataclass(frozen=True)
class Say:
    """Answer with words."""

    text: str


@dataclass(frozen=True)
class Call:
    """Answer with a tool call, and words before it if there are any."""

    tool: str
    arguments: dict[str, Any]
    text: str = ""


Answer: TypeAlias = Say | Call
Messages: TypeAlias = Sequence[ChatMessage]
Tools: TypeAlias = Collection[str]


def answer(messages: Messages, tools: Tools) -> Answer:
    """Return the answer to a conversation, given the names of the tools that may be called."""
    if messages and messages[-1].role == "tool":
        return _after_tools(messages)
    user = [message for message in messages if message.role == "user"]
    if not user:
        return Say(HELLO)
    said = words(user[-1].text)
    for intent in _INTENTS:
        if intent.pattern.search(said):
            return intent.reply(messages, tools)
    if _booking_is_open(messages) or details(user[-1].text) != Details():
        return _book(messages, tools)
    if _GREETING.search(said):
        return Say(HELLO)
    return Say(NOT_UNDERSTOOD)


def _after_tools(messages: Messages) -> Answer:
    """Tell the results of the tools just called."""
    names = {call.id: call.function.name for message in messages for call in message.tool_calls or ()}
    results: list[ChatMessage] = []
    for message in reversed(messages):
        if message.role != "tool":
            break
        results.insert(0, message)
    if all(names.get(result.tool_call_id or "") == "hang_up" for result in results):
        return Say(GOODBYE)
    told = " ".join(_sentence(result.text) for result in results)
    return Say(f"Thank you. The booking system says: {told} Can I do anything else for you?")


def _sentence(text: str) -> str:
    text = text.strip() or "nothing"
    return text if text.endswith((".", "!", "?")) else f"{text}."


def _say(text: str) -> Callable[[Messages, Tools], Answer]:
    return lambda _messages, _tools: Say(text)


def _repeat(messages: Messages, _tools: Tools) -> Answer:
    """Quote the last thing that the history holds as said."""
    said = [text for message in messages if message.role == "assistant" and (text := message.text.strip())]
    if not said:
        return Say(NOTHING_SAID)
    return Say(f"{_QUOTE}{said[-1].removeprefix(_QUOTE)}")


def _goodbye(_messages: Messages, tools: Tools) -> Answer:
    return Call("hang_up", {}, GOODBYE) if "hang_up" in tools else Say(GOODBYE)


def _book(messages: Messages, tools: Tools) -> Answer:
    """Ask for what is missing, then book."""
    known = _known(messages)
    if known.people is None or known.time is None:
        if known == Details():
            return Say(ASK_BOTH)
        return Say(ASK_PEOPLE if known.people is None else ASK_TIME)
    if "book_table" not in tools:
        return Say(
            f"I understood {_people(known.people)} at {known.time}, but I was given no book_table tool to book it with."
        )
    return Call("book_table", {"people": known.people, "time": known.time})


def _people(count: int) -> str:
    return "one person" if count == 1 else f"{count} people"


def _known(messages: Messages) -> Details:
    """What the caller has said of the booking under way; what was said later counts."""
    known = Details()
    for message in _since_last_result(messages):
        if message.role == "user":
            wanted = "people" if known.people is None else "time"
            known = details(message.text, wanted=wanted).over(known)
    return known


def _since_last_result(messages: Messages) -> Messages:
    """The messages after the last tool result: an earlier booking is done."""
    results = [index for index, message in enumerate(messages) if message.role == "tool"]
    return messages[results[-1] + 1 :] if results else messages


def _booking_is_open(messages: Messages) -> bool:
    return any(message.role == "user" and _BOOKING.search(words(message.text)) for message in _since_last_result(messages))


@dataclass(frozen=True)
class Intent:
    """Words that tell what a caller wants, and the reply to it."""

    pattern: re.Pattern[str]
    reply: Callable[[Messages, Tools], Answer]


_BOOKING = re.compile(r"\b(book|booking|reserve|reservation|table|tables)\b")
_GREETING = re.compile(r"\b(hello|hi|hey|good (morning|afternoon|evening|day))\b")
# The first that matches counts. Patterns see the text of `words`; the tiny recogniser's usual slips are in them.
_INTENTS = (
    Intent(
        re.compile(
            r"\b(who|what) (are|is) (you|this)\b|\bwho am i (talking|speaking)\b|\bare you (a |an |really )*"
            r"(human|robot|person|machine|bot|real|ai|computer|script|language model)\b|\bwhere are you$|\bthey were you$"
        ),
        _say(WHO),
    ),
    Intent(
        re.compile(
            r"\bwhat (did|have|were) you (just )?(say|said|saying)\b|\b(say|repeat) (that|it)\b|\brepeat\b|\bsay again\b"
            r"|\b(once|one more time) (more|again|please)\b|\bpardon\b|\bcome again\b|^(sorry|what)$"
            r"|\bdid(n't| not) (hear|catch|understand)\b"
        ),
        _repeat,
    ),
    Intent(re.compile(r"\b(good ?bye|bye|hang up|that's all|that is all|see you)\b|^(the|good) bay$"), _goodbye),
    Intent(re.compile(r"\b(menu|menus|food|dishes|eat|serve|kitchen|dessert)\b"), _say(MENU)),
    Intent(re.compile(r"\b(opening|open|hours|close|closed|closing)\b"), _say(HOURS)),
    Intent(_BOOKING, _book),
)


def arguments_json(call: Call) -> str:
    """A tool call's arguments as a model writes them."""
    return json.dumps(call.arguments)
