"""What a replay plays of an event log, and how it compares the answers of then and now."""

from collections.abc import Callable
from typing import Any

import pytest
from trio.testing import MockClock

from dialog_worker import Agent, Message, RequestFailed, VoIP
from dialog_worker.replay.exchanges import Exchange, Happening, compare, exchanges_of, same
from dialog_worker.replay.script import Cue, script_of
from dialog_worker.replay.stage import perform
from dialog_worker.stt.base import Final, SpeechEnded, SpeechStarted
from dialog_worker.testing import TextSTT, TextTTS
from protocol.messages import Dtmf, Metadata, StreamingStarted, TransferTo
from protocol.record import Entry, plain

from .desk import Receptionist
from .model_server import ModelServer, model_server, text, tool_call

METADATA, STARTED = Metadata("CA1", "twilio", "+15550001111", "+15550002222"), StreamingStarted("MZ1")


def event(t: float, message: Any) -> Entry:
    return Entry(t, 7, event=type(message).__name__, fields=plain(message))


def step(t: float, kind: str, words: str = "", **fields: str) -> Entry:
    return Entry(t, step=kind, text=words, fields=fields)


def spoken(t: float, uuid: str, words: str, heard: str | None = None) -> list[Entry]:
    """Return what a log has of an utterance that is said in two seconds, or cut after what was heard."""
    cut = str(heard is not None).lower()
    said = step(t + 2.0, "said", words if heard is None else heard, uuid=uuid, total=words, interrupted=cut)
    return [step(t, "saying", words, uuid=uuid), said]


def asked(t: float, words: str) -> list[Entry]:
    return [step(t, "speech_started"), step(t + 1.0, "heard", words), step(t + 1.0, "speech_ended")]


BEGIN = [event(0.0, METADATA), event(0.1, STARTED)]
CALL = [
    *BEGIN,
    *spoken(0.2, "g", "Good evening."),
    *asked(4.0, "hello"),
    *spoken(5.5, "a", "You said hello."),
    step(7.6, "turn", "answered"),
    event(9.0, Dtmf("5")),
]


# The script


def test_a_caller_waits_for_the_end_of_an_answer_as_long_as_then() -> None:
    assert script_of(CALL).cues == [
        Cue(METADATA, "calm", 0.0),
        Cue(STARTED, "calm", 0.1),
        Cue(SpeechStarted(), "calm", 1.8),
        Cue(Final("hello"), "calm", 1.0),
        Cue(SpeechEnded(), "cue", 0.0),
        Cue(Dtmf("5"), "calm", 1.4),
    ]


def test_a_caller_who_interrupts_does_so_as_long_after_the_first_words_as_then() -> None:
    log = [
        *BEGIN,
        *spoken(1.0, "g", "Good evening, this is a long greeting.", heard="Good evening,")[:1],
        *asked(2.5, "hello"),
    ]
    assert script_of(log).cues[2:4] == [
        Cue(SpeechStarted(), "speaking", 1.5),
        Cue(Final("hello"), "cue", 1.0),
    ]


def test_a_caller_who_speaks_while_the_agent_thinks_does_so_as_long_after_the_last_words_as_then() -> None:
    *_, again = script_of([*BEGIN, *asked(1.0, "hello"), step(2.5, "speech_started")]).cues
    assert again == Cue(SpeechStarted(), "cue", 0.5)


def test_what_a_second_worker_was_told_again_is_played_once() -> None:
    assert script_of([*CALL, *BEGIN, *BEGIN]).cues == script_of(CALL).cues


# The comparison


def test_words_are_said_where_they_began_also_when_their_end_is_told_later() -> None:
    happened = [
        Happening("heard", "one"),
        Happening("saying", "First", {"uuid": "a"}),
        Happening("saying", "answer.", {"uuid": "a"}),
        Happening("heard", "two"),
        Happening("said", "First", {"uuid": "a", "total": "First answer.", "interrupted": "true"}),
        Happening("saying", "One moment.", {"uuid": "b"}),
        Happening("tool", "", {"name": "book", "arguments": "{}"}),
    ]
    assert exchanges_of(happened, {"One moment."}) == [
        Exchange("(the call begins)"),
        Exchange("one", ["First answer."], cut=True),
        Exchange("two", ["[book({})]"]),
    ]


@pytest.mark.parametrize(
    ("one", "other", "alike"),
    [
        (Exchange("", ["Yes, please."]), Exchange("", ["yes please"]), True),
        (Exchange("", ["Yes."]), Exchange("", ["No."]), False),
        (Exchange("", ["Yes", "please"]), Exchange("", ["Yes please"]), True),
        (Exchange("", ["One two"], cut=True), Exchange("", ["One two three"]), True),
        (Exchange("", ["One two three"]), Exchange("", ["One two"], cut=True), True),
        (Exchange("", ["One four"], cut=True), Exchange("", ["One two three"]), False),
        (Exchange("", ["One two"]), Exchange("", ["One two three"]), False),
        (Exchange("", [], cut=True), Exchange("", ["Anything"]), True),
    ],
)
def test_answers_are_the_same_but_for_case_and_punctuation_and_as_far_as_they_came(
    one: Exchange, other: Exchange, alike: bool
) -> None:
    assert same(one, other) is alike
    assert same(other, one) is alike


def test_an_exchange_that_did_not_come_about_is_another() -> None:
    then, now = [Exchange("hello", ["Hello."]), Exchange("bye", ["Bye."])], [Exchange("hello", ["Hello."])]
    assert [one.same for one in compare(then, now)] == [True, False]
    assert [one.same for one in compare(now, then)] == [True, False]


# The play


class Parrot(Agent):
    """Greets, repeats what it hears, and presses on when a key is pressed."""

    greeting = "Good evening."

    def __init__(self, voip: VoIP) -> None:
        super().__init__(voip=voip, stt=Silent(), tts=Mute())

    async def on_streaming_started(self, started: StreamingStarted) -> None:
        self.nursery.start_soon(self.dispatch_message, Message("g", self.greeting, done=True))

    async def inference(self, message: Message[str]) -> None:
        await self.dispatch_message(Message(message.uuid, f"You said {message.data}.", done=True))

    async def on_dtmf(self, dtmf: Dtmf) -> None:
        try:
            await self.transfer_to("+15557654321")
        except RequestFailed as error:
            await self.dispatch_message(Message("sorry", error.failure.message, done=True))


class Silent(TextSTT):
    """An STT whose provider must not be asked."""

    async def run(self) -> None:
        raise AssertionError("a replay listened to a provider")


class Mute(TextTTS):
    """A TTS whose provider must not be asked."""

    async def run(self) -> None:
        raise AssertionError("a replay spoke through a provider")


async def replayed(
    log: list[Entry], create: Callable[[VoIP], Agent], clock: MockClock, *, real_tools: bool = False
) -> list[tuple[str, list[str], bool]]:
    """Return caller, answers now, and whether they are the same, for each exchange."""
    script = script_of(log)
    call = await perform(script, create, clock, real_tools=real_tools)
    compared = compare(exchanges_of(script.happened, call.asides), exchanges_of(call.happened, call.asides))
    return [(one.caller, one.now, one.same) for one in compared]


async def test_the_same_code_answers_the_same(mock_clock: MockClock) -> None:
    assert await replayed(CALL[:-1], Parrot, mock_clock) == [
        ("(the call begins)", ["Good evening."], True),
        ("hello", ["You said hello."], True),
    ]
    assert mock_clock.current_time() > 3.5  # of a time that took none


async def test_other_code_is_seen_to_answer_otherwise(mock_clock: MockClock) -> None:
    class Morning(Parrot):
        greeting = "Good morning."

    assert [same for _, _, same in await replayed(CALL[:-1], Morning, mock_clock)] == [False, True]


async def test_an_interruption_is_one_again(mock_clock: MockClock) -> None:
    class Talkative(Parrot):
        greeting = "one two three four five six seven eight nine ten " * 3

    log = [*BEGIN, *spoken(0.2, "g", Talkative.greeting, heard="one two")[:1], *asked(1.5, "stop")]
    script = script_of(log)
    call = await perform(script, Talkative, mock_clock, real_tools=False)
    greeting, answer = exchanges_of(call.happened, ())
    assert greeting.cut
    assert answer.answers == ["You said stop."]


@pytest.mark.parametrize("failure", [None, {"kind": "refused", "message": "not there", "code": None, "status": None}])
async def test_a_request_is_answered_as_it_was_then(failure: dict[str, object] | None, mock_clock: MockClock) -> None:
    request = plain(TransferTo(1, 15.0, "+15557654321"))
    log = [
        *CALL,
        Entry(9.1, 7, command="TransferTo", fields=request),
        Entry(9.2, 7, event="Reply", fields={"id": 1, "failure": failure, "value": ""}),
    ]
    *_, (caller, answers, _) = await replayed(log, Parrot, mock_clock)
    assert caller == "(presses 5)"
    assert answers == ["[TransferTo(destination=+15557654321, after_playout=True)]", *(["not there"] if failure else [])]


# With a model


class Desk:
    """Makes receptionists that ask a model server, and remembers the last."""

    def __init__(self, server: ModelServer) -> None:
        self._url = server.url

    def __call__(self, voip: VoIP) -> Agent:
        self.agent = Receptionist(voip=voip, stt=Silent(), tts=Mute(), url=self._url)
        return self.agent


BOOKED = [
    *BEGIN,
    step(0.1, "heard", "a table"),
    step(0.2, "tool", name="book_table", arguments='{"people":2,"time":"8"}', result="there is one left"),
    *spoken(0.3, "a", "Yes."),
    step(2.3, "turn", "answered"),
]


@pytest.mark.parametrize(
    ("arguments", "real_tools", "result", "booked"),
    [
        ('{"time": "8", "people": 2}', False, "there is one left", []),
        ('{"time": "9", "people": 2}', False, "error: this is a replay, in which nothing is done that was not done", []),
        ('{"time": "8", "people": 2}', True, "booked for 2 at 8", [(2, "8")]),
    ],
)
async def test_a_tool_returns_what_it_returned_and_does_nothing_unless_it_is_to(
    arguments: str, real_tools: bool, result: str, booked: list[tuple[int, str]], mock_clock: MockClock
) -> None:
    mock_clock.rate = 1.0  # as long as the model takes
    async with model_server() as server:
        desk = Desk(server)
        server.scripts = [tool_call("book_table", arguments), text("Yes.")]
        await replayed(BOOKED, desk, mock_clock, real_tools=real_tools)
        assert server.requests[1]["messages"][-1]["content"].startswith(result)
        assert desk.agent.booked == booked
