"""The scripted receptionist: which answer a conversation gets, by keywords. A pure function, and no language model.

It answers as a model with tools would: with words or with a tool call, of those tools that the request offers. It reads only
the history that it is sent, so what it quotes from there is what the agent holds to have been heard.
"""

import json
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import msgspec

from dialog_local.brain.offered import Tool, find
from dialog_local.brain.understanding import Details, clock, details, weekday, words

MODEL = "scripted-receptionist"

HELLO = "Hello! I can book a table for you, tell you our opening hours, or read you the menu."
WHO = "I am a script and no language model. I answer by keywords: I book tables, and tell the opening hours and the menu."
HOURS = "We are open from Tuesday to Sunday, from noon until ten in the evening. On Mondays we are closed."
MENU = (
    "With pleasure: there is a soup with white beans. Or grilled bread with tomatoes and basil. As a main course we have "
    "fresh pasta with mushrooms, a risotto with saffron, and sea bass from the oven with lemon and potatoes. For dessert "
    "there is a tiramisu, a lemon tart, and three kinds of ice cream. And the cook recommends the risotto tonight."
)
GOODBYE = "Goodbye, and thank you for calling."
NOT_UNDERSTOOD = "I am sorry, I did not understand. I can book a table, tell you the opening hours, or read you the menu."
ASK_BOTH = "With pleasure. For how many people, and at what time?"
ASK_PEOPLE = "For how many people shall I book?"
ASK_TIME = "At what time would you like to come?"
ASK_DAY = "For which day?"
ANYTHING_ELSE = "Anything else?"
SHALL_I_BOOK = "Shall I book it for you?"
CONNECTING = "One moment, I will connect you."
CONNECTED = "You are being connected."
NOBODY_ELSE = "I am sorry, there is nobody else here whom I could connect you with."
NO_CLOCK = "I have no clock, and nobody told me the time."
NOTHING_SAID = "I have not said anything yet."
_QUOTE = "I said: "
_ERROR = "error:"

# Kinds of tools, by words that are in their names.
BOOKING = {"book", "booking", "reserve", "reservation"}
AVAILABILITY = {"free", "available", "availability"}
HOURS_OF_OPENING = {"hours", "opening", "open"}
MENU_OF_TODAY = {"menu", "dishes"}
TRANSFER = {"transfer", "connect", "forward"}
HANG_UP = {"hang", "hangup", "end"}


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
Tools: TypeAlias = Collection[Tool]
Reply: TypeAlias = Callable[[Messages, Tools], Answer | None]  # None: this is not for me, see what else the words may mean


def answer(messages: Messages, tools: Tools) -> Answer:
    """Return the answer to a conversation, given the tools that may be called."""
    if messages and messages[-1].role == "tool":
        return _after_tools(messages, tools)
    if not (utterance := _utterance(messages)):
        return Say(HELLO)
    said = words(utterance)
    for intent in _INTENTS:
        if intent.pattern.search(said) and (reply := intent.reply(messages, tools)):
            return reply
    if _booking_is_open(messages) or details(utterance) != Details():
        return _book(messages, tools)
    if _GREETING.search(said):
        return Say(HELLO)
    return Say(NOT_UNDERSTOOD)


def _utterance(messages: Messages) -> str:
    """What the caller said last, "" for nothing yet."""
    return next((message.text for message in reversed(messages) if message.role == "user"), "")


# After a tool was called


def _after_tools(messages: Messages, tools: Tools) -> Answer:
    """Tell the results of the tools just called."""
    results: list[ChatMessage] = []
    for message in reversed(messages):
        if message.role != "tool":
            break
        results.insert(0, message)
    called = [_called(messages, result) for result in results]
    told = " ".join(_sentence(result.text) for result in results)
    if any(result.text.strip().startswith(_ERROR) for result in results):
        return Say(f"I am sorry. {told} {ANYTHING_ELSE}")
    if all(tool.words & HANG_UP for tool in called):
        return Say(GOODBYE)
    if all(tool.words & TRANSFER for tool in called):
        return Say(CONNECTED)
    if any(tool.words & BOOKING for tool in called):
        return Say(f"Thank you. {told}")
    if any(tool.words & AVAILABILITY for tool in called) and find(tools, BOOKING) and not told.startswith("No"):
        return Say(f"{told} {SHALL_I_BOOK}")
    return Say(f"{told} {ANYTHING_ELSE}")


def _called(messages: Messages, result: ChatMessage) -> Tool:
    """Return the tool that gave a result."""
    calls = [call for message in messages for call in message.tool_calls or ()]
    return Tool(next((call.function.name for call in calls if call.id == result.tool_call_id), ""))


def _sentence(text: str) -> str:
    """Make a tool's result speakable."""
    text = text.strip().removeprefix(_ERROR).strip().replace("_", " ") or "nothing"
    text = text[0].upper() + text[1:]
    return text if text.endswith((".", "!", "?")) else f"{text}."


# What the caller may want


def _say(text: str) -> Reply:
    return lambda _messages, _tools: Say(text)


def _repeat(messages: Messages, _tools: Tools) -> Answer:
    """Quote the last thing that the history holds as said."""
    return Say(f"{_QUOTE}{said.removeprefix(_QUOTE)}" if (said := _last_said(messages)) else NOTHING_SAID)


def _last_said(messages: Messages) -> str:
    """What the agent said last, as far as the history knows."""
    said = (text for message in reversed(messages) if message.role == "assistant" and (text := message.text.strip()))
    return next(said, "")


def _goodbye(_messages: Messages, tools: Tools) -> Answer:
    hang_up = find(tools, HANG_UP)
    return Call(hang_up.name, {}, GOODBYE) if hang_up else Say(GOODBYE)


def _decline(messages: Messages, tools: Tools) -> Answer:
    """Take a no: to whether there is anything else, it is a goodbye."""
    return _goodbye(messages, tools) if _last_said(messages).endswith(ANYTHING_ELSE) else Say(f"All right. {ANYTHING_ELSE}")


def _tell_time(messages: Messages, _tools: Tools) -> Answer:
    """Read the time from the stamp that the agent put on the caller's words, if it did."""
    stamped = clock(_utterance(messages))
    return Say(f"It is {stamped} by the stamp on your words." if stamped else NO_CLOCK)


def _transfer(_messages: Messages, tools: Tools) -> Answer:
    transfer = find(tools, TRANSFER)
    return Call(transfer.name, {}, CONNECTING) if transfer else Say(NOBODY_ELSE)


def _look_up(kind: Collection[str], without: str = "") -> Reply:
    """Ask the tool of this kind, and without one say what the script knows by itself."""

    def reply(messages: Messages, tools: Tools) -> Answer | None:
        tool = find(tools, kind)
        if tool is None:
            return Say(without) if without else None
        return _use(tool, _known(messages), day=weekday(_utterance(messages)))

    return reply


def _book(messages: Messages, tools: Tools) -> Answer:
    """Ask for what is missing, then book."""
    known = _known(messages)
    tool = find(tools, BOOKING)
    if tool is not None:
        return _use(tool, known)
    if known.people is None or known.time is None:
        return _ask([name for name, value in (("people", known.people), ("time", known.time)) if value is None])
    return Say(f"I understood {_people(known.people)} at {known.time}, but I was given no tool to book it with.")


def _use(tool: Tool, known: Details, day: str | None = None) -> Answer:
    """Call a tool, or ask for what it needs."""
    values = {"people": known.people, "time": known.time, "day": day}
    if unknown := tool.unknown(values):
        return _ask(unknown)
    return Call(tool.name, tool.arguments(values))


def _ask(unknown: Sequence[str]) -> Answer:
    if {"people", "time"} <= set(unknown):
        return Say(ASK_BOTH)
    questions = {"people": ASK_PEOPLE, "time": ASK_TIME, "day": ASK_DAY}
    name = unknown[0]
    return Say(questions.get(name, f"For that I would need the {name.replace('_', ' ')}, which a script cannot understand."))


def _people(count: int) -> str:
    return "one person" if count == 1 else f"{count} people"


def _known(messages: Messages) -> Details:
    """What the caller has said of the booking under way; what was said later counts."""
    known = Details()
    for message in _since_booking(messages):
        if message.role == "user":
            wanted = "people" if known.people is None else "time"
            known = details(message.text, wanted=wanted).over(known)
    return known


def _since_booking(messages: Messages) -> Messages:
    """The messages after the last booking's result: an earlier booking is done."""
    done = [
        index
        for index, message in enumerate(messages)
        if message.role == "tool" and _called(messages, message).words & BOOKING
    ]
    return messages[done[-1] + 1 :] if done else messages


def _booking_is_open(messages: Messages) -> bool:
    return any(message.role == "user" and _BOOKING.search(words(message.text)) for message in _since_booking(messages))


@dataclass(frozen=True)
class Intent:
    """Words that tell what a caller wants, and the reply to it."""

    pattern: re.Pattern[str]
    reply: Reply


_BOOKING = re.compile(r"\b(book|booking|reserve|reservation|table|tables|free|available)\b")
_GREETING = re.compile(r"\b(hello|hi|hey|good (morning|afternoon|evening|day))\b")
# The first that matches counts. Patterns see the text of `words`; the tiny recogniser's usual slips are in them.
_INTENTS = (
    Intent(
        re.compile(
            r"\b(who|what) (are|is) (you|this)\b|\b(who )?am i (talking|speaking)\b|\bare you (a |an |really )*"
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
    Intent(re.compile(r"^(no|nope|nothing)( else| thanks| thank you| that is all| that's it)*$"), _decline),
    Intent(
        re.compile(
            r"\b(speak|talk)( to| with)?( an?| the| your| some| another)?( real| human| other)* "
            r"(person|human|someone|somebody|manager|owner|colleague|staff)\b"
            r"|\b(connect me|put me through|transfer me|operator|real person|human being)\b"
        ),
        _transfer,
    ),
    Intent(re.compile(r"\bwhat('s| is)? the time\b|\bwhat time is it\b"), _tell_time),
    Intent(re.compile(r"\b(free|available|availability|any tables)\b"), _look_up(AVAILABILITY)),
    Intent(re.compile(r"\b(menu|menus|food|dishes|eat|serve|kitchen|dessert)\b"), _look_up(MENU_OF_TODAY, MENU)),
    Intent(re.compile(r"\b(opening|open|hours|close|closed|closing)\b"), _look_up(HOURS_OF_OPENING, HOURS)),
    Intent(_BOOKING, _book),
)


def arguments_json(call: Call) -> str:
    """A tool call's arguments as a model writes them."""
    return json.dumps(call.arguments)
