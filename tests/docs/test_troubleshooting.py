"""docs/troubleshooting.md: every log line, answer and complaint that it quotes is what one really sees."""

import json
import re
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import trio
import trio_websocket

from dialog_supervisor.config import ConfigError, load
from dialog_supervisor.confinement import sandbox
from dialog_supervisor.supervisor import Supervisor
from tests.conftest import StartDialogd
from tests.docs.page import DOCS, blocks
from tests.docs.services import http, http_server
from tests.e2e.control import PATIENCE_S
from tests.e2e.daemon import AUTH_TOKEN, DIALOGCTL, DIALOGD, PROBE, RECORDER, Dialogd, write_agent, write_config
from tests.e2e.site import counting, goes_on, site
from tests.e2e.twilio_api import Answer, TwilioApi, twilio_api
from tests.e2e.twilio_client import FORM, PhoneCall, Twilio, sign

QUOTES = [block for block in blocks("troubleshooting.md") if block.language in ("json", "text")]
ANY = "…"
SIZE_LIMIT, MESSAGE_LIMIT = 1000, 2000

# An agent with ears and a voice wherever the environment says, which speaks at once.
SPEAKER = '''
from dialog_worker import Agent, CartesiaTTS, DeepgramSTT, Message, VoIP


class Speaker(Agent):
    """Says good evening."""

    async def on_streaming_started(self, started) -> None:
        if self.tts is not None:
            self.nursery.start_soon(self.dispatch_message, Message("u", "Good evening.", True))


def create(voip: VoIP) -> Agent:
    import os
    if voice := os.environ.get("CARTESIA_URL"):
        return Speaker(voip=voip, tts=CartesiaTTS("v", "k", timeout_s=0.2))
    return Speaker(voip=voip, stt=DeepgramSTT())
'''


class Seen:
    """What was seen: log lines by their fields, everything else as text."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []
        self.texts: list[str] = []

    def has(self, quote: str) -> bool:
        """Whether a quoted line is among it."""
        if quote.startswith("{"):
            wanted = json.loads(quote)
            return any(_fields_match(wanted, line) for line in self.lines)
        return any(_matches(quote, text) for text in self.texts)


def _matches(quote: Any, found: Any) -> bool:
    if isinstance(quote, str) and ANY in quote:
        pattern = ".*".join(map(re.escape, quote.split(ANY)))
        return re.fullmatch(pattern, str(found), re.DOTALL) is not None
    return bool(quote == found)


def _fields_match(wanted: dict[str, Any], line: dict[str, Any]) -> bool:
    """Whether a line has these fields and no others, unless more are said to differ."""
    fields = {key: value for key, value in wanted.items() if key != ANY}
    rest = set(line) - set(fields) - {"timestamp", "call"}
    return all(key in line and _matches(value, line[key]) for key, value in fields.items()) and (ANY in wanted or not rest)


def quotes_under(heading: str) -> list[str]:
    return [line for block in QUOTES if block.section == heading for line in block.text.splitlines()]


# Complaints at the start


def complaint(command: Path, file: Path, *arguments: str) -> str:
    """Return what a command that fails writes."""
    environ = {"TWILIO_AUTH_TOKEN": AUTH_TOKEN, "PATH": "", "HOME": str(file.parent)}
    done = subprocess.run([command, "-c", file, *arguments], env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    return done.stderr.rstrip("\n")


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    agent = write_agent(tmp_path / "agent", PROBE)
    return lambda **sections: write_config(tmp_path, agent, **sections)


def test_the_certificate_or_the_key_does_not_load(write: Callable[..., Path], tmp_path: Path) -> None:
    seen = Seen()
    both = {"certificate": "fullchain.pem", "key": "privkey.pem"}
    seen.texts.append(complaint(DIALOGD, write(gateway=both)))
    seen.texts.append(complaint(DIALOGD, write(gateway={"certificate": "fullchain.pem"})))
    for file in both.values():
        (tmp_path / file).write_text("not PEM")
    seen.texts.append(complaint(DIALOGD, write(gateway=both)))
    check("The certificate or the key does not load", seen)


def test_dialogctl_cannot_connect(write: Callable[..., Path]) -> None:
    seen = Seen()
    seen.texts.append(complaint(DIALOGCTL, write(), "status"))
    check("dialogctl cannot connect", seen)


def test_the_port_is_in_use(write: Callable[..., Path], dialogd: Dialogd) -> None:
    seen = Seen()
    seen.texts.append(complaint(DIALOGD, write(gateway={"listen": f"127.0.0.1:{dialogd.port}"})))
    check("The port is in use", seen)


async def test_a_sandbox_that_cannot_be(write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "lacking", lambda: "this kernel has no Landlock (…), or lsm= leaves it out at boot")
    monkeypatch.setenv("TWILIO_AUTH_TOKEN", AUTH_TOKEN)
    with pytest.raises(ConfigError) as refused:
        await Supervisor(load(write(workers={"sandbox": True}))).run()
    seen = Seen()
    seen.texts.append(f"dialogd: {refused.value}")
    check("PermissionError in an agent that works elsewhere", seen)


# Answers and log lines of one that runs


@pytest.fixture(scope="module")
def dialogd(start_shared_dialogd: StartDialogd) -> Dialogd:
    limits = {"request_size_limit": SIZE_LIMIT, "message_size_limit": MESSAGE_LIMIT}
    dialogd = start_shared_dialogd(gateway=limits, calls={"connect_timeout": 0.5, "ending_timeout": 0.3, "restarts": 1})
    dialogd.expects_traceback = True  # the agent's own
    return dialogd


async def answer(twilio: Twilio, method: str, path: str, body: bytes = b"", **headers: str) -> str:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    response = await twilio.request(method, twilio.public_url + path, headers=named, content=body)
    return f"{method} {path}: {response.status_code} {response.text.strip()}"


UPGRADE = {"Upgrade": "websocket", "Connection": "Upgrade", "Sec_WebSocket_Key": "AAAAAAAAAAAAAAAAAAAAAA=="}
VOICE = "/twilio/voice"


async def unreached(dialogd: Dialogd, twilio: Twilio, seen: Seen) -> None:
    seen.texts.append(await answer(twilio, "GET", "/healthz"))
    call = PhoneCall(twilio)
    await call.ring()
    await dialogd.ended(call.sid)


async def forbidden(dialogd: Dialogd, twilio: Twilio, seen: Seen) -> None:
    seen.texts.append(await answer(twilio, "POST", VOICE, b"a=b", Content_Type=FORM, X_Twilio_Signature="wrong"))


async def unsigned(dialogd: Dialogd, twilio: Twilio, seen: Seen) -> None:
    seen.texts.append(await answer(twilio, "POST", VOICE, b"a=b", Content_Type=FORM))
    seen.texts.append(await answer(twilio, "GET", VOICE))
    seen.texts.append(await answer(twilio, "POST", VOICE, b"{}", Content_Type="application/json"))


async def unknown(dialogd: Dialogd, twilio: Twilio, seen: Seen) -> None:
    path = "/twilio/media/no-such-token"
    signature = sign(twilio.public_url.replace("http", "ws") + path)
    seen.texts.append(await answer(twilio, "GET", path, b"", X_Twilio_Signature=signature, **UPGRADE))
    async with Twilio(dialogd) as another:  # for dialogd closes the connection of an upgrade that it refused
        seen.texts.append(await answer(another, "GET", "/twilio/media", b"", **UPGRADE))


async def too_large(dialogd: Dialogd, twilio: Twilio, seen: Seen) -> None:
    seen.texts.append(await answer(twilio, "POST", VOICE, b"a" * (SIZE_LIMIT + 1), Content_Type=FORM))


async def large_message(dialogd: Dialogd, twilio: Twilio, seen: Seen) -> None:
    async with twilio.streaming() as call:
        await call.send({"event": "media", "padding": "x" * MESSAGE_LIMIT})
        await call.closed()
        await dialogd.logged(event="media socket closed", call=call.sid)


async def dead_worker(dialogd: Dialogd, twilio: Twilio, seen: Seen) -> None:
    async with twilio.streaming() as call:
        await call.press("1")
        await dialogd.logged(event="worker died in mid-call, and another takes over", call=call.sid)
        await call.press("1")
        await dialogd.logged(event="worker died in mid-call", call=call.sid)
        await call.after()


async def no_transfer(dialogd: Dialogd, twilio: Twilio, seen: Seen) -> None:
    async with twilio.streaming() as call:
        await call.press("*")
        await dialogd.logged(event="request failed", call=call.sid)


@pytest.mark.parametrize(
    ("heading", "provoke"),
    [
        ("The client does not connect, or no calls arrive", unreached),
        ("403 on a webhook or an upgrade", forbidden),
        ("400, 405 or 415 on a webhook", unsigned),
        ("404 on an upgrade", unknown),
        ("The request is too large", too_large),
        ("A message on the media socket is too large", large_message),
        ("A worker died in mid-call", dead_worker),
        ("A transfer is refused", no_transfer),
    ],
)
async def test_what_is_quoted_is_seen(
    dialogd: Dialogd, heading: str, provoke: Callable[[Dialogd, Twilio, Seen], Awaitable[None]]
) -> None:
    seen = Seen()
    async with Twilio(dialogd) as twilio:
        await provoke(dialogd, twilio, seen)
    await check_log(heading, seen, dialogd)


async def test_calls_are_not_kept_for_another_dialogd(start_dialogd: StartDialogd, tmp_path: Path) -> None:
    store = tmp_path / "kept" / "calls.sqlite"
    with_garbage(store)
    damaged = start_dialogd(store={"path": str(store)})
    await damaged.logged(event="the store is written again")
    homeless = start_dialogd(environ={"HOME": "", "XDG_STATE_HOME": ""})
    seen = Seen()
    seen.lines = damaged.log + homeless.log
    check("Calls are not kept for another dialogd", seen)


def with_garbage(store: Path) -> None:
    store.parent.mkdir()
    store.write_bytes(b"garbage, " * 500)


async def test_a_call_was_taken_up_or_was_not(tmp_path: Path) -> None:
    with site(tmp_path) as here, here.dialogd() as first:
        async with Twilio(here.place) as twilio:
            async with counting(here, twilio) as call:
                await first.killed()
            with here.dialogd() as second:
                await goes_on(second, call)
                await check_log("A call was taken up, or was not", Seen(), second)


# With a provider or a carrier's API that fails


async def speak(dialogd: Dialogd, wanted: str) -> None:
    """Place a call and hold it until the agent has logged a line that begins so."""
    async with Twilio(dialogd) as twilio:
        call = PhoneCall(twilio)
        await call.ring()
        with trio.fail_after(PATIENCE_S):
            # An agent that fails at once may be over before its media socket is opened.
            with suppress(trio_websocket.ConnectionRejected):
                async with call.stream():
                    await _said(dialogd, wanted)
            await _said(dialogd, wanted)
        await call.after("completed")
        await dialogd.ended(call.sid)


async def _said(dialogd: Dialogd, wanted: str) -> None:
    while not any(line["event"].startswith(wanted) for line in dialogd.log):  # noqa: ASYNC110 - a thread's list
        await trio.sleep(0.02)


async def test_a_provider_refuses_the_key(start_dialogd: StartDialogd) -> None:
    async with http_server(http(401)) as url:
        environ = {"DEEPGRAM_API_KEY": "k", "DEEPGRAM_URL": url.replace("http", "ws")}
        refused = start_dialogd(agent=SPEAKER, environ=environ)
        await speak(refused, "the agent gives up")
    keyless = start_dialogd(agent=SPEAKER)
    keyless.expects_traceback = True
    await speak(keyless, "the agent failed")
    seen = Seen()
    seen.texts += [text for line in keyless.log for text in line["event"].splitlines()]
    await check_log("A provider refuses the key", seen, refused)


async def test_a_provider_cannot_be_reached(start_dialogd: StartDialogd) -> None:
    environ = {"DEEPGRAM_API_KEY": "k", "DEEPGRAM_URL": "ws://127.0.0.1:9"}
    dialogd = start_dialogd(agent=SPEAKER, environ=environ)
    await speak(dialogd, "stt: ")
    await check_log("A provider cannot be reached", Seen(), dialogd)


async def test_nothing_is_said(start_dialogd: StartDialogd) -> None:
    async with trio.open_nursery() as nursery:
        serve = trio_websocket.serve_websocket
        silent = await nursery.start(serve, swallow, "127.0.0.1", 0, None)
        dialogd = start_dialogd(agent=SPEAKER, environ={"CARTESIA_URL": f"ws://127.0.0.1:{silent.port}"})
        await speak(dialogd, "tts: ")
        nursery.cancel_scope.cancel()
    await check_log("Nothing is said", Seen(), dialogd)


async def swallow(request: trio_websocket.WebSocketRequest) -> None:
    """Take everything and say nothing."""
    socket = await request.accept()
    with suppress(trio_websocket.ConnectionClosed):
        while True:
            await socket.get_message()


@pytest.fixture
def api() -> Iterator[TwilioApi]:
    with twilio_api() as api:
        yield api


async def test_a_recording_is_not_copied(start_dialogd: StartDialogd, api: TwilioApi) -> None:
    api.answers += [Answer(201, '{"sid": "RE1"}'), Answer(403)]
    dialogd = start_dialogd(agent=RECORDER, twilio={"api_url": api.url})
    async with Twilio(dialogd) as twilio, twilio.streaming() as call:
        await call.press("2")
        await dialogd.step(call.sid, kind="granted")
        more = {"RecordingSid": "RE1", "RecordingStatus": "completed", "RecordingChannels": "2"}
        await call.report("recording", RecordingUrl=f"{api.url}/2010-04-01/Accounts/AC1/Recordings/RE1", **more)
        await dialogd.step(call.sid, kind="recording")
    await check_log("A recording is not copied", Seen(), dialogd)


async def test_a_canary_is_rolled_back(start_dialogd: StartDialogd) -> None:
    dialogd = start_dialogd(agent_keys={"canary": 100})
    await dialogd.ask("/reload", "POST")
    async with Twilio(dialogd) as twilio:
        for _ in range(2):
            async with twilio.streaming() as call:
                await call.press("3")
                await dialogd.logged(event="worker died in mid-call, and another takes over", call=call.sid)
    await check_log("A canary is rolled back", Seen(), dialogd)


async def test_a_call_s_event_log_is_missing(start_dialogd: StartDialogd, tmp_path: Path) -> None:
    (tmp_path / "events").write_text("in the way")
    dialogd = start_dialogd(events={"directory": str(tmp_path / "events")})
    await check_log("A call's event log is missing, or ends too early", Seen(), dialogd)


async def test_too_many_connections(start_dialogd: StartDialogd) -> None:
    dialogd = start_dialogd(gateway={"max_connections": 1})
    async with await trio.open_tcp_stream("127.0.0.1", dialogd.port) as first:
        await first.send_all(b"GET")
        async with await trio.open_tcp_stream("127.0.0.1", dialogd.port) as second:
            assert (await second.receive_some()).startswith(b"HTTP/1.1 503 ")
    await check_log("Too many open files, or too many connections", Seen(), dialogd)


# What would take too long, or the machine's last descriptor, to see: it is in the source, with these fields
SOURCE = {
    "worker hangs and is killed": ("worker.py", ("pid", "silent_s")),
    "cannot accept a connection": ("connections.py", ("count", "reason", 'remedy="raise LimitNOFILE"')),
    "a call cannot be taken": ("switchboard.py", ("call", "reason", 'remedy="raise LimitNOFILE"')),
}


@pytest.mark.parametrize("event", SOURCE)
def test_what_is_rare_is_in_the_source(event: str) -> None:
    file, fields = SOURCE[event]
    source = (DOCS.parent / "dialog_supervisor" / file).read_text(encoding="utf-8")
    [call] = re.findall(rf'log\.error\("{event}", (.*)\)$', source, re.MULTILINE)
    assert re.findall(r"(\w+)=", call) == [field.partition("=")[0] for field in fields]
    assert all(field in call for field in fields)


def missing(heading: str, seen: Seen) -> list[str]:
    """Return what is quoted under a heading and was not seen."""
    quotes = [quote for quote in quotes_under(heading) if not any(event in quote for event in SOURCE)]
    assert quotes, f"nothing is quoted under {heading!r}"
    return [quote for quote in quotes if not seen.has(quote)]


def check(heading: str, seen: Seen) -> None:
    """Compare what was seen with what is quoted under a heading."""
    assert missing(heading, seen) == [], f"seen: {seen.texts} {seen.lines}"


async def check_log(heading: str, seen: Seen, dialogd: Dialogd) -> None:
    """Compare likewise, as soon as the log has come this far."""
    seen.lines = dialogd.log  # which grows
    with trio.move_on_after(PATIENCE_S):
        while missing(heading, seen):  # noqa: ASYNC110 - a thread reads the log
            await trio.sleep(0.02)
    check(heading, seen)


def test_nothing_is_quoted_that_is_not_checked() -> None:
    source = Path(__file__).read_text(encoding="utf-8")
    assert [heading for heading in {block.section for block in QUOTES} if f'"{heading}"' not in source] == []
