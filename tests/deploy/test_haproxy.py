"""Two dialogds behind the HAProxy of `deploy/haproxy`: where calls go, where they stay, and what if one is gone."""

import re
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
import trio

from tests.deploy.fleet import NODES, SHIPPED, Fleet, Node, Server, fleet, haproxy
from tests.e2e.control import PATIENCE_S
from tests.e2e.site import TAKEN_UP, goes_on, kept_calls
from tests.e2e.test_recovery import COUNTER
from tests.e2e.twilio_client import FORM, PhoneCall, Twilio, sign, verbs

AGENT = '''
"""Counts as the other does, says back what it hears, and tells of what it is told."""

from counter import Counter
from dialog_worker import Message, VoIP


class Desk(Counter):
    def on_media(self, media) -> None:
        super().on_media(media)
        self.voip.post(Message("echo", media.payload))

    async def on_stream_status(self, status) -> None:
        self.voip.trace("stream_status", status.status)

    async def on_call_status(self, status) -> None:
        self.voip.trace("call_status", status.status)


def create(voip: VoIP) -> Desk:
    return Desk(voip=voip)
'''


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    directory = tmp_path_factory.mktemp("fleet")
    (directory / "agent").mkdir()
    (directory / "agent" / "counter.py").write_text(COUNTER)
    with fleet(directory, AGENT) as found:
        yield found


@pytest.fixture(scope="module")
def slow(site: Fleet) -> Iterator[socket.socket]:
    """A client whose request was begun before the first test, and never ends."""
    with socket.create_connection(("127.0.0.1", site.proxy.place.port), PATIENCE_S) as client:
        client.sendall(b"POST /twilio/voice HTTP/1.1\r\nHost: voice.te")
        yield client


@pytest.fixture
async def twilio(site: Fleet, slow: socket.socket) -> AsyncIterator[Twilio]:
    """The carrier, as long as no call of the test before is left."""
    await site.proxy.finds("UP", *NODES)
    await site.proxy.until(lambda found: total(found) == 0)
    async with Twilio(site.proxy.place) as twilio:
        yield twilio


def total(servers: dict[str, Server]) -> int:
    return sum(server.connections for server in servers.values())


@asynccontextmanager
async def calls(site: Fleet, twilio: Twilio, count: int) -> AsyncIterator[list[PhoneCall]]:
    """Have so many calls talk, each placed when HAProxy knows of the one before."""
    async with AsyncExitStack() as stack:
        placed: list[PhoneCall] = []
        while len(placed) < count:
            expected = total(await site.proxy.servers()) + 1
            placed.append(await stack.enter_async_context(twilio.streaming()))
            await placed[-1].echo()
            await site.proxy.until(lambda found, expected=expected: total(found) == expected)  # type: ignore[misc]
        yield placed


@asynccontextmanager
async def drained(site: Fleet, *names: str) -> AsyncIterator[None]:
    """Have dialogds take no calls, and HAProxy know it."""
    for name in names:
        await site.nodes[name].post("/drain")
    await site.proxy.finds("NOLB", *names)
    try:
        yield
    finally:
        for name in names:
            await site.nodes[name].post("/undrain")


async def counted(site: Fleet, call: PhoneCall) -> None:
    """Have a call's agent count, and the store know of it."""
    await call.press("3")
    with trio.fail_after(PATIENCE_S):
        while kept_calls(site.config.parent / "calls.sqlite").get(call.sid) != b"3":  # noqa: ASYNC110 - another process
            await trio.sleep(0.02)


async def test_a_new_call_goes_where_the_fewest_are_under_way(site: Fleet, twilio: Twilio) -> None:
    async with calls(site, twilio, 2) as two:
        assert {(await site.of(call)).name for call in two} == set(NODES)
        async with drained(site, "2"), calls(site, twilio, 2) as more:
            assert [(await site.of(call)).name for call in more] == ["1", "1"]
            await site.nodes["2"].post("/undrain")
            await site.proxy.finds("UP", "2")
            async with calls(site, twilio, 2) as last:
                assert [(await site.of(call)).name for call in last] == ["2", "2"]


async def test_the_carriers_reports_reach_the_dialogd_that_has_the_call(site: Fleet, twilio: Twilio) -> None:
    async with calls(site, twilio, 2) as two:
        for call in two:
            node = await site.of(call)
            assert f"/n/{node.name}/twilio/stream" in reports_to(call)
            await reported(twilio, call, reports_to(call), node)


def reports_to(call: PhoneCall) -> str:
    """Return where the carrier is to report on a call's stream."""
    stream = call.document.find("Connect/Stream")
    assert stream is not None
    return stream.attrib["statusCallback"]


async def reported(twilio: Twilio, call: PhoneCall, url: str, node: Node) -> None:
    """Have the carrier report, and check that a dialogd's agent is told."""
    fields = call.fields(StreamSid=call.stream_sid, StreamEvent="stream-started")
    assert (await twilio.post(url, fields)).status_code == 204
    assert (await node.step(call.sid, kind="stream_status"))["text"] == "started"


async def test_what_is_asked_again_without_a_name_reaches_it_too(site: Fleet, twilio: Twilio) -> None:
    async with calls(site, twilio, 2) as two:
        for call in two:
            node = await site.of(call)
            assert f"/n/{node.name}/twilio/media/" in call.stream_url
            assert (await call.report("status", CallStatus="in-progress")).status_code == 204
            assert (await node.step(call.sid, kind="call_status"))["text"] == "in-progress"
            await call.ring()
            assert (await site.of(call)).name == node.name


async def test_a_drained_dialogd_keeps_its_calls_and_gets_no_others(site: Fleet, twilio: Twilio) -> None:
    promised = PhoneCall(twilio)
    await promised.ring()
    node = await site.of(promised)
    [other] = [name for name in NODES if name != node.name]
    async with drained(site, node.name):
        async with promised.stream(), calls(site, twilio, 3) as new:
            await promised.echo()
            assert {(await site.of(call)).name for call in new} == {other}
        assert verbs(await promised.after()) == ["Connect"]
        async with promised.stream():
            await promised.echo_again()
            assert await site.of(promised) is node
            await promised.stop()
            await node.ended(promised.sid)


async def test_when_none_takes_calls_the_caller_is_told_so(site: Fleet, twilio: Twilio) -> None:
    async with drained(site, *NODES):
        assert verbs(await PhoneCall(twilio).ring()) == ["Say", "Hangup"]


async def test_calls_go_on_when_their_dialogd_is_killed_and_others_notice_nothing(site: Fleet, twilio: Twilio) -> None:
    one, two = site.nodes["1"], site.nodes["2"]
    async with calls(site, twilio, 6) as six:
        asked, dying, waiting = mine = [call for call in six if await site.of(call) is one]
        for call in mine:
            await counted(site, call)
        before = reports_to(asked)
        await dies_while_it_is_asked(site, one, dying)
        await goes_on(two, dying)
        assert verbs(await asked.after()) == ["Connect"]  # while its dialogd is dead
        again = site.start("1")
        await site.proxy.finds("UP", "1")
        await goes_on(again, waiting)
        await reported(twilio, asked, before, two)  # to the address of the first, which lives again
        await goes_on(two, asked)
        for bystander in set(six) - set(mine):
            await bystander.echo()
    assert {line["call"] for line in two.find(event=TAKEN_UP)} == {asked.sid, dying.sid}
    assert {line["call"] for line in again.find(event=TAKEN_UP)} == {waiting.sid}


async def dies_while_it_is_asked(site: Fleet, node: Node, call: PhoneCall) -> None:
    """Kill a dialogd that has got a webhook and not answered it; the carrier is answered all the same."""
    before = (await site.proxy.servers())[node.name].connections
    node.signal(signal.SIGSTOP)

    async def ask() -> None:
        assert verbs(await call.after()) == ["Connect"]

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        await site.proxy.until(lambda found: found[node.name].connections == before + 1)
        await node.killed()


async def test_a_caller_waits_for_a_dialogd_that_was_only_taken_out_by_hand(site: Fleet, twilio: Twilio) -> None:
    async with calls(site, twilio, 1) as [call]:
        node = await site.of(call)
        await site.proxy.told(f"set server dialogd/{node.name} state maint")
        answer = await call.after()
        assert verbs(answer) == ["Pause", "Redirect"]
        await site.proxy.told(f"set server dialogd/{node.name} state ready")
        there = answer.findtext("Redirect")
        assert there is not None
        assert verbs(await twilio.ask(there, call.fields(CallStatus="in-progress"))) == ["Connect"]


async def test_a_reload_of_haproxy_costs_no_call_anything(site: Fleet, twilio: Twilio) -> None:
    async with calls(site, twilio, 2) as two:
        await site.proxy.reload()
        async with twilio.streaming() as new:
            for call in (*two, new):
                await call.echo()


@pytest.mark.parametrize("path", ["/twilio/voice", "/n/1/twilio/after", "/n/2/twilio/after"])
async def test_what_the_carrier_did_not_sign_is_refused(twilio: Twilio, path: str) -> None:
    call = PhoneCall(twilio)
    forged = sign(twilio.public_url + path, call.fields(), token="guess")
    response = await twilio.post(twilio.public_url + path, call.fields(), signature=forged)
    assert response.status_code == 403


async def test_signatures_hold_when_a_proxy_normalises_paths(site: Fleet, twilio: Twilio) -> None:
    normal = ["fragment-strip", "path-merge-slashes", "path-strip-dotdot", "percent-to-uppercase strict"]
    normalise = "\n".join(f"    http-request normalize-uri {how}" for how in [*normal, "percent-decode-unreserved"])
    strict = site.configured(
        "normalising",
        ("    # Nothing else is public", f"{normalise}\n    # Nothing else is public"),
        ("global\n    #", "global\n    expose-experimental-directives\n    #"),
    )
    with strict.running():
        async with Twilio(strict.place) as other, other.streaming() as call:
            await call.echo()
            assert verbs(await call.ring()) == ["Connect"]


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/", "/n/1/healthz", "/n/3/twilio", "/metrics"])
async def test_nothing_else_is_public(twilio: Twilio, path: str) -> None:
    response = await twilio.request("GET", twilio.public_url + path, headers={"Content-Type": FORM})
    assert response.status_code == 404


def test_the_example_for_tls_can_be_used(tmp_path: Path) -> None:
    pem = tmp_path / "voice.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=voice.test", "-keyout", "-"]
    made = subprocess.run([*command, "-out", "-"], capture_output=True, check=True).stdout
    pem.write_bytes(made)
    text = SHIPPED.read_text().replace("#bind :443", "bind :443").replace("/etc/haproxy/voice.pem", str(pem))
    (tmp_path / "haproxy.cfg").write_text(text)
    assert str(pem) in text
    done = subprocess.run([haproxy(), "-c", "-f", tmp_path / "haproxy.cfg"], capture_output=True, text=True, check=False)
    assert (done.returncode, re.findall("WARNING.*", done.stderr)) == (0, [])


def test_a_client_that_never_ends_its_request_is_cut(slow: socket.socket) -> None:
    answer = b"".join(iter(lambda: slow.recv(4096), b""))
    assert answer.startswith(b"HTTP/1.1 408 ")
