"""`dialogctl replay`: a call that a real dialogd has had, played against the code as it is now."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from tests.conftest import StartDialogd
from tests.e2e.control import PATIENCE_S
from tests.e2e.daemon import Dialogd
from tests.e2e.test_event_log import record
from tests.e2e.twilio_api import TwilioApi, twilio_api
from tests.e2e.twilio_client import Twilio

# An agent whose ears need no provider: a frame of the caller's is a sentence.
CLERK = '''
"""Says what it has heard, and hangs up when it hears so."""

from dialog_worker import Agent, Media, Message, VoIP
from dialog_worker.stt.base import Final, SpeechEnded, SpeechStarted
from dialog_worker.testing import TextSTT, TextTTS

SENTENCES = {1: "when are you open", 2: "thank you, bye"}


class Clerk(Agent):
    def on_media(self, media: Media) -> None:
        self.nursery.start_soon(self.understand, SENTENCES[media.payload[0]])

    async def understand(self, sentence: str) -> None:
        for hearing in (SpeechStarted(), Final(sentence), SpeechEnded()):
            await self.stt.emit(hearing)

    async def inference(self, message: Message[str]) -> None:
        await self.dispatch_message(Message(message.uuid, f"You said: {message.data}.", done=True))
        if "bye" in message.data:
            await self.hangup()


def create(voip: VoIP) -> Agent:
    return Clerk(voip=voip, stt=TextSTT(), tts=TextTTS())
'''


@pytest.fixture(scope="module")
def api() -> Iterator[TwilioApi]:
    with twilio_api() as api:
        yield api


@pytest.fixture(scope="module")
def dialogd(start_shared_dialogd: StartDialogd, api: TwilioApi) -> Dialogd:
    events = {"directory": "events", "transcripts": True}
    return start_shared_dialogd(agent=CLERK, twilio={"api_url": api.url}, events=events)


async def a_conversation(dialogd: Dialogd) -> str:
    """Have a call in which the caller says two things, and return its id."""
    async with Twilio(dialogd) as twilio, twilio.streaming() as call:
        for number in (1, 2):
            await call.say(bytes([number]) * 160)
            while (message := await call.receive())["event"] != "mark":
                pass
            await call.return_mark(message["mark"]["name"])
        assert (await dialogd.ended(call.sid))["reason"] == "the agent hung up"
    await record(dialogd.directory / "events", call)
    return call.sid


async def test_the_same_code_gives_the_same_answers_and_other_code_others(dialogd: Dialogd) -> None:
    call = await a_conversation(dialogd)
    same = await dialogd.ctl("replay", call)
    assert (same.returncode, same.stderr) == (0, "")
    assert "when are you open" in same.stdout
    assert same.stdout.endswith("the same answers\n")
    agent = dialogd.directory / "agent" / "agent.py"
    agent.write_text(CLERK.replace("You said", "You have said"))
    other = await dialogd.ctl("replay", call, "--json")
    assert other.returncode == 1
    exchanges = json.loads(other.stdout)
    assert [one["same"] for one in exchanges] == [True, False, False]
    assert (exchanges[1]["then"], exchanges[1]["now"]) == (
        ["You said: when are you open."],
        ["You have said: when are you open."],
    )
    assert exchanges[2]["now"][-1] == "[Hangup(after_playout=True)]"


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("raise RuntimeError('not like this')", "RuntimeError: not like this"),
        ("def create(voip): return voip.nothing", "AttributeError: 'ReplayedCall' object has no attribute 'nothing'"),
    ],
)
async def test_code_that_fails_is_explained(dialogd: Dialogd, source: str, told: str) -> None:
    call = await a_conversation(dialogd)
    agent = dialogd.directory / "agent" / "agent.py"
    agent.write_text(source)
    said = await dialogd.ctl("replay", call)
    agent.write_text(CLERK)
    assert said.returncode == 1
    assert told in said.stderr
    assert said.stderr.endswith("dialogctl: the agent failed in the replay\n")


async def test_what_cannot_be_replayed_is_told_in_a_sentence(dialogd: Dialogd, tmp_path: Path) -> None:
    mute = tmp_path / "mute.jsonl"
    mute.write_text('{"dialog_events":1,"call":"CA1","generation":"g","began":"","transcripts":false}\n')
    other = tmp_path / "other.txt"
    other.write_text("hello\n")
    with trio.fail_after(PATIENCE_S):
        said = [(await dialogd.ctl("replay", str(log))).stderr for log in (mute, other, tmp_path / "nothing")]
    assert said == [
        f"dialogctl: {mute} has no words in it; set events.transcripts = true for the calls that are to be replayed\n",
        f"dialogctl: {other} is no event log: its first line is no header\n",
        f"dialogctl: {tmp_path}/nothing is no file, and no call with an event log here; see events.directory, and "
        "events.transcripts\n",
    ]
