"""A dialogd for the bench: a certificate, an ordinary agent, an ordinary dialog.toml whose URLs point at the bench."""

import ssl
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio
from msgspec import Struct

from scripts.benches.stage import BIN, TOKEN, free_port, process, wait_ready

ACCOUNT = "AC" + "0" * 32

AGENT = '''
"""A receptionist whose providers are told which call it is, each in a field that it has for its customers' own use."""

from dialog_worker import Agent, CartesiaTTS, DeepgramSTT, OpenAIAgent, VoIP, tool


class Receptionist(OpenAIAgent):
    """Answers the phone of a restaurant."""

    system = "You answer the phone at Bella's, an Italian restaurant. One or two short sentences."
    greeting = {greeting!r}

    @tool
    async def book_table(self, people: int, time: str) -> str:
        """Book a table. `time` is like "19:30"."""
        return f"booked: a table for {{people}} at {{time}}"


def create(voip: VoIP) -> Agent:
    """Make the agent of one call."""
    call = voip.metadata.call_id
    return Receptionist(
        voip=voip,
        stt=DeepgramSTT(options={{"tag": call}}),
        tts=CartesiaTTS(voice="joe", headers={{"X-Bench-Call": call}}),
        model="scripted-receptionist",
        options={{"user": call}},
    )
'''


class Addresses(Struct, frozen=True):
    """Where dialogd listens, where its carrier calls it, and where its agents find their providers."""

    listen: str
    public: str
    ear: str
    voice: str
    model: str


@asynccontextmanager
async def dialogd(directory: Path, at: Addresses, greeting: str, *environ: str) -> AsyncIterator[None]:
    """Run a dialogd for the length of the block, with these variables, NAME=VALUE. Raises `BenchFailed`."""
    (directory / "agent").mkdir()
    (directory / "agent" / "agent.py").write_text(AGENT.format(greeting=greeting))
    config = directory / "dialog.toml"
    settings = {
        "DEEPGRAM_API_KEY": "local",
        "DEEPGRAM_URL": f"ws://{at.ear}/v1/listen",
        "CARTESIA_API_KEY": "local",
        "CARTESIA_URL": f"ws://{at.voice}/tts/websocket",
        "OPENAI_API_KEY": "local",
        "OPENAI_BASE_URL": f"{at.model}/v1",
    }
    config.write_text(
        f"""
[gateway]
listen = "{at.listen}"
public_url = "http://{at.public}"
[twilio]
account_sid = "{ACCOUNT}"
auth_token = "{TOKEN}"
api_url = "http://127.0.0.1:{free_port()}"
[agent]
path = "agent"
[agent.env]
{"".join(f'{name} = "{value}"' + chr(10) for name, value in settings.items())}
[control]
socket = "{directory}/control.sock"
"""
    )
    log, unset = directory / "dialogd.log", (f"--unset={name}" for name in settings)  # for the environment would come first
    with process(log, "env", *unset, *environ, str(BIN / "dialogd"), "-c", str(config)) as started:
        await trio.to_thread.run_sync(wait_ready, f"http://{at.listen}/healthz", started, log)
        yield


def certificate(directory: Path) -> tuple[ssl.SSLContext, Path]:
    """Make a certificate for this machine, signed by itself; return a server's context, and the file to trust."""
    cert, key = directory / "cert.pem", directory / "key.pem"
    kind = ["-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    name = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(["openssl", "req", *kind, *name, "-keyout", key, "-out", cert], check=True, capture_output=True)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(cert, key)
    return context, cert
