"""TwilioVoIPOpenAIAgent in a real call: recorded and transcribed, and given both when the caller has gone."""

import json
import wave
from functools import partial

import trio

from dialog_local.call.report import words
from dialog_local.call.speech_client import SpeechClient
from dialog_local.carrier.company import PhoneCompany
from dialog_local.carrier.events import VoiceEnded
from dialog_local.carrier.phonecall import Call
from tests.conftest import StartDialogd
from tests.e2e.daemon import ACCOUNT_SID, AUTH_TOKEN, PUBLIC_URL, Dialogd
from tests.e2e.twilio_client import CALLEE, CALLER

CLERK = """
import json

from dialog_worker import CartesiaTTS, CompletedCall, DeepgramSTT, TwilioVoIPOpenAIAgent, VoIP


class Clerk(TwilioVoIPOpenAIAgent):
    greeting = "Good evening. How can I help?"

    async def on_call_completed(self, call: CompletedCall) -> None:
        told = {"path": call.recording.path if call.recording else "", "reason": call.reason,
                "transcript": [(one.track, one.text) for one in call.transcript], "history": call.history}
        self.voip.trace("completed", json.dumps(told))


def create(voip: VoIP) -> Clerk:
    return Clerk(voip=voip, stt=DeepgramSTT(), tts=CartesiaTTS(voice="joe"), model="scripted-receptionist")
"""


async def ended(call: Call, times: int) -> None:
    """Wait until the agent has ceased to speak so many times."""
    async for event in call.log:
        times -= isinstance(event, VoiceEnded) and event.who == "agent"
        if not times:
            return


async def test_a_finished_call_is_given_to_its_agent(server: str, start_dialogd: StartDialogd) -> None:
    environ = {
        "DEEPGRAM_API_KEY": "k",
        "CARTESIA_API_KEY": "k",
        "OPENAI_API_KEY": "k",
        "DEEPGRAM_URL": f"ws://{server}/v1/listen",
        "CARTESIA_URL": f"ws://{server}/tts/websocket",
        "OPENAI_BASE_URL": f"http://{server}/v1",
    }
    async with SpeechClient(f"http://{server}") as speech:
        company = PhoneCompany(ACCOUNT_SID, AUTH_TOKEN, ear=speech.recognise)
        async with company.serve() as api_url, trio.open_nursery() as nursery:
            start = partial(
                start_dialogd, agent=CLERK, environ=environ, twilio={"api_url": api_url}, log={"transcripts": True}
            )
            dialogd: Dialogd = await trio.to_thread.run_sync(start)
            call = company.call(f"{PUBLIC_URL}/twilio/voice", CALLER, CALLEE, via=f"http://127.0.0.1:{dialogd.port}")
            nursery.start_soon(call.run)
            with trio.fail_after(40):
                await ended(call, 1)
                await call.caller.speak(await speech.say("When are you open?"))
                await ended(call, 2)
                call.caller.hang_up()
                told = json.loads((await dialogd.logged(event="completed", call=call.sid))["text"])
                await dialogd.ended(call.sid)
    assert told["reason"] == "the carrier stopped the stream"
    assert [track for track, _ in told["transcript"]] == ["outbound", "inbound", "outbound"]
    greeting, question, answer = (words(text) for _, text in told["transcript"])
    assert "evening" in greeting
    assert question == ["when", "are", "you", "open"]
    assert "tuesday" in answer
    assert [entry["role"] for entry in told["history"]] == ["assistant", "user", "assistant"]
    with wave.open(told["path"]) as recording:
        assert recording.getnchannels() == 2
        assert recording.getnframes() / 8000 > 4
