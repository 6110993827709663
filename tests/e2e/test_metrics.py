"""What Prometheus reads of a running dialogd: that it is right, and stays so when calls and workers vanish."""

import os
import re
import signal
from typing import get_args

import httpx
import pytest

from dialog_supervisor.telemetry import metrics
from tests.conftest import StartDialogd
from tests.docs.page import sections, tables
from tests.e2e.daemon import PROBE, Dialogd
from tests.e2e.scrape import Scrape, scrape
from tests.e2e.twilio_client import PhoneCall, Twilio, verbs


@pytest.fixture(scope="module")
def dialogd(start_shared_dialogd: StartDialogd) -> Dialogd:
    dialogd = start_shared_dialogd(control={"listen": "127.0.0.1:0"})
    dialogd.expects_traceback = True  # the agents' own
    return dialogd


def grown(before: Scrape, after: Scrape, name: str, **labels: str) -> float:
    return after.value(name, **labels) - before.value(name, **labels)


async def kill_worker(dialogd: Dialogd, call: PhoneCall) -> None:
    """Have a call's worker killed as by somebody else, and wait for the next."""
    os.kill((await dialogd.ask(f"/calls/{call.sid}"))["worker_pid"], signal.SIGKILL)
    await dialogd.steps(call.sid, 2, kind="worker", text="ready")


async def test_a_call_is_counted_from_its_beginning_to_its_end(dialogd: Dialogd) -> None:
    before = await scrape(dialogd)
    async with Twilio(dialogd) as twilio, twilio.streaming() as call:
        for _ in range(5):
            await call.echo()
        during = await scrape(dialogd)
        assert during.value("dialog_calls", state="streaming") == during.value("dialog_workers") == 1
        assert grown(before, during, "dialog_frames_total", direction="in") == 5
        await call.stop()
        await dialogd.ended(call.sid)
    after = await scrape(dialogd)
    assert grown(before, after, "dialog_frames_total", direction="in") == 5
    assert grown(before, after, "dialog_frames_total", direction="out") == 5
    assert grown(before, after, "dialog_calls_begun_total") == 1
    assert grown(before, after, "dialog_calls_ended_total", by="caller", fallback="no") == 1
    assert grown(before, after, "dialog_call_seconds_count") == 1
    assert grown(before, after, "dialog_fork_seconds_count") == 1
    assert grown(before, after, "dialog_webhook_seconds_count", path="/twilio/voice", status="200") == 1
    assert grown(before, after, "dialog_webhook_seconds_count", path="/twilio/media/", status="101") == 1


async def test_gauges_are_zero_when_all_calls_have_vanished(dialogd: Dialogd) -> None:
    async with Twilio(dialogd) as twilio:
        calls = [PhoneCall(twilio) for _ in range(3)]
        for call in calls:
            await call.ring()
            async with call.stream():
                await call.echo()  # and the socket is gone without a word
        for call in calls:
            await dialogd.ask(f"/calls/{call.sid}/hangup", "POST")
            await call.after("completed")
            await dialogd.ended(call.sid)
    after = await scrape(dialogd)
    assert [after.value(name) for name in ("dialog_calls", "dialog_workers", "dialog_pipe_outbox_bytes")] == [0, 0, 0]


@pytest.mark.parametrize(
    ("key", "cause", "code"), [("3", "exit", "7"), ("1", "exit", "1"), ("8", "protocol", ""), ("", "signal", "SIGKILL")]
)
async def test_a_worker_that_dies_is_counted_with_its_cause(dialogd: Dialogd, key: str, cause: str, code: str) -> None:
    labels = {"cause": cause, **({"code": code} if code else {})}
    before = await scrape(dialogd)
    async with Twilio(dialogd) as twilio, twilio.streaming() as call:
        await call.echo()
        if key:
            await call.press(key)
            await dialogd.steps(call.sid, 2, kind="worker", text="ready")
        else:
            await kill_worker(dialogd, call)
        after = await scrape(dialogd)
    assert grown(before, after, "dialog_worker_deaths_total", **labels) == 1
    assert grown(before, after, "dialog_worker_deaths_total") == 1
    assert grown(before, after, "dialog_worker_restarts_total", cause=cause) == 1


async def test_a_call_that_ends_with_the_fallback_is_counted_so(start_dialogd: StartDialogd) -> None:
    dialogd = start_dialogd(calls={"restarts": 0, "ending_timeout": 0.2})
    async with Twilio(dialogd) as twilio, twilio.streaming() as call:
        await call.press("3")
        await call.closed()
        assert verbs(await call.after()) == ["Say", "Hangup"]
        await dialogd.ended(call.sid)
    after = await scrape(dialogd)
    assert after.value("dialog_calls_ended_total", by="dialogd", fallback="yes") == 1
    assert after.value("dialog_worker_deaths_total", cause="exit", code="7") == 1
    assert after.value("dialog_worker_restarts_total") == 0


async def test_a_lost_media_socket_is_counted_and_so_is_its_successor(dialogd: Dialogd) -> None:
    before = await scrape(dialogd)
    async with Twilio(dialogd) as twilio:
        call = PhoneCall(twilio)
        await call.ring()
        async with call.stream():
            await call.echo()
        await dialogd.steps(call.sid, 2, kind="state", text="connecting")
        between = await scrape(dialogd)
        assert verbs(await call.after()) == ["Connect"]
        async with call.stream():
            await dialogd.steps(call.sid, 2, kind="state", text="streaming")
            await call.stop()
            await call.after("completed")
        await dialogd.ended(call.sid)
    after = await scrape(dialogd)
    lost, resumed = "dialog_media_sockets_lost_total", "dialog_media_sockets_resumed_total"
    assert (grown(before, between, lost), grown(before, between, resumed)) == (1, 0)
    assert (grown(before, after, lost), grown(before, after, resumed)) == (1, 1)


async def test_who_ended_a_call_is_told(dialogd: Dialogd) -> None:
    before = await scrape(dialogd)
    async with Twilio(dialogd) as twilio, twilio.streaming() as call:
        await dialogd.ask(f"/calls/{call.sid}/hangup", "POST")
        await call.closed()
        await call.after()
        await dialogd.ended(call.sid)
    assert grown(before, await scrape(dialogd), "dialog_calls_ended_total", by="operator", fallback="no") == 1


async def test_a_refused_call_is_counted_by_its_reason(dialogd: Dialogd) -> None:
    before = await scrape(dialogd)
    await dialogd.ask("/drain", "POST")
    during = await scrape(dialogd)
    async with Twilio(dialogd) as twilio:
        assert verbs(await PhoneCall(twilio).ring()) == ["Say", "Hangup"]
    await dialogd.ask("/undrain", "POST")
    after = await scrape(dialogd)
    assert [one.value("dialog_accepting") for one in (before, during, after)] == [1, 0, 1]
    assert grown(before, after, "dialog_calls_refused_total", reason="draining") == 1


async def test_reloads_are_counted_by_result(start_dialogd: StartDialogd) -> None:
    dialogd = start_dialogd()
    dialogd.expects_traceback = True
    assert (await dialogd.ctl("reload")).returncode == 0
    (dialogd.directory / "agent" / "agent.py").write_text("import nothing_like_it\n")
    assert (await dialogd.ctl("reload")).returncode == 1
    found = await scrape(dialogd)
    assert found.value("dialog_reloads_total", kind="reload", result="done") == 1
    assert found.value("dialog_reloads_total", kind="reload", result="failed") == 1
    assert found.value("dialog_generations", state="current") == 1


async def test_no_caller_can_make_labels_of_their_own(dialogd: Dialogd) -> None:
    before = await scrape(dialogd)
    async with Twilio(dialogd) as twilio:
        for path in ("/twilio/nothing", "/wp-login.php", "/twilio/media/", "/twilio/media/guess"):
            await twilio.request("GET", twilio.public_url + path, headers={})
    after = await scrape(dialogd)
    paths = {sample.labels["path"] for family in after.families for sample in family.samples if "path" in sample.labels}
    assert paths <= {"/twilio/voice", "/twilio/after", "/twilio/media/", "/healthz", "other"}
    assert grown(before, after, "dialog_webhook_seconds_count", path="other", status="404") == 2


# Over TCP


@pytest.fixture(scope="module")
def address(dialogd: Dialogd) -> str:
    return "http://" + str(dialogd.wait_for_log(event="metrics are served")["listen"])


async def test_the_figures_are_served_over_tcp_where_the_configuration_says(dialogd: Dialogd, address: str) -> None:
    async with httpx.AsyncClient(trust_env=False) as client:
        served = await client.get(f"{address}/metrics")
        assert Scrape(served.text).value("dialog_build_info") == 1
        assert (await client.head(f"{address}/metrics")).text == ""
        assert (await client.get(f"{address}/healthz")).text == "ok\n"
        assert (await client.get(f"{address}/readyz")).text == "ok\n"


@pytest.mark.parametrize("path", ["/", "/status", "/calls", "/drain", "/reload", "/twilio/voice"])
async def test_nothing_else_is_served_there(dialogd: Dialogd, address: str, path: str) -> None:
    async with httpx.AsyncClient(trust_env=False) as client:
        assert (await client.get(address + path)).status_code == 404
        assert (await client.post(address + path)).status_code == 405


async def test_dialogctl_prints_them(dialogd: Dialogd) -> None:
    done = await dialogd.ctl("metrics")
    assert done.returncode == 0
    assert Scrape(done.stdout).value("dialog_accepting") == 1


async def test_the_page_on_operations_names_every_series_that_is_served_and_no_other(dialogd: Dialogd) -> None:
    page = sections("operations.md")["Metrics"]
    [described] = [rows for rows in tables(page) if rows[0][0] == "series"]
    causes = next(meaning for cell, meaning in described if "worker_deaths" in cell)
    assert all(f"`{cause}`" in causes for cause in get_args(metrics.Cause))
    named = {name for cell, *_ in described[1:] for name in re.findall(r"`(\w+)", cell)}
    served = (await scrape(dialogd)).families
    assert {
        family.name + "_total" * (family.type == "counter") for family in served if family.name[:7] == "dialog_"
    } == named
    samples = {sample.name for family in served for sample in family.samples}
    assert set(re.findall(r"dialog_\w+(?=[{[])", "".join(re.findall(r"expr: (.+)", page)))) <= samples | named


async def test_a_worker_that_wants_too_much_memory_is_counted_so(start_dialogd: StartDialogd) -> None:
    dialogd = start_dialogd(agent=PROBE.replace("os._exit(7)", "bytearray(10**9)"))
    dialogd.expects_traceback = True
    async with Twilio(dialogd) as twilio, twilio.streaming() as call:
        await call.press("3")
        await dialogd.steps(call.sid, 2, kind="worker", text="ready")
    found = await scrape(dialogd)
    assert found.value("dialog_worker_deaths_total", cause="memory", code="12") == 1
