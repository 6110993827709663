"""Measures every pair of ears and voice: ten sentences said to an agent, ten answers understood back, through mu-law.

The adapters are the real ones, the services are `dialog_local`'s, which speak the services' protocols on this machine. Fails
when more than 15 % of the words of any pair are wrong, either way.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from dialog_local.call.report import words
from scripts.benches.stage import BIN, BenchFailed, free_port, process, wait_ready

LIMIT = 0.15  # of the words
EARS = {"deepgram": "DeepgramSTT()", "openai": "OpenAISTT()"}
VOICES = {"cartesia": 'CartesiaTTS(voice="joe")', "elevenlabs": 'ElevenLabsTTS("joe")'}

SENTENCES = (
    "Good evening, I would like to book a table.",
    "A table for four people, please.",
    "What is on the menu today?",
    "Do you have a table outside?",
    "My brother does not eat any meat.",
    "When are you open on Sunday?",
    "Is there a place to park the car?",
    "Can we bring our little dog?",
    "Please call me back in the morning.",
    "Thank you very much, and goodbye.",
)
ANSWERS = (
    "Good evening, for how many people shall it be?",
    "We have a nice table for four by the window.",
    "Today there is soup, fish, and a cake with apples.",
    "Yes, there are six tables in the garden.",
    "That is no problem, we cook many things without meat.",
    "On Sunday we are open from noon until ten.",
    "There is a large parking lot behind the house.",
    "Of course, dogs are always welcome here.",
    "We will call you tomorrow morning.",
    "Thank you for calling, and have a good night.",
)
AGENT = f'''
from dialog_worker import Agent, CartesiaTTS, DeepgramSTT, ElevenLabsTTS, Message, OpenAISTT, VoIP

ANSWERS = {ANSWERS!r}


class Answering(Agent):
    """Gives one answer after another, whatever is said."""

    given = 0

    async def inference(self, message: Message[str]) -> None:
        answer = ANSWERS[self.given % len(ANSWERS)]
        self.given += 1
        await self.dispatch_message(Message(message.uuid, answer, done=True), allow_interrupt=False)


def create(voip: VoIP) -> Agent:
    return Answering(voip=voip, stt={{stt}}, tts={{tts}})
'''


def word_error_rate(said: str, understood: str) -> float:
    """Return the edits from one text to the other, in words, for each word that was said."""
    expected, found = words(said), words(understood)
    previous = list(range(len(found) + 1))
    for row, word in enumerate(expected, 1):
        current = [row]
        for column, other in enumerate(found, 1):
            current.append(min(previous[column] + 1, current[-1] + 1, previous[column - 1] + (word != other)))
        previous = current
    return previous[-1] / len(expected)


def place_call(directory: Path, speech: str, ears: str, voice: str) -> dict[str, Any]:
    """Start a dialogd with this pair, call it, and return the call's summary."""
    listen = free_port()
    (directory / "agent").mkdir(parents=True)
    (directory / "agent" / "agent.py").write_text(AGENT.replace("{stt}", EARS[ears]).replace("{tts}", VOICES[voice]))
    config = directory / "dialog.toml"
    config.write_text(
        f"""
[gateway]
listen = "127.0.0.1:{listen}"
public_url = "http://127.0.0.1:{listen}"
[twilio]
account_sid = "AC{"0" * 32}"
auth_token = "token"
api_url = "http://127.0.0.1:{free_port()}"
[agent]
path = "agent"
[agent.env]
DEEPGRAM_API_KEY = "local"
OPENAI_API_KEY = "local"
CARTESIA_API_KEY = "local"
ELEVENLABS_API_KEY = "local"
DEEPGRAM_URL = "ws://{speech}/v1/listen"
OPENAI_REALTIME_URL = "ws://{speech}/v1/realtime?intent=transcription"
CARTESIA_URL = "ws://{speech}/tts/websocket"
ELEVENLABS_URL = "ws://{speech}"
[control]
socket = "{directory}/control.sock"
"""
    )
    log = directory / "dialogd.log"
    with process(log, str(BIN / "dialogd"), "-c", str(config)) as dialogd:
        wait_ready(f"http://127.0.0.1:{listen}/healthz", dialogd, log)
        script = directory / "script.txt"
        script.write_text("\n".join(SENTENCES))
        command = [str(BIN / "dialogctl"), "-c", str(config), "call", "--json", "--check", "--script", str(script)]
        environ = os.environ | {"DIALOG_LOCAL_URL": f"http://{speech}"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environ)
    if not done.stdout:
        raise BenchFailed(f"the call with {ears} and {voice} failed:\n{done.stderr}{log.read_text()}")
    summary: dict[str, Any] = json.loads(done.stdout)
    return summary


def row(ears: str, voice: str, summary: dict[str, Any]) -> tuple[str, str, float, float, float]:
    """Return a pair's figures: the two word error rates, and the delay of its answers in ms."""
    heard = " ".join(turn["recognised"] for turn in summary["turns"])
    delays = [turn["delay_ms"] for turn in summary["turns"] if turn["delay_ms"] is not None]
    wrong, wrong_back = (
        word_error_rate(" ".join(said), understood)
        for said, understood in ((SENTENCES, heard), (ANSWERS, (summary["words"] or {}).get("recognised", "")))
    )
    return ears, voice, wrong, wrong_back, median(delays) if delays else float("nan")


def show(rows: Sequence[tuple[str, str, float, float, float]]) -> None:
    """Print the table."""
    table = Table(
        "ears", "voice", "words wrong, caller to agent", "words wrong, agent to caller", "answer after, ms (median)"
    )
    for ears, voice, wrong, wrong_back, delay in rows:
        table.add_row(ears, voice, f"{wrong:.1%}", f"{wrong_back:.1%}", f"{delay:.0f}")
    Console().print(table)


def main() -> None:
    """Call every pair, one after another."""
    speech = f"127.0.0.1:{free_port()}"
    rows = []
    with tempfile.TemporaryDirectory(prefix="dialog-bench-") as temporary:
        directory = Path(temporary)
        log = directory / "speech.log"
        with process(log, sys.executable, "-m", "dialog_local", "--listen", speech) as server:
            wait_ready(f"http://{speech}/healthz", server, log)
            for ears in EARS:
                for voice in VOICES:
                    print(f"a call of {len(SENTENCES)} sentences: {ears} hears, {voice} speaks …", file=sys.stderr)
                    rows.append(row(ears, voice, place_call(directory / f"{ears}-{voice}", speech, ears, voice)))
    show(rows)
    worst = max(max(wrong, wrong_back) for _, _, wrong, wrong_back, _ in rows)
    if worst > LIMIT:
        sys.exit(f"bench: FAILED; {worst:.1%} of a pair's words are wrong, more than {LIMIT:.0%}")
    print(f"bench: no pair has more than {worst:.1%} of the words wrong (at most {LIMIT:.0%})")


if __name__ == "__main__":
    try:
        main()
    except BenchFailed as error:
        sys.exit(f"bench: {error}")
